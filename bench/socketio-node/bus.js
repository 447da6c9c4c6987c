// The official server with an adapter for Redis, doing what `broadcasting` of application.py does.
//
//   node bus.js PORT redis|streams|streams-recovery
const { createServer } = require("http");
const { Server } = require("socket.io");
const { createAdapter: publishing } = require("@socket.io/redis-adapter");
const { createAdapter: streaming } = require("@socket.io/redis-streams-adapter");
const { createClient } = require("redis");

const [port, adapter] = process.argv.slice(2);

async function connected() {
  const client = createClient({ url: process.env.STICKYRING_BUS_URL });
  client.on("error", (error) => console.error(error.message));
  await client.connect();
  return client;
}

async function main() {
  const client = await connected();
  const io = new Server({
    adapter: adapter === "redis" ? publishing(client, await connected()) : streaming(client),
    ...(adapter === "streams-recovery" && { connectionStateRecovery: {} }),
  });
  io.on("connection", (socket) => {
    socket.on("publish", (...values) => io.emit("numbered", ...values));
    socket.on("count", (last, rate) => {
      const begun = Date.now() / 1000;
      let number = 0;
      const timer = setInterval(() => {
        while (number < last && begun + (number + 1) / rate <= Date.now() / 1000) {
          number += 1;
          io.emit("numbered", "all", number, begun + number / rate);
        }
        if (number === last) clearInterval(timer);
      }, 1000 / rate);
    });
  });
  const server = createServer();
  io.attach(server);
  server.listen(Number(port), "127.0.0.1");
}

main();
