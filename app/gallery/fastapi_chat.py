"""FastAPI with an AsyncServer mounted in it, a stream of events and an upload. Deploy `fastapi_chat:app`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import socketio
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import StreamingResponse

server = socketio.AsyncServer(async_mode="asgi")
started: list[str] = []


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Open what the application needs before it serves, and close it at the end."""
    started.append("database")
    server.start_background_task(tick)
    yield
    print("closed", *started, flush=True)


app = FastAPI(lifespan=lifespan)
app.mount("/socket.io", socketio.ASGIApp(server, socketio_path=""))


@app.get("/")
async def index() -> dict[str, list[str]]:
    """Say what was opened."""
    return {"started": started}


@app.post("/upload")
async def upload(request: Request) -> int:
    """Return the size of a body."""
    return len(await request.body())


@app.get("/events")
async def events() -> StreamingResponse:
    """Send an event now, and nothing for an hour."""

    async def quiet() -> AsyncIterator[str]:
        yield "data: here\n\n"
        await asyncio.sleep(3600)

    return StreamingResponse(quiet(), media_type="text/event-stream")


@app.websocket("/plain")
async def plain(websocket: WebSocket) -> None:
    """Echo over a WebSocket that is no Socket.IO."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


async def tick() -> None:
    """Send every client a number every few seconds."""
    for number in range(1, 1_000_000):
        await server.sleep(3)
        await server.emit("tick", number)


@server.event
async def join(sid: str, room: str) -> str:
    """Put the client into a room."""
    await server.enter_room(sid, room)
    return room


@server.event
async def say(_: str, room: str, text: str) -> str:
    """Send a text to all of a room on this node, and acknowledge it."""
    await server.emit("said", text, to=room)
    return text
