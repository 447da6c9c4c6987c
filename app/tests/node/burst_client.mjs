// Sends a burst of events with the JavaScript client, and prints those that the application recorded.
//
//   node burst_client.mjs PACKAGE URL COUNT ATTACHMENT OPTIONS
//
// PACKAGE is a folder with socket.io-client in node_modules; OPTIONS are the client's, as JSON. COUNT numbered events
// `note`, with ATTACHMENT bytes each unless that is 0, are emitted at once before the client is connected.

import { createRequire } from "node:module";
import { resolve } from "node:path";

const [folder, url, count, attachment, options] = process.argv.slice(2);
const { io } = createRequire(resolve(folder, "package.json"))("socket.io-client");

const socket = io(url, { reconnection: false, ...JSON.parse(options) });
const size = Number(attachment);
for (let number = 0; number < Number(count); number++) {
  socket.emit("note", number, ...(size ? [Buffer.alloc(size, number)] : []));
}
socket.on("disconnect", (reason) => console.error(reason));
socket.emit("noted", (noted) => {
  console.log(JSON.stringify(noted));
  socket.disconnect();
});
