"use strict";

const LOG_LINES = 200;
const part = (name) => document.querySelector(`[data-testid="${name}"]`);

/**
 * This user's id: the one in the page's address, so that links can be shared; else the one stored in this browser; else
 * a new one. Only characters that no client percent-encodes are used: they look the same in every log.
 */
function clientId() {
  const usable = (id) => id !== null && /^[A-Za-z0-9._~-]{1,64}$/.test(id);
  const url = new URL(location.href);
  let id = url.searchParams.get("client_id");
  if (!usable(id)) {
    id = kept();
    if (!usable(id)) {
      // crypto.randomUUID needs https or localhost, and an edge's plain address is neither.
      const bytes = crypto.getRandomValues(new Uint8Array(8));
      id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
      keep(id);
    }
    url.searchParams.set("client_id", id);
    history.replaceState(null, "", url);
  }
  return id;
}

// A browser that blocks storage throws on access; then only the address carries the id.
function kept() {
  try {
    return localStorage.getItem("client_id");
  } catch {
    return null;
  }
}

function keep(id) {
  try {
    localStorage.setItem("client_id", id);
  } catch {
    // Other tabs will not share the id.
  }
}

/**
 * A hue in degrees for a node's name, so that tabs on one node have one colour. In names such as node1-1, the next
 * host's hue is the golden angle away, so a few hosts differ clearly; instances of one host have similar hues.
 */
function hue(name) {
  let sum = 0;
  for (const character of name) {
    sum = (sum * 3 + character.codePointAt(0)) % 65536;
  }
  return (sum * (137.508 / 9)) % 360; // the host's digit has been multiplied by 3 twice
}

function paintNode(element, name) {
  element.textContent = name;
  element.classList.add("node");
  element.style.setProperty("--hue", hue(name));
}

/** The node's name and the text of what the service sends; the whole text if it names no node. */
function parsed(text) {
  const [, node, said] = /^node#(.+?): (.*)$/s.exec(text) ?? [];
  return [node, said ?? text];
}

function log(kind, text, node) {
  const line = document.createElement("li");
  line.className = kind;
  if (node !== undefined) {
    paintNode(line.appendChild(document.createElement("span")), node);
    line.append(" ");
  }
  line.append(text);
  const list = part("log");
  list.append(line);
  while (list.children.length > LOG_LINES) {
    list.firstChild.remove();
  }
  list.scrollTop = list.scrollHeight;
}

/** Engine.IO's short message, with the HTTP status and body of the failed request if there are any. */
function reason(message, details) {
  const request = details?.context;
  if (request instanceof XMLHttpRequest && request.status > 0) {
    return `${message}: HTTP ${request.status} ${request.responseText.slice(0, 200)}`;
  }
  return message;
}

function showState(state) {
  part("state").textContent = state;
  part("state").dataset.state = state;
  part("send").disabled = state !== "connected";
}

function showTransport(name) {
  part("transport").textContent = name;
}

function showError(text) {
  part("error").textContent = text;
  part("error").classList.add("failed");
  log("error", text);
}

function connect() {
  const options = {};
  if (document.body.hasAttribute("data-named-user")) {
    const id = clientId();
    part("client-id").textContent = id;
    options.query = { client_id: id };
    options.transports = ["websocket", "polling"];
    options.tryAllTransports = true; // without it, the client never tries the second transport
  }
  const socket = io(options);
  const join = () => {
    if (part("room")?.value) {
      socket.emit("join", part("room").value);
    }
  };

  socket.on("connect", () => {
    const engine = socket.io.engine; // a new one for each connection
    showState("connected");
    showTransport(engine.transport.name);
    log("note", `connected, ${engine.transport.name}${socket.recovered ? ", with the same session" : ""}`);
    if (!socket.recovered) {
      join();
    }
    engine.on("upgrade", (transport) => {
      showTransport(transport.name);
      log("note", `upgraded to ${transport.name}`);
    });
    engine.on("upgradeError", (error) => showError(`upgrade failed: ${error.message}`));
  });

  socket.on("message", (text) => {
    const [node, said] = parsed(text);
    if (node !== undefined) {
      paintNode(part("node"), node);
    }
    log("echo", said, node);
  });

  socket.on("said", (text, room) => {
    const [node, said] = parsed(text);
    log("said", room === null ? `to everybody: ${said}` : `to ${room}: ${said}`, node);
  });

  socket.on("connect_error", (error) => {
    showState(socket.active ? "reconnecting" : "disconnected");
    showError(reason(error.message, error));
  });

  socket.on("disconnect", (why, details) => {
    // connect_error has already shown an error before the connection was open, with a better message.
    const shown = part("state").textContent !== "connected" && why === "transport error";
    showState(socket.active ? "reconnecting" : "disconnected");
    showTransport("none");
    if (!shown) {
      showError(reason(why, details));
    }
  });

  socket.io.on("reconnect_attempt", () => {
    part("reconnects").textContent = Number(part("reconnects").textContent) + 1;
  });

  part("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const input = part("message");
    const to = part("to")?.value ?? "echo";
    log("sent", input.value);
    if (to === "echo") {
      socket.send(input.value);
    } else {
      socket.emit("say", input.value, to === "room" ? part("room").value : null);
    }
    input.value = "";
  });
  part("room")?.addEventListener("change", join);
}

if (typeof io === "undefined") {
  showState("disconnected");
  showError("the client script socket.io.min.js was not loaded");
} else {
  connect();
}
