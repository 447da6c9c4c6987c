"""A Django site with a Socket.IO server in front of it, as both document it. Deploy `django_site:application`."""

import django.conf
import django.http
import django.urls
import socketio
from django.core.wsgi import get_wsgi_application

django.conf.settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="of no use here")
urlpatterns = [django.urls.path("", lambda request: django.http.HttpResponse("site"))]

server = socketio.Server()
application = socketio.WSGIApp(server, get_wsgi_application())


@server.event
def say(sid: str, text: str) -> str:
    """Send a text to all clients of this node, and acknowledge it."""
    server.emit("said", text)
    return text
