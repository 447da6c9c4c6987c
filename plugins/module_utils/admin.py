"""Client of Envoy's admin interface on its Unix socket.

https://www.envoyproxy.io/docs/envoy/v1.40.0/operations/admin
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
import urllib.parse
from datetime import datetime
from pathlib import Path

from ansible_collections.stickyring.fleet.plugins.module_utils.xds import Dump, Resource, Stats, place_of

ADMIN_SECONDS = 5


def listener_of(path: Path) -> int | None:
    """The process that listens on a Unix socket; None if nobody does."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return None
    return int(struct.unpack("3i", credentials)[0])


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ADMIN_SECONDS)
        self.path = path

    def connect(self) -> None:
        """Connects, or raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Admin:
    """Envoy's admin interface. Every method but `answers` raises OSError when it does not answer."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get(self, path: str) -> Resource:
        """The JSON of this path."""
        connection = UnixConnection(self.path)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            answer: Resource = json.loads(response.read())
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"{self.path} is not Envoy's admin interface: {error!r}") from error
        finally:
            connection.close()
        return answer

    def answers(self) -> bool:
        """Whether Envoy answers."""
        try:
            return "version" in self.get("/server_info")
        except OSError:
            return False

    def stats(self) -> Stats:
        """Statistics of the subscriptions: name to number, or to text for version_text."""
        pattern = urllib.parse.quote(r"(version_text|update_rejected|update_failure|update_success)$")
        stats = self.get(f"/stats?format=json&filter={pattern}")["stats"]
        return {item["name"]: item["value"] for item in stats if "name" in item}

    def websockets(self) -> dict[str, int]:
        """Listener to the number of open WebSockets that came through it, those that are about to end included."""
        pattern = r"^http\.(.+)\.downstream_cx_upgrades_active$"
        stats = self.get(f"/stats?format=json&filter={urllib.parse.quote(pattern)}")["stats"]
        found = {item["name"]: item["value"] for item in stats if "name" in item}
        return {match[1]: count for name, count in found.items() if (match := re.search(pattern, name)) and count}

    def certificates(self) -> list[tuple[list[str], datetime]]:
        """The names of each certificate that Envoy serves, or its serial number, and when it expires; each once."""
        served = [one["cert_chain"][0] for one in self.get("/certs")["certificates"] if one.get("cert_chain")]
        found = {
            item["serial_number"]: (
                [str(name) for one in item.get("subject_alt_names", []) for name in one.values()]
                or [f"serial number {item['serial_number']}"],
                datetime.fromisoformat(item["expiration_time"]),
            )
            for item in served
        }
        return [*found.values()]

    def dump(self) -> Dump:
        """Envoy's running configuration, by the last part of each section's type."""
        return {part["@type"].rpartition(".")[2]: part for part in self.get("/config_dump?include_eds")["configs"]}

    def hosts(self) -> dict[tuple[str, str, int], Resource]:
        """Cluster, address and port to health status; `{"eds_health_status": "HEALTHY"}` for a healthy endpoint."""
        found = {}
        for cluster in self.get("/clusters?format=json").get("cluster_statuses", []):
            for host in cluster.get("host_statuses", []):
                if "pipe" in host["address"]:
                    continue
                found[(cluster["name"], *place_of(host["address"]))] = host["health_status"]
        return found
