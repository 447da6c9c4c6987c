// Opens Socket.IO sessions with the JavaScript client's default options and reports which nodes answered.
//
//   node socketio_client.mjs --package DIR --connections N URL ID...
//
// DIR has node_modules/socket.io-client. For every ID it opens N connections at once, each with `client_id=ID` in its
// query and otherwise default options, waits for the node's welcome, the echo of one message and the upgrade, and
// closes them. Prints one JSON object:
//
//   {tried, completed, errors: [text, ...], nodes_by_id: {id: [node, ...]}, transports: {name: completed sessions}}
//
// Exits 0 if all sessions were tried, whatever the results: the caller checks them.

import { createRequire } from "node:module";
import { resolve } from "node:path";
import { parseArgs } from "node:util";

const DEADLINE_MS = 30_000;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { package: { type: "string" }, connections: { type: "string" } },
});
const [url, ...ids] = positionals;
const connections = Number(values.connections);
if (values.package === undefined || !(connections > 0) || ids.length === 0) {
  console.error("usage: socketio_client.mjs --package DIR --connections N URL ID...");
  process.exit(2);
}
const { io } = createRequire(resolve(values.package, "package.json"))("socket.io-client");

/** One session: resolves to {nodes: [node, ...], transport} if it completes, else rejects with the reason. */
function session(clientId) {
  const text = `hello from ${clientId}`;
  const socket = io(url, { query: { client_id: clientId }, forceNew: true });
  const nodes = [];
  let echoed = false;
  return new Promise((fulfil, reject) => {
    const timer = setTimeout(() => reject(new Error("not done in time")), DEADLINE_MS);
    const fail = (message, details) => {
      const body = details?.context?.responseText ?? "";
      reject(new Error(`${message} ${details?.description ?? ""} ${body}`.trim()));
    };
    const finishWhenDone = () => {
      const transport = socket.io.engine.transport.name;
      if (echoed && transport === "websocket") {
        fulfil({ nodes, transport });
      }
    };
    // The upgrade may be over before the session is connected, or come after the echo.
    socket.io.on("open", () => {
      socket.io.engine.on("upgrade", finishWhenDone);
      socket.io.engine.on("upgradeError", (error) => fail(`upgrade failed: ${error.message}`));
    });
    socket.on("connect_error", (error) => fail(error.message, error));
    socket.on("disconnect", (reason, details) => fail(reason, details));
    socket.on("message", (answer) => {
      const [, node, said] = /^node#(.+?): (.*)$/s.exec(answer) ?? [];
      nodes.push(node);
      if (said === "welcome") {
        socket.send(text);
      } else if (said === text) {
        echoed = true;
        finishWhenDone();
      } else {
        fail(`unexpected answer: ${answer}`);
      }
    });
    socket.io.on("close", () => clearTimeout(timer));
  }).finally(() => socket.disconnect());
}

const found = { tried: 0, completed: 0, errors: [], nodes_by_id: {}, transports: {} };
const sessions = ids.flatMap((id) => Array.from({ length: connections }, () => id));
await Promise.all(
  sessions.map(async (id) => {
    found.tried += 1;
    try {
      const { nodes, transport } = await session(id);
      found.completed += 1;
      found.nodes_by_id[id] = [...new Set([...(found.nodes_by_id[id] ?? []), ...nodes])].sort();
      found.transports[transport] = (found.transports[transport] ?? 0) + 1;
    } catch (error) {
      found.errors.push(error.message);
    }
  }),
);
console.log(JSON.stringify(found));
process.exit(0);
