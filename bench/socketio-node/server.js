// The official server with its defaults, doing what stickyring.echo does.
const { createServer } = require("http");
const { Server } = require("socket.io");

const [port, name] = process.argv.slice(2);
const server = createServer();
new Server(server).on("connection", (socket) => {
  socket.emit("message", `node#${name}: welcome`);
  socket.on("message", (text, acknowledge) => {
    const answer = `node#${name}: ${text}`;
    socket.emit("message", answer);
    if (typeof acknowledge === "function") acknowledge(answer);
  });
});
server.listen(Number(port), "127.0.0.1");
