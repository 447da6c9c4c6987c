// Holds one Socket.IO connection of the JavaScript client until standard input ends, and prints its events.
//
//   node reconnecting_client.mjs PACKAGE URL TRANSPORT...
//
// PACKAGE is a folder with socket.io-client in node_modules; options other than the transports are the client's
// defaults. Prints one JSON object per line: {event: connect | upgrade | message | disconnect | connect_error |
// reconnect_attempt, detail, at: milliseconds}.

import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, url, ...transports] = process.argv.slice(2);
const { io } = createRequire(resolve(folder, "package.json"))("socket.io-client");

const tell = (event, detail) => console.log(JSON.stringify({ event, detail, at: performance.now() }));
const socket = io(url, { transports });
socket.on("connect", () => tell("connect", socket.id));
socket.on("message", (text) => tell("message", text));
socket.on("disconnect", (reason) => tell("disconnect", reason));
socket.on("connect_error", (error) => tell("connect_error", error.message));
socket.io.on("reconnect_attempt", (attempt) => tell("reconnect_attempt", attempt));
socket.io.on("open", () => {
  tell("open", socket.io.engine.transport.name);
  socket.io.engine.on("upgrade", (transport) => tell("upgrade", transport.name));
});
process.stdin.on("end", () => socket.disconnect()).resume();
