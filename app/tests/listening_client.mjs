// Holds one Socket.IO connection of the JavaScript client, and prints its events; standard input tells it what to do.
//
//   node listening_client.mjs PACKAGE URL TRANSPORT...
//
// PACKAGE is a folder with socket.io-client in node_modules. Each line of standard input is a JSON array: ["emit", EVENT,
// ARGUMENT...] (what the acknowledgement says is printed), ["away", URL] (the connection is lost; the next one goes to
// URL), ["back"] (it connects again), ["next", URL] (the next connection goes to URL), ["leave"] (it disconnects on purpose). Prints one JSON array per line:
// ["connect", SID, RECOVERED, PID], ["ack", VALUE], ["disconnect", REASON], or an event's name and arguments.

import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";

const [folder, url, ...transports] = process.argv.slice(2);
const { io } = createRequire(resolve(folder, "package.json"))("socket.io-client");
const readable = (value) => (Buffer.isBuffer(value) ? { bytes: [...value] } : value);
const tell = (...values) => console.log(JSON.stringify(values.map(readable)));

const socket = io(url, { transports, reconnectionDelay: 100, reconnectionDelayMax: 500 });
socket.on("connect", () => tell("connect", socket.id, socket.recovered, socket._pid));
socket.on("disconnect", (reason) => tell("disconnect", reason));
socket.on("connect_error", (error) => tell("connect_error", error.message));
socket.onAny((...event) => tell(...event));
socket.on("asked", (question, answer) => answer(`${question}, answered by ${socket.id}`));

for await (const line of createInterface({ input: process.stdin })) {
  const [order, ...rest] = JSON.parse(line);
  if (order === "emit") socket.emit(...rest, (value) => tell("ack", value));
  if (order === "away" || order === "next") socket.io.uri = rest[0];
  if (order === "away") {
    socket.io.reconnection(false);
    socket.io.engine.close();
  }
  if (order === "back") {
    socket.io.reconnection(true);
    socket.connect();
  }
  if (order === "leave") socket.disconnect();
}
socket.disconnect();
