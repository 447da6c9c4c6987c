#!/bin/sh
# socket.io-client 4.8.4: events that come before the answer to CONNECT are kept when the connection is lost, and handled after the
# next one, beside those that the server sends again.
#
# A server with connection state recovery sends what a client has missed, then the answer to CONNECT; that of socket.io does so. The
# client holds the events back until the answer comes, and takes the offset of an event, from which the server goes on, when it handles
# it.
# Expected: if the connection is lost in between, these events are forgotten, or their offsets are sent with the next CONNECT.
# Seen: neither. The server, asked for the same events again, sends them again, and the client handles each twice.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cd "$folder"
echo '{"private": true}' > package.json
npm install --silent --no-audit --no-fund --ignore-scripts socket.io-client@4.8.4 ws@8.18.3
cat > shown.mjs <<'JAVASCRIPT'
import assert from "node:assert";
import { WebSocketServer } from "ws";
import { io } from "socket.io-client";

const handled = [], claims = [];
const server = new WebSocketServer({ port: 0, host: "127.0.0.1" });
server.on("connection", (socket) => {
  socket.send(`0${JSON.stringify({ sid: `e${claims.length}`, upgrades: [], pingInterval: 25000, pingTimeout: 20000, maxPayload: 1e6 })}`);
  socket.on("message", (data) => {
    if (!`${data}`.startsWith("40")) return;
    claims.push(JSON.parse(`${data}`.slice(2) || "{}"));
    if (claims.length === 1) {
      socket.send('40{"sid":"a","pid":"secret"}');
      socket.send('42["news",1,"offset-1"]');
      setTimeout(() => socket.terminate(), 200);
    } else {
      // Recovery: what was missed after the client's offset, then the answer. The first time, the connection is lost before it.
      socket.send('42["news",2,"offset-2"]');
      if (claims.length === 2) setTimeout(() => socket.terminate(), 200);
      else socket.send('40{"sid":"a","pid":"secret"}');
    }
  });
});
await new Promise((resolve) => server.once("listening", resolve));
const client = io(`http://127.0.0.1:${server.address().port}`, { transports: ["websocket"], reconnectionDelay: 50 });
client.on("news", (number) => handled.push(number));
const deadline = Date.now() + 10000;
while ((claims.length < 3 || !client.connected || handled.length < 2) && Date.now() < deadline) {
  await new Promise((resolve) => setTimeout(resolve, 50));
}
client.close();
server.close();
for (const one of server.clients) one.terminate();
console.log("offsets of the three connections:", claims.map((claim) => claim.offset ?? null), "handled:", handled);
assert.deepEqual(claims.map((claim) => claim.offset ?? null), [null, "offset-1", "offset-1"], "this has changed");
assert.deepEqual(handled, [1, 2, 2], "this has changed");
JAVASCRIPT
node shown.mjs
