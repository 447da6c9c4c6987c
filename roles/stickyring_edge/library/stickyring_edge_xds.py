"""Ansible module: filesystem xDS files for Envoy, proven in the running process.

Envoy's side of it: https://www.envoyproxy.io/docs/envoy/v1.40.0/configuration/overview/xds_api and
https://www.envoyproxy.io/docs/envoy/v1.40.0/operations/admin.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import ipaddress
import json
import os
import pwd
import re
import socket
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: stickyring_edge_xds
short_description: Write Envoy's filesystem xDS files and prove that Envoy runs on them
description:
  - Writes every file of O(files) by renaming it into place, which is the only change Envoy's file subscription notices,
    and only those whose content differs. Each file is stamped with a C(version_info) that is a hash of its resources.
  - The order never names what is not there yet (what is new, clusters, endpoints, routes, certificates, listeners), and
    what is no longer wanted goes last.
  - When Envoy's admin interface answers, each step is awaited there. A rejected or unfinished step puts the previous
    files back and fails with Envoy's own words. Without an answer the files are only written, unless O(unit) runs.
  - With nothing to change the module just proves the state and reports no change.
  - Where websockets are open that a change would end, nothing is written unless O(may_end_websockets).
options:
  state:
    description:
      - V(present) writes the files.
      - V(proven) changes nothing. It fails when the files differ from what is wanted, naming them and showing the
        difference in diff mode, and when the admin interface does not answer within O(timeout) or Envoy is not at them.
      - V(compared) changes nothing, waits for nothing, and tells with RV(in_order) whether there is anything to do.
    type: str
    choices: [present, proven, compared]
    default: present
  directory:
    description: Directory of the files; made when missing, with one level of sub-directories.
    type: path
    required: true
  files:
    description:
      - Path below O(directory), ending in C(.yaml), to the list of resources in Envoy's JSON notation with C(@type).
      - One resource type a file; a file of routes or endpoints, or of a secret, holds exactly one resource, since Envoy
        takes no more.
    type: dict
    required: true
  private_keys:
    description:
      - Private keys in PEM, by the path of the secret in O(files) that they belong to. Neither logged nor shown.
    type: dict
    default: {}
  header:
    description: Comment block that opens every file.
    type: str
    default: ""
  owner:
    description: Owner of the files and directories; whoever runs the module when left out.
    type: str
  group:
    description: Group of the files and directories.
    type: str
  secrets_group:
    description: Group that may read the files with private keys, whose mode is 0640; O(group) when left out.
    type: str
  admin_port:
    description:
      - Port of Envoy's admin interface on 127.0.0.1.
      - With V(present) and O(unit), an Envoy that still has another one is found by the ports that its process has.
    type: int
    default: 9901
  timeout:
    description: Seconds that each step may take until Envoy has it.
    type: int
    default: 30
  healthy_timeout:
    description:
      - With V(proven), seconds to wait until Envoy finds every endpoint healthy; 0 asks nothing.
      - With V(compared), 0 asks nothing, too.
      - With V(present), seconds until those that Envoy does not have yet must answer this host with 200, or nothing is
        written; 0 asks nothing. Its users would otherwise be moved to the others first.
    type: int
    default: 0
  unit:
    description:
      - systemd unit of this Envoy.
      - Its journal is searched for Envoy's reason when the admin interface does not tell it.
      - Files are not written below an Envoy that runs and does not answer, because nobody would judge them.
    type: str
  start_files:
    description:
      - What Envoy is started from, and is started anew for by whoever runs this module when it differs.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: What it is, for messages.
        type: str
        required: true
      path:
        description: Path of the file or link.
        type: path
        required: true
      content:
        description: Text that the file is going to have, with O(owner), O(group) and mode 0644.
        type: str
      link:
        description: Target that the link is going to have.
        type: str
  start_record:
    description:
      - File that holds RV(start_digest) once Envoy was started from O(start_files), and something else while they are
        written. Whoever runs this module writes it.
      - Times of files would not do, since a clock may be set.
    type: path
  needed:
    description: Further files that have to be there to be RV(in_order).
    type: list
    elements: path
    default: []
  account:
    description: The account that has to be there to be RV(in_order).
    type: str
  may_end_websockets:
    description:
      - Whether to go on where websockets are open that end with it, because a listener that they came through changes
        or goes, or because Envoy is to be started anew for O(start_files), be it for what an earlier run left undone.
      - In check mode a warning tells of them instead.
    type: bool
    default: false
author:
  - The stickyring authors
attributes:
  check_mode: {support: full}
  diff_mode: {support: full}
"""

EXAMPLES = r"""
- name: Write the files
  stickyring_edge_xds:
    directory: /etc/stickyring-edge/xds
    files:
      clusters.yaml: "{{ clusters }}"
      listeners.yaml: "{{ listeners }}"
      routes/sticky.yaml: ["{{ route_configuration }}"]
      certificates/sticky.yaml: ["{{ secret_without_its_key }}"]
      endpoints/nodes.yaml: ["{{ cluster_load_assignment }}"]
    private_keys:
      certificates/sticky.yaml: "{{ lookup('file', '/srv/tls/key.pem') }}"

- name: Prove that Envoy runs on them and finds every endpoint healthy
  stickyring_edge_xds:
    directory: /etc/stickyring-edge/xds
    files: "{{ files }}"
    state: proven
    healthy_timeout: 60
"""

RETURN = r"""
written:
  description: Files that were written, in order.
  returned: success
  type: list
removed:
  description: Files that were removed.
  returned: success
  type: list
left:
  description: Endpoints that Envoy had and has no more, as C(name) and C(address), in check mode those that would go.
  returned: success
  type: list
versions:
  description: File to C(version_info).
  returned: success
  type: dict
proven:
  description: Whether a running Envoy was seen to be at these versions.
  returned: success
  type: bool
up_to_date:
  description: Whether O(unit) runs, and runs on O(start_files).
  returned: success
  type: bool
recorded:
  description: Whether O(start_record) says so.
  returned: success
  type: bool
start_digest:
  description: SHA-256 of O(start_files), which tells them from others.
  returned: success
  type: str
enabled:
  description: Whether O(unit) starts at boot.
  returned: success
  type: bool
differing:
  description: Names of those of O(start_files) that are not as they are going to be.
  returned: success
  type: list
in_order:
  description:
    - Whether files, folders, owners and modes are as wanted, O(needed) is there, and Envoy starts at boot, was started
      from O(start_files), and runs on the files, with open ports and, where that is asked for, healthy endpoints.
  returned: success with V(compared)
  type: bool
ends:
  description: What ends how many open websockets, as C(the binary changes: 214 open websockets end); empty when none.
  returned: success with V(present)
  type: str
"""

CLUSTER = "envoy.config.cluster.v3.Cluster"
ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
ROUTES = "envoy.config.route.v3.RouteConfiguration"
SECRET = "envoy.extensions.transport_sockets.tls.v3.Secret"
LISTENER = "envoy.config.listener.v3.Listener"
# Nothing may be named before it is there, so Envoy is given them in this order.
TYPES = (CLUSTER, ENDPOINTS, ROUTES, SECRET, LISTENER)
# Envoy takes exactly one of these from a file.
SINGLE_TYPES = (ENDPOINTS, ROUTES, SECRET)

# Words that some YAML parsers take for something else than text.
RESERVED_KEYS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
POLL_SECONDS = 0.1
JOURNAL_SECONDS = 3
ADMIN_SECONDS = 5
PROC = Path("/proc")
TCP_LISTEN = "0A"
LOOPBACK = "0100007F"
REASON_LENGTH = 500
HOW_TO_GO_ON = "To end them all the same, run this again with `-e stickyring_edge_may_end_websockets=true`."

Resource = dict[str, Any]
Stats = dict[str, Any]
Dump = dict[str, Any]


class InvalidFiles(Exception):
    """The wanted files must not be written; the message names the file."""


class NotApplied(Exception):
    """Envoy refused a step or did not finish it in time; the message is Envoy's reason."""


class EndsWebsockets(Exception):
    """The change would end open websockets and nobody has allowed that; the message tells which."""


class NotProven(Exception):
    """The host does not hold what is wanted; the message names what differs."""


def to_yaml(value: object, indent: int = 0) -> str:
    """Block YAML of JSON data, as text that ends with a newline.

    Scalars are JSON, which YAML contains. Written here because a managed host need not have PyYAML.
    """
    pad = " " * indent
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            plain = re.fullmatch(r"[A-Za-z][\w.-]*", key) and key.lower() not in RESERVED_KEYS
            name = key if plain else json.dumps(key)
            if isinstance(item, (dict, list)) and item:
                lines.append(f"{pad}{name}:\n{to_yaml(item, indent + 2)}")
            else:
                lines.append(f"{pad}{name}: {json.dumps(item)}\n")
        return "".join(lines)
    if isinstance(value, list) and value:
        # The item's first line moves up behind its dash.
        return "".join(f"{pad}- {to_yaml(item, indent + 2).lstrip()}" for item in value)
    return f"{pad}{json.dumps(value)}\n"


def version_of(resources: list[Resource]) -> str:
    """The version_info of a file with these resources: 16 hexadecimal digits, whatever the order of keys."""
    return hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]


def with_key(resources: list[Resource], private_key: str | None) -> list[Resource]:
    """The secret with its private key; what has none stays as it is."""
    if private_key is None:
        return resources
    [secret] = resources
    certificate = {**secret["tls_certificate"], "private_key": {"inline_string": private_key}}
    return [{**secret, "tls_certificate": certificate}]


def is_secret(text: str) -> bool:
    """Whether the text of a file is not for everybody."""
    return SECRET in text or "PRIVATE KEY" in text


def resource_texts(text: str) -> dict[str, str]:
    """Each resource's name to its text, of a file that this module has written; empty of other files."""
    texts = {}
    for part in re.split(r"^  - ", text, flags=re.MULTILINE)[1:]:
        if found := re.search(r"^(?: {4})?name: (.+)$", part, re.MULTILINE):
            texts[json.loads(found[1])] = part
    return texts


class XdsFile:
    """One wanted file: its path below the directory, its resources, their type and version."""

    def __init__(self, path: str, resources: list[Resource]) -> None:
        if not resources:
            raise InvalidFiles(
                f"{path}: no resources. Envoy would drop what it serves; leave the file out to remove it."
            )
        types = {resource.get("@type", "").removeprefix("type.googleapis.com/") for resource in resources}
        if len(types) != 1 or not types <= set(TYPES):
            raise InvalidFiles(f"{path}: wants resources of one type out of {', '.join(TYPES)}; got {sorted(types)}.")
        self.path = path
        self.type = types.pop()
        self.resources = resources
        self.version = version_of(resources)
        if self.type in SINGLE_TYPES and len(resources) != 1:
            raise InvalidFiles(f"{path}: Envoy takes exactly one resource from such a file; got {len(resources)}.")
        if self.type == ENDPOINTS and not self.endpoints():
            raise InvalidFiles(f"{path}: the endpoint list is empty. Envoy would accept it and then refuse every user.")

    def endpoints(self) -> dict[tuple[str, int], str]:
        """Address and port to the endpoint's name, of a file of endpoints."""
        return endpoints_of(self.resources[0])

    def checked_endpoints(self) -> dict[tuple[str, int], str]:
        """The same without those that are not to be checked: places on the ring that are no nodes."""
        unchecked = {
            place_of(item["endpoint"]["address"])
            for locality in self.resources[0].get("endpoints", [])
            for item in locality.get("lb_endpoints", [])
            if item["endpoint"].get("health_check_config", {}).get("disable_active_health_check")
        }
        return {place: name for place, name in self.endpoints().items() if place not in unchecked}

    def names(self) -> list[str]:
        """The resources' names; for endpoints that of their cluster."""
        return [resource["cluster_name" if self.type == ENDPOINTS else "name"] for resource in self.resources]

    def text(self, header: str) -> str:
        """The file's content below the header."""
        body = to_yaml({"version_info": self.version, "resources": self.resources})
        return f"{header.rstrip()}\n{body}" if header else body

    def subscriptions(self, stats: Stats) -> list[str]:
        """Statistics prefixes of Envoy's subscriptions to this file; none for what no listener uses yet."""
        if self.type == CLUSTER:
            return ["cluster_manager.cds"]
        if self.type == LISTENER:
            return ["listener_manager.lds"]
        if self.type == ENDPOINTS:
            return [f"cluster.{self.names()[0]}"]
        if self.type == SECRET:
            prefix = f"sds.{self.names()[0]}"
            return [prefix] if f"{prefix}.version_text" in stats else []
        ending = f".rds.{self.names()[0]}.version_text"
        return [name.removesuffix(".version_text") for name in stats if name.endswith(ending)]

    def refusals(self, stats: Stats) -> int:
        """How many updates of this file Envoy has refused since it started."""
        return sum(
            stats.get(f"{prefix}.{counter}", 0)
            for prefix in self.subscriptions(stats)
            for counter in ("update_rejected", "update_failure")
        )

    def refused(self, stats: Stats) -> bool:
        """Whether Envoy has refused this file and is not at it."""
        return bool(self.refusals(stats) and self.version_problems(stats))

    def version_problems(self, stats: Stats) -> list[str]:
        """A line when Envoy is not at this version."""
        loaded = {stats.get(f"{prefix}.version_text") or "none" for prefix in self.subscriptions(stats)}
        if loaded == {self.version}:
            return []
        return [f"{self.path}: Envoy is at version {', '.join(sorted(loaded)) or 'none'}, not at {self.version}"]

    def activity_problems(self, dump: Dump) -> list[str]:
        """A line for each resource that is not active, still warming or should be gone."""
        if self.type == ENDPOINTS:
            return self._endpoint_problems(dump)
        if self.type == CLUSTER:
            clusters = dump.get("ClustersConfigDump", {})
            active = {item["cluster"]["name"] for item in clusters.get("dynamic_active_clusters", [])}
            warming = warming_clusters(dump)
        elif self.type == LISTENER:
            listeners = dump.get("ListenersConfigDump", {}).get("dynamic_listeners", [])
            active = {item["name"] for item in listeners if "active_state" in item}
            warming = {item["name"] for item in listeners if "warming_state" in item}
        else:
            return []
        kind = self.type.rpartition(".")[2].lower()
        wanted = set(self.names())
        return (
            [f"{kind} {name} is not active" for name in sorted(wanted - active)]
            + [f"{kind} {name} is still warming" for name in sorted(wanted & warming)]
            + [f"{kind} {name} is still there" for name in sorted(active - wanted)]
        )

    def _endpoint_problems(self, dump: Dump) -> list[str]:
        loaded: set[tuple[str, int]] = set()
        for item in dump.get("EndpointsConfigDump", {}).get("dynamic_endpoint_configs", []):
            if item["endpoint_config"]["cluster_name"] == self.names()[0]:
                loaded |= set(endpoints_of(item["endpoint_config"]))
        if loaded == set(self.endpoints()):
            return []
        return [f"cluster {self.names()[0]} has other endpoints than {self.path}: {sorted(loaded)}"]

    def port_problems(self) -> list[str]:
        """A line for each listener port that accepts no connection."""
        problems = []
        for listener in self.resources if self.type == LISTENER else []:
            where = listener["address"]["socket_address"]
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where["address"], where["address"])
            port = where["port_value"]
            try:
                socket.create_connection((host, port), timeout=5).close()
            except OSError as error:
                problems.append(f"listener {listener['name']}: {host}:{port} accepts no connection ({error})")
        return problems

    def health_problems(self, hosts: dict[tuple[str, str, int], Resource]) -> list[str]:
        """A line with name, address and Envoy's flags for each endpoint that Envoy does not find healthy."""
        problems = []
        for (address, port), name in self.checked_endpoints().items() if self.type == ENDPOINTS else ():
            status = hosts.get((self.names()[0], address, port), {"unknown_to_envoy": True})
            flags = [flag for flag, value in status.items() if value is True]
            if flags or status.get("eds_health_status", "HEALTHY") != "HEALTHY":
                told = ", ".join(flags) or status["eds_health_status"]
                problems.append(f"{name} ({address}:{port}) of cluster {self.names()[0]} is not healthy: {told}")
        return problems


def unhealthy(address: str, port: int, path: str) -> str:
    """Why the address does not answer the path with 200; empty when it does."""
    connection = http.client.HTTPConnection(address, port, timeout=ADMIN_SECONDS)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return "" if status == 200 else f"status {status}"


def endpoints_of(assignment: Resource) -> dict[tuple[str, int], str]:
    """Address and port to the endpoint's name, of a ClusterLoadAssignment."""
    found = {}
    for locality in assignment.get("endpoints", []):
        for item in locality.get("lb_endpoints", []):
            found[place_of(item["endpoint"]["address"])] = item["endpoint"].get("hostname", "")
    return found


def place_of(address: Resource) -> tuple[str, int]:
    """IP address, in the one spelling that compares, and port of an Address."""
    place = address["socket_address"]
    return str(ipaddress.ip_address(place["address"])), place["port_value"]


def warming_clusters(dump: Dump) -> set[str]:
    """Names of clusters that do not serve yet because their endpoints are not loaded or not checked."""
    return {item["cluster"]["name"] for item in dump.get("ClustersConfigDump", {}).get("dynamic_warming_clusters", [])}


def in_one_line(reason: str) -> str:
    """The reason without line breaks and without the refused message, which Envoy prints behind it or before it."""
    words = " ".join(reason.split()).partition('): {"')[0]
    return words if len(words) <= REASON_LENGTH else f"... {words[-REASON_LENGTH:]}"


class Admin:
    """Envoy's admin interface on the loopback address. Every method raises OSError when it does not answer."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> Resource:
        """The JSON of this path."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ADMIN_SECONDS)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            answer: Resource = json.loads(response.read())
        except (http.client.HTTPException, ValueError) as error:
            raise OSError(f"127.0.0.1:{self.port} is not Envoy's admin interface: {error!r}") from error
        finally:
            connection.close()
        return answer

    def answers(self) -> bool:
        """Whether an Envoy is there."""
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
        """Listener to the number of open websockets that came through it, those that are about to end included."""
        pattern = r"^http\.(.+)\.downstream_cx_upgrades_active$"
        stats = self.get(f"/stats?format=json&filter={urllib.parse.quote(pattern)}")["stats"]
        found = {item["name"]: item["value"] for item in stats if "name" in item}
        return {match[1]: count for name, count in found.items() if (match := re.search(pattern, name)) and count}

    def dump(self) -> Dump:
        """The configuration that Envoy runs on, by the last part of each section's type."""
        return {part["@type"].rpartition(".")[2]: part for part in self.get("/config_dump?include_eds")["configs"]}

    def hosts(self) -> dict[tuple[str, str, int], Resource]:
        """Cluster, address and port to health as Envoy tells it, {'eds_health_status': 'HEALTHY'} when it is well."""
        found = {}
        for cluster in self.get("/clusters?format=json").get("cluster_statuses", []):
            for host in cluster.get("host_statuses", []):
                found[(cluster["name"], *place_of(host["address"]))] = host["health_status"]
        return found


class Unit:
    """The systemd unit that runs Envoy, as it was when it was looked at; without a name nothing runs."""

    def __init__(self, module: AnsibleModule) -> None:
        self.name: str | None = module.params["unit"]
        self.module = module
        self.shown: dict[str, str] = {}
        self.look()

    def look(self) -> None:
        """Asks systemd."""
        if self.name:
            properties = "ActiveState,UnitFileState,MainPID,NeedDaemonReload"
            command = ["systemctl", "show", f"--property={properties}", self.name]
            output = self.module.run_command(command, check_rc=True)[1]
            self.shown = dict(line.split("=", 1) for line in output.splitlines())

    def active(self) -> bool:
        """Whether it runs."""
        return self.shown.get("ActiveState") == "active"

    def enabled(self) -> bool:
        """Whether it starts at boot."""
        return self.shown.get("UnitFileState") == "enabled"

    def up_to_date(self) -> bool:
        """Whether it runs on the start files: nobody has begun to write them without having started it since.

        Without a record it was deployed by a version that kept none.
        """
        record = self.module.params["start_record"]
        if not self.active() or self.shown["NeedDaemonReload"] == "yes":
            return False
        return record is None or not Path(record).exists() or self.recorded()

    def recorded(self) -> bool:
        """Whether the record says that it was started from the start files."""
        record = self.module.params["start_record"]
        return record is not None and Path(record).exists() and Path(record).read_text() == self.start_digest()

    def start_digest(self) -> str:
        """What tells the start files from others."""
        texts = (
            file["link"] if file["content"] is None else file["content"] for file in self.module.params["start_files"]
        )
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    def loopback_ports(self) -> list[int]:
        """Ports on 127.0.0.1 that its main process listens on."""
        process = PROC / self.shown["MainPID"]
        sockets = set()
        try:
            for descriptor in (process / "fd").iterdir():
                # Clients' connections may end while we look.
                with suppress(FileNotFoundError):
                    sockets.add(str(descriptor.readlink()))
            rows = [row.split() for row in (process / "net" / "tcp").read_text().splitlines()[1:]]
        except OSError:
            return []  # the process ended meanwhile
        places = [row[1].split(":") for row in rows if row[3] == TCP_LISTEN and f"socket:[{row[9]}]" in sockets]
        return sorted({int(port, 16) for address, port in places if address == LOOPBACK})


class Edge:
    """The directory of files and, when its admin interface answers, the Envoy that reads them."""

    def __init__(self, module: AnsibleModule, files: list[XdsFile]) -> None:
        self.module = module
        self.files = files
        self.directory = Path(module.params["directory"])
        self.header: str = module.params["header"]
        self.timeout: int = module.params["timeout"]
        self.admin = Admin(module.params["admin_port"])
        self.unit = Unit(module)
        self.running = self.admin.answers()
        if not self.running and module.params["state"] == "present":
            self.find()
        self.started = time.time()
        self.before: Stats = self.admin.stats() if self.running else {}

    def find(self) -> None:
        """Waits until a unit that runs is found at any port; NotApplied when it never answers.

        To write the files all the same would give them to Envoy in no order and unjudged.
        """
        deadline = time.monotonic() + self.timeout
        while self.unit.active():
            # It may be at the port of an earlier run, as long as it was not restarted.
            for admin in map(Admin, [self.admin.port, *self.unit.loopback_ports()]):
                if admin.answers():
                    self.admin, self.running = admin, True
                    return
            if time.monotonic() > deadline:
                raise NotApplied(
                    f"{self.unit.name} runs, but its admin interface answers neither on 127.0.0.1:{self.admin.port} nor"
                    f" on another port that it has open there, for {self.timeout} s. Nothing was written."
                    f" If Envoy hangs, `systemctl stop {self.unit.name}` and run this again."
                )
            time.sleep(POLL_SECONDS)
            self.unit.look()

    def read(self, path: str) -> str | None:
        """The file's text, None when it is not there."""
        try:
            return (self.directory / path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def leaving(self) -> list[dict[str, str]]:
        """Endpoints that Envoy has and that no file has any more, or has elsewhere: name and address of each."""
        wanted = {place for file in self.files if file.type == ENDPOINTS for place in file.endpoints()}
        found: dict[tuple[str, int], str] = {}
        for item in self.admin.dump().get("EndpointsConfigDump", {}).get("dynamic_endpoint_configs", []):
            found |= endpoints_of(item["endpoint_config"])
        return [
            {"name": name, "address": f"{address}:{port}"}
            for (address, port), name in sorted(found.items(), key=lambda item: item[1])
            if (address, port) not in wanted
        ]

    def newcomers(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Endpoints that Envoy does not have yet, by address and port: name and health path."""
        present = {(address, port) for _, address, port in self.admin.hosts()} if self.running else set()
        paths = {
            cluster["name"]: check["http_health_check"]["path"]
            for file in self.files
            if file.type == CLUSTER
            for cluster in file.resources
            for check in cluster.get("health_checks", [])
        }
        return {
            place: (name, paths[file.names()[0]])
            for file in self.files
            if file.type == ENDPOINTS and file.names()[0] in paths
            for place, name in file.checked_endpoints().items()
            if place not in present
        }

    def expect_healthy_newcomers(self) -> None:
        """Waits until every endpoint that is to join answers this host; NotApplied with those that do not."""
        newcomers = self.newcomers()

        def problems() -> list[str]:
            return [
                f"{name} ({address}:{port}) does not answer {path} with 200 ({reason})"
                for (address, port), (name, path) in newcomers.items()
                if (reason := unhealthy(address, port, path))
            ]

        patience, self.timeout = self.timeout, self.module.params["healthy_timeout"]
        try:
            self.wait("Waiting for who is to join; nothing was written", problems)
        finally:
            self.timeout = patience

    def strangers(self) -> list[str]:
        """Files below the directory that are named like ours and that nobody wants."""
        found = {str(path.relative_to(self.directory)) for path in self.directory.rglob("[!.]*.yaml")}
        return sorted(found - {file.path for file in self.files})

    def changed_files(self) -> list[XdsFile]:
        """Files to write: those whose text differs, and those that Envoy refused before.

        Envoy looks at a file again only when it is moved into place again, so a refusal whose cause is gone, such as a
        port that was taken, is mended by that.
        """
        return [
            file for file in self.files if self.read(file.path) != file.text(self.header) or file.refused(self.before)
        ]

    def ends(self) -> str:
        """What ends which open websockets, in one line; empty when none end."""
        if not self.running:
            return ""
        restart = self.restart_reasons()
        listeners = self.changing_listeners()
        if not restart and not listeners:
            return ""
        websockets = self.admin.websockets()
        changing = [name for name in listeners if name in websockets]
        count = sum(websockets.values()) if restart else sum(websockets[name] for name in changing)
        if not count:
            return ""
        reasons = [*restart, *(f"listener {name} {listeners[name]}" for name in changing)]
        return f"{', '.join(reasons)}: {count} open websocket{' ends' if count == 1 else 's end'}"

    def restart_reasons(self) -> list[str]:
        """Why Envoy is going to be started anew."""
        reasons = [f"the {name} changes" for name in self.differing]
        if not reasons and self.unit.active() and not self.unit.up_to_date():
            reasons = ["Envoy's process is older than what it is started from"]
        return reasons

    @cached_property
    def differing(self) -> list[str]:
        """Names of the files and links that Envoy is started from and that are not as they are going to be."""
        return [file["name"] for file in self.module.params["start_files"] if self.start_file_differs(file)]

    def start_file_differs(self, file: dict[str, str | None]) -> bool:
        """Whether a file or link that Envoy is started from is not as it is going to be."""
        path = Path(str(file["path"]))
        try:
            if file["link"] is not None:
                return str(path.readlink()) != file["link"]
            return path.read_text(encoding="utf-8") != file["content"] or self.would_own(path, "0644")
        except OSError:
            return True

    def changing_listeners(self) -> dict[str, str]:
        """Listeners that Envoy may have and that do not stay as they are, and what happens to them."""
        file = next((file for file in self.files if file.type == LISTENER), None)
        if file is None:
            return {}
        before, after = resource_texts(self.read(file.path) or ""), resource_texts(file.text(self.header))
        changing = {
            name: "changes" if name in after else "is removed"
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        }
        if file.refused(self.before):
            changing |= dict.fromkeys(self.refused_listeners(), "changes")
        return changing

    def refused_listeners(self) -> list[str]:
        """Listeners that Envoy has in another version than the one that it refused."""
        found = self.admin.dump().get("ListenersConfigDump", {}).get("dynamic_listeners", [])
        return [item["name"] for item in found if "error_state" in item and "active_state" in item]

    def own(self, path: Path, mode: str, group: str | None = None) -> bool:
        """Gives owner, group and mode, except in check mode; True when that changed something."""
        arguments = {**self.module.params, "mode": mode, "attributes": None}
        arguments["group"] = group or arguments["group"]
        wanted = self.module.load_file_common_arguments(arguments, path=str(path))
        return bool(self.module.set_fs_attributes_if_different(wanted, changed=False))

    def own_file(self, path: Path, text: str) -> bool:
        """The same for a file with this text: private keys are for Envoy and nobody else."""
        if is_secret(text):
            return self.own(path, "0640", self.module.params["secrets_group"])
        return self.own(path, "0644")

    def would_own(self, path: Path, mode: str) -> bool:
        """Whether the path has another owner, group or mode."""
        checking, self.module.check_mode = self.module.check_mode, True
        try:
            return self.own(path, mode)
        finally:
            self.module.check_mode = checking

    def directories(self) -> list[Path]:
        """The directory and those of the files below it."""
        return sorted({self.directory, *((self.directory / file.path).parent for file in self.files)})

    def make_directories(self) -> None:
        """Makes them."""
        for directory in self.directories():
            directory.mkdir(parents=True, exist_ok=True)
            self.own(directory, "0755")

    def put(self, path: str, text: str) -> None:
        """Moves the text into place, complete with owner and mode: Envoy reads it in the same instant."""
        target = self.directory / path
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            self.own_file(temporary, text)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def wait(self, what: str, problems_now: Callable[[], list[str]]) -> None:
        """Polls until there are no problems; NotApplied with the last ones after the timeout."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                problems = problems_now()
            except OSError as error:
                problems = [f"Envoy's admin interface does not answer ({error})"]
            if not problems:
                return
            if time.monotonic() > deadline:
                raise NotApplied(f"{what}: not done after {self.timeout} s: {'; '.join(problems)}")
            time.sleep(POLL_SECONDS)

    def problems(self, files: Iterable[XdsFile]) -> list[str]:
        """What of these files Envoy does not run on yet; NotApplied when it has refused any file since the start."""
        stats = self.admin.stats()
        refused = [file.path for file in self.files if file.refusals(stats) > file.refusals(self.before)]
        if refused:
            raise NotApplied(f"Envoy refused {', '.join(refused)}: {self.reason()}")
        dump = self.admin.dump()
        return [line for file in files for line in file.version_problems(stats) + file.activity_problems(dump)]

    def health_problems(self) -> list[str]:
        """The endpoints that Envoy does not find healthy, one line each."""
        hosts = self.admin.hosts()
        return [line for file in self.files for line in file.health_problems(hosts)]

    def reason(self) -> str:
        """Why Envoy refused an update, in its own words; waits a moment for the journal to have them."""
        deadline = time.monotonic() + JOURNAL_SECONDS
        while True:
            listeners = self.admin.dump().get("ListenersConfigDump", {}).get("dynamic_listeners", [])
            found = [item["error_state"]["details"] for item in listeners if "error_state" in item]
            found = found or self.reasons_in_journal()
            if found or not self.unit.name or time.monotonic() > deadline:
                return "; ".join(dict.fromkeys(map(in_one_line, found))) or "its log has the reason"
            time.sleep(POLL_SECONDS)

    def journal(self, *options: str) -> str:
        """What the unit logged, one record a line; empty when no unit is known."""
        if not self.unit.name:
            return ""
        command = ["journalctl", "--unit", self.unit.name, "--output", "cat", "--no-pager", *options]
        return str(self.module.run_command(command)[1])

    def reasons_in_journal(self) -> list[str]:
        """What Envoy logged since the start about files that it refused; config_dump knows only of listeners."""
        log = self.journal("--since", f"@{self.started:.6f}")
        # A report may span lines; the next record begins with its time in brackets or is a line of the access log.
        return re.findall(r"Filesystem config update (?:rejected|failure): (.*?)(?=\n[\[{]|\Z)", log, re.DOTALL)

    def expect_an_answer(self) -> None:
        """Waits for the admin interface; NotApplied with the unit's last words."""
        try:
            self.wait(
                f"Asking Envoy on 127.0.0.1:{self.admin.port}",
                lambda: [] if self.admin.answers() else ["its admin interface does not answer"],
            )
        except NotApplied as error:
            raise NotApplied(f"{error}. {in_one_line(self.journal('--lines', '5'))}".strip()) from error
        self.running = True
        self.before = self.admin.stats()

    def steps(self, changed: list[XdsFile]) -> list[list[XdsFile]]:
        """The files to write, in steps that Envoy finishes one after another.

        What nothing names yet goes first. Clusters that are to leave stay until no route names them any more.
        """
        new = [file for file in changed if file.type in SINGLE_TYPES and self.read(file.path) is None]
        steps = [[file for file in changed if file.type == kind and file not in new] for kind in TYPES]
        clusters = [file for file in self.files if file.type == CLUSTER]
        parting = self.parting_clusters()
        if parting:
            steps[0] = [XdsFile(file.path, file.resources + parting) for file in clusters]
            steps.append(clusters)
        return [new, *steps]

    def parting_clusters(self) -> list[Resource]:
        """Clusters that Envoy has and that the files no longer name."""
        if not self.running:
            return []
        wanted = {name for file in self.files if file.type == CLUSTER for name in file.names()}
        active = self.admin.dump().get("ClustersConfigDump", {}).get("dynamic_active_clusters", [])
        return [item["cluster"] for item in active if item["cluster"]["name"] not in wanted]

    def apply(self, changed: list[XdsFile], strangers: list[str]) -> None:
        """Writes what changed, step by step, and proves the whole; what fails on the way puts everything back."""
        texts = {path: self.read(path) for path in [*(file.path for file in self.files), *strangers]}
        self.make_directories()
        try:
            for number, step in enumerate(self.steps(changed) if changed or strangers else []):
                for file in step:
                    self.put(file.path, file.text(self.header))
                if step and number and self.running:
                    self.wait(f"Loading {', '.join(file.path for file in step)}", partial(self.problems, step))
            for path in strangers:
                (self.directory / path).unlink()
            if self.running:
                self.prove()
        except (NotApplied, OSError) as error:
            raise NotApplied(f"{error}. {self.restore(texts)}.") from error

    def prove(self) -> None:
        """Waits until Envoy runs on the files and its ports are open."""
        self.wait(
            "Loading the configuration",
            lambda: self.problems(self.files) or [line for file in self.files for line in file.port_problems()],
        )

    def prove_healthy(self) -> None:
        """Waits until Envoy finds every endpoint healthy, if that is asked for."""
        if self.module.params["healthy_timeout"]:
            self.timeout = self.module.params["healthy_timeout"]
            self.wait("Waiting until Envoy finds every endpoint healthy", self.health_problems)

    def in_order(self) -> bool:
        """Whether there is nothing to do and nothing to wait for."""
        unit = self.unit
        if not (self.running and unit.enabled() and unit.up_to_date() and unit.recorded() and not self.differing):
            return False
        try:
            return self.as_wanted() and not self.problems_at_once()
        except (NotApplied, OSError):
            return False

    def as_wanted(self) -> bool:
        """Whether every file and folder is there as it is going to be, and no other."""
        account = self.module.params["account"]
        if account and account not in {known.pw_name for known in pwd.getpwall()}:
            return False
        if not all(Path(path).is_file() for path in self.module.params["needed"]):
            return False
        if self.changed_files() or self.strangers():
            return False
        self.module.check_mode = True
        folders = [Path(self.module.params["start_record"]).parent, *self.directories()]
        return not any(
            [self.own(folder, "0755") for folder in folders]
            + [self.own_file(self.directory / file.path, file.text(self.header)) for file in self.files]
        )

    def problems_at_once(self) -> list[str]:
        """What would be waited for: the files loaded, ports open and, where that is asked for, endpoints healthy."""
        problems = self.problems(self.files) + [line for file in self.files for line in file.port_problems()]
        return problems + (self.health_problems() if self.module.params["healthy_timeout"] else [])

    def difference(self, texts: dict[str, str]) -> list[dict[str, str]]:
        """Files and their texts as Ansible shows them under --diff, of those with private keys only the version."""

        def shown(text: str) -> str:
            return "".join(re.findall(r"^version_info: .*\n", text, re.MULTILINE)) if is_secret(text) else text

        return [
            {"before_header": path, "after_header": path, "before": shown(self.read(path) or ""), "after": shown(text)}
            for path, text in texts.items()
        ]

    def prove_files(self) -> None:
        """NotProven when files, or their owners and modes, are not the wanted ones; changes none of it."""
        texts = {file.path: file.text(self.header) for file in self.files}
        texts = {path: text for path, text in texts.items() if self.read(path) != text}
        texts |= dict.fromkeys(self.strangers(), "")
        self.module.check_mode = True
        names = [
            *texts,
            *(
                f"{file.path} (owner or mode)"
                for file in self.files
                if file.path not in texts and self.own_file(self.directory / file.path, file.text(self.header))
            ),
        ]
        if not names:
            return
        told = f"{self.directory} is not what the variables say and was left alone: {', '.join(names)}."
        if self.module._diff:
            # Ansible shows no diff of a task that failed, so it is part of the message.
            lines = [
                line
                for part in self.difference(texts)
                for line in difflib.unified_diff(
                    part["before"].splitlines(),
                    part["after"].splitlines(),
                    f"{part['before_header']} on the host",
                    f"{part['after_header']} wanted",
                    lineterm="",
                )
            ]
            told = "\n".join([told, *lines])
        raise NotProven(told)

    def restore(self, texts: dict[str, str | None]) -> str:
        """Puts the files back as they were and waits until Envoy is at them; a sentence on how that went."""
        different = {path: text for path, text in texts.items() if self.read(path) != text}
        if not different:
            return "The files are as they were before"
        try:
            before = self.admin.stats()
        except OSError:
            before = {}
        # The files that name others come after those, and what was not there before goes last.
        for path, text in sorted(different.items(), key=lambda item: (item[1] is None, "/" not in item[0])):
            if text is None:
                (self.directory / path).unlink()
            else:
                self.put(path, text)
        if not self.running:
            return "The previous files are back in place"

        def problems_now() -> list[str]:
            stats = self.admin.stats()
            problems = [f"cluster {name} is still warming" for name in sorted(warming_clusters(self.admin.dump()))]
            for file in self.files:
                # A version alone does not tell: a refused update may have been taken in part, and leaves the version.
                counters = [f"{prefix}.update_success" for prefix in file.subscriptions(before)]
                if different.get(file.path) and any(stats.get(name, 0) <= before.get(name, 0) for name in counters):
                    problems.append(f"{file.path} is not loaded again")
            return problems

        try:
            self.wait("Loading them", problems_now)
        except NotApplied as error:
            return f"The previous files are back in place, but Envoy is not at them yet. {error}"
        return "The previous files are back in place and Envoy has loaded them: what served before serves on"


def expect_user_namespaces() -> None:
    """Raises NotApplied where systemd could not start the unit."""
    allowed = PROC / "sys/user/max_user_namespaces"
    if allowed.is_file() and allowed.read_text().strip() == "0":
        raise NotApplied(
            "user.max_user_namespaces is 0 on this host, so systemd cannot start a unit with PrivateUsers: raise it,"
            " for example sysctl -w user.max_user_namespaces=10000, and in /etc/sysctl.d for good"
            ". Nothing that serves was changed."
        )


def run(module: AnsibleModule) -> dict[str, Any]:
    """Does what the parameters ask; the module's result."""
    if module.params["unit"] and module.params["state"] == "present":
        expect_user_namespaces()
    keys = module.params["private_keys"]
    files = [XdsFile(path, with_key(resources, keys.get(path))) for path, resources in module.params["files"].items()]
    edge = Edge(module, files)
    result = {
        "changed": False,
        "written": [],
        "removed": [],
        "left": [],
        "versions": {file.path: file.version for file in files},
        "proven": False,
        "up_to_date": edge.unit.up_to_date(),
        "enabled": edge.unit.enabled(),
        "recorded": edge.unit.recorded(),
        "start_digest": edge.unit.start_digest(),
        "differing": edge.differing,
    }
    if module.params["state"] == "compared":
        in_order = edge.in_order()
        return result | {"in_order": in_order, "proven": in_order}
    if module.params["state"] == "proven":
        edge.prove_files()
        if not edge.running:
            edge.expect_an_answer()
        edge.prove()
        edge.prove_healthy()
        return result | {"proven": True}

    changed = edge.changed_files()
    strangers = edge.strangers()
    texts = {file.path: file.text(edge.header) for file in changed} | dict.fromkeys(strangers, "")
    # Before websockets are counted: it may take a minute, in which users come.
    if texts and module.params["healthy_timeout"] and not module.check_mode:
        edge.expect_healthy_newcomers()
    result |= {
        "changed": bool(texts),
        "written": [file.path for file in changed],
        "removed": strangers,
        "left": edge.leaving() if texts and edge.running else [],
        "diff": edge.difference(texts),
        "ends": edge.ends(),
    }
    if result["ends"] and not module.params["may_end_websockets"]:
        told = f"{result['ends']}. {HOW_TO_GO_ON}"
        if not module.check_mode:
            raise EndsWebsockets(f"Open websockets would end, so nothing that serves was changed: {told}")
        module.warn(f"Open websockets would end, so this is going to be refused: {told}")
    if module.check_mode:
        return result

    edge.apply(changed, strangers)
    owned = [edge.own_file(edge.directory / file.path, file.text(edge.header)) for file in files]
    return result | {"changed": any([result["changed"], *owned]), "proven": edge.running}


def main() -> None:
    """Runs as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "proven", "compared"], "default": "present"},
            "directory": {"type": "path", "required": True},
            "files": {"type": "dict", "required": True},
            "private_keys": {"type": "dict", "default": {}, "no_log": True},
            "header": {"type": "str", "default": ""},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "secrets_group": {"type": "str", "no_log": False},
            "admin_port": {"type": "int", "default": 9901},
            "timeout": {"type": "int", "default": 30},
            "healthy_timeout": {"type": "int", "default": 0},
            "unit": {"type": "str"},
            "start_files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "path": {"type": "path", "required": True},
                    "content": {"type": "str"},
                    "link": {"type": "str"},
                },
                "required_one_of": [("content", "link")],
                "mutually_exclusive": [("content", "link")],
            },
            "start_record": {"type": "path"},
            "needed": {"type": "list", "elements": "path", "default": []},
            "account": {"type": "str"},
            "may_end_websockets": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    try:
        result = run(module)
    except (EndsWebsockets, InvalidFiles, NotApplied, NotProven, OSError) as error:
        module.fail_json(msg=str(error))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
