"""Flask-SocketIO, as its own documentation begins: rooms, a page and a background thread. Deploy `flask_rooms:app`."""

from flask import Flask, request
from flask_socketio import SocketIO, emit, join_room

app = Flask(__name__)
socketio = SocketIO(app)
ticking = []


@app.get("/")
def index() -> str:
    """Answer a request that is no Socket.IO."""
    return "rooms"


@socketio.on("join")
def join(room: str) -> str:
    """Put the client into a room."""
    join_room(room)
    return room


@socketio.on("say")
def say(room: str, text: str) -> str:
    """Send a text to all of a room on this node, and acknowledge it."""
    emit("said", text, to=room)
    return text


@socketio.on("connect")
def start_ticking() -> None:
    """Start the background thread with the first client."""
    if not ticking:
        ticking.append(socketio.start_background_task(tick))
    emit("here", request.sid)


def tick() -> None:
    """Send every client a number every few seconds."""
    for number in range(1, 1_000_000):
        socketio.sleep(3)
        socketio.emit("tick", number)
