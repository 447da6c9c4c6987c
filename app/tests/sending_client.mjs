// Sends a numbered message with the JavaScript client's own retries for every line of standard input, and ends when all
// are acknowledged.
//
//   node sending_client.mjs PACKAGE URL EVENT
//
// PACKAGE is a folder with socket.io-client in node_modules. Prints each acknowledgement on a line.

import { randomBytes } from "node:crypto";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { createInterface } from "node:readline";

const [folder, url, event] = process.argv.slice(2);
const { io } = createRequire(resolve(folder, "package.json"))("socket.io-client");

const socket = io(url, { retries: Infinity, ackTimeout: 10000 });
const sender = randomBytes(16).toString("hex");
let counter = 0;

const sent = [];
for await (const text of createInterface({ input: process.stdin })) {
  const acknowledged = new Promise((done) => {
    socket.emit(event, text, `${sender}-${++counter}`, (error, answer) => {
      console.log(answer);
      done();
    });
  });
  sent.push(acknowledged);
}
await Promise.all(sent);
socket.disconnect();
