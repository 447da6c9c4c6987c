// The official server with its defaults, doing what stickyring.echo does.
const { Server } = require("socket.io");

const [port, name] = process.argv.slice(2);
const io = new Server();
io.on("connection", (socket) => {
  socket.emit("message", `node#${name}: welcome`);
  socket.on("message", (text, acknowledge) => {
    const answer = `node#${name}: ${text}`;
    socket.emit("message", answer);
    if (typeof acknowledge === "function") acknowledge(answer);
  });
});
require("http").createServer().on("request", () => {});
io.listen(Number(port));
