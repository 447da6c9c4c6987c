"""A fake Envoy with the behaviour that the module needs, and a way to run the module against it."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import threading
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any
from unittest.mock import patch

import pytest
from ansible.module_utils.common import warnings
from ansible.module_utils.testing import patch_module_args
from ansible_collections.stickyring.fleet.plugins.modules import edge_xds

ROLE = Path(__file__).parents[1]


def run_module(directory: Path, files: Any, admin_socket: str, **parameters: object) -> dict[str, Any]:
    """The result of the module that writes files, as Ansible would read it."""
    arguments = {"directory": str(directory), "files": files, "admin_socket": admin_socket, "timeout": 1}
    output = io.StringIO()
    # A process of its own would have none of the warnings that earlier runs have left.
    with (
        patch.dict(warnings._global_warnings, clear=True),
        patch_module_args(arguments | parameters),
        redirect_stdout(output),
        pytest.raises(SystemExit),
    ):
        edge_xds.main()
    result: dict[str, Any] = json.loads(output.getvalue())
    return result


class UnixServer(ThreadingMixIn, UnixStreamServer):
    """An HTTP server on a Unix socket."""

    daemon_threads = True


class FakeEnvoy:
    """Reads the files as Envoy does and answers as its admin interface does.

    A file that was moved into place is loaded at the next request; one with a key `refuse` is rejected with that text.
    `refused` names listeners whose version in the file was rejected. `history` has the names in each clusters file that
    was loaded, `loads` the order of the files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stats: dict[str, Any] = {}
        self.loaded: dict[str, list[dict[str, Any]]] = {}
        self.errors: list[str] = []
        self.inodes: dict[Path, int] = {}
        self.history: list[list[str]] = []
        self.loads: list[str] = []
        self.ignores_changes = False
        self.unhealthy: set[int] = set()
        self.refused: set[str] = set()
        # A socket's path has 107 characters at most, fewer than a test's own directory may take.
        self.folder = tempfile.mkdtemp()
        self.socket = f"{self.folder}/admin.sock"
        # The port is that of an endpoint that answers with 200.
        self.servers = [
            UnixServer(self.socket, self._handler()),
            ThreadingHTTPServer(("127.0.0.1", 0), self._handler()),
        ]
        self.port: int = self.servers[1].server_address[1]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        envoy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                envoy.look()
                body = json.dumps(envoy.answer(self.path)).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return ""

            def log_message(self, *_arguments: object) -> None:
                pass

        return Handler

    def look(self) -> None:
        if self.ignores_changes:
            return
        for path in sorted(self.directory.rglob("[!.]*.json"), key=lambda path: path.stat().st_mtime_ns):
            inode = path.stat().st_ino
            if self.inodes.get(path) != inode:
                self.inodes[path] = inode
                self.load(path)

    def load(self, path: Path) -> None:
        content = json.loads(path.read_text())
        resources = content["resources"]
        kind = resources[0]["@type"].rpartition(".")[2]
        prefix = {
            "Cluster": "cluster_manager.cds",
            "Listener": "listener_manager.lds",
            "ClusterLoadAssignment": f"cluster.{resources[0].get('cluster_name')}",
            "Secret": f"sds.{resources[0].get('name')}",
            "RouteConfiguration": f"http.x.rds.{resources[0].get('name')}",
        }[kind]
        self.loads.append(str(path.relative_to(self.directory)))
        refused = [resource["refuse"] for resource in resources if "refuse" in resource]
        counter = f"{prefix}.{'update_rejected' if refused else 'update_success'}"
        self.stats[counter] = self.stats.get(counter, 0) + 1
        if kind == "Listener":
            self.errors = refused
        if not refused:
            self.stats[f"{prefix}.version_text"] = content["version_info"]
            self.loaded[prefix] = resources
            if kind == "Cluster":
                self.history.append([resource["name"] for resource in resources])

    def answer(self, path: str) -> dict[str, Any]:
        if path.startswith("/stats"):
            return {
                "stats": [{"name": name, "value": value} for name, value in self.stats.items()] + [{"histograms": {}}]
            }
        clusters = self.loaded.get("cluster_manager.cds", [])
        assignments = [found for name, found in self.loaded.items() if name.startswith("cluster.")]
        if path.startswith("/clusters"):
            return {"cluster_statuses": [self._status(assignment[0]) for assignment in assignments]}
        if path.startswith("/config_dump"):
            listeners = [
                {"name": item["name"], "active_state": {"listener": item}}
                | ({"error_state": {"details": "refused"}} if item["name"] in self.refused else {})
                for item in self.loaded.get("listener_manager.lds", [])
            ]
            listeners += [{"name": "refused", "error_state": {"details": error}} for error in self.errors]
            return {
                "configs": [
                    {
                        "@type": "a.ClustersConfigDump",
                        "dynamic_active_clusters": [{"cluster": item} for item in clusters],
                    },
                    {"@type": "a.ListenersConfigDump", "dynamic_listeners": listeners},
                    {
                        "@type": "a.EndpointsConfigDump",
                        "dynamic_endpoint_configs": [{"endpoint_config": found[0]} for found in assignments],
                    },
                ]
            }
        return {"version": "fake"}

    def _status(self, assignment: dict[str, Any]) -> dict[str, Any]:
        hosts = []
        for item in assignment["endpoints"][0]["lb_endpoints"]:
            address = item["endpoint"]["address"]
            health: dict[str, Any] = {"eds_health_status": "HEALTHY"}
            if address["socket_address"]["port_value"] in self.unhealthy:
                health["failed_active_health_check"] = True
            hosts.append({"address": address, "health_status": health})
        return {"name": assignment["cluster_name"], "host_statuses": hosts}

    def stop(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()
        shutil.rmtree(self.folder, ignore_errors=True)
