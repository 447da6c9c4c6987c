#!/usr/bin/python
"""Ansible module: reads the state of a node service on a host, and checks whether the host can take the wanted one."""

from __future__ import annotations  # a Python that is too old must get a clear message, not a syntax error

DOCUMENTATION = r"""
module: node_state
short_description: Read the state of a host before a node service is installed or changed
description:
  - Reads what is installed and what runs. Changes nothing.
  - Fails with every cause if the host cannot take the service, before anything that runs is changed.
options:
  service: {description: "Name of the service", type: str, required: true}
  address: {description: "IP address that the instances listen on", type: str, required: true}
  port: {description: "Port of instance 1; instance i has this port + i - 1", type: int, required: true}
  instances: {description: "Number of instances", type: int, required: true}
  health_path: {description: "Path that a healthy instance answers with 200", type: str, required: true}
  release: {description: "Name of the wanted release", type: str, required: true}
  made_from: {description: "SHA-256 of what the release is made from", type: str, required: true}
  python: {description: "Python that runs the release", type: str, required: true, choices: [python3, pypy3]}
  releases_kept: {description: "Number of releases that are kept", type: int, required: true}
  keep_surplus: {description: "Whether surplus instances are no reason to act", type: bool, required: true}
  mistakes:
    description: Mistakes in the role's variables; with any, the module fails without reading the host
    type: list
    elements: str
    required: true
  open_files: {description: "LimitNOFILE of the unit", type: int, required: true}
  files: {description: "SHA-256 of each file that the instances read, by path", type: dict, required: true}
  secrets:
    description: Digest of the service's secrets. It is not shown, because short secrets can be guessed from it.
    type: str
    required: true
attributes:
  check_mode: {description: "Changes nothing in either mode", support: full}
author:
  - The stickyring authors (!UNKNOWN)
"""

EXAMPLES = r"""
- name: Read the state of the host
  stickyring.fleet.node_state:
    service: chat
    address: 198.51.100.11
    port: 8001
    instances: 2
    health_path: /readyz
    release: 1.4.2
    made_from: "{{ lookup('file', 'requirements.txt') | hash('sha256') }}"
    python: python3
    releases_kept: 5
    keep_surplus: false
    mistakes: []
    files: {}
    secrets: "{{ {} | stickyring.fleet.node_secrets_digest }}"
  register: state
"""

RETURN = r"""
condition:
  description:
    - C(idle), if no instance runs on the host; C(outdated), if an instance needs a restart or a release must be
      installed or removed; C(unhealthy), if only an instance is not healthy or a file differs that needs no restart;
      C(current), if nothing is to do.
  type: str
  returned: success
surplus:
  description: Instances that are configured, enabled or running, and not wanted
  type: list
  elements: int
  returned: success
lacks_venv:
  description:
    - Whether the wanted Python is missing or cannot make virtual environments.
    - False without a check if the wanted release is complete.
  type: bool
  returned: success
prepared: {description: "Whether the account and the settings folder are as wanted", type: bool, returned: success}
differing:
  description:
    - Files of O(files) that are missing or have another content, owner or mode; the folder of the secrets if anything
      in it is; the folder of the former secrets if it exists.
  type: list
  elements: str
  returned: success
complete:
  description: Whether the wanted release is installed completely and the host still has its Python
  type: bool
  returned: success
application: {description: "What the installed unit serves, or empty", type: str, returned: success}
current: {description: "Name of the release that is linked as current, or empty", type: str, returned: success}
keep_in: {description: "Folder below releases for copies of unit and environments", type: str, returned: success}
kept: {description: "Whether these copies exist", type: bool, returned: success}
serves: {description: "Folder of the linked state's copies, or empty if it never served", type: str, returned: success}
last_served: {description: "The same, or the folder of the state that served last", type: str, returned: success}
previous: {description: "Folder of the state that a rollback restores, or empty", type: str, returned: success}
next_use: {description: "Time in seconds, later than that of every state that served", type: int, returned: success}
moving:
  description: Addresses of running instances that are wanted at another address or port
  type: list
  elements: str
  returned: success
behind: {description: "Wanted instances that do not run the linked state", type: list, elements: int, returned: success}
obsolete:
  description: What to remove below releases, namely those beyond the kept ones or that never served, and older settings
  type: list
  elements: str
  returned: success
enabled: {description: "Instances that start at boot", type: list, elements: int, returned: success}
running: {description: "Instances that run", type: list, elements: int, returned: success}
healthy: {description: "Those that answer the health path with 200", type: list, elements: int, returned: success}
drained: {description: "Those that C(stickyring drain) has emptied", type: list, elements: int, returned: success}
up_to_date:
  description: Instances whose processes were started from the wanted unit, environment, secrets, release and Python
  type: list
  elements: int
  returned: success
reloadable:
  description: Instances that a reload gives all that a restart does, namely those that have no secrets and need none
  type: list
  elements: int
  returned: success
"""

import errno
import hashlib
import http.client
import pwd
import re
import socket
import stat
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.compat.version import LooseVersion
from ansible_collections.stickyring.fleet.plugins.module_utils.host import files_problem, namespace_problem
from ansible_collections.stickyring.fleet.plugins.module_utils.instances import instance_port
from ansible_collections.stickyring.fleet.plugins.module_utils.secrets import (
    DIGEST,
    secrets_digest,
    secrets_in,
)

LOWEST_PYTHON = "3.11"
PYPY_SINCE = 13
"""The first release of Debian whose PyPy is new enough; python3 is new enough since the one before."""
# find_spec does not import the modules, which saves time on every host in every run.
PYTHON_TELLS = (
    "import sys; from importlib.util import find_spec; print(*sys.version_info[:3], sep='.');"
    " raise SystemExit(not all(map(find_spec, ['venv', 'ensurepip'])))"
)
OPTIONS = {
    "service": {"type": "str", "required": True},
    "address": {"type": "str", "required": True},
    "port": {"type": "int", "required": True},
    "instances": {"type": "int", "required": True},
    "health_path": {"type": "str", "required": True},
    "release": {"type": "str", "required": True},
    "made_from": {"type": "str", "required": True},
    "python": {"type": "str", "required": True, "choices": ["python3", "pypy3"]},
    "releases_kept": {"type": "int", "required": True},
    "keep_surplus": {"type": "bool", "required": True},
    "open_files": {"type": "int", "required": True},
    "mistakes": {"type": "list", "elements": "str", "required": True},
    "files": {"type": "dict", "required": True},
    "secrets": {"type": "str", "required": True, "no_log": True},
}
HEALTH_SECONDS = 3
# Home and shell of the account that the role makes; another account of that name would be overwritten.
ACCOUNT = ("/nonexistent", "/usr/sbin/nologin")
# User and group, and modes, of the files that instances start from. Only root may read an environment file.
OWNER = (0, 0)
MODES = {".service": 0o644, ".env": 0o600, "": 0o644}
KEPT = "served"
"""Prefix of the folders below a release that keep a unit and environments with which it has served."""
DIGESTS = ("STICKYRING_UNIT", "STICKYRING_ENVIRONMENT")
"""Variables in the unit and the environment file; in a process they show which of these it was started from."""
NO_SECRETS = secrets_digest({})
ROOT = Path("/")
PROGRAMS = Path("/usr/bin")
PROC = Path("/proc")
TCP_LISTEN = "0A"


def listeners(port: int) -> set[tuple[int, str, str]]:
    """Return ``{(process id, command, unit)}`` of everything that listens on a TCP port, on any address."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        path = PROC / "net" / table
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        for _, local, _, state, _, _, _, _, _, inode, *_ in map(str.split, rows):
            if state == TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{inode}]")
    found = set()
    for process in PROC.glob("[0-9]*"):
        try:
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                cgroup = (process / "cgroup").read_text()
                unit = re.search(r"/([^/\n]+\.(?:service|scope))(?:/|$)", cgroup, re.MULTILINE)
                found.add((int(process.name), (process / "comm").read_text().strip(), unit[1] if unit else ""))
        except OSError:
            continue  # the process ended while we looked at it
    return found


def port_problem(address: str, port: int, own_unit: str) -> str | None:
    """Return what keeps ``own_unit`` from listening on the address and port, or None."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        # As the server does: connections that linger from an earlier process are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return f"{address} is not an address of this host: correct stickyring_node_address"
            if error.errno != errno.EADDRINUSE:
                return f"{own_unit} cannot listen on {address} port {port}: {error.strerror}"
        else:
            return None
    holders = listeners(port)
    if holders and all(unit == own_unit for _, _, unit in holders):
        return None
    names = [f"{command} (process {pid}, {unit or 'no unit'})" for pid, command, unit in sorted(holders)]
    return (
        f"port {port} on {address}, meant for {own_unit}, is in use by {', '.join(names) or 'an unknown process'}:"
        " stop it, or choose another stickyring_node_port"
    )


def prepared(service: str, settings: Path) -> bool:
    """Return whether the account and the settings folder are as the role makes them; two tasks are then skipped."""
    try:
        account, folder = pwd.getpwnam(service), settings.stat()
    except (KeyError, FileNotFoundError):
        return False
    owned = (folder.st_uid, folder.st_gid, stat.S_IMODE(folder.st_mode)) == (*OWNER, 0o755)
    return owned and stat.S_ISDIR(folder.st_mode) and (account.pw_dir, account.pw_shell) == ACCOUNT


def as_wanted(path: Path, sha256: str) -> bool:
    """Return whether the file is as the role writes it."""
    if not path.is_file():
        return False
    status = path.lstat()
    made = (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))
    return made == (*OWNER, MODES[path.suffix]) and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def runs(release: Path) -> bool:
    """Return whether a release is complete and still has its Python.

    An upgrade of Debian replaces that Python: the link then leads to another version with another package folder.
    """
    python = (release / "bin" / "python").resolve()
    name = re.match(r"[a-z]+[\d.]+", python.name)
    packages = release.glob(f"lib/{name[0]}*/site-packages/stickyring") if name else []
    return (release / ".complete").is_file() and python.is_file() and any(packages)


def settings_key(unit: str, environment: str) -> str:
    """Return an id of the settings of a release, from the SHA-256 of the unit and of the first environment."""
    return hashlib.sha256(f"{unit}{environment}".encode()).hexdigest()[:12]


def key_of(unit: Path, environment: Path) -> str:
    """Return the same for files; empty if one is missing."""
    if not unit.is_file() or not environment.is_file():
        return ""
    return settings_key(*(hashlib.sha256(path.read_bytes()).hexdigest() for path in (unit, environment)))


def served(releases: Path, service: str) -> dict[tuple[str, str], Path]:
    """Return ``{(release, key of its settings): folder}`` of the states that served and can still run, latest first."""
    usable = [release for release in releases.glob("*") if runs(release)]
    folders = [folder for release in usable for folder in release.glob(f"{KEPT}*")]
    folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    found: dict[tuple[str, str], Path] = {}
    for folder in folders:
        found.setdefault((folder.parent.name, key_of(folder / f"{service}@.service", folder / "1.env")), folder)
    return found


def history(wanted: dict[str, Any], releases: Path, release: str, unit: Path, environment: Path) -> dict[str, Any]:
    """Return which states have served on the host, are kept, and are to be removed, as paths below releases.

    release: the linked one; unit, environment: the files on the host that instances start from.
    """
    own_key = settings_key(*(wanted["files"][f"/{path.relative_to(ROOT)}"] for path in (unit, environment)))
    kept = releases / wanted["release"] / f"{KEPT}-{own_key}"
    found = served(releases, wanted["service"])
    order = [*found.values()]
    serves = found.get((release, key_of(unit, environment)))
    last_served = serves or next(iter(order), None)
    # After a rollback, the state that serves now comes before the newer ones.
    by_use = sorted(order, key=lambda folder: folder != last_served)
    others = dict.fromkeys(folder.parent.name for folder in by_use if folder.parent.name != wanted["release"])
    staying = {wanted["release"], *[*others][: wanted["releases_kept"] - 1]}
    older = [
        folder
        for name in sorted(staying)
        for folder in [one for one in by_use if one.parent.name == name and one != kept][wanted["releases_kept"] - 1 :]
    ]
    present = {path.name for path in releases.iterdir()} if releases.is_dir() else set()

    def below_releases(folder: Path | None) -> str:
        return str(folder.relative_to(releases)) if folder else ""

    return {
        "keep_in": below_releases(kept),
        "kept": all(as_wanted(kept / Path(path).name, sha256) for path, sha256 in wanted["files"].items()),
        "serves": below_releases(serves),
        "last_served": below_releases(last_served),
        "previous": below_releases(next(iter(order[serves is not None :]), None)),
        "next_use": int(max([time.time(), *(folder.stat().st_mtime + 1 for folder in order)])),
        "obsolete": sorted(present - staying) + [below_releases(folder) for folder in older],
    }


def started_from(pid: str) -> tuple[Path, Path, dict[str, str]]:
    """Return what a process of the service was started from: the release, its Python, and the environment.

    It is read from the process itself, so it does not depend on the clock or on files that are written later.
    """
    process = PROC / pid
    try:
        # The first word of the command line is the interpreter in the script's first line.
        release = Path((process / "cmdline").read_text().split("\0")[0]).parents[1]
        python = Path(str((process / "exe").readlink()).removesuffix(" (deleted)"))
        words = [word.partition("=") for word in (process / "environ").read_text(errors="replace").split("\0")]
    except (OSError, IndexError):
        return Path(), Path(), {}
    return release, python, {name: value for name, _, value in words}


def moving(wanted: dict[str, Any], environments: dict[int, dict[str, str]]) -> list[str]:
    """Return the address:port of each running instance that is wanted at another address or port."""
    host = f"[{wanted['address']}]" if ":" in wanted["address"] else wanted["address"]
    listening = {i: variables.get("STICKYRING_LISTEN", "") for i, variables in sorted(environments.items())}
    return [place for i, place in listening.items() if place and place != f"{host}:{instance_port(wanted['port'], i)}"]


def digests(*paths: Path) -> dict[str, str]:
    """Return the digests in the unit and the environment file.

    Each is the last one of its name: a setting of several lines before it may contain the same words.
    """
    texts = [(name, path.read_text()) for name, path in zip(DIGESTS, paths, strict=True) if path.is_file()]
    found = {name: re.findall(rf'^(?:Environment=)?{name}="?(\w+)"?$', text, re.MULTILINE) for name, text in texts}
    return {name: values[-1] for name, values in found.items() if values}


def differing_secrets(folder: Path, *, same: bool) -> set[str]:
    """Return the folders of secrets on which the role must act, the former ones included."""
    former = folder.with_name(f"{folder.name}.former")
    paths = [folder] * (not same) + [former] * former.exists()
    return {f"/{path.relative_to(ROOT)}" for path in paths}


def has_secrets(variables: dict[str, str], digest: str) -> bool:
    """Return whether a process has the secrets of this digest.

    Its variables tell. It has the same secrets as credentials, because the role restarts an instance that has or gets
    any: after a reload, a process has the credentials of the start before, or none.
    """
    return variables.get(DIGEST) == digest and ("CREDENTIALS_DIRECTORY" in variables or digest == NO_SECRETS)


def account_problem(service: str) -> str | None:
    """Return which existing account the role would overwrite, or None."""
    try:
        account = pwd.getpwnam(service)
    except KeyError:
        return None
    if (account.pw_dir, account.pw_shell) == ACCOUNT:
        return None
    return (
        f"the account {service} exists and was not made by this role (home {account.pw_dir}, shell {account.pw_shell})"
        " and would be overwritten and locked: choose another stickyring_node_service"
    )


def healthy(address: str, port: int, path: str) -> bool:
    """Return whether an instance can take users."""
    return answer(address, port, path)[0] == http.HTTPStatus.OK


def drained(address: str, port: int) -> bool:
    """Return whether an instance takes no users because it was drained."""
    return answer(address, port, "/readyz") == (http.HTTPStatus.SERVICE_UNAVAILABLE, b"draining")


def answer(address: str, port: int, path: str) -> tuple[int, bytes]:
    """Return status and beginning of an instance's answer; 0 and nothing without one."""
    connection = http.client.HTTPConnection(address, port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read(100).strip()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def units(module: AnsibleModule, service: str, instances: list[int]) -> dict[int, dict[str, str]]:
    """Return ``{instance: properties}`` as systemd sees the instances given and all others of the service."""
    names = [f"{service}@{instance}.service" for instance in instances]
    properties = "Id,ActiveState,UnitFileState,NeedDaemonReload,MainPID"
    command = ["systemctl", "show", f"--property={properties}", *names, f"{service}@*.service"]
    _, output, _ = module.run_command(command, check_rc=True)
    shown = {}
    for block in output.strip().split("\n\n"):
        unit = dict(line.split("=", 1) for line in block.splitlines())
        instance = re.fullmatch(re.escape(service) + r"@([0-9]+)\.service", unit.get("Id", ""))
        if instance:
            shown[int(instance[1])] = unit
    return shown


def condition(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return the condition of a host from what was found on it."""
    instances = set(range(1, wanted["instances"] + 1))
    if not found["running"]:
        return "idle"
    installed = found["complete"] and found["prepared"] and found["kept"] and not found["obsolete"]
    started = instances.issubset(found["up_to_date"]) and instances.issubset(found["enabled"])
    if not installed or not started or (found["surplus"] and not wanted["keep_surplus"]):
        return "outdated"
    return "current" if instances.issubset(found["healthy"]) and not found["differing"] else "unhealthy"


def judged(module: AnsibleModule, python: Path) -> tuple[bool, list[str]]:
    """Return whether Python or its venv module must be installed, and the problems with this Python."""
    if not python.exists():
        release = ROOT / "etc/os-release"
        debian = re.search(r'^VERSION_ID="?(\d+)', release.read_text() if release.is_file() else "", re.MULTILINE)
        if debian and int(debian[1]) < PYPY_SINCE:
            return True, [f"{python} of Debian {debian[1]} is older than {LOWEST_PYTHON}: use Debian {PYPY_SINCE}"]
        return True, []
    code, version, _ = module.run_command([str(python), "-c", PYTHON_TELLS])
    if LooseVersion(version.strip() or "0") >= LooseVersion(LOWEST_PYTHON):
        return code != 0, []
    return code != 0, [f"{python} is {version.strip() or 'broken'}: {LOWEST_PYTHON} or newer is needed"]


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(argument_spec=OPTIONS, supports_check_mode=True)
    wanted = module.params
    service, instances = wanted["service"], range(1, wanted["instances"] + 1)

    if wanted["mistakes"]:
        refuse(module, wanted["mistakes"])

    home, settings = ROOT / "opt" / service, ROOT / "etc" / service
    releases, current = home / "releases", home / "current"
    stamp = releases / wanted["release"] / ".complete"
    obstacles = {
        port_problem(wanted["address"], instance_port(wanted["port"], i), f"{service}@{i}.service") for i in instances
    }
    problems = sorted(filter(None, obstacles))
    too_many = files_problem("stickyring_node_limit_nofile", wanted["open_files"])
    problems += filter(None, [account_problem(service), namespace_problem(), too_many])
    lacks_venv = False
    complete = runs(stamp.parent)
    if not complete:
        lacks_venv, problem = judged(module, PROGRAMS / wanted["python"])
        problems += problem
    elif stamp.read_text().strip() != wanted["made_from"]:
        problems.append(
            f"release {wanted['release']} was installed from other stickyring_node_requirements, or for another"
            " stickyring_node_python: choose another stickyring_node_release"
        )
    if problems:
        refuse(module, problems)

    configured = {int(path.stem) for path in settings.glob("*.env") if path.stem.isdigit()}
    shown = units(module, service, sorted(configured.union(instances)))
    running = {i for i, unit in shown.items() if unit["ActiveState"] == "active"}
    enabled = {i for i, unit in shown.items() if unit["UnitFileState"] == "enabled"}
    template = ROOT / "etc/systemd/system" / f"{service}@.service"
    command = re.search(r'^ExecStart=.* "(.+)"$', template.read_text() if template.is_file() else "", re.MULTILINE)
    linked = current.readlink() if current.is_symlink() else Path()
    release = linked.name if linked.parent == Path("releases") else ""
    differing = {path for path, sha256 in wanted["files"].items() if not as_wanted(ROOT / path.lstrip("/"), sha256)}
    secrets = settings / "secrets"
    present = secrets_in(secrets, OWNER)
    # Empty if the folder is damaged: no process has such secrets.
    digest = "" if present is None else secrets_digest(present)
    differing |= differing_secrets(secrets, same=digest == wanted["secrets"])
    needs_secrets = template.is_file() and f"=/{secrets.relative_to(ROOT)}/" in template.read_text()

    processes = {i: started_from(shown[i]["MainPID"]) for i in running}

    def runs_what_is_there(instance: int) -> bool:
        made, python, variables = processes[instance]
        same_python = python == (made / "bin" / "python").resolve()
        told = {name: variables[name] for name in DIGESTS if name in variables}
        same_settings = told == digests(template, settings / f"{instance}.env")
        # A rollback may restore a unit that has none.
        same_secrets = not needs_secrets or has_secrets(variables, digest)
        return same_python and made == releases / release and same_settings and same_secrets

    def up_to_date(instance: int) -> bool:
        files = [template, settings / f"{instance}.env", secrets]
        written = differing.isdisjoint(f"/{path.relative_to(ROOT)}" for path in files)
        loaded = shown[instance]["NeedDaemonReload"] == "no" and release == wanted["release"]
        return complete and written and loaded and runs_what_is_there(instance)

    found = {
        "lacks_venv": lacks_venv,
        "prepared": prepared(service, settings),
        "differing": sorted(differing),
        "complete": complete,
        "application": command[1] if command else "",
        "current": release,
        "behind": sorted(i for i in instances if i not in running or not runs_what_is_there(i)),
        "enabled": sorted(enabled),
        "running": sorted(running),
        "healthy": (
            well := [
                i
                for i in sorted(running)
                if healthy(wanted["address"], instance_port(wanted["port"], i), wanted["health_path"])
            ]
        ),
        "drained": [
            i for i in sorted(running.difference(well)) if drained(wanted["address"], instance_port(wanted["port"], i))
        ],
        "up_to_date": sorted(filter(up_to_date, running)),
        "reloadable": [
            i
            for i in sorted(running)
            if {wanted["secrets"], digest} == {NO_SECRETS} and has_secrets(processes[i][2], NO_SECRETS)
        ],
        "moving": moving(wanted, {i: variables for i, (_, _, variables) in processes.items() if i in instances}),
        "surplus": sorted((configured | running | enabled).difference(instances)),
    }
    found |= history(wanted, releases, release, template, settings / "1.env")
    module.exit_json(condition=condition(found, wanted), **found)


def refuse(module: AnsibleModule, problems: list[str]) -> None:
    """Fail on this host with every problem."""
    module.fail_json(msg="Nothing was changed. " + ". ".join(problems) + ".")


if __name__ == "__main__":
    main()
