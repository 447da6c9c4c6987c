"""Two Socket.IO servers behind one middleware, one of them mounted under a prefix. Deploy `two_servers:application`."""

import socketio
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.middleware.proxy_fix import ProxyFix

chat = socketio.Server()
game = socketio.Server(serializer="msgpack")
application = ProxyFix(DispatcherMiddleware(socketio.WSGIApp(chat), {"/game": socketio.WSGIApp(game)}))


@chat.event
def say(sid: str, text: str) -> str:
    """Acknowledge a text."""
    return text


@game.event
def move(sid: str, field: bytes) -> bytes:
    """Acknowledge a move, in binary."""
    return field
