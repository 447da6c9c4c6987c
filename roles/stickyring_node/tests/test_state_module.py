"""The module that checks a node's variables and reads the state of its host, with real sockets and a fake systemctl."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pwd
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.testing import patch_module_args
from ansible_collections.stickyring.fleet.plugins.module_utils import host as allowances
from ansible_collections.stickyring.fleet.plugins.module_utils import secrets as files_of_secrets
from ansible_collections.stickyring.fleet.plugins.modules import node_secrets, node_state

SERVICE = "stickyring-test"
REQUIREMENTS = hashlib.sha256(b"click==8.0").hexdigest()
UNIT = f"/etc/systemd/system/{SERVICE}@.service"
SETTINGS = f"/etc/{SERVICE}"
RELEASE = "1.0+abc_D-1"
FILES = {
    UNIT: f"Environment=STICKYRING_UNIT=a1\nEnvironmentFile={SETTINGS}/secrets/environment\n"
    f'ExecStart=/opt/{SERVICE}/current/bin/stickyring serve "chat:app"\n',
    f"{SETTINGS}/1.env": 'N="1"\nSTICKYRING_ENVIRONMENT=b1\n',
    f"{SETTINGS}/2.env": 'N="2"\nSTICKYRING_ENVIRONMENT=b2\n',
}
SECRETS = {"PASSWORD": "hunter2", "KEY": "-----BEGIN\nSTICKYRING_UNIT=0\nSTICKYRING_SECRETS=0\n"}
DIGEST = files_of_secrets.secrets_digest(SECRETS)
NONE = files_of_secrets.secrets_digest({})
GOOD: dict[str, Any] = {
    "service": SERVICE,
    "address": "127.0.0.1",
    "port": 8001,
    "instances": 2,
    "health_path": "/healthz",
    "release": RELEASE,
    "made_from": REQUIREMENTS,
    "python": "python3",
    "releases_kept": 3,
    "keep_surplus": False,
    "open_files": 20000,
    "mistakes": [],
    "files": {path: hashlib.sha256(text.encode()).hexdigest() for path, text in FILES.items()},
    "secrets": DIGEST,
}


def account(name: str, home: str, shell: str) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", 990, 990, "", home, shell))


class Host:
    """A fake host: files below `root`, units that its systemctl shows, accounts."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.asked = folder / "asked"
        self.processes = folder / "proc"
        self.accounts: dict[str, pwd.struct_passwd] = {}
        self.shows({})
        self.has_python("3.11.2")
        self.program("python3.11", "")

    def program(self, name: str, script: str) -> Path:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def has_python(self, version: str, venv: bool = True, name: str = "python3") -> None:
        self.program(name, f'echo "{version}"; exit {0 if venv else 1}')

    def shows(self, units: dict[str, dict[str, str]]) -> None:
        """Sets what systemctl shows, by unit; systemctl has its own order of properties."""
        blocks = [
            "\n".join(f"{key}={value}" for key, value in ({"Id": name} | unit).items()) for name, unit in units.items()
        ]
        (self.programs / "shown").write_text("\n\n".join(blocks))
        self.program("systemctl", f'echo "$@" >"{self.asked}"; cat "{self.programs / "shown"}"')

    def write(self, path: str, text: str = "") -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def release(self, name: str) -> Path:
        """A release that is complete and has its Python."""
        folder = self.write(f"opt/{SERVICE}/releases/{name}/.complete", REQUIREMENTS).parent
        for part in ("bin", "lib/python3.11/site-packages/stickyring"):
            (folder / part).mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(self.programs / "python3.11")
        return folder

    def unit(
        self,
        instance: int = 1,
        *,
        enabled: bool = True,
        edited: bool = False,
        release: str = RELEASE,
        python: Path | None = None,
        **variables: str | None,
    ) -> dict[str, str]:
        """What systemctl shows of a running instance; its process was started from the arguments, or from FILES."""
        pid = str(1000 + instance)
        process = self.processes / pid
        process.mkdir(parents=True, exist_ok=True)
        interpreter = self.root / "opt" / SERVICE / "releases" / release / "bin" / "python"
        (process / "cmdline").write_text(f"{interpreter}\0/opt/{SERVICE}/current/bin/stickyring\0serve\0")
        told: dict[str, str | None] = {
            "STICKYRING_UNIT": "a1",
            "STICKYRING_ENVIRONMENT": f"b{instance}",
            "STICKYRING_SECRETS": DIGEST,
        }
        told |= {"CREDENTIALS_DIRECTORY": "/run/credentials"} | variables
        (process / "environ").write_text(
            "\0".join(f"{name}={value}" for name, value in {"N": "1", **told}.items() if value is not None)
        )
        (process / "exe").unlink(missing_ok=True)
        (process / "exe").symlink_to(python or self.programs / "python3.11")
        return {
            **unit(enabled=enabled),
            "MainPID": pid,
            "ActiveState": "active",
            "NeedDaemonReload": "yes" if edited else "no",
        }

    def age(self, path: Path, age: float) -> None:
        os.utime(path, (time.time() - age,) * 2, follow_symlinks=False)

    def getpwnam(self, name: str) -> pwd.struct_passwd:
        return self.accounts[name]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(node_state, "ROOT", made.root)
    monkeypatch.setattr(node_state, "OWNER", (os.getuid(), os.getgid()))
    monkeypatch.setattr(node_secrets, "OWNER", (os.getuid(), os.getgid()))
    monkeypatch.setattr(node_state, "PROGRAMS", made.programs)
    monkeypatch.setattr(node_state, "PROC", made.processes)
    monkeypatch.setattr(allowances, "PROC", made.processes)
    monkeypatch.setattr(pwd, "getpwnam", made.getpwnam)
    monkeypatch.setenv("PATH", str(made.programs), prepend=":")
    return made


@pytest.fixture
def free_ports() -> int:
    """The first of two free ports; each process of these tests searches another range."""
    first = 20000 + os.getpid() % 100 * 100
    for port in range(first, first + 100, 2):
        try:
            for probed in (port, port + 1):
                socket.create_server(("127.0.0.1", probed)).close()
        except OSError as error:
            assert error.errno == errno.EADDRINUSE
        else:
            return port
    raise AssertionError("no two free ports")


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of loopback that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def run(**changed: object) -> dict[str, Any]:
    """The module's result, as Ansible would read it."""
    output = io.StringIO()
    with patch_module_args(GOOD | changed), redirect_stdout(output), pytest.raises(SystemExit):
        node_state.main()
    result: dict[str, Any] = json.loads(output.getvalue())
    return result


def test_mistakes_are_reported_before_the_host_is_read(host: Host) -> None:
    result = run(mistakes=["stickyring_node_instances is 0", "stickyring_node_release is /"], files={})
    assert result["failed"]
    assert result["msg"] == "Nothing was changed. stickyring_node_instances is 0. stickyring_node_release is /."
    assert not host.asked.exists()


def test_a_bare_host_is_accepted(host: Host, free_ports: int) -> None:
    result = run(port=free_ports)
    assert not result.get("failed"), result
    expected = {"condition": "idle", "lacks_venv": False, "complete": False, "application": "", "current": ""}
    expected |= {name: [] for name in ("enabled", "running", "up_to_date", "surplus")}
    assert {name: result[name] for name in expected} == expected
    assert not result.get("changed")
    assert not host.root.exists()
    assert host.asked.read_text().split()[2:] == [f"{SERVICE}@{i}.service" for i in ("1", "2", "*")]


@pytest.mark.parametrize(
    ("home", "shell"),
    [
        ("/home/deploy", "/bin/bash"),
        ("/nonexistent", "/bin/sh"),
        ("/var/www", "/usr/sbin/nologin"),
        ("/root", "/bin/bash"),
    ],
)
def test_an_existing_account_with_a_login_is_refused(host: Host, free_ports: int, home: str, shell: str) -> None:
    host.accounts["deploy"] = account("deploy", home, shell)
    result = run(service="deploy", port=free_ports)
    assert result["failed"]
    assert result["msg"].startswith("Nothing was changed. the account deploy exists and was not made by this role")
    assert f"(home {home}, shell {shell})" in result["msg"]
    assert result["msg"].endswith("choose another stickyring_node_service.")
    assert not run(port=free_ports).get("failed")


def test_an_account_that_the_role_made_is_accepted(host: Host, free_ports: int) -> None:
    host.accounts[SERVICE] = account(SERVICE, "/nonexistent", "/usr/sbin/nologin")
    assert not run(port=free_ports).get("failed")


def test_a_host_without_user_namespaces_is_refused(host: Host, free_ports: int) -> None:
    allowed = host.processes / "sys" / "user" / "max_user_namespaces"
    allowed.parent.mkdir(parents=True)
    allowed.write_text("0\n")
    result = run(port=free_ports)
    assert result["failed"]
    assert result["msg"].startswith("Nothing was changed. user.max_user_namespaces is 0 on this host")
    allowed.write_text("31000\n")
    assert not run(port=free_ports).get("failed")


def test_a_host_that_allows_too_few_open_files_is_refused(host: Host, free_ports: int) -> None:
    system = host.processes / "1"
    system.mkdir(parents=True)
    (system / "status").write_text("CapEff:\t0000003ffeffffff\n")
    (system / "limits").write_text("Max open files            1024                 20000                files\n")
    result = run(port=free_ports, open_files=20001)
    assert result["msg"] == (
        "Nothing was changed. systemd on this host can give a service at most 20000 open files, but"
        " stickyring_node_limit_nofile is 20001: lower it."
    )
    assert not run(port=free_ports, open_files=20000).get("failed")
    (system / "limits").write_text("Max open files            unlimited            unlimited            files\n")
    assert not run(port=free_ports, open_files=2**20).get("failed")


def test_a_real_account_is_found() -> None:
    assert "the account root exists" in str(node_state.account_problem("root"))
    assert node_state.account_problem("stickyring-nobody-has-this") is None


def test_the_account_is_the_one_that_the_role_makes() -> None:
    install = (Path(__file__).parents[1] / "tasks" / "install.yml").read_text()
    home, shell = node_state.ACCOUNT
    assert f"home: {home}\n" in install
    assert f"shell: {shell}\n" in install


@pytest.mark.parametrize(("version", "refused"), [("3.9.2", True), ("3.10.12", True), ("", True), ("3.11.0", False)])
def test_a_python_that_is_too_old_is_refused(host: Host, free_ports: int, version: str, refused: bool) -> None:
    host.has_python(version)
    result = run(port=free_ports)
    assert bool(result.get("failed")) == refused
    assert (f"python3 is {version or 'broken'}: 3.11 or newer is needed" in result.get("msg", "")) == refused


def test_a_python_without_venv_is_reported(host: Host, free_ports: int) -> None:
    host.has_python("3.11.2", venv=False)
    assert run(port=free_ports)["lacks_venv"] is True


def test_a_missing_python_is_reported(host: Host, free_ports: int) -> None:
    assert run(port=free_ports, python="pypy3")["lacks_venv"] is True
    host.has_python("3.11.11", name="pypy3")
    assert run(port=free_ports, python="pypy3")["lacks_venv"] is False


def test_a_missing_python_that_debian_has_too_old_is_refused(host: Host, free_ports: int) -> None:
    host.write("etc/os-release", 'NAME="Debian GNU/Linux"\nVERSION_ID="12"\n')
    assert "of Debian 12 is older than 3.11" in run(port=free_ports, python="pypy3")["msg"]
    host.write("etc/os-release", 'NAME="Debian GNU/Linux"\nVERSION_ID="13"\n')
    assert not run(port=free_ports, python="pypy3").get("failed")


def test_another_python_that_is_too_old_is_refused_by_its_name(host: Host, free_ports: int) -> None:
    host.has_python("3.9.16", name="pypy3")
    assert not run(port=free_ports).get("failed")
    assert "pypy3 is 3.9.16: 3.11 or newer is needed" in run(port=free_ports, python="pypy3")["msg"]


def test_python_is_not_checked_if_the_release_is_complete(host: Host, free_ports: int) -> None:
    host.release(RELEASE)
    host.has_python("3.9.2", venv=False)
    result = run(port=free_ports)
    assert not result.get("failed"), result
    assert result["lacks_venv"] is False


AS_WANTED: dict[str, Any] = {
    **dict.fromkeys(("complete", "prepared", "kept"), True),
    **{name: [1, 2] for name in ("running", "up_to_date", "enabled", "healthy")},
    **{name: [] for name in ("obsolete", "surplus", "differing")},
}


@pytest.mark.parametrize(
    ("found", "condition"),
    [
        ({}, "current"),
        ({"running": [], "up_to_date": [], "healthy": []}, "idle"),
        ({"running": [1], "up_to_date": [1], "healthy": [1]}, "outdated"),
        *[({name: False}, "outdated") for name in ("complete", "prepared", "kept")],
        *[({name: [1]}, "outdated") for name in ("up_to_date", "enabled")],
        ({"obsolete": ["1.0"]}, "outdated"),
        ({"surplus": [3]}, "outdated"),
        ({"differing": ["/etc/stickyring-node/edges"]}, "unhealthy"),
        ({"healthy": [2]}, "unhealthy"),
        ({"healthy": [2], "enabled": [2]}, "outdated"),
    ],
)
def test_the_condition_is_the_worst_that_was_found(found: dict[str, Any], condition: str) -> None:
    assert node_state.condition(AS_WANTED | found, GOOD) == condition


def test_kept_surplus_instances_are_no_reason_to_restart() -> None:
    keeping = GOOD | {"keep_surplus": True}
    assert node_state.condition(AS_WANTED | {"surplus": [3]}, keeping) == "current"
    assert node_state.condition(AS_WANTED | {"surplus": [3], "enabled": [1]}, keeping) == "outdated"


def test_a_release_of_the_same_name_with_other_content_is_refused(host: Host, free_ports: int) -> None:
    host.release(RELEASE)
    assert run(port=free_ports)["complete"] is True
    result = run(port=free_ports, made_from="other")
    assert f"release {GOOD['release']} was installed from other stickyring_node_requirements" in result["msg"]
    assert run(port=free_ports, made_from="other", release="2.0")["complete"] is False


def test_the_process_behind_a_listening_socket_is_found(listening: int) -> None:
    comm = Path("/proc/self/comm").read_text().strip()
    [(pid, command, _)] = node_state.listeners(listening)
    assert (pid, command) == (os.getpid(), comm)


def test_a_port_without_a_listener_has_no_holder(free_ports: int, listening: int) -> None:
    assert node_state.listeners(free_ports) == set()
    with socket.create_connection(("127.0.0.1", listening)) as client:
        assert node_state.listeners(client.getsockname()[1]) == set()


class FakeProc:
    """A /proc in which given processes share the listening socket of one port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.inode = 4711
        (folder / "net").mkdir(parents=True)
        self.listens("tcp", "0100007F")

    def listens(self, table: str, address: str) -> None:
        """Put the socket into this table and no other."""
        for path in (self.folder / "net").iterdir():
            path.unlink()
        row = (
            f"0: {address}:{self.port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 {self.inode} 1 0"
        )
        (self.folder / "net" / table).write_text(f"sl local_address ...\n{row}\n")

    def add(self, pid: int, cgroup: str, socket_of: int | None = None) -> None:
        process = self.folder / str(pid)
        (process / "fd").mkdir(parents=True)
        (process / "fd" / "0").symlink_to("/dev/null")
        (process / "fd" / "5").symlink_to(f"socket:[{socket_of or self.inode}]")
        (process / "comm").write_text("gunicorn\n")
        (process / "cgroup").write_text(f"0::{cgroup}\n")


@pytest.fixture
def proc(tmp_path: Path, listening: int, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    made = FakeProc(tmp_path / "proc", listening)
    monkeypatch.setattr(node_state, "PROC", made.folder)
    return made


OWN = f"{SERVICE}@1.service"
OWN_CGROUP = f"/system.slice/system-{SERVICE}.slice/{OWN}"


def test_a_port_of_the_service_itself_is_no_problem(proc: FakeProc, listening: int) -> None:
    for pid in (100, 101):
        proc.add(pid, OWN_CGROUP)
    proc.add(200, "/system.slice/other.service", socket_of=1)
    assert node_state.listeners(listening) == {(100, "gunicorn", OWN), (101, "gunicorn", OWN)}
    assert node_state.port_problem("127.0.0.1", listening, OWN) is None


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/system.slice/nginx.service", "nginx.service"),
        ("/user.slice/user-0.slice/session-3.scope", "session-3.scope"),
        (f"/system.slice/system-{SERVICE}.slice/{SERVICE}@2.service", f"{SERVICE}@2.service"),
        ("/", "no unit"),
    ],
)
def test_a_port_of_another_service_is_refused(proc: FakeProc, listening: int, cgroup: str, unit: str) -> None:
    proc.add(100, OWN_CGROUP)
    proc.add(300, cgroup)
    problem = node_state.port_problem("127.0.0.1", listening, OWN) or ""
    assert problem.startswith(
        f"port {listening} on 127.0.0.1, meant for {OWN}, is in use by gunicorn (process 100, {OWN})"
    )
    assert f"gunicorn (process 300, {unit})" in problem
    assert problem.endswith("choose another stickyring_node_port")


def test_a_port_whose_holder_cannot_be_seen_is_refused(proc: FakeProc, listening: int) -> None:
    assert proc.folder.exists()
    assert "is in use by an unknown process" in (node_state.port_problem("127.0.0.1", listening, OWN) or "")


def test_a_socket_of_ipv6_is_found_too(proc: FakeProc, listening: int) -> None:
    proc.add(100, OWN_CGROUP)
    proc.listens("tcp6", "00000000000000000000000001000000")
    assert node_state.listeners(listening) == {(100, "gunicorn", OWN)}


def test_a_process_that_has_just_ended_is_ignored(proc: FakeProc, listening: int) -> None:
    proc.add(100, OWN_CGROUP)
    (proc.folder / "101").mkdir()
    assert node_state.listeners(listening) == {(100, "gunicorn", OWN)}


def test_an_address_of_another_host_is_refused(free_ports: int) -> None:
    assert node_state.port_problem("192.0.2.1", free_ports, OWN) == (
        "192.0.2.1 is not an address of this host: correct stickyring_node_address"
    )
    assert node_state.port_problem("127.0.0.1", free_ports, OWN) is None


def test_a_port_that_lingers_from_an_earlier_run_is_no_problem() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first stays in TIME_WAIT
        client.close()
    assert node_state.port_problem("127.0.0.1", port, OWN) is None


def test_all_problems_of_the_host_are_reported_at_once(host: Host, listening: int) -> None:
    host.has_python("3.9.2")
    host.accounts[SERVICE] = account(SERVICE, "/home/deploy", "/bin/bash")
    message = run(port=listening, instances=1)["msg"]
    assert "Nothing was changed. port" in message
    assert "the account" in message
    assert "3.11 or newer is needed" in message
    assert not host.asked.exists()


def unit(enabled: bool = True) -> dict[str, str]:
    """What systemctl shows of a stopped instance."""
    return {
        "MainPID": "0",
        "ActiveState": "inactive",
        "UnitFileState": "enabled" if enabled else "disabled",
        "NeedDaemonReload": "no",
    }


def installed(host: Host) -> None:
    """A host on which everything is as wanted."""
    for path, text in FILES.items():
        host.write(path, text).chmod(0o644 if path == UNIT else 0o600)
    node_secrets.write(SECRETS, host.root / SETTINGS.lstrip("/") / "secrets")
    host.release(RELEASE)
    (host.root / "opt" / SERVICE / "current").symlink_to(f"releases/{RELEASE}")


def test_the_state_of_a_host_is_reported(host: Host, free_ports: int) -> None:
    installed(host)
    host.write(f"{SETTINGS}/3.env")
    host.write(f"etc/{SERVICE}/notes.env", "no instance")
    host.shows(
        {
            f"{SERVICE}@1.service": host.unit(1),
            f"{SERVICE}@2.service": unit(),
            f"{SERVICE}@3.service": unit(enabled=False),
            f"{SERVICE}@7.service": host.unit(7, enabled=False),
            f"{SERVICE}@x.service": host.unit(8),
            f"other-{SERVICE}@9.service": host.unit(9),
        }
    )
    result = run(port=free_ports)
    assert result["application"] == "chat:app"
    assert result["complete"]
    assert result["current"] == RELEASE
    assert result["differing"] == []
    assert result["surplus"] == [3, 7]
    assert result["enabled"] == [1, 2]
    assert result["running"] == [1, 7]
    assert result["up_to_date"] == [1]
    asked = host.asked.read_text().split()
    assert asked[2:] == [f"{SERVICE}@{i}.service" for i in ("1", "2", "3", "*")]


@pytest.mark.parametrize("clock", [-3600, 0, 3600])
@pytest.mark.parametrize(
    ("other", "up_to_date"),
    [
        ({}, [1, 2]),
        ({"release": "0.9"}, [1]),
        ({"STICKYRING_UNIT": "a0"}, [1]),
        ({"STICKYRING_ENVIRONMENT": "b1"}, [1]),
        ({"STICKYRING_SECRETS": NONE}, [1]),
        # After `systemctl reload`: the variables are new, the credentials are hidden.
        ({"CREDENTIALS_DIRECTORY": None}, [1]),
        ({"python": Path("/usr/bin/python3.7 (deleted)")}, [1]),
    ],
)
def test_a_process_started_from_the_wanted_state_is_up_to_date_whatever_the_clock(
    host: Host, free_ports: int, clock: float, other: dict[str, Any], up_to_date: list[int]
) -> None:
    installed(host)
    host.shows({f"{SERVICE}@1.service": host.unit(1), f"{SERVICE}@2.service": host.unit(2, **other)})
    for path in host.root.rglob("*"):
        os.utime(path, (time.time() + clock,) * 2, follow_symlinks=False)
    result = run(port=free_ports)
    assert result["up_to_date"] == up_to_date
    assert result["behind"] == [i for i in (1, 2) if i not in up_to_date]


def test_a_python_that_was_replaced_by_an_update_of_its_package_is_the_same(host: Host, free_ports: int) -> None:
    installed(host)
    replaced = Path(f"{host.programs / 'python3.11'} (deleted)")
    host.shows({f"{SERVICE}@1.service": host.unit(1, python=replaced)})
    assert run(port=free_ports)["up_to_date"] == [1]


@pytest.mark.parametrize(
    ("address", "listens", "moving"),
    [
        ("127.0.0.1", "127.0.0.1:{}", []),
        ("::1", "[::1]:{}", []),
        ("127.0.0.1", "127.0.0.2:{}", ["127.0.0.2:{}"]),
        ("127.0.0.1", "127.0.0.1:1024", ["127.0.0.1:1024"]),
    ],
)
def test_an_instance_at_another_address_or_port_is_reported(
    host: Host, free_ports: int, address: str, listens: str, moving: list[str]
) -> None:
    installed(host)
    second = free_ports + 1
    host.shows({f"{SERVICE}@2.service": host.unit(2, STICKYRING_LISTEN=listens.format(second))})
    assert run(port=free_ports, address=address)["moving"] == [place.format(second) for place in moving]


def test_a_process_of_an_earlier_version_is_restarted_once(host: Host, free_ports: int) -> None:
    """Its unit and environment have no digests."""
    installed(host)
    shown = host.unit(1)
    (host.processes / shown["MainPID"] / "environ").write_text("N=1")
    host.shows({f"{SERVICE}@1.service": shown})
    assert run(port=free_ports)["up_to_date"] == []
    # It counts as started from the linked state until the role has written its own files.
    for path, text in FILES.items():
        lines = text.splitlines(keepends=True)
        host.write(path, "".join(line for line in lines if "STICKYRING" not in line and "secrets" not in line))
    assert 1 not in run(port=free_ports)["behind"]


def test_an_instance_whose_unit_systemd_has_not_read_again_is_out_of_date(host: Host, free_ports: int) -> None:
    """A drop-in, which the role does not write, has the same effect."""
    installed(host)
    host.shows({f"{SERVICE}@1.service": host.unit(1), f"{SERVICE}@2.service": host.unit(2, edited=True)})
    assert run(port=free_ports)["up_to_date"] == [1]


def test_a_release_whose_python_is_gone_is_built_again(host: Host, free_ports: int) -> None:
    """After an upgrade of Debian, processes keep running, but the link leads to another Python or to none."""
    installed(host)
    host.shows({f"{SERVICE}@1.service": host.unit(1)})
    assert run(port=free_ports)["complete"]
    python = host.root / "opt" / SERVICE / "releases" / RELEASE / "bin" / "python"
    python.unlink()
    for other in ("python3.13", "nothing"):
        python.unlink(missing_ok=True)
        python.symlink_to(host.program(other, "") if other != "nothing" else host.programs / other)
        result = run(port=free_ports)
        assert (result["complete"], result["up_to_date"], result["condition"]) == (False, [], "outdated")


class Health(BaseHTTPRequestHandler):
    """Answers /well with 200 and all else with 503."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/well" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("path", "healthy"), [("/well", True), ("/ill", False)])
def test_an_instance_is_healthy_when_it_says_so(host: Host, path: str, healthy: bool) -> None:
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert node_state.healthy("127.0.0.1", port, path) == healthy
        assert not node_state.drained("127.0.0.1", port)
        server.shutdown()
    assert not node_state.healthy("127.0.0.1", port, path)


@pytest.mark.parametrize(("reason", "drained"), [(b"draining\n", True), (b"full\n", False)])
def test_an_instance_is_drained_when_it_says_so(reason: bytes, drained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Health) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(reason)

    monkeypatch.setattr(Health, "do_GET", refuse)
    with HTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert node_state.drained("127.0.0.1", server.server_address[1]) == drained
        server.shutdown()


@pytest.mark.parametrize("lost", [f"etc/systemd/system/{SERVICE}@.service", f"opt/{SERVICE}/current"])
def test_an_instance_whose_files_are_gone_is_out_of_date(host: Host, free_ports: int, lost: str) -> None:
    installed(host)
    host.shows({f"{SERVICE}@1.service": host.unit(1)})
    (host.root / lost).unlink()
    result = run(port=free_ports)
    assert result["running"] == [1]
    assert result["up_to_date"] == []


def edit(path: Path) -> None:
    path.write_text("other\n")


@pytest.mark.parametrize("change", [Path.unlink, edit, lambda path: path.chmod(0o640)])
@pytest.mark.parametrize(("path", "up_to_date"), [(UNIT, []), (f"{SETTINGS}/2.env", [1])])
def test_a_file_that_differs_is_reported_and_its_instances_are_out_of_date(
    host: Host, free_ports: int, path: str, change: Callable[[Path], None], up_to_date: list[int]
) -> None:
    installed(host)
    host.shows({f"{SERVICE}@{i}.service": host.unit(i) for i in (1, 2)})
    file = host.root / path.lstrip("/")
    change(file)
    result = run(port=free_ports)
    assert result["differing"] == [path]
    assert result["up_to_date"] == up_to_date


def append(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[(name, change) for name in ("environment", "credentials/PASSWORD") for change in (Path.unlink, append)],
        ("credentials/STICKYRING_SECRETS", append),
        ("credentials/PLANTED", edit),
        ("credentials/PLANTED", lambda path: path.symlink_to("/etc/hostname")),
        ("environment", lambda path: path.chmod(0o640)),
        ("credentials", lambda path: path.chmod(0o750)),
        (".", lambda path: path.chmod(0o755)),
    ],
)
def test_secrets_that_differ_are_reported_by_their_folder(
    host: Host, free_ports: int, name: str, change: Callable[[Path], None]
) -> None:
    installed(host)
    host.shows({f"{SERVICE}@{i}.service": host.unit(i) for i in (1, 2)})
    assert run(port=free_ports)["up_to_date"] == [1, 2]
    change(host.root / SETTINGS.lstrip("/") / "secrets" / name)
    result = run(port=free_ports)
    assert (result["differing"], result["up_to_date"]) == ([f"{SETTINGS}/secrets"], [])


def test_changed_secrets_are_reported_without_them_or_their_digest(host: Host, free_ports: int) -> None:
    installed(host)
    host.shows({f"{SERVICE}@{i}.service": host.unit(i) for i in (1, 2)})
    changed = files_of_secrets.secrets_digest(SECRETS | {"PASSWORD": "hunter3"})
    result = run(port=free_ports, secrets=changed)
    assert (result["differing"], result["up_to_date"]) == ([f"{SETTINGS}/secrets"], [])
    assert result["behind"] == []
    for digest in (changed, DIGEST):
        assert digest not in str(result)
    # The negative control: other digests are in the answer.
    assert GOOD["files"][UNIT] in str(result)


def test_an_interrupted_run_leaves_instances_that_do_not_have_the_present_secrets(host: Host, free_ports: int) -> None:
    installed(host)
    restarted, other = host.unit(1), host.unit(2, STICKYRING_SECRETS=NONE)
    host.shows({f"{SERVICE}@1.service": restarted, f"{SERVICE}@2.service": other})
    node_secrets.write(SECRETS, host.root / SETTINGS.lstrip("/") / "secrets")
    result = run(port=free_ports)
    assert (result["up_to_date"], result["behind"]) == ([1], [2])
    # Also if all instances run with the new ones, so that the run removes the former ones.
    assert result["differing"] == [f"{SETTINGS}/secrets.former"]


@pytest.mark.parametrize(
    ("wanted", "written", "started_with", "reloadable"),
    [
        ({}, {}, {}, True),
        (SECRETS, SECRETS, SECRETS, False),
        (SECRETS, {}, {}, False),
        (SECRETS, SECRETS, {}, False),
        ({}, SECRETS, SECRETS, False),
        ({}, {}, SECRETS, False),
        ({}, SECRETS, {}, False),
    ],
)
def test_only_an_instance_without_secrets_can_be_reloaded(
    host: Host,
    free_ports: int,
    wanted: dict[str, str],
    written: dict[str, str],
    started_with: dict[str, str],
    reloadable: bool,
) -> None:
    installed(host)
    node_secrets.write(written, host.root / SETTINGS.lstrip("/") / "secrets")
    digest = files_of_secrets.secrets_digest(started_with)
    host.shows({f"{SERVICE}@1.service": host.unit(1, STICKYRING_SECRETS=digest)})
    result = run(port=free_ports, secrets=files_of_secrets.secrets_digest(wanted))
    assert result["reloadable"] == ([1] if reloadable else [])


def test_a_unit_without_secrets_that_a_rollback_has_restored_runs_what_is_there(host: Host, free_ports: int) -> None:
    installed(host)
    unit = host.root / UNIT.lstrip("/")
    unit.write_text("".join(line for line in FILES[UNIT].splitlines(keepends=True) if "secrets" not in line))
    host.shows({f"{SERVICE}@1.service": host.unit(1, STICKYRING_SECRETS=None)})
    assert 1 not in run(port=free_ports)["behind"]


def test_a_setting_of_several_lines_is_not_taken_for_a_digest(host: Host, free_ports: int) -> None:
    installed(host)
    text = 'N="1\nSTICKYRING_ENVIRONMENT=b0\n"\nSTICKYRING_ENVIRONMENT=b1\n'
    host.write(f"{SETTINGS}/1.env", text).chmod(0o600)
    host.shows({f"{SERVICE}@1.service": host.unit(1)})
    files = GOOD["files"] | {f"{SETTINGS}/1.env": hashlib.sha256(text.encode()).hexdigest()}
    assert run(port=free_ports, files=files)["up_to_date"] == [1]


def test_a_file_of_another_owner_is_reported(host: Host, free_ports: int, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(host)
    monkeypatch.setattr(node_state, "OWNER", (os.getuid(), os.getgid() + 1))
    assert run(port=free_ports)["differing"] == sorted([*FILES, f"{SETTINGS}/secrets"])


def test_an_instance_of_another_release_is_out_of_date(host: Host, free_ports: int) -> None:
    installed(host)
    host.shows({f"{SERVICE}@1.service": host.unit(1)})
    assert run(port=free_ports)["up_to_date"] == [1]
    result = run(port=free_ports, release="2.0")
    assert (result["current"], result["complete"], result["up_to_date"]) == (GOOD["release"], False, [])


@pytest.mark.parametrize(("mode", "prepared"), [(0o755, True), (0o775, False)])
def test_account_and_folder_are_prepared_only_as_the_role_makes_them(
    host: Host, free_ports: int, mode: int, prepared: bool
) -> None:
    installed(host)
    (host.root / SETTINGS.lstrip("/")).chmod(mode)
    assert not run(port=free_ports)["prepared"]
    host.accounts[SERVICE] = account(SERVICE, *node_state.ACCOUNT)
    assert run(port=free_ports)["prepared"] == prepared


def serves_with(host: Host, release: str, settings: str, age: float | None = None) -> str:
    """Link a release with settings that began to serve that many seconds ago or never. Returns the folder of copies."""
    current = host.root / "opt" / SERVICE / "current"
    current.unlink(missing_ok=True)
    current.symlink_to(f"releases/{release}")
    folder = f"{release}/served-{settings}"
    for path in (UNIT, f"{SETTINGS}/1.env"):
        host.write(path, settings)
        if age is not None:
            host.write(f"opt/{SERVICE}/releases/{folder}/{Path(path).name}", settings)
    if age is not None:
        host.age(host.root / "opt" / SERVICE / "releases" / folder, age)
    return folder


def test_states_that_served_are_ordered_by_their_age(host: Host, free_ports: int) -> None:
    """Four releases that have served, one of them linked; one that never served, and one that is incomplete."""
    releases = ("incomplete", "never", "oldest", "old", "current", "young")
    for name in releases:
        host.release(name)
    for age, name in enumerate(reversed(releases), 1):
        serves_with(host, name, "a", None if name == "never" else age * 10)
    (host.root / f"opt/{SERVICE}/releases/incomplete/.complete").unlink()

    def told(linked: str, **changed: object) -> tuple[str, str, list[str]]:
        serves_with(host, linked, "a")
        result = run(port=free_ports, **changed)
        names = [result[name].partition("/")[0] for name in ("last_served", "previous")]
        return *names, result["obsolete"]

    too_many = ["incomplete", "never", "old", "oldest"]
    assert told("young") == ("young", "current", too_many)
    # After a rollback, another rollback goes no further.
    assert told("current") == ("current", "current", too_many)
    assert told("never") == ("young", "young", too_many)
    assert told("current", releases_kept=2)[2] == [*too_many, "young"]
    assert told("young", releases_kept=2)[2] == ["current", *too_many]
    assert told("current", releases_kept=9)[2] == ["incomplete", "never"]


def test_the_previous_state_may_be_the_same_release_with_other_settings(host: Host, free_ports: int) -> None:
    host.release("1.0")
    host.release("2.0")
    first = serves_with(host, "1.0", "a", 30)
    assert run(port=free_ports, release="2.0")["previous"] == ""
    second = serves_with(host, "2.0", "a", 20)
    third = serves_with(host, "2.0", "b", 10)
    result = run(port=free_ports, release="2.0")
    assert (result["serves"], result["last_served"], result["previous"]) == (third, third, second)
    assert not result["obsolete"]
    # After a rollback, `previous` stays the same: another rollback goes no further.
    serves_with(host, "2.0", "a")
    result = run(port=free_ports, release="2.0")
    assert (result["serves"], result["previous"]) == (second, second)
    # Settings that were written but have not served are no rollback target.
    serves_with(host, "2.0", "c")
    result = run(port=free_ports, release="2.0")
    assert (result["serves"], result["last_served"], result["previous"]) == ("", third, third)
    assert first.startswith("1.0/")


def test_surplus_settings_are_reported(host: Host, free_ports: int) -> None:
    host.release(RELEASE)
    *older, old, serves = (serves_with(host, RELEASE, name, 100 - age) for age, name in enumerate("abcd"))
    result = run(port=free_ports, releases_kept=3)
    assert (result["serves"], result["previous"], result["obsolete"]) == (serves, old, older[::-1])


def test_the_next_time_of_use_is_the_latest_whatever_the_clock(host: Host, free_ports: int) -> None:
    host.release(RELEASE)
    assert run(port=free_ports)["next_use"] == pytest.approx(time.time(), abs=10)
    serves_with(host, RELEASE, "a", -3600)
    assert run(port=free_ports)["next_use"] == pytest.approx(time.time() + 3601, abs=10)


def test_a_release_whose_python_is_gone_is_no_rollback_target(host: Host, free_ports: int) -> None:
    for age, name in ((20, "1.0"), (10, "2.0")):
        host.release(name)
        serves_with(host, name, "a", age)
    assert run(port=free_ports, release="2.0")["previous"].startswith("1.0/")
    (host.root / "opt" / SERVICE / "releases/1.0/bin/python").unlink()
    assert run(port=free_ports, release="2.0")["previous"] == ""


def test_the_copies_of_an_earlier_version_are_found(host: Host, free_ports: int) -> None:
    """It kept one folder per release, whose name does not depend on the settings."""
    host.release(RELEASE)
    folder = host.root / "opt" / SERVICE / "releases" / serves_with(host, RELEASE, "a", 10)
    folder.rename(folder.with_name("served"))
    assert run(port=free_ports)["serves"] == f"{RELEASE}/served"


def test_a_release_keeps_copies_of_unit_and_environments(host: Host, free_ports: int) -> None:
    installed(host)
    result = run(port=free_ports)
    assert not result["kept"]
    assert result["keep_in"].startswith(f"{RELEASE}/served-")
    for path, text in FILES.items():
        copy = host.write(f"opt/{SERVICE}/releases/{result['keep_in']}/{Path(path).name}", text)
        copy.chmod(0o644 if path == UNIT else 0o600)
    result = run(port=free_ports)
    assert (result["kept"], result["serves"]) == (True, result["keep_in"])
    copy.write_text("something else")
    assert not run(port=free_ports)["kept"]


def test_a_link_to_elsewhere_is_no_release(host: Host, free_ports: int) -> None:
    installed(host)
    current = host.root / "opt" / SERVICE / "current"
    current.unlink()
    current.symlink_to("/srv/1.0")
    assert run(port=free_ports)["current"] == ""


def test_a_systemctl_that_fails_ends_the_run(host: Host, free_ports: int) -> None:
    host.program("systemctl", "echo no bus >&2; exit 1")
    result = run(port=free_ports)
    assert result["failed"]
    assert "no bus" in result["msg"]


def test_check_mode_reads_the_host_too(host: Host, free_ports: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    installed(host)
    host.shows({f"{SERVICE}@1.service": host.unit(1)})
    assert run(port=free_ports, _ansible_check_mode=True) == run(port=free_ports)


def test_the_documentation_has_every_option() -> None:
    documented = yaml.safe_load(node_state.DOCUMENTATION)["options"]
    types = {name: {key: option[key] for key in option if key != "description"} for name, option in documented.items()}
    # no_log is no part of the documentation.
    assert types == {
        name: {key: value for key, value in option.items() if key != "no_log"}
        for name, option in node_state.OPTIONS.items()
    }
    assert set(GOOD) == set(node_state.OPTIONS)


def test_the_documentation_has_every_return_value(host: Host, free_ports: int) -> None:
    # Warnings may come from other modules that this process has run.
    answered = set(run(port=free_ports)) - {"changed", "invocation", "warnings"}
    assert answered == set(yaml.safe_load(node_state.RETURN))
