"""A secret reaches the application, and is found nowhere else: in no output, log, command line or other file.

The tests are steps: each begins with the secrets that the previous one has left. The last one removes them.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from ansible.parsing.vault import VaultLib, VaultSecret
from residents import Residents

PROJECT = Path(__file__).parents[4]
NEEDLE = "/root/needle"
"""A file on each node with the values to search for: a command that named them would put them into the journal."""
FOLDERS = "/etc /home /opt /root /run /srv /tmp /usr/local /var"
WATCH = "watch-commands"
# Writes every command line that it sees, once. It runs on the nodes, as root, and leaves them most of their processor.
WATCHER = """\
import glob, time
seen, kept = set(), open("/root/commands", "wb", buffering=0)
while True:
    time.sleep(0.015)
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            line = open(path, "rb").read()
        except OSError:
            continue
        if line not in seen:
            seen.add(line)
            kept.write(line.replace(b"\\0", b" ") + b"\\n")
"""
SETTLED_SECONDS = 60
BACK_SECONDS = 30


@dataclass
class Fleet:
    """Deploys secrets to the nodes, and finds where they are."""

    nodes: list[Any]
    machine: Any
    ansible: Any
    inventory: Path
    folder: Path
    since: str = ""
    values: dict[str, str] = field(default_factory=dict)
    local_commands: set[bytes] = field(default_factory=set)

    def deploy(self, values: dict[str, str], *options: str, check: bool = True) -> str:
        """Run playbooks/nodes.yml with --diff -vvv and vault-encrypted secrets; return its output."""
        self.values = values
        password = self.folder / "password"
        password.write_text(secrets.token_hex())
        vault = VaultLib([("default", VaultSecret(password.read_bytes()))])
        lines = ["stickyring_node_secrets:" if values else "stickyring_node_secrets: {}"]
        for name, value in values.items():
            lines += [f"  {name}: !vault |"]
            lines += [f"    {line}" for line in vault.encrypt(value).decode().splitlines()]
        (self.folder / "secrets.yml").write_text("\n".join([*lines, ""]))
        command = ["-i", self.inventory, "playbooks/nodes.yml", "--diff", "-vvv", "--vault-password-file", password]
        command += ["-e", f"@{self.folder}/secrets.yml", "-e", "stickyring_node_proving_time=0", *options]
        ended = threading.Event()

        def look() -> None:
            # The commands that Ansible starts here last longer.
            while not ended.wait(0.05):
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    try:
                        self.local_commands.add(path.read_bytes())
                    except OSError:
                        continue

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            done = self.ansible("ansible-playbook", *command, check=check)
        finally:
            ended.set()
            watcher.join()
        return str(done.stdout + done.stderr)

    def units(self, node: Any) -> list[str]:
        numbers = range(1, int(node.variables["stickyring_node_instances"]) + 1)
        return [f"{node.variables['stickyring_node_service']}@{number}.service" for number in numbers]

    def processes(self) -> dict[tuple[str, str], str]:
        """The main process of each instance, by node and unit."""
        return {
            (node.name, unit): self.machine(node.name).check_output(f"systemctl show {unit} -P MainPID")
            for node in self.nodes
            for unit in self.units(node)
        }

    def has(self, node: Any, unit: str) -> tuple[dict[str, str], dict[str, str]]:
        """What the application of an instance has: variables, and the credentials that its user can read."""
        host, user = self.machine(node.name), node.variables["stickyring_node_service"]
        main = host.check_output(f"systemctl show {unit} -P MainPID")
        worker = host.check_output(f"cat /proc/{main}/task/{main}/children").split()[0]
        words = host.check_output(f"tr '\\0' '\\1' < /proc/{worker}/environ").split("\1")
        variables = dict(word.split("=", 1) for word in words if "=" in word)
        folder = variables["CREDENTIALS_DIRECTORY"]
        if not self.passes_credentials(node):
            return variables, {}
        inside = f"nsenter --target {worker} --mount setpriv --reuid {user} --regid {user} --clear-groups"
        names = host.check_output(f"{inside} ls {folder}").split()
        found = {name: host.check_output(f"{inside} cat {folder}/{name}") for name in names}
        return variables, found

    def passes_credentials(self, node: Any) -> bool:
        """Whether the node's systemd passes credentials to any unit at all: in a container of podman, it does not."""
        trial = "systemd-run --quiet --collect --wait --pipe --property=LoadCredential=trial:/etc/hostname"
        return bool(self.machine(node.name).run(f"{trial} sh -c 'test -s \"$CREDENTIALS_DIRECTORY/trial\"'").rc == 0)

    def mark(self, values: list[str]) -> None:
        """Put the values to search for on each node, without a command that names them."""
        (self.folder / "needle").write_text("\n".join(values) + "\n")
        copy = ["-m", "copy", "-a", f"src={self.folder}/needle dest={NEEDLE} mode=0600"]
        self.ansible("ansible", "nodes", "-i", self.inventory, "--become", *copy)

    def files(self, node: Any) -> dict[str, int]:
        """The files on a node with one of the marked values, and their modes."""
        find = f"grep --recursive --files-with-matches --fixed-strings --devices=skip --file={NEEDLE} {FOLDERS}"
        found = self.machine(node.name).run(f"{find} | xargs --no-run-if-empty stat --format='%a %n'").stdout
        lines = (line.split(" ", 1) for line in found.splitlines())
        return {path: int(mode, 8) for mode, path in lines if path != NEEDLE}

    def expected_files(self, node: Any) -> set[str]:
        service = node.variables["stickyring_node_service"]
        kept = f"/etc/{service}/secrets"
        names = [name for name in self.values if name != "EMPTY"]
        units = self.units(node) if self.passes_credentials(node) else []
        return {
            f"{kept}/environment",
            *(f"{kept}/credentials/{name}" for name in names),
            *(f"/run/credentials/{unit}/secret_{name}" for unit in units for name in names),
        }

    def texts(self, node: Any) -> dict[str, str]:
        """What everybody on the node, or who collects its logs, can see."""
        look = {
            "journal": f"journalctl --no-pager --all --output=json --since=@{self.since}",
            "systemctl show": "systemctl show; systemctl show --all '*'; systemctl show-environment",
            "cmdline": "cat /root/commands",
        }
        return {place: self.machine(node.name).check_output(command) for place, command in look.items()}


def fresh() -> dict[str, str]:
    """Values that are nowhere else."""
    return {
        "TOKEN": f"token-{secrets.token_hex(16)}",
        "KEY": f"-----BEGIN KEY-----\n{secrets.token_hex(16)} '\"\\n $HOME %n é\n-----END KEY-----",
        "EMPTY": "",
    }


def parts(values: dict[str, str]) -> list[str]:
    """What to search for: the random words in the values."""
    return re.findall(r"[0-9a-f]{32}", " ".join(values.values()))


@pytest.fixture(scope="module")
def fleet(
    nodes: list[Any], machine: Any, ansible: Any, inventory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    found = Fleet(nodes, machine, ansible, inventory, tmp_path_factory.mktemp("secrets"))
    found.since = min(machine(node.name).check_output("date +%s") for node in nodes)
    for node in nodes:
        command = "systemd-run --quiet --unit=%s python3 -c %s"
        machine(node.name).check_output(command, WATCH, WATCHER)
    yield found
    for node in nodes:
        machine(node.name).run(
            f"systemctl stop {WATCH} planted; rm -f {NEEDLE} /root/commands /root/planted /var/tmp/planted"
        )


@pytest.fixture(scope="module")
def deployed(fleet: Fleet) -> str:
    """The output of the run that has brought the first secrets to nodes without any."""
    values = fresh()
    output = fleet.deploy(values, "-e", "stickyring_share=100%")
    fleet.mark(parts(values))
    return output


def assert_has_both_ways(fleet: Fleet) -> None:
    for node in fleet.nodes:
        for unit in fleet.units(node):
            variables, credentials = fleet.has(node, unit)
            assert {name: variables.get(name) for name in fleet.values} == fleet.values
            if not fleet.passes_credentials(node):
                service = node.variables["stickyring_node_service"]
                asked = f"LoadCredential=secret:/etc/{service}/secrets/credentials"
                assert asked in fleet.machine(node.name).check_output(f"systemctl cat {unit}").splitlines()
                continue
            del credentials["secret_STICKYRING_SECRETS"]
            assert credentials == {f"secret_{name}": value for name, value in fleet.values.items()}


def test_the_application_has_it(fleet: Fleet, deployed: str) -> None:
    assert "PLAY RECAP" in deployed
    assert_has_both_ways(fleet)


def test_no_output_has_it(fleet: Fleet, deployed: str) -> None:
    assert [part for part in parts(fleet.values) if part in deployed] == []
    assert "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in deployed, "the output shows no module that was given the secrets"


def test_no_log_property_or_command_line_has_it(fleet: Fleet, deployed: str) -> None:
    for node in fleet.nodes:
        for place, text in fleet.texts(node).items():
            assert [part for part in parts(fleet.values) if part in text] == [], f"{node.name}: {place}"
        assert "serve --check" in fleet.texts(node)["cmdline"], "the load check was not seen"
    together = b"\n".join(fleet.local_commands)
    assert b"playbooks/nodes.yml" in together
    assert [part for part in parts(fleet.values) if part.encode() in together] == []


def test_no_file_but_those_of_root_and_of_the_unit_has_it(fleet: Fleet, deployed: str) -> None:
    """Release folders included."""
    for node in fleet.nodes:
        found = fleet.files(node)
        assert found.keys() == fleet.expected_files(node)
        assert [path for path, mode in found.items() if mode & 0o007] == []
        assert {mode for path, mode in found.items() if path.startswith("/etc/")} == {0o600}


def test_the_artifacts_do_not_have_it(fleet: Fleet, deployed: str) -> None:
    search = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", f"--file={fleet.folder}/needle"]
    done = subprocess.run([*search, PROJECT / ".artifacts"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_second_run_changes_nothing(fleet: Fleet, deployed: str) -> None:
    before = fleet.processes()
    assert re.findall(r"changed=[1-9]", fleet.deploy(fleet.values)) == []
    assert fleet.processes() == before


@contextmanager
def watched(fleet: Fleet) -> Iterator[set[frozenset[str]]]:
    """The sets of instances that were down at the same time."""
    down: set[frozenset[str]] = set()
    done = threading.Event()
    addresses = [
        f"{node.variables['stickyring_address']}:{int(node.variables['stickyring_node_port']) + number}"
        for node in fleet.nodes
        for number in range(int(node.variables["stickyring_node_instances"]))
    ]

    def answers(address: str) -> bool:
        try:
            with urlopen(f"http://{address}/healthz", timeout=1) as answer:
                return bool(answer.status == 200)
        except (HTTPError, URLError, ConnectionError, TimeoutError):
            return False

    def watch() -> None:
        while not done.wait(0.05):
            down.add(frozenset(address for address in addresses if not answers(address)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield down
    finally:
        done.set()
        watcher.join()


def test_a_changed_one_restarts_one_instance_after_another_and_loses_nothing(
    fleet: Fleet, deployed: str, edge_url: Callable[[str], str]
) -> None:
    before, old = fleet.processes(), fleet.values
    with Residents(edge_url("sticky"), [f"user-{number}" for number in range(10)]) as residents:
        residents.settle(SETTLED_SECONDS)
        with watched(fleet) as down:
            output = fleet.deploy(old | {"TOKEN": fresh()["TOKEN"]})
        # Not settle(): only a rebalance brings those home who reconnected while their node was restarting.
        residents.wait_for_answers(time.monotonic(), BACK_SECONDS)
        assert not [one for one in residents if one.lost]
    after = fleet.processes()
    assert [place for place in before if after[place] == before[place]] == []
    assert max(map(len, down)) == 1, down
    assert [part for part in parts(old | fleet.values) if part in output] == []
    assert_has_both_ways(fleet)
    # The old value is gone from every node.
    fleet.mark(parts({"TOKEN": old["TOKEN"]}))
    assert [fleet.files(node) for node in fleet.nodes] == [{}] * len(fleet.nodes)


@pytest.mark.soak
def test_in_surge_mode_a_changed_one_reaches_the_application_too(fleet: Fleet, deployed: str) -> None:
    fleet.deploy(fresh(), "-e", "stickyring_node_surge=true")
    assert_has_both_ways(fleet)


@pytest.mark.soak
def test_an_instance_that_fails_with_changed_secrets_gets_the_former_ones_back(fleet: Fleet, deployed: str) -> None:
    good, before = fleet.values, fleet.processes()
    never = ["-e", "stickyring_node_health_path=/never", "-e", "stickyring_node_start_timeout=8"]
    assert "which serves" in " ".join(fleet.deploy(good | {"TOKEN": "bad"}, *never, check=False).split())
    fleet.values = good
    deadline = time.monotonic() + BACK_SECONDS
    while len(set(fleet.processes().values()) & {"0", ""}) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert_has_both_ways(fleet)
    after = fleet.processes()
    assert {name for name, unit in after if after[name, unit] != before[name, unit]} == {fleet.nodes[0].name}
    service = fleet.nodes[0].variables["stickyring_node_service"]
    assert not fleet.machine(fleet.nodes[0].name).file(f"/etc/{service}/secrets.former").exists
    fleet.deploy(good)


# Shows the value in each place, without a command that names it.
PLANT = f"""\
cat {NEEDLE} > /var/tmp/planted
chmod 0644 /var/tmp/planted
logger --file {NEEDLE}
echo 'exec -a "$(cat {NEEDLE})" sleep 600' > /root/planted
systemd-run --quiet --unit=planted --property=Environment=TOKEN="$(cat {NEEDLE})" bash /root/planted
"""


def test_the_same_search_finds_what_is_planted(fleet: Fleet, deployed: str) -> None:
    """The negative control."""
    node = fleet.nodes[0]
    [planted] = parts({"TOKEN": fresh()["TOKEN"]})
    fleet.mark([planted])
    fleet.machine(node.name).check_output("sh -c %s", PLANT)
    deadline = time.monotonic() + BACK_SECONDS
    while True:
        texts = fleet.texts(node)
        missing = [place for place, text in texts.items() if planted not in text]
        if not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(0.2)
    assert fleet.files(node)["/var/tmp/planted"] & 0o004
    shown = fleet.ansible(
        "ansible", node.name, "-i", fleet.inventory, "--become", "-m", "command", "-a", f"cat {NEEDLE}"
    )
    assert planted in shown.stdout


@pytest.mark.soak
def test_removed_ones_are_gone(fleet: Fleet, deployed: str) -> None:
    fleet.machine(fleet.nodes[0].name).check_output("rm -f /var/tmp/planted; systemctl stop planted")
    old = fleet.values
    fleet.deploy({})
    fleet.mark(parts(old))
    for node in fleet.nodes:
        assert fleet.files(node) == {}
        for unit in fleet.units(node):
            variables, credentials = fleet.has(node, unit)
            assert old.keys().isdisjoint(variables)
            left = {"secret_STICKYRING_SECRETS"} if fleet.passes_credentials(node) else set()
            assert credentials.keys() == left
