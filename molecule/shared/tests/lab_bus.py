"""A bus on hosts of its own beside those of an inventory, and what is needed to speak to its users."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import environment
import redis.sentinel
import testinfra
from stickyring.bus.connection import Address

sys.path.insert(0, str(environment.PROJECT / "app" / "tests"))
from bus_crowd import Crowd  # of the application's tests

USERS = 300 if environment.SOAK else 60
BACK_SECONDS = 90 if environment.SOAK else 40
EVENT_SECONDS = 0.05 if environment.SOAK else 0.2
NUMBERS = {"bus1": 30, "bus2": 31, "bus3": 32}
"""Of their addresses in the lab."""
PASSWORDS = {
    "nodes": "of-the-nodes-of-the-lab",
    "emitter": "of-the-workers-of-the-lab",
    "replication": "of-the-bus-of-the-lab",
}
OTHER_PASSWORDS = {account: f"another-one-{password}" for account, password in PASSWORDS.items()}
ROOMS = {"0": "room 0", "1": "room 1"}
"""Of the echo service, by their names there."""
UNIT, SENTINEL = "stickyring-bus.service", "stickyring-bus-sentinel.service"
DATA = "/var/lib/stickyring-bus/appendonlydir"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


class LabBus:
    """A copy of an inventory, in a new folder, that has the group `bus` too."""

    def __init__(self, inventory: Path, folder: Path) -> None:
        self.inventory = folder
        self._hosts: list[str] = []
        self._passwords, self._accepted = PASSWORDS, OTHER_PASSWORDS
        self.addresses = {name: environment.lab_address(inventory, number) for name, number in NUMBERS.items()}
        shutil.copytree(inventory, folder)

    def do(self, name: str, command: str) -> str:
        """Runs a command on a host, which must succeed; returns its output."""
        host = testinfra.get_host(f"ansible://{name}?sudo=true", ansible_inventory=str(self.inventory))
        output: str = host.check_output(command)
        return output

    def write(self, *hosts: str) -> None:
        """Write the group: one host, or several with TLS."""
        if [*hosts] != self._hosts and len(hosts) > 1:
            self._make_certificates(hosts)
        self._hosts = [*hosts]
        group: dict[str, Any] = {"hosts": {name: {"ansible_host": self.addresses[name]} for name in hosts}}
        if len(hosts) > 1:
            own = f"{self.inventory}/certs/{{{{ inventory_hostname }}}}"
            tls = {"certificate": f"{own}.pem", "key": f"{own}.key", "ca": f"{self.inventory}/certs/ca.pem"}
            group["vars"] = {"stickyring_bus_tls": tls}
        variables = {
            "stickyring_bus_password": self._passwords["nodes"],
            "stickyring_bus_emitter_password": self._passwords["emitter"],
            "stickyring_bus_replication_password": self._passwords["replication"],
            "stickyring_bus_accepted_passwords": {account: [one] for account, one in self._accepted.items()},
        }
        (self.inventory / "bus.json").write_text(json.dumps({"bus": group, "all": {"vars": variables}}))

    def exchange_passwords(self) -> None:
        """Use the passwords that were only accepted up to now, and accept the former ones."""
        self._passwords, self._accepted = self._accepted, self._passwords
        self.write(*self._hosts)

    def _make_certificates(self, hosts: tuple[str, ...]) -> None:
        folder = self.inventory / "certs"
        folder.mkdir()

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

        signing = ("-addext", "keyUsage=critical,keyCertSign")
        openssl("req", "-x509", *KEY, "-subj", "/CN=ca", *signing, "-keyout", "ca.key", "-out", "ca.pem")
        for name in hosts:
            names = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{self.addresses[name]}")
            openssl("req", *KEY, *names, "-keyout", f"{name}.key", "-out", f"{name}.csr")
            signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-copy_extensions", "copy")
            openssl("x509", "-req", *signed, "-in", f"{name}.csr", "-out", f"{name}.pem")

    def url(self, account: str) -> str:
        """What an account of the bus connects to."""
        login = f"{account}:{self._passwords[account]}"
        if len(self._hosts) == 1:
            return f"redis://{login}@{self.addresses[self._hosts[0]]}:6379/0"
        sentinels = ",".join(f"{self.addresses[name]}:26379" for name in self._hosts)
        return f"rediss+sentinel://{login}@{sentinels}/0/stickyring?ssl_ca_certs={self.inventory}/certs/ca.pem"

    def client(self, account: str) -> Any:
        """A client of redis-py."""
        return Address(self.url(account), "stickyring").client(asyncio=False)

    def primary(self) -> str | None:
        """Which host is the primary; None while the Sentinels choose one."""
        try:
            found = self.client("nodes").connection_pool.get_master_address()[0]
        except redis.sentinel.MasterNotFoundError:
            return None
        return next(name for name, address in self.addresses.items() if address == found)

    # Faults. `wait` waits for a condition.

    def restart(self, wait: Callable[[Callable[[], bool]], None]) -> None:
        """The primary is restarted."""
        self._on_primary(f"systemctl restart {UNIT}")

    def kill(self, wait: Callable[[Callable[[], bool]], None]) -> None:
        """The primary is killed; systemd starts it again."""
        self._on_primary(f"systemctl kill --signal=KILL {UNIT}")

    def stop(self, wait: Callable[[Callable[[], bool]], None]) -> None:
        """The primary is stopped until another one has taken over."""
        primary = self._on_primary(f"systemctl stop {UNIT}")
        wait(lambda: self.primary() not in {primary, None})
        self.do(primary, f"systemctl start {UNIT}")

    def freeze(self, wait: Callable[[Callable[[], bool]], None]) -> None:
        """The primary and its Sentinel stand still until another one has taken over."""
        primary = self._on_primary(f"systemctl kill --signal=STOP {UNIT} {SENTINEL}")
        wait(lambda: self.primary() not in {primary, None})
        self.do(primary, f"systemctl kill --signal=CONT {UNIT} {SENTINEL}")

    def wipe(self, wait: Callable[[Callable[[], bool]], None]) -> None:
        """The primary comes back with an empty disk."""
        primary = self._on_primary(f"systemctl stop {UNIT}; rm -r {DATA}; systemctl start --no-block {UNIT}")
        wait(lambda: self.primary() not in {primary, None})

    def _on_primary(self, command: str) -> str:
        primary = self.primary()
        assert primary is not None
        self.do(primary, command)
        return primary


def connect_users(javascript: Path, url: str) -> Crowd:
    """Connects them; one of six is python-socketio's client."""
    return Crowd(javascript, USERS - USERS // 6, [url], python=USERS // 6)


def wait_until(condition: Callable[[], object], what: str, seen: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + BACK_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {BACK_SECONDS} s: {what} {seen()}"
        time.sleep(0.2)


def wait_until_all_are_back(nodes: list[Any]) -> None:
    def seen() -> list[tuple[float, float]]:
        return [*map(metrics, nodes)]

    def are_back() -> bool:
        users, up = zip(*seen(), strict=True)
        return sum(users) == USERS and all(up)

    wait_until(are_back, "all users are connected, and all nodes read from the bus", seen)


def metrics(node: Any) -> tuple[float, float]:
    """How many sessions a node has, and whether all its instances read from the bus."""
    variables, users, up = node.variables, 0.0, 1.0
    for number in range(int(variables["stickyring_node_instances"])):
        port = int(variables["stickyring_node_port"]) + number
        try:
            with urlopen(f"http://{variables['stickyring_address']}:{port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return 0, 0
        users += sum(float(found) for found in re.findall(r"^stickyring_connections{.*} (.*)$", text, re.MULTILINE))
        up = min(up, float(re.findall(r"^stickyring_bus_up (.*)$", text, re.MULTILINE)[0]))
    return users, up
