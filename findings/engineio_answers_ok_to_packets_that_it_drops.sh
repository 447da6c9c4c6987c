#!/bin/sh
# python-engineio 4.15.1: a POST of more than 16 packets is dropped whole, and one that is sent in chunks is taken for empty. Both
# are answered with 200 OK.
#
# Expected: the packets are handled, as with 16 of them and a Content-Length, or the answer is an error, after which a client knows
# that it has to send them again. The protocol bounds a payload by maxPayload, in bytes.
# Seen: "OK" each time; of 16 messages 16 arrive, of 17 none, of 16 in a chunked body (RFC 9112, section 7.1; gunicorn hands it on
# with wsgi.input_terminated and without CONTENT_LENGTH) none. Official clients send such a POST whenever they have buffered
# something. Ends with 0 as long as this is so.
set -eu
folder=$(mktemp -d)
trap 'kill "$server" 2>/dev/null || :; rm -r "$folder"' EXIT
server=
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check python-engineio==4.15.1 simple-websocket==1.1.0 gunicorn==23.0.0
cat > "$folder/application.py" <<'PYTHON'
import engineio

server = engineio.Server(async_mode="threading")
received = []
server.on("message", lambda sid, message: received.append(message))


def count(environ, start_response):
    start_response("200 OK", [])
    number = len(received)
    received.clear()
    return [str(number).encode()]


application = engineio.WSGIApp(server, count)
PYTHON
cd "$folder"
venv/bin/gunicorn --threads 4 --bind 127.0.0.1:0 application:application 2> log &
server=$!
venv/bin/python - <<'PYTHON'
import http.client, json, pathlib, re, time

while not (found := re.search(r"127\.0\.0\.1:(\d+)", pathlib.Path("log").read_text())):
    time.sleep(0.1)


def ask(method, path, body=None, chunked=False):
    connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}
    connection.request(method, path, iter([body]) if chunked else body, headers, encode_chunked=chunked)
    return connection.getresponse().read().decode()


path = "/engine.io/?EIO=4&transport=polling"
sid = json.loads(ask("GET", path)[1:])["sid"]
seen = []
for number, chunked in ((16, False), (17, False), (16, True)):
    answer = ask("POST", f"{path}&sid={sid}", b"\x1e".join([b"4hello"] * number), chunked)
    seen.append((number, chunked, answer, int(ask("GET", "/count"))))
print(*(f"{number} packets, chunked {chunked}: {answer}, {arrived} arrived" for number, chunked, answer, arrived in seen), sep="\n")
assert [(answer, arrived) for *_, answer, arrived in seen] == [("OK", 16), ("OK", 0), ("OK", 0)], "this has changed"
PYTHON
