// Holds many Socket.IO connections of the JavaScript client, each of which goes to the next node when it is lost.
//
//   node listening_crowd.mjs PACKAGE COUNT URL...
//
// PACKAGE is a folder with socket.io-client in node_modules. A third of the users use WebSocket, a third polling, a third
// begin with polling. Each joins room 0 or 1 when its session begins. Prints {connected: COUNT} when all have been
// connected. A line of standard input loses the connections of that many users. At its end, one JSON array per user:
// ["connect", RECOVERED], or an event's name, its room, its number, more arguments, and when it came, in seconds.

import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";

const [folder, count, ...urls] = process.argv.slice(2);
const { io } = createRequire(resolve(folder, "package.json"))("socket.io-client");
const transports = [["websocket"], ["polling"], ["polling", "websocket"]];

let connected = 0;
const users = Array.from({ length: Number(count) }, (_, number) => {
  const socket = io(urls[number % urls.length], {
    transports: transports[number % 3], reconnectionDelay: 200, reconnectionDelayMax: 500, timeout: 3000, forceNew: true,
    query: { client_id: `user-${number}` },
  });
  const heard = [];
  let next = number;
  const joined = (recovered) => heard.push(["connect", recovered]);
  socket.on("connect", () => {
    joined(socket.recovered);
    if (!socket.recovered) socket.emit("join", `${number % 2}`);
    if (heard.length === 1 && ++connected === Number(count)) console.log(JSON.stringify({ connected }));
  });
  socket.io.on("reconnect_attempt", () => { socket.io.uri = urls[++next % urls.length]; });
  socket.on("numbered", (...values) => heard.push(["numbered", ...values, Date.now() / 1000]));
  return { socket, heard };
});

for await (const line of createInterface({ input: process.stdin })) {
  const chosen = [...users].sort(() => Math.random() - 0.5).slice(0, Number(line));
  for (const { socket } of chosen) socket.io.engine?.transport?.ws?.terminate?.() ?? socket.io.engine?.close();
}
for (const { socket, heard } of users) {
  console.log(JSON.stringify(heard));
}
for (const { socket } of users) socket.disconnect();
process.stdout.write("", () => process.exit());
