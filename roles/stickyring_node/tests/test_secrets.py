"""Secrets: the files that systemd reads, the load check, and that no output, command line or file shows them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stickyring.fleet.plugins.module_utils import secrets as files_of_secrets
from ansible_collections.stickyring.fleet.plugins.modules import node_load_check, node_secrets

ROLE = Path(__file__).parents[1]
PROJECT = ROLE.parents[1]
PROGRAMS = Path(sys.executable).parent
ODD = {
    "EMPTY": "",
    "NUMBER": 5432,
    "KEY": "-----BEGIN KEY-----\nab+/=\n-----END KEY-----\n",
    "ODD": "'single' \"double\" \\ \\n $HOME `id` %n # ; \t {{ x }} é",
    "TRICK": 'x"\nSTICKYRING_SECRETS=\nSTICKYRING_SECRETS="0"\n',
}
SECONDS = 60


def texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def read(text: str) -> dict[str, str]:
    """Read an environment file by the shell's rules, which are the same as systemd's for what is in these quotes."""
    return dict(word.split("=", 1) for word in shlex.split(text, comments=True))


def test_both_ways_give_each_value_unchanged() -> None:
    files = files_of_secrets.secret_files(ODD)
    digest = files_of_secrets.secrets_digest(ODD)
    expected = texts(ODD) | {"STICKYRING_SECRETS": digest}
    assert read(files.pop("environment")) == expected
    assert files == {f"credentials/{name}": value for name, value in expected.items()}


def test_the_digest_depends_on_names_and_values_only() -> None:
    digest = files_of_secrets.secrets_digest
    assert digest({"A": "1", "B": "2"}) == digest({"B": 2, "A": 1})
    others = [{}, {"A": "1"}, {"A": "2", "B": "1"}, {"A": "1", "B": "2", "C": ""}, {"A": '1", "B": "2'}]
    assert len({digest(one) for one in [*others, {"A": "1", "B": "2"}]}) == len(others) + 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(node_secrets, "OWNER", (os.getuid(), os.getgid()))
    return tmp_path / "secrets"


def present(folder: Path) -> dict[str, str] | None:
    found: dict[str, str] | None = files_of_secrets.secrets_in(folder, (os.getuid(), os.getgid()))
    return found


def test_the_folder_is_readable_by_its_owner_only_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        node_secrets.write(ODD, folder)
    finally:
        os.umask(before)
    assert present(folder) == texts(ODD)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}
    assert len(modes) == 2 + len(ODD) + 2


def test_removed_secrets_are_only_in_the_former_folder(folder: Path) -> None:
    node_secrets.write({"OLD": "1", "SAME": "1"}, folder)
    node_secrets.write({"SAME": "2"}, folder)
    assert present(folder) == {"SAME": "2"}
    former = folder.with_name("secrets.former")
    assert present(former) == {"OLD": "1", "SAME": "1"}
    # Another run before the instances have restarted: they still have those of the first.
    node_secrets.write({"SAME": "3"}, folder)
    assert (present(folder), present(former)) == ({"SAME": "3"}, {"OLD": "1", "SAME": "1"})
    assert {path.name for path in folder.parent.iterdir()} == {"secrets", "secrets.former"}


def test_a_file_or_link_in_place_of_the_folder_is_replaced(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    folder.symlink_to(other)
    node_secrets.write({"A": "1"}, folder)
    assert present(folder) == {"A": "1"}
    assert list(other.iterdir()) == []


@pytest.mark.parametrize("module", [node_secrets, node_load_check])
def test_the_documentation_has_every_option(module: Any) -> None:
    documented = yaml.safe_load(module.DOCUMENTATION)["options"]
    types = {name: {key: one[key] for key in one if key != "description"} for name, one in documented.items()}
    assert types == {n: {k: v for k, v in one.items() if k != "no_log"} for n, one in module.OPTIONS.items()}
    assert {name for name, one in module.OPTIONS.items() if one.get("no_log")} == {"secrets"}


APPLICATION = """\
import json, os, pathlib, time
folder = pathlib.Path(os.environ["CREDENTIALS_DIRECTORY"])
said = {
    "environment": dict(os.environ),
    "credentials": {path.name: path.read_text() for path in folder.iterdir()},
    "modes": sorted({oct(path.stat().st_mode) for path in [folder, *folder.iterdir()]}),
    "input": os.readlink("/proc/self/fd/0"),
}
(here := pathlib.Path(os.environ["HERE"])).joinpath("arriving").write_text(json.dumps(said))
(here / "arriving").rename(here / "arrived")
deadline = time.monotonic() + 30
while not (here / "seen").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
print("it prints", os.environ["PASSWORD"], flush=True)
if "FAILS" in os.environ:
    raise OSError(f"cannot connect to db://app:{os.environ['PASSWORD']}@db")
def app(environ, start_response):
    start_response("200 OK", [])
    return []
"""


@dataclass
class Run:
    """A playbook with the role's tasks that has ended."""

    folder: Path
    code: int
    output: str
    commands: set[bytes]
    values: dict[str, str]

    def shows(self, value: str) -> list[str]:
        """Return the notations of the value that are in the output."""
        forms = {
            "plain": value,
            "JSON": json.dumps(value)[1:-1],
            "base64": base64.b64encode(value.encode()).decode(),
            "SHA-256": hashlib.sha256(value.encode()).hexdigest(),
        }
        return [form for form, text in forms.items() if text in self.output]


def task_of(file: str, name: str) -> dict[str, Any]:
    """The role's task whose name begins so; its conditions, which ask for a host's state, are left out."""
    tasks = yaml.safe_load((ROLE / "tasks" / f"{file}.yml").read_text())
    tasks += [inner for block in tasks for inner in block.get("block", [])]
    [found] = [one for one in tasks if one["name"].startswith(name)]
    return {key: value for key, value in found.items() if key != "when"}


def commands() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:
            continue


def play(folder: Path, tasks: list[dict[str, Any]], values: dict[str, str], *options: str, **given: object) -> Run:
    """Run tasks with vault-encrypted secrets and --diff -vvv on this machine, and look at all processes meanwhile."""
    (folder / "bin").mkdir()
    (folder / "application.py").write_text(APPLICATION)
    (folder / "password").write_text(secrets.token_hex())
    programs = {
        "stickyring": f'export PYTHONPATH={folder}\nexec {PROGRAMS}/stickyring "$@"',
        "python": f'exec {sys.executable} "$@"',
    }
    # In the name space of a user who is not root, there is no other user.
    programs |= {} if os.getuid() == 0 else {"runuser": 'shift 3\nexec "$@"'}
    for name, script in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_VAULT_PASSWORD_FILE": str(folder / "password"),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "TMPDIR": str(folder),
    }
    encrypt = [sys.executable, "-c", ENCRYPT, str(folder / "password")]
    done = subprocess.run(encrypt, input=json.dumps(values), capture_output=True, text=True, check=True)
    lines = [
        line
        for name, encrypted in json.loads(done.stdout).items()
        for line in [f"  {name}: !vault |", *(f"    {line}" for line in encrypted.splitlines())]
    ]
    (folder / "secrets.yml").write_text("\n".join(["stickyring_node_secrets:", *lines, ""]))
    variables: dict[str, object] = {
        "ansible_python_interpreter": sys.executable,
        "stickyring_node_service": "root",
        "stickyring_node_application": "application:app",
        "stickyring_node_address": "127.0.0.1",
        "stickyring_node_edges": [],
        "stickyring_node_wheelhouse": "",
        "stickyring_node_requirements": str(PROJECT / "app" / "requirements.lock"),
        "stickyring_node_release": "1",
        "stickyring_node_start_timeout": 50,
        "stickyring_node_environment": {"HERE": str(folder), "SHOWN": "this-is-shown"},
        "__stickyring_node_release_path": str(folder),
        "__stickyring_node_secrets_path": str(folder / "secrets"),
    }
    files = [*(str(ROLE / part / "main.yml") for part in ("defaults", "vars")), str(folder / "secrets.yml")]
    plays = [{"hosts": "all", "gather_facts": False, "vars_files": files, "tasks": tasks}]
    (folder / "run.yml").write_text(yaml.safe_dump(plays))
    (folder / "given.json").write_text(json.dumps(variables | given))
    command: list[str | Path] = [
        PROGRAMS / "ansible-playbook",
        "-i",
        "localhost,",
        "-c",
        "local",
        folder / "run.yml",
        "--diff",
        "-vvv",
    ]
    command += ["-e", f"@{folder}/given.json", *options]
    seen: set[bytes] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            arrived = (folder / "arrived").exists()
            seen.update(commands())
            if arrived:
                (folder / "seen").touch()

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        root = [] if os.getuid() == 0 else ["unshare", "--map-root-user"]
        done = subprocess.run(
            [*root, *command], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    finally:
        ended.set()
        watcher.join()
    return Run(folder, done.returncode, done.stdout + done.stderr, seen, values)


# In a process of its own: importing Ansible's controller redirects the warnings of modules, which other tests look at.
ENCRYPT = """
import json, sys
from ansible.parsing.vault import VaultLib, VaultSecret
vault = VaultLib([("default", VaultSecret(open(sys.argv[1], "rb").read()))])
print(json.dumps({name: vault.encrypt(value).decode() for name, value in json.load(sys.stdin).items()}))
"""
WRITE = task_of("configure", "Write the secrets")
TRY = task_of("load", "Load the application")
REMOVE = task_of("service", "Remove the former secrets")
CHECK = {
    "ansible.builtin.import_role": {"name": "stickyring.fleet.stickyring_node", "tasks_from": "state"},
    "ignore_errors": True,
}
PLANT = {"ansible.builtin.debug": {"msg": "{{ stickyring_node_secrets }}"}}


def unique(**more: str) -> dict[str, str]:
    """Values that are nowhere else on this machine."""
    word = secrets.token_hex(12)
    return {
        "PASSWORD": f"word-{word}",
        "KEY": f"BEGIN {word}\nodd '\" \\ $HOME %n é {word}\nEND\n",
        "EMPTY": "",
        **more,
    }


def left_below(folder: Path, values: dict[str, str]) -> set[str]:
    """The files below a folder with a secret, by their paths in it."""
    wanted = [value.encode() for value in values.values() if value]
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)) for path in files if any(value in path.read_bytes() for value in wanted)}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The load check succeeds, and the secrets are written where others are already."""
    folder = tmp_path_factory.mktemp("deployed")
    first = {"name": "First"} | WRITE | {"vars": {"stickyring_node_secrets": {"OLD": "an old secret"}}}
    run = play(folder, [CHECK, TRY, first, WRITE, REMOVE, WRITE | {"name": "Again"}], unique())
    assert run.code == 0, run.output
    return run


def test_the_load_check_has_the_secrets_both_ways(deployed: Run) -> None:
    said = json.loads((deployed.folder / "arrived").read_text())
    assert {name: said["environment"][name] for name in deployed.values} == deployed.values
    assert said["credentials"] == {f"secret_{name}": value for name, value in deployed.values.items()}
    assert said["modes"] == ["0o100400", "0o40500"]
    assert said["input"] == "/dev/null"
    # It is gone, although the application could not remove it.
    folder = Path(said["environment"]["CREDENTIALS_DIRECTORY"])
    assert folder.name.startswith(".stickyring-")
    assert not folder.exists()


def test_no_output_has_a_secret_or_its_digest(deployed: Run) -> None:
    # The password, which the application prints, is replaced.
    assert "it prints ********" in deployed.output
    for value in filter(None, [*deployed.values.values(), "an old secret"]):
        assert deployed.shows(value) == []
        assert all(line not in deployed.output for line in value.splitlines() if len(line) > 3)
    assert files_of_secrets.secrets_digest(deployed.values) not in deployed.output
    # The negative control: the setting that is no secret is shown.
    assert "this-is-shown" in deployed.output


def test_no_command_line_has_a_secret(deployed: Run) -> None:
    together = b"\n".join(deployed.commands)
    assert b"serve\0--check" in together, "the load check was not seen"
    for value in filter(None, deployed.values.values()):
        assert all(line.encode() not in together for line in value.splitlines() if len(line) > 3)


def test_only_the_present_secrets_stay_and_only_there(deployed: Run) -> None:
    # What the application itself has written, in this test.
    expected = {"arrived", *(f"secrets/{name}" for name in ("environment", "credentials/PASSWORD", "credentials/KEY"))}
    assert left_below(deployed.folder, deployed.values) == expected
    assert left_below(deployed.folder, {"OLD": "an old secret"}) == {"run.yml"}
    assert "changed=3" in deployed.output, "a second run changes something, or the first did not"


def test_the_secrets_of_a_load_check_that_fails_are_not_shown(tmp_path: Path) -> None:
    run = play(tmp_path, [TRY], unique(FAILS="failing-" + secrets.token_hex(8)))
    assert run.code == 2
    assert "The application cannot be loaded" in run.output
    assert "OSError: cannot connect to db://app:********@db" in run.output
    assert [run.shows(value) for value in run.values.values() if value] == [[]] * 3
    assert left_below(tmp_path, run.values) == {"arrived"}


def test_check_mode_works_where_nothing_is_and_writes_nothing(tmp_path: Path) -> None:
    run = play(tmp_path, [TRY, WRITE], unique(), "--check", __stickyring_node_secrets_path=f"{tmp_path}/none/secrets")
    assert run.code == 0, run.output
    assert "changed=1" in run.output
    assert left_below(tmp_path, run.values) == set()
    assert [run.shows(value) for value in run.values.values() if value] == [[]] * 2


def test_the_search_finds_a_secret_that_is_printed(tmp_path: Path) -> None:
    """The negative control."""
    run = play(tmp_path, [PLANT], {"PASSWORD": secrets.token_hex()})
    assert run.code == 0, run.output
    assert run.shows(run.values["PASSWORD"]) == ["plain", "JSON"]


def test_values_of_a_wrong_type_are_refused_without_being_shown(tmp_path: Path) -> None:
    """By Ansible's validation or by the role's own; neither changes anything."""
    value = secrets.token_hex()
    wrong = [value, f"A={value}", [value], {"A": [value]}, {"A": {"B": value}}, {"A-B": value}, {"A": value + "\0"}]
    role = {"name": "stickyring.fleet.stickyring_node"}
    tasks = [
        {
            "ansible.builtin.import_role": role | {"tasks_from": tasks_from},
            "vars": {"stickyring_node_secrets": one},
            "ignore_errors": True,
        }
        for one in wrong
        for tasks_from in ("state", "check")
    ]
    run = play(tmp_path, tasks, {})
    # Two that cannot be converted to a dictionary are refused by the validation too, before the role's own check.
    assert f"ignored={len(tasks) + 2} " in run.output, run.output
    assert run.shows(value) == []
