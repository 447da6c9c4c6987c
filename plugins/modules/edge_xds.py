"""Ansible module: writes filesystem xDS files for Envoy and proves that Envoy has loaded them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: edge_xds
short_description: Write Envoy's filesystem xDS files and prove that Envoy runs on them
description:
  - Writes the files of O(files) whose content differs. Each is renamed into place, the only change that Envoy's file
    subscription notices, and carries a C(version_info) that is a hash of its resources.
  - Files are written in an order in which none names a resource that does not exist yet (new files, clusters,
    endpoints, routes, certificates, listeners). Files that are no longer wanted are removed last.
  - Each step waits until Envoy's admin interface shows it loaded. If Envoy rejects a step or does not finish it in
    time, the previous files are put back and the module fails with Envoy's reason.
  - Where no Envoy runs, the files are only written.
  - A change that would end open websockets is refused before anything is written, unless O(may_end_websockets) is true.
options:
  state:
    description:
      - V(present) writes the files.
      - V(proven) changes nothing. It fails when files differ, which it names and shows in diff mode, and when Envoy has
        not loaded them within O(timeout).
      - V(compared) changes nothing and waits for nothing. RV(in_order) is false when there is something to do.
    type: str
    choices: [present, proven, compared]
    default: present
  directory:
    description: Directory of the files, created if it is missing, with one level of sub-directories.
    type: path
    required: true
  files:
    description:
      - Path below O(directory), ending in C(.json), to the list of resources in Envoy's JSON notation with C(@type).
      - All resources of a file have one type. A file of routes, endpoints or a secret holds exactly one resource,
        because Envoy reads no more.
    type: dict
    required: true
  private_keys:
    description:
      - Private keys in PEM, by the path in O(files) of their secret. They are neither logged nor shown.
    type: dict
    default: {}
  owner:
    description: Owner of the files and directories; by default the user that runs the module.
    type: str
  group:
    description: Group of the files and directories.
    type: str
  secrets_group:
    description: Group of the files with private keys, which have the mode 0640; by default O(group).
    type: str
  admin_socket:
    description:
      - Unix socket of Envoy's admin interface.
      - An Envoy that runs without it was started by an earlier version of the role. It cannot be asked, so with
        V(present) the module refuses, unless O(may_end_websockets) is true; the restart that follows then ends its
        websockets.
    type: path
    required: true
  timeout:
    description: Seconds that Envoy may take to load each step.
    type: int
    default: 30
  healthy_timeout:
    description:
      - With V(proven), seconds to wait until Envoy finds every endpoint healthy.
      - With V(present), seconds within which new endpoints have to answer this host with 200, or nothing is written.
        Otherwise their users would first move to other endpoints.
      - With 0, health is not checked; this also applies to V(compared).
    type: int
    default: 0
  unit:
    description:
      - systemd unit of this Envoy.
      - Its journal has Envoy's reason where the admin interface does not.
      - While it runs and Envoy does not answer, no file is written, because a rejection would not be noticed.
    type: str
  start_files:
    description:
      - Files and links that Envoy is started from. If they differ, Envoy has to be restarted, which the module leaves
        to its caller.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Its name in messages.
        type: str
        required: true
      path:
        description: Path of the file or link.
        type: path
        required: true
      content:
        description: Text of the file, with O(owner), O(group) and mode 0644.
        type: str
      link:
        description: Target of the link.
        type: str
  start_record:
    description:
      - File that holds RV(start_digest) once Envoy was started from O(start_files), and another text while they are
        being written. The caller writes it.
      - Modification times would not do, because a clock may be set back.
    type: path
  needed:
    description: Further files that must exist for RV(in_order).
    type: list
    elements: path
    default: []
  unwanted:
    description: Files and folders that must not exist for RV(in_order).
    type: list
    elements: path
    default: []
  texts:
    description: Further files that must have this text for RV(in_order), by path.
    type: dict
    default: {}
  account:
    description: Account that must exist for RV(in_order).
    type: str
  open_files:
    description: C(LimitNOFILE) of O(unit). With V(present), a host on which systemd cannot set it is refused.
    type: int
    default: 0
  connections:
    description:
      - Most connections of clients. With V(present), a host whose kernel tracks connections, and not twice as many, is
        refused.
    type: int
    default: 0
  may_end_websockets:
    description:
      - Whether to make a change that ends open websockets. These are changed or removed listeners, and a restart for
        O(start_files), also one that an earlier run has left undone.
      - In check mode, a warning reports them instead.
    type: bool
    default: false
  hands_over:
    description:
      - Whether the caller gives the ports to another process of Envoy after such a change, as RV(hands_over) says,
        instead of restarting it, and has the users of the old process reconnect. Then only listeners that are removed
        or leave their port end websockets.
    type: bool
    default: false
author:
  - The stickyring authors (!UNKNOWN)
attributes:
  check_mode: {description: "Reports what would change", support: full}
  diff_mode: {description: "Private keys are left out", support: full}
"""

EXAMPLES = r"""
- name: Write the files
  stickyring.fleet.edge_xds:
    directory: /etc/stickyring-edge/xds
    admin_socket: /run/stickyring-edge/admin.sock
    files:
      clusters.json: "{{ clusters }}"
      listeners.json: "{{ listeners }}"
      routes/sticky.json: ["{{ route_configuration }}"]
      certificates/sticky.json: ["{{ secret_without_its_key }}"]
      endpoints/nodes.json: ["{{ cluster_load_assignment }}"]
    private_keys:
      certificates/sticky.json: "{{ lookup('file', '/srv/tls/key.pem') }}"

- name: Prove that Envoy runs on them and finds every endpoint healthy
  stickyring.fleet.edge_xds:
    directory: /etc/stickyring-edge/xds
    admin_socket: /run/stickyring-edge/admin.sock
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
  description: Endpoints that Envoy loses, as C(name) and C(address); in check mode, those that it would lose.
  returned: success
  type: list
versions:
  description: File to C(version_info).
  returned: success
  type: dict
proven:
  description: Whether a running Envoy has loaded these versions.
  returned: success
  type: bool
up_to_date:
  description: Whether O(unit) runs and was started from O(start_files).
  returned: success
  type: bool
recorded:
  description: Whether O(start_record) confirms that.
  returned: success
  type: bool
start_digest:
  description: SHA-256 of O(start_files).
  returned: success
  type: str
invalid_certificates:
  description: Certificates that no client accepts, one sentence each. Warnings name those that expire soon.
  returned: success with V(proven)
  type: list
forbidden:
  description: Ports of O(files) below 1024 that O(unit), which runs, was not started with the capability for.
  returned: success
  type: list
enabled:
  description: Whether O(unit) starts at boot.
  returned: success
  type: bool
differing:
  description: Names of those of O(start_files) that differ from what is wanted.
  returned: success
  type: list
in_order:
  description:
    - Whether files, directories, owners and modes are as wanted, O(needed) and O(account) exist, O(texts) are as
      wanted, O(unwanted) do not exist, and Envoy starts at boot, was started from O(start_files), has loaded the files,
      and has open ports and, if checked, healthy endpoints.
  returned: success with V(compared)
  type: bool
left_over:
  description: Those of O(unwanted) that exist.
  returned: success with V(compared)
  type: list
config_dump:
  description: The clusters and endpoints of Envoy's config_dump.
  returned: success with V(compared), if RV(in_order)
  type: dict
hands_over:
  description:
    - With O(hands_over), whether the ports have to be handed over. From when this is known until the caller has written
      it, O(start_record) does not hold RV(start_digest).
  returned: success with V(present)
  type: bool
reconnects:
  description:
    - "Why and how many users of open websockets have to reconnect with RV(hands_over), as C(ends)."
  returned: success with V(present)
  type: str
leaving:
  description: Names of processes that have handed over their ports and still have users.
  returned: success
  type: list
ends:
  description:
    - "Why and how many open websockets end, as C(the binary changes: 214 open websockets end); empty when none do."
  returned: success with V(present)
  type: str
"""

import pwd
from collections import Counter
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stickyring.fleet.plugins.module_utils.envoy import Envoy, NotApplied
from ansible_collections.stickyring.fleet.plugins.module_utils.host import (
    files_problem,
    namespace_problem,
    tracking_problem,
    watching_problem,
)
from ansible_collections.stickyring.fleet.plugins.module_utils.xds import (
    CLUSTER,
    LISTENER,
    SINGLE_TYPES,
    TYPES,
    InvalidFiles,
    Resource,
    XdsFile,
    resources_of,
    warming_clusters,
    with_key,
)
from ansible_collections.stickyring.fleet.plugins.module_utils.xds_directory import NotProven, XdsDirectory

HOW_TO_GO_ON = "To end them all the same, run this again with `-e stickyring_edge_may_end_websockets=true`."


class EndsWebsockets(Exception):
    """The change would end open WebSockets without permission; the message says why and how many."""


class Change:
    """The change from the files on the host to the wanted ones, and the WebSockets that it ends."""

    def __init__(self, module: AnsibleModule, files: list[XdsFile]) -> None:
        self.module = module
        self.files = files
        self.directory = XdsDirectory(module, files)
        self.envoy = Envoy(module, files)
        if module.params["state"] == "present":
            self.envoy.await_answer_of_running_unit()

    @cached_property
    def changed(self) -> list[XdsFile]:
        """Files to write: those that differ, and those that Envoy has rejected.

        Envoy reads a file again only when it is renamed into place again. That resolves a rejection whose cause
        is gone, such as a port that was in use.
        """
        return [file for file in self.files if self.directory.differs(file) or file.refused(self.envoy.before)]

    @cached_property
    def surplus(self) -> list[str]:
        """Files to remove."""
        return self.directory.surplus()

    def texts(self) -> dict[str, str]:
        """The new text of each file that is written or removed."""
        return {file.path: file.text for file in self.changed} | dict.fromkeys(self.surplus, "")

    def ends(self) -> str:
        """Why and how many open WebSockets end, in one line; empty when none do."""
        if self.envoy.without_socket():
            return (
                f"{self.envoy.unit.name} runs without an admin socket, as an earlier version of this role started it,"
                " and has to be restarted: all its open websockets end"
            )
        restart, listeners = self.restart_reasons(), self.changing_listeners()
        if self.module.params["hands_over"]:
            closing = self.closing_ports()
            restart, listeners = [], {name: how for name, how in listeners.items() if name in closing}
        return self.affected(restart, listeners, "ends", "end", leaving=True)

    def hands_over(self) -> bool:
        """Whether the caller has to hand over the ports.

        Also for a listener without WebSockets: some may open until it has changed, and its connections would keep it.
        """
        needed = self.envoy.answers and (self.restart_reasons() or self.changing_listeners(new=False))
        return bool(self.module.params["hands_over"] and needed)

    def reconnects(self) -> str:
        """Why and how many users of open WebSockets reconnect when the ports are handed over, as `ends`."""
        return self.affected(self.restart_reasons(), self.changing_listeners(), "reconnects", "reconnect")

    def affected(
        self, restart: list[str], listeners: dict[str, str], one: str, several: str, *, leaving: bool = False
    ) -> str:
        """Reasons, and how many open WebSockets they concern; empty if none, or if no Envoy answers.

        With `leaving`, those of processes that have handed over count too.
        """
        if not self.envoy.answers or not (restart or listeners):
            return ""
        websockets = Counter(self.envoy.admin.websockets())
        if leaving:
            websockets += self.envoy.leaving_websockets()
        changing = [name for name in listeners if name in websockets]
        count = sum(websockets.values()) if restart else sum(websockets[name] for name in changing)
        if not count:
            return ""
        reasons = [*restart, *(f"listener {name} {listeners[name]}" for name in changing)]
        return f"{', '.join(reasons)}: {count} open websocket{f' {one}' if count == 1 else f's {several}'}"

    def restart_reasons(self) -> list[str]:
        """Why Envoy has to be restarted."""
        reasons = [f"the {name} changes" for name in self.differing]
        reasons += [f"Envoy may not open port {port} yet" for port in self.forbidden_ports()]
        if self.envoy.stray:
            reasons.append("a hand-over to another Envoy was interrupted")
        if not reasons and self.envoy.unit.active() and not self.envoy.unit.up_to_date():
            reasons = ["Envoy's process is older than its files"]
        return reasons

    @cached_property
    def differing(self) -> list[str]:
        """Names of the start files that differ from what is wanted."""
        return [file["name"] for file in self.module.params["start_files"] if self.start_file_differs(file)]

    def start_file_differs(self, file: dict[str, str | None]) -> bool:
        """Whether a start file differs from what is wanted."""
        path = Path(str(file["path"]))
        try:
            if file["link"] is not None:
                return str(path.readlink()) != file["link"]
            return path.read_text(encoding="utf-8") != file["content"] or self.directory.would_own(path, "0644")
        except OSError:
            return True

    def forbidden_ports(self) -> list[int]:
        """Ports that Envoy can open only after a restart with another unit."""
        listeners = [one for file in self.files if file.type == LISTENER for one in file.resources]
        ports = {int(one["address"]["socket_address"]["port_value"]) for one in listeners}
        return sorted(port for port in ports if not self.envoy.unit.may_open(port))

    @cached_property
    def listeners(self) -> tuple[dict[str, Resource], dict[str, Resource]]:
        """The listeners on the host and the wanted ones, by name."""
        file = next((file for file in self.files if file.type == LISTENER), None)
        if file is None:
            return {}, {}
        return resources_of(self.directory.read(file.path) or ""), resources_of(file.text)

    def changing_listeners(self, *, new: bool = True) -> dict[str, str]:
        """Names of listeners that change or are removed, and which of the two; `new`: also those that are added."""
        before, after = self.listeners
        changing = {
            name: "changes" if name in after else "is removed"
            for name in ({**before, **after} if new else before)
            if before.get(name) != after.get(name)
        }
        if any(file.refused(self.envoy.before) for file in self.files if file.type == LISTENER):
            changing |= dict.fromkeys(self.envoy.rejected_listeners(), "changes")
        return changing

    def closing_ports(self) -> set[str]:
        """Names of listeners whose address or port none has any more, so that their users cannot come back."""
        before, after = self.listeners
        open_ports = [listener["address"] for listener in after.values()]
        return {name for name, listener in before.items() if listener["address"] not in open_ports}

    def steps(self) -> Iterable[list[XdsFile]]:
        """The files to write, in steps that Envoy finishes one after another.

        New files, which no resource names yet, go first. Removed clusters stay until no route names them.
        """
        new = [file for file in self.changed if file.type in SINGLE_TYPES and self.directory.read(file.path) is None]
        steps = [[file for file in self.changed if file.type == kind and file not in new] for kind in TYPES]
        clusters = [file for file in self.files if file.type == CLUSTER]
        leaving = self.leaving_clusters()
        if leaving:
            steps[0] = [XdsFile(file.path, file.resources + leaving) for file in clusters]
            steps.append(clusters)
        return [new, *steps]

    def leaving_clusters(self) -> list[Resource]:
        """Clusters that Envoy has and the files do not."""
        if not self.envoy.answers:
            return []
        wanted = {name for file in self.files if file.type == CLUSTER for name in file.names()}
        active = self.envoy.admin.dump().get("ClustersConfigDump", {}).get("dynamic_active_clusters", [])
        return [item["cluster"] for item in active if item["cluster"]["name"] not in wanted]

    def apply(self, *, hands_over: bool) -> None:
        """Writes the files step by step and proves the whole; a failure on the way restores the previous files.

        With `hands_over`, the record is none from then on, so that the next run hands over if this one is interrupted.
        """
        record = Path(self.module.params["start_record"]) if hands_over and self.module.params["start_record"] else None
        recorded = record.read_text(encoding="utf-8") if record and record.exists() else None
        if record:
            record.write_text("pending", encoding="utf-8")
        texts = {path: self.directory.read(path) for path in [*(file.path for file in self.files), *self.surplus]}
        self.directory.make_folders()
        try:
            for number, step in enumerate(self.steps() if self.changed or self.surplus else []):
                for file in step:
                    self.directory.put(file.path, file.text)
                if step and number and self.envoy.answers:
                    what = f"Loading {', '.join(file.path for file in step)}"
                    self.envoy.wait(what, partial(self.envoy.problems, step))
            for path in self.surplus:
                self.directory.remove(path)
            if self.envoy.answers:
                self.envoy.prove()
        except (NotApplied, OSError) as error:
            restored = self.restore(texts)
            if record and recorded is None:
                record.unlink()
            elif record:
                record.write_text(str(recorded), encoding="utf-8")
            raise NotApplied(f"{error}. {restored}.") from error

    def restore(self, texts: dict[str, str | None]) -> str:
        """Puts the previous files back and waits until Envoy has loaded them; returns a sentence about the result."""
        different = {path: text for path, text in texts.items() if self.directory.read(path) != text}
        if not different:
            return "The files are as they were before"
        try:
            before = self.envoy.admin.stats()
        except OSError:
            before = {}
        # A file comes after the files that it names; new files are removed last.
        for path, text in sorted(different.items(), key=lambda item: (item[1] is None, "/" not in item[0])):
            if text is None:
                self.directory.remove(path)
            else:
                self.directory.put(path, text)
        if not self.envoy.answers:
            return "The previous files are back in place"

        def problems_now() -> list[str]:
            stats = self.envoy.admin.stats()
            dump = self.envoy.admin.dump()
            problems = [f"cluster {name} is still warming" for name in sorted(warming_clusters(dump))]
            for file in self.files:
                # The version is no proof: Envoy may have loaded a part of a rejected update under the old version.
                counters = [f"{prefix}.update_success" for prefix in file.subscriptions(before)]
                if different.get(file.path) and any(stats.get(name, 0) <= before.get(name, 0) for name in counters):
                    problems.append(f"{file.path} is not loaded again")
            return problems

        try:
            self.envoy.wait("Loading them", problems_now)
        except NotApplied as error:
            return f"The previous files are back in place, but Envoy has not loaded them yet. {error}"
        return "The change was rolled back: Envoy has loaded the previous files and keeps serving them"

    def in_order(self) -> bool:
        """Whether there is nothing to do and nothing to wait for."""
        unit = self.envoy.unit
        if not (self.envoy.answers and unit.enabled() and unit.up_to_date() and unit.recorded()) or self.differing:
            return False
        if self.envoy.stray:
            return False
        try:
            return self.as_wanted() and not (self.envoy.serving_problems() or self.envoy.health_problems())
        except (NotApplied, OSError):
            return False

    def as_wanted(self) -> bool:
        """Whether all files, directories and the account exist as wanted, and no other file does."""
        account = self.module.params["account"]
        if account and account not in {known.pw_name for known in pwd.getpwall()}:
            return False
        if not all(Path(path).is_file() for path in self.module.params["needed"]) or self.left_over():
            return False
        if self.changed or self.surplus:
            return False
        if any(Path(path).read_text(encoding="utf-8") != text for path, text in self.module.params["texts"].items()):
            return False
        folders = [Path(self.module.params["start_record"]).parent, *self.directory.folders()]
        owned = any(self.directory.would_own(folder, "0755") for folder in folders)
        return not owned and not self.directory.wrongly_owned()

    def left_over(self) -> list[str]:
        """What exists of what is unwanted."""
        return [path for path in self.module.params["unwanted"] if Path(path).exists()]


def expect_a_host_for(unit_files: int, connections: int) -> None:
    """Raises NotApplied where the unit could not start, or have so many open files or connections."""
    too_many = files_problem("stickyring_edge_limit_nofile", unit_files)
    if too_many:
        too_many += ", and stickyring_edge_max_connections to at most half of it"
    too_few = tracking_problem("stickyring_edge_max_connections", connections)
    if problem := namespace_problem() or too_many or too_few:
        raise NotApplied(f"Nothing was changed. {problem}.")


def run(module: AnsibleModule) -> dict[str, Any]:
    """Does what the parameters ask; returns the module's result."""
    if module.params["unit"] and module.params["state"] == "present":
        expect_a_host_for(module.params["open_files"], module.params["connections"])
    keys = module.params["private_keys"]
    files = [XdsFile(path, with_key(resources, keys.get(path))) for path, resources in module.params["files"].items()]
    change = Change(module, files)
    envoy = change.envoy
    result = {
        "changed": False,
        "written": [],
        "removed": [],
        "left": [],
        "versions": {file.path: file.version for file in files},
        "proven": False,
        "up_to_date": envoy.unit.up_to_date(),
        "enabled": envoy.unit.enabled(),
        "recorded": envoy.unit.recorded(),
        "start_digest": envoy.unit.start_digest(),
        "differing": change.differing,
        "forbidden": change.forbidden_ports(),
        "leaving": envoy.leaving_processes(),
    }
    if module.params["state"] == "compared":
        in_order = change.in_order()
        served = {"config_dump": {"configs": envoy.served()}} if in_order else {}
        return result | {"in_order": in_order, "proven": in_order, "left_over": change.left_over()} | served
    if module.params["state"] == "proven":
        change.directory.prove()
        envoy.expect_answer()
        envoy.prove()
        envoy.prove_healthy()
        invalid, soon = envoy.expiring()
        for sentence in soon:
            module.warn(sentence)
        return result | {"proven": True, "invalid_certificates": invalid}

    texts = change.texts()
    # Before WebSockets are counted, because users may connect during this wait.
    if texts and module.params["healthy_timeout"] and not module.check_mode:
        envoy.expect_healthy_newcomers()
    result |= {
        "changed": bool(texts),
        "written": [file.path for file in change.changed],
        "removed": change.surplus,
        "left": envoy.leaving() if texts and envoy.answers else [],
        "diff": change.directory.difference(texts),
        "ends": change.ends(),
        "hands_over": change.hands_over(),
        "reconnects": change.reconnects(),
    }
    if result["ends"] and not module.params["may_end_websockets"]:
        message = f"{result['ends']}. {HOW_TO_GO_ON}"
        if not module.check_mode:
            raise EndsWebsockets(f"This would end open websockets, so no running service was changed: {message}")
        module.warn(f"This would end open websockets, and will be refused: {message}")
    if module.check_mode:
        return result

    if result["hands_over"] and (problem := watching_problem((2 + len(envoy.leaving_processes())) * len(files))):
        raise NotApplied(f"Nothing was changed. {problem}.")
    change.apply(hands_over=bool(result["hands_over"]))
    return result | {"changed": change.directory.own_files() or result["changed"], "proven": envoy.answers}


def main() -> None:
    """Runs as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["present", "proven", "compared"], "default": "present"},
            "directory": {"type": "path", "required": True},
            "files": {"type": "dict", "required": True},
            "private_keys": {"type": "dict", "default": {}, "no_log": True},
            "owner": {"type": "str"},
            "group": {"type": "str"},
            "secrets_group": {"type": "str", "no_log": False},
            "admin_socket": {"type": "path", "required": True},
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
            "unwanted": {"type": "list", "elements": "path", "default": []},
            "texts": {"type": "dict", "default": {}},
            "account": {"type": "str"},
            "open_files": {"type": "int", "default": 0},
            "connections": {"type": "int", "default": 0},
            "may_end_websockets": {"type": "bool", "default": False},
            "hands_over": {"type": "bool", "default": False},
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
