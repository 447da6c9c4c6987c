"""Tasks that run programs, executed on this machine: with broken applications, and instances that end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

ROLE = Path(__file__).parents[1]
SLEEP = ["sleep", f"7{os.getpid()}"]
THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
APP = "def app(environ, start_response):\n    start_response('200 OK', [])\n    return []\n"
APPLICATIONS = {
    "good": APP,
    "thread": THREAD + APP,
    "process": f"import subprocess\nsubprocess.Popen({SLEEP}, start_new_session=True)\n{APP}",
    "hanging": f"import subprocess\nsubprocess.Popen({SLEEP}, start_new_session=True).wait()\n",
    "broken": f"{THREAD}raise OSError('no database')\n",
    "asking": "import json, os\nraise OSError(json.dumps(dict(os.environ)))\n",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """The result of the task for each application."""
    folder = tmp_path_factory.mktemp("load")
    programs = {
        "stickyring": f'export PYTHONPATH={folder}\nexec {Path(sys.executable).parent}/stickyring "$@"',
        "python": f'exec {sys.executable} "$@"',
    }
    if os.getuid() != 0:
        # Runs as root of a user namespace, which has no other user.
        programs |= {"unshare": 'exec /usr/bin/unshare --map-root-user "$@"', "runuser": 'shift 3\nexec "$@"'}
    (folder / "bin").mkdir()
    for name, script in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    for name, text in APPLICATIONS.items():
        (folder / f"{name}.py").write_text(text)
    [task] = yaml.safe_load((ROLE / "tasks" / "load.yml").read_text())
    tasks = [task | {"register": "done", "ignore_errors": True}]
    tasks.append(
        {
            "ansible.builtin.copy": {
                "content": "{{ done | to_json }}",
                "dest": f"{folder}/{{{{ inventory_hostname }}}}.json",
            }
        }
    )
    files = [str(ROLE / part / "main.yml") for part in ("defaults", "vars")]
    (folder / "run.yml").write_text(
        yaml.safe_dump(
            [{"hosts": "all", "gather_facts": False, "strategy": "free", "vars_files": files, "tasks": tasks}]
        )
    )
    given = {
        "stickyring_node_service": "root",
        "stickyring_node_address": "192.0.2.1",
        "stickyring_node_release": "1",
        "stickyring_node_start_timeout": 15,
        "stickyring_node_environment": {"CHAT": "a 'quoted' \"text\" $HOME", "NUMBER": 1},
        "stickyring_node_result_state": {"current": "", "application": "", "differing": []},
        "__stickyring_node_release_path": str(folder),
    }
    hosts = {name: {"stickyring_node_application": f"{name}:app"} for name in APPLICATIONS}
    everywhere = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (folder / "hosts.yml").write_text(json.dumps({"all": {"hosts": hosts, "vars": everywhere}}))
    began = time.monotonic()
    subprocess.run(
        [
            Path(sys.executable).parent / "ansible-playbook",
            "-i",
            folder / "hosts.yml",
            folder / "run.yml",
            "-e",
            json.dumps(given),
        ],
        env=os.environ
        | {
            "ANSIBLE_COLLECTIONS_PATH": str(ROLE.parents[1] / "collections"),
            "ONLY_HERE": "1",
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
        },
        check=True,
        capture_output=True,
        timeout=120,
    )
    assert time.monotonic() - began < 60
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in APPLICATIONS}


@pytest.mark.parametrize("name", ["good", "thread", "process"])
def test_an_application_is_loaded_whatever_it_starts(said: dict[str, dict[str, object]], name: str) -> None:
    assert said[name]["rc"] == 0, said[name]


def test_an_application_that_hangs_fails_with_a_clear_message(said: dict[str, dict[str, object]]) -> None:
    assert said["hanging"]["failed"]
    said_of_it = str(said["hanging"]["stderr"])
    assert "hanging:app was not loaded within 15 s (stickyring_node_start_timeout)" in said_of_it


def test_the_error_of_an_application_is_shown(said: dict[str, dict[str, object]]) -> None:
    assert said["broken"]["rc"] == 1
    line = str(said["broken"]["stderr"]).splitlines()[-1]
    assert re.fullmatch(r"Error: cannot load broken:app: OSError: no database \(/.*/broken\.py:3\)", line)


def test_no_process_is_left_behind(said: dict[str, dict[str, object]]) -> None:
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert "\0".join(SLEEP).encode() not in b"\n".join(commands)


def test_the_application_is_loaded_with_the_units_environment(said: dict[str, dict[str, object]]) -> None:
    (found,) = re.findall(r"OSError: (\{.*\}) \(", str(said["asking"]["stderr"]).splitlines()[-1])
    environment = json.loads(found)
    assert environment["STICKYRING_NODE_NAME"] == "asking-1"
    assert environment["STICKYRING_LISTEN"] == "192.0.2.1:8001"
    assert environment["CHAT"] == "a 'quoted' \"text\" $HOME"
    assert environment["NUMBER"] == "1"
    assert environment["HOME"] == "/nonexistent"
    assert "ONLY_HERE" not in environment


@pytest.mark.parametrize(
    ("instance", "stays"), [("sleep 60 & wait", True), ("while sleep 0.5; do :; done", False), ("exit 0", False)]
)
def test_instances_are_watched_with_the_programs_of_a_minimal_debian(
    tmp_path: Path, instance: str, stays: bool
) -> None:
    """The master has a new child after a worker has died. `pgrep` is missing, as on a minimal Debian."""
    text = (ROLE / "tasks" / "restart.yml").read_text().partition("- name: Check that the processes keep running")[2]
    text = textwrap.dedent(text.partition("cmd: |\n")[2].partition("      changed_when")[0])
    text = text.replace("{{ __stickyring_node_units | join(' ') }}", "x@1.service")
    text = text.replace("{{ stickyring_node_proving_time }}", "3")
    assert "{{" not in text
    for program in ("sleep", "seq", "cat"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    with subprocess.Popen(["sh", "-c", instance], start_new_session=True) as master:
        (tmp_path / "systemctl").write_text(f"#!/bin/sh\necho {master.pid}\n")
        (tmp_path / "systemctl").chmod(0o755)
        if instance == "exit 0":
            master.wait()
        else:
            children = Path(f"/proc/{master.pid}/task/{master.pid}/children")
            while not children.read_text():
                assert master.poll() is None
        done = subprocess.run(
            ["/bin/sh", "-c", text], env={"PATH": str(tmp_path)}, capture_output=True, timeout=60, check=False
        )
        if master.poll() is None:
            os.killpg(master.pid, signal.SIGKILL)
    assert (done.returncode == 0) == stays, (done.stdout, done.stderr)
    assert stays or b"It ended" in done.stdout


@pytest.mark.parametrize(
    ("said", "times", "asked", "succeeds"),
    [
        ("E: Could not get lock /var/lib/dpkg/lock-frontend", 6, 7, True),
        # apt-get update returns 0 even if a mirror did not answer.
        ("E: Unable to locate package python3-apt", 2, 3, True),
        ("No package matching 'pypy3-venv' is available", 2, 3, True),
        ("E: Unable to locate package python3-apt", 9, 4, False),
        ("E: You don't have enough free space", 9, 1, False),
    ],
)
def test_apt_is_retried_for_temporary_errors(tmp_path: Path, said: str, times: int, asked: int, succeeds: bool) -> None:
    """The task with a program in place of the module, which fails so many times."""
    [task] = [
        one
        for one in yaml.safe_load((ROLE / "tasks" / "install.yml").read_text())
        if one["name"] == "Install the venv package"
    ]
    script = f'echo >> asked; [ "$(wc -l < asked)" -gt {times} ] || {{ echo "{said}" >&2; exit 1; }}'
    del task["ansible.builtin.apt"], task["when"]
    task |= {"ansible.builtin.shell": {"cmd": script, "chdir": str(tmp_path)}, "delay": 0}
    (tmp_path / "run.yml").write_text(
        yaml.safe_dump([{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [task]}])
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", tmp_path / "run.yml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    assert len((tmp_path / "asked").read_text().splitlines()) == asked
