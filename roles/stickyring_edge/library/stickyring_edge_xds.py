#!/usr/bin/python
"""Ansible module: filesystem xDS files for Envoy, proven in the running process."""

from __future__ import annotations

DOCUMENTATION = r"""
module: stickyring_edge_xds
short_description: Write Envoy's filesystem xDS files and prove that Envoy runs on them
description:
  - Writes every file of O(files) by renaming it into place, which is the only change Envoy's file subscription notices,
    and only those whose content differs. Each file is stamped with a C(version_info) that is a hash of its resources.
  - The order never names what is not there yet (endpoints of new clusters, clusters, endpoints, routes, listeners), and
    what is no longer wanted goes last.
  - When Envoy's admin interface answers, each step is awaited there. A rejected or unfinished step puts the previous
    files back and fails with Envoy's own words. Without an answer the files are only written.
  - With nothing to change the module just proves the state and reports no change.
options:
  directory:
    description: Directory of the files; made when missing, with one level of sub-directories.
    type: path
    required: true
  files:
    description:
      - Path below O(directory), ending in C(.yaml), to the list of resources in Envoy's JSON notation with C(@type).
      - One resource type a file; a file of routes or endpoints holds exactly one resource, since Envoy takes no more.
    type: dict
    required: true
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
  admin_port:
    description: Port of Envoy's admin interface on 127.0.0.1.
    type: int
    default: 9901
  admin_required:
    description: Fail when the admin interface does not answer within O(timeout).
    type: bool
    default: false
  timeout:
    description: Seconds that each step may take until Envoy has it.
    type: int
    default: 30
  healthy_timeout:
    description: Seconds to wait until Envoy finds every endpoint healthy; 0 asks nothing.
    type: int
    default: 0
  unit:
    description: systemd unit whose journal is searched for Envoy's reason when the admin interface does not tell it.
    type: str
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
      endpoints/nodes.yaml: ["{{ cluster_load_assignment }}"]

- name: Prove that Envoy runs on them and finds every endpoint healthy
  stickyring_edge_xds:
    directory: /etc/stickyring-edge/xds
    files: "{{ files }}"
    admin_required: true
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
versions:
  description: File to C(version_info).
  returned: success
  type: dict
proven:
  description: Whether a running Envoy was seen to be at these versions.
  returned: success
  type: bool
"""

import hashlib
import http.client
import json
import os
import re
import socket
import tempfile
import time
import urllib.parse

from ansible.module_utils.basic import AnsibleModule

CLUSTER = "envoy.config.cluster.v3.Cluster"
ENDPOINTS = "envoy.config.endpoint.v3.ClusterLoadAssignment"
ROUTES = "envoy.config.route.v3.RouteConfiguration"
LISTENER = "envoy.config.listener.v3.Listener"
ONE_RESOURCE_TYPES = (ENDPOINTS, ROUTES)
COUNTERS = ("update_rejected", "update_failure")
POLL_SECONDS = 0.1
# Words that some YAML parsers take for something else than text.
RESERVED_KEYS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


class InvalidFiles(Exception):
    """The wanted files must not be written; the message names the file."""


class NotApplied(Exception):
    """Envoy rejected a step or did not finish it in time; the message is Envoy's reason."""


def to_yaml(value, indent=0):
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


def version_of(resources):
    """The version_info of a file with these resources: 16 hexadecimal digits, whatever the order of keys."""
    return hashlib.sha256(json.dumps(resources, sort_keys=True).encode()).hexdigest()[:16]


class XdsFile:
    """One wanted file: its path below the directory, its resources, their type and version."""

    def __init__(self, path, resources):
        if not resources:
            raise InvalidFiles(
                f"{path}: no resources. Envoy would drop what it serves; leave the file out to remove it."
            )
        types = {resource.get("@type", "").removeprefix("type.googleapis.com/") for resource in resources}
        if len(types) != 1 or not types <= {CLUSTER, ENDPOINTS, ROUTES, LISTENER}:
            raise InvalidFiles(
                f"{path}: one resource type a file, of clusters, endpoints, routes, listeners; got {types}."
            )
        self.path = path
        self.type = types.pop()
        self.resources = resources
        self.version = version_of(resources)
        if self.type in ONE_RESOURCE_TYPES and len(resources) != 1:
            raise InvalidFiles(f"{path}: Envoy takes exactly one resource from such a file; got {len(resources)}.")
        if self.type == ENDPOINTS and not self.endpoints():
            raise InvalidFiles(f"{path}: the endpoint list is empty. Envoy would accept it and then refuse every user.")

    def endpoints(self):
        """(address, port) -> endpoint name, for a file of endpoints."""
        found = {}
        for locality in self.resources[0].get("endpoints", []):
            for item in locality.get("lb_endpoints", []):
                address = item["endpoint"]["address"]["socket_address"]
                found[(address["address"], address["port_value"])] = item["endpoint"].get("hostname", "")
        return found

    def names(self):
        return [resource["name"] for resource in self.resources]

    def text(self, header):
        return (
            header.rstrip() + "\n" * bool(header) + to_yaml({"version_info": self.version, "resources": self.resources})
        )


class Admin:
    """Envoy's admin interface on the loopback address."""

    def __init__(self, port):
        self.port = port

    def get(self, path):
        """The body as text; OSError when nothing answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read().decode()
        except http.client.HTTPException as error:
            raise OSError(f"127.0.0.1:{self.port} is not Envoy's admin interface: {error!r}") from error
        finally:
            connection.close()
        if response.status != 200:
            raise OSError(f"http://127.0.0.1:{self.port}{path} answered {response.status}")
        return body

    def answers(self):
        try:
            self.get("/server_info")
        except OSError:
            return False
        return True

    def stats(self):
        """Subscription statistics: name -> number, or text for version_text."""
        pattern = urllib.parse.quote(r"(version_text|update_rejected|update_failure|update_success)$")
        return {
            item["name"]: item["value"]
            for item in json.loads(self.get(f"/stats?format=json&filter={pattern}"))["stats"]
            if "name" in item
        }

    def dump(self):
        """config_dump by the last part of each section's type, for example ClustersConfigDump."""
        configs = json.loads(self.get("/config_dump?include_eds"))["configs"]
        return {config["@type"].rpartition(".")[2]: config for config in configs}

    def hosts(self):
        """(cluster, address, port) -> health status as Envoy tells it, for example {'eds_health_status': 'HEALTHY'}."""
        found = {}
        for cluster in json.loads(self.get("/clusters?format=json")).get("cluster_statuses", []):
            for host in cluster.get("host_statuses", []):
                address = host["address"]["socket_address"]
                found[(cluster["name"], address["address"], address["port_value"])] = host["health_status"]
        return found


def subscriptions(file, stats):
    """Statistics prefixes of the subscriptions that read this file."""
    if file.type == CLUSTER:
        return ["cluster_manager.cds"]
    if file.type == LISTENER:
        return ["listener_manager.lds"]
    if file.type == ENDPOINTS:
        return [f"cluster.{file.resources[0]['cluster_name']}"]
    ending = f".rds.{file.names()[0]}.version_text"
    return [name.removesuffix(".version_text") for name in stats if name.startswith("http.") and name.endswith(ending)]


def failures(file, stats):
    """How many updates of this file Envoy has refused since it started."""
    return sum(stats.get(f"{prefix}.{counter}", 0) for prefix in subscriptions(file, stats) for counter in COUNTERS)


def version_problems(files, stats):
    """What Envoy's subscriptions have not loaded yet, one line a file."""
    problems = []
    for file in files:
        loaded = [stats.get(f"{prefix}.version_text") or "none" for prefix in subscriptions(file, stats)]
        if set(loaded) != {file.version}:
            problems.append(f"{file.path}: Envoy is at version {', '.join(loaded) or 'none'}, not at {file.version}")
    return problems


def activity_problems(files, dump):
    """Resources that are not active, are still warming, are in error, or should be gone; one line each."""
    problems = []
    clusters = dump.get("ClustersConfigDump", {})
    active = {item["cluster"]["name"] for item in clusters.get("dynamic_active_clusters", [])}
    warming = {item["cluster"]["name"] for item in clusters.get("dynamic_warming_clusters", [])}
    listeners = {item["name"]: item for item in dump.get("ListenersConfigDump", {}).get("dynamic_listeners", [])}
    serving = {name for name, item in listeners.items() if "active_state" in item}
    for file in files:
        if file.type == CLUSTER:
            problems += [f"cluster {name} is not active" for name in file.names() if name not in active]
            problems += [f"cluster {name} is still warming" for name in file.names() if name in warming]
            problems += [f"cluster {name} is still there" for name in sorted(active - set(file.names()))]
        elif file.type == LISTENER:
            problems += [f"listener {name} is not active" for name in file.names() if name not in serving]
            problems += [
                f"listener {name} is still warming"
                for name in file.names()
                if "warming_state" in listeners.get(name, {})
            ]
            problems += [f"listener {name} is still there" for name in sorted(serving - set(file.names()))]
        elif file.type == ENDPOINTS:
            cluster = file.resources[0]["cluster_name"]
            loaded = next(
                (
                    XdsFile(file.path, [item["endpoint_config"]]).endpoints()
                    for item in dump.get("EndpointsConfigDump", {}).get("dynamic_endpoint_configs", [])
                    if item["endpoint_config"]["cluster_name"] == cluster
                    and any(part.get("lb_endpoints") for part in item["endpoint_config"].get("endpoints", []))
                ),
                {},
            )
            if set(loaded) != set(file.endpoints()):
                problems.append(f"cluster {cluster} has other endpoints than {file.path}: {sorted(loaded)}")
    return problems


def reasons(dump):
    """Envoy's own words about resources that it rejected, as it keeps them in config_dump."""
    found = []
    for section, key in (
        ("ListenersConfigDump", "dynamic_listeners"),
        ("RoutesConfigDump", "dynamic_route_configs"),
        ("ClustersConfigDump", "dynamic_active_clusters"),
        ("ClustersConfigDump", "dynamic_warming_clusters"),
        ("EndpointsConfigDump", "dynamic_endpoint_configs"),
    ):
        for item in dump.get(section, {}).get(key, []):
            if "error_state" in item:
                found.append(item["error_state"]["details"])
    return found


def port_problems(files):
    """Listener ports that accept no connection, one line each."""
    problems = []
    for listener in (resource for file in files if file.type == LISTENER for resource in file.resources):
        where = listener["address"]["socket_address"]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(where["address"], where["address"])
        try:
            socket.create_connection((host, where["port_value"]), timeout=5).close()
        except OSError as error:
            problems.append(
                f"listener {listener['name']}: {host}:{where['port_value']} accepts no connection ({error})"
            )
    return problems


def health_problems(files, admin):
    """Endpoints that Envoy does not find healthy, one line each with name, address and Envoy's flags."""
    hosts = admin.hosts()
    problems = []
    for file in (file for file in files if file.type == ENDPOINTS):
        cluster = file.resources[0]["cluster_name"]
        for (address, port), name in file.endpoints().items():
            status = hosts.get((cluster, address, port), {"unknown to Envoy": True})
            flags = [flag for flag, value in status.items() if value is True]
            if flags or status.get("eds_health_status", "HEALTHY") != "HEALTHY":
                told = ", ".join(flags) or status["eds_health_status"]
                problems.append(f"{name} ({address}:{port}) in cluster {cluster}: {told}")
    return problems


class Edge:
    """The directory of files and, when its admin interface answers, the Envoy that reads them."""

    def __init__(self, module):
        self.module = module
        self.directory = module.params["directory"]
        self.header = module.params["header"]
        self.timeout = module.params["timeout"]
        self.admin = Admin(module.params["admin_port"])
        self.running = False
        self.started = time.time()

    def read(self, path):
        """The file's text, or None."""
        try:
            with open(os.path.join(self.directory, path), encoding="utf-8") as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def existing(self):
        """Paths of all files below the directory that are named like ours."""
        found = []
        for parent, _directories, names in os.walk(self.directory):
            found += [
                os.path.relpath(os.path.join(parent, name), self.directory)
                for name in names
                if name.endswith(".yaml") and not name.startswith(".")
            ]
        return sorted(found)

    def own(self, path, mode):
        """Gives owner, group and mode; True when that changed something."""
        arguments = dict(self.module.params, mode=mode, attributes=None)
        return self.module.set_fs_attributes_if_different(
            self.module.load_file_common_arguments(arguments, path=path), False
        )

    def make_directories(self, paths):
        for name in sorted({self.directory} | {os.path.dirname(os.path.join(self.directory, path)) for path in paths}):
            if not os.path.isdir(name):
                os.makedirs(name)
            self.own(name, "0755")

    def put(self, path, text):
        """Moves the text into place, complete with owner and mode: Envoy reads it in the same instant."""
        target = os.path.join(self.directory, path)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            self.own(temporary, "0644")
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    def remove(self, path):
        os.unlink(os.path.join(self.directory, path))

    def wait(self, problems_now, what):
        """Polls until there are no problems; NotApplied with the last ones at the deadline."""
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

    def reason(self):
        """Why Envoy refused an update, in its own words."""
        found = reasons(self.admin.dump())
        if not found and self.module.params["unit"]:
            _code, output, _error = self.module.run_command(
                [
                    "journalctl",
                    "--unit",
                    self.module.params["unit"],
                    "--since",
                    f"@{int(self.started)}",
                    "--output",
                    "cat",
                    "--no-pager",
                ]
            )
            found = re.findall(r"Filesystem config update (?:rejected|failure): (.*)", output)
        return "; ".join(dict.fromkeys(found)) or "the reason is in Envoy's log"

    def refuse_rejections(self, files, before):
        """The statistics of now; NotApplied when Envoy refused one of the files since ``before``."""
        stats = self.admin.stats()
        refused = [file.path for file in files if failures(file, stats) > failures(file, before)]
        if refused:
            raise NotApplied(f"Envoy rejected {', '.join(refused)}: {self.reason()}")
        return stats

    def prove(self, files, before):
        """Waits until Envoy runs on exactly these files and every listener's port is open."""

        def problems_now():
            stats = self.refuse_rejections(files, before)
            return (version_problems(files, stats) + activity_problems(files, self.admin.dump())) or port_problems(
                files
            )

        self.wait(problems_now, "Loading the configuration")

    def apply(self, files, changed, stale):
        """Writes what changed, step by step; a step that Envoy refuses puts everything back as it was."""
        before = self.admin.stats() if self.running else {}
        texts = {path: self.read(path) for path in [file.path for file in files] + stale}
        new = [file for file in changed if texts[file.path] is None and file.type in ONE_RESOURCE_TYPES]
        old = [file for file in changed if file not in new]
        parting = self.parting_clusters(files) if self.running else []
        clusters = [file for file in files if file.type == CLUSTER]
        steps = [new]
        if parting:
            # Clusters that are to go stay until no route names them any more.
            steps.append([XdsFile(file.path, file.resources + parting) for file in clusters])
        steps += [
            [file for file in old if file.type == kind]
            for kind in (CLUSTER, ENDPOINTS, ROUTES, LISTENER)
            if not (parting and kind == CLUSTER)
        ]
        if parting:
            steps.append(clusters)
        try:
            for step in (step for step in steps if step):
                for file in step:
                    self.put(file.path, file.text(self.header))
                if self.running and step is not new:
                    self.wait(
                        lambda step=step: (
                            version_problems(step, self.refuse_rejections(files, before))
                            + activity_problems(
                                [file for file in step if file.type in (CLUSTER, LISTENER)], self.admin.dump()
                            )
                        ),
                        f"Loading {', '.join(file.path for file in step)}",
                    )
            for path in stale:
                self.remove(path)
            if self.running:
                self.prove(files, before)
        except NotApplied as error:
            raise NotApplied(f"{error}. {self.restore(files, texts)}") from error

    def parting_clusters(self, files):
        """Clusters that Envoy has and that the files no longer name, as resources."""
        wanted = {name for file in files if file.type == CLUSTER for name in file.names()}
        active = self.admin.dump().get("ClustersConfigDump", {}).get("dynamic_active_clusters", [])
        return [item["cluster"] for item in active if item["cluster"]["name"] not in wanted]

    def restore(self, files, texts):
        """Puts the files back as they were and waits until Envoy is at them; a sentence on how that went."""
        different = {path: text for path, text in texts.items() if self.read(path) != text}
        if not different:
            return "The files are as they were before"
        successes = self.admin.stats()
        # What is read by others comes back first; what was not there before goes last.
        for path, text in sorted(different.items(), key=lambda item: (item[1] is None, os.sep not in item[0])):
            if text is None:
                self.remove(path)
            else:
                self.put(path, text)
        returned = [file for file in files if different.get(file.path)]

        def problems_now():
            stats = self.admin.stats()
            problems = []
            for file in returned:
                version = re.search(r'^version_info: "(\w+)"$', different[file.path], re.MULTILINE)
                for prefix in subscriptions(file, successes):
                    counter = f"{prefix}.update_success"
                    if (
                        stats.get(counter, 0) <= successes.get(counter, 0)
                        or version
                        and stats.get(f"{prefix}.version_text") != version.group(1)
                    ):
                        problems.append(f"{file.path} is not loaded")
            return problems

        try:
            self.wait(problems_now, "Loading the previous files")
        except NotApplied as error:
            return f"The previous files are back in place, but Envoy is not at them: {error}"
        return "The previous files are back in place and Envoy is at them: what served before serves on"


def main():
    module = AnsibleModule(
        argument_spec=dict(
            directory=dict(type="path", required=True),
            files=dict(type="dict", required=True),
            header=dict(type="str", default=""),
            owner=dict(type="str"),
            group=dict(type="str"),
            admin_port=dict(type="int", default=9901),
            admin_required=dict(type="bool", default=False),
            timeout=dict(type="int", default=30),
            healthy_timeout=dict(type="int", default=0),
            unit=dict(type="str"),
        ),
        supports_check_mode=True,
    )
    try:
        run(module)
    except (InvalidFiles, NotApplied, OSError) as error:
        module.fail_json(msg=str(error))


def run(module):
    """Does what the parameters ask and ends the module with its result."""
    edge = Edge(module)
    files = [XdsFile(path, resources) for path, resources in module.params["files"].items()]
    if module.params["admin_required"] and not module.check_mode:
        edge.wait(
            lambda: [] if edge.admin.answers() else ["nothing answers"],
            f"Asking Envoy's admin interface on 127.0.0.1:{edge.admin.port}",
        )
    edge.running = edge.admin.answers()

    changed = [file for file in files if edge.read(file.path) != file.text(edge.header)]
    stale = [path for path in edge.existing() if path not in module.params["files"]]
    if edge.running:
        # Envoy reads a file again only when it is moved into place again, so a refusal whose cause is gone is mended here.
        stats = edge.admin.stats()
        behind = [file for file in files if version_problems([file], stats) and failures(file, stats)]
        changed += [file for file in behind if file not in changed]
    result = dict(
        changed=bool(changed or stale),
        written=[file.path for file in changed],
        removed=stale,
        versions={file.path: file.version for file in files},
        proven=False,
        diff=[
            dict(
                before_header=file.path,
                after_header=file.path,
                before=edge.read(file.path) or "",
                after=file.text(edge.header),
            )
            for file in changed
        ]
        + [dict(before_header=path, after_header=path, before=edge.read(path), after="") for path in stale],
    )
    if module.check_mode:
        module.exit_json(**result)

    edge.make_directories(module.params["files"])
    edge.apply(files, changed, stale)
    for file in files:
        result["changed"] |= edge.own(os.path.join(edge.directory, file.path), "0644")
    result["proven"] = edge.running
    if module.params["healthy_timeout"]:
        edge.timeout = module.params["healthy_timeout"]
        edge.wait(lambda: health_problems(files, edge.admin), "Waiting until Envoy finds every endpoint healthy")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
