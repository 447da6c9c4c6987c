#!/bin/sh
# socket.io-client 4.8.4 (npm) in Node.js: it does not follow a redirect from http to https, whatever its status.
#
# Expected: a long poll is repeated at the https URL, as browsers and python-socketio's AsyncClient do it; or at least every status is
# an error at once.
# Seen: WebSocket, and polling with 301 and 308: an error at once. Polling with 302, 303 and 307: xmlhttprequest-ssl chooses the module
# for the second request by the first URL, and speaks http to the port of https.
# Clients in Node.js must be given the https URL.
# Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cd "$folder"
npm install --silent --no-audit --no-fund --ignore-scripts socket.io-client@4.8.4 >npm.log
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -noenc -days 1 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 \
  -keyout key.pem -out chain.pem 2>openssl.log
cat >redirects.js <<'JAVASCRIPT'
const assert = require("node:assert");
const fs = require("node:fs");
const http = require("node:http");
const https = require("node:https");
const { io } = require("socket.io-client");

const seen = { https: 0, "http at the port of https": 0 };
const safe = https.createServer({ key: fs.readFileSync("key.pem"), cert: fs.readFileSync("chain.pem") }, (_, answer) => {
  seen.https += 1;
  answer.writeHead(404).end();
});
safe.on("tlsClientError", (error) => (seen["http at the port of https"] += error.code === "ERR_SSL_HTTP_REQUEST"));
safe.on("upgrade", (_, socket) => {
  seen.https += 1;
  socket.destroy();
});
let status;
const redirect = (request, answer) =>
  answer.writeHead(status, { Location: `https://127.0.0.1:${safe.address().port}${request.url}`, Connection: "close" }).end();
const plain = http.createServer(redirect);
plain.on("upgrade", (request, socket) => {
  const answer = new http.ServerResponse(request);
  answer.assignSocket(socket);
  redirect(request, answer);
});

const attempt = (url, transport) =>
  new Promise((done) => {
    const socket = io(url, { transports: [transport], reconnection: false, rejectUnauthorized: false, forceNew: true });
    socket.on("connect_error", (error) => done(error.message));
  });

const listening = (server) => new Promise((done) => server.listen(0, "127.0.0.1", done));
(async () => {
  await listening(safe);
  await listening(plain);
  for (status of [301, 302, 303, 307, 308]) {
    for (const transport of ["polling", "websocket"]) {
      const before = { ...seen };
      const message = await attempt(`http://127.0.0.1:${plain.address().port}`, transport);
      const wrong = seen["http at the port of https"] - before["http at the port of https"];
      console.log(status, transport, message, wrong ? "http at the port of https" : "");
      assert.equal(seen.https, 0, "this has changed");
      assert.equal(wrong, transport === "polling" && [302, 303, 307].includes(status) ? 1 : 0, "this has changed");
    }
  }
  // The control: the same server is reached by its own URL.
  await attempt(`https://127.0.0.1:${safe.address().port}`, "polling");
  assert.equal(seen.https, 1);
  process.exit(0);
})();
JAVASCRIPT
timeout 60 node redirects.js
