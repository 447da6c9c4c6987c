"""The lab with a bus, first on one host and then on three with TLS, and what is needed to speak to its users."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis.sentinel
import yaml
from stickyring.bus.connection import Address

ADDRESSES = {"bus1": "198.51.100.30", "bus2": "198.51.100.31", "bus3": "198.51.100.32"}
PASSWORDS = {"nodes": "of-the-nodes-of-the-lab", "emitter": "of-the-workers-of-the-lab"}
VARIABLES = {
    "stickyring_bus_password": PASSWORDS["nodes"],
    "stickyring_bus_emitter_password": PASSWORDS["emitter"],
    "stickyring_bus_replication_password": "of-the-bus-of-the-lab",
    "stickyring_node_proving_time": 0,
}
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


@dataclass
class Fleet:
    """An inventory with the group `bus`, and how playbooks run on it."""

    inventory: Path
    ansible: Callable[..., Any]
    machine: Callable[..., Any]
    hosts: list[str]

    def play(self, *arguments: str, check: bool = True) -> str:
        """Runs a playbook; returns its output."""
        given = ("-i", self.inventory, *arguments, "-e", json.dumps(VARIABLES))
        done = self.ansible("ansible-playbook", *given, check=check)
        return str(done.stdout)

    def create(self, *hosts: str) -> None:
        """Creates hosts, and makes them the group `bus`."""
        self.hosts = [*hosts]
        inventory = yaml.safe_load((self.inventory / "hosts.yml").read_text())
        inventory["bus"] = {"hosts": {name: {"ansible_host": ADDRESSES[name]} for name in hosts}}
        (self.inventory / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False))
        self.ansible("ansible-playbook", "-i", self.inventory, "molecule/shared/create.yml")

    def grow(self) -> None:
        """Creates two more hosts of the bus, and certificates for all."""
        self.create(*ADDRESSES)
        folder = self.inventory / "tls"
        folder.mkdir()

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

        signing = ("-addext", "keyUsage=critical,keyCertSign")
        openssl("req", "-x509", *KEY, "-subj", "/CN=ca", *signing, "-keyout", "ca.key", "-out", "ca.pem")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key")
        for name, address in ADDRESSES.items():
            names = ("-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}")
            openssl("req", *KEY, *names, "-keyout", f"{name}.key", "-out", f"{name}.csr")
            files = ("-in", f"{name}.csr", "-out", f"{name}.pem")
            openssl("x509", "-req", *files, *signed, "-copy_extensions", "copy")
        paths = {"certificate": "{{ inventory_hostname }}.pem", "key": "{{ inventory_hostname }}.key", "ca": "ca.pem"}
        tls = {kind: f"{{{{ inventory_dir }}}}/tls/{name}" for kind, name in paths.items()}
        (self.inventory / "group_vars" / "bus.yml").write_text(yaml.safe_dump({"stickyring_bus_tls": tls}))

    def url(self, account: str) -> str:
        """What an account of the bus connects to."""
        login = f"{account}:{PASSWORDS[account]}"
        if len(self.hosts) == 1:
            return f"redis://{login}@{ADDRESSES['bus1']}:6379/0"
        sentinels = ",".join(f"{address}:26379" for address in ADDRESSES.values())
        return f"rediss+sentinel://{login}@{sentinels}/0/stickyring?ssl_ca_certs={self.inventory}/tls/ca.pem"

    def on(self, name: str, command: str) -> str:
        """Runs a command on a host, which must succeed; returns its output."""
        return str(self.machine(name, self.inventory).check_output(command))

    def primary(self) -> str | None:
        """Which host is the primary; None while the Sentinels choose one."""
        client = Address(self.url("nodes"), "stickyring").client(asyncio=False)
        try:
            found = client.connection_pool.get_master_address()[0]
        except redis.sentinel.MasterNotFoundError:
            return None
        return next(name for name, address in ADDRESSES.items() if address == found)


@pytest.fixture(scope="session")
def fleet(inventory: Path, ansible: Any, machine: Any, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The inventory with one host of the bus; it exists, and has nothing of ours."""
    folder = tmp_path_factory.mktemp("fleet") / "inventory"
    shutil.copytree(inventory, folder)
    found = Fleet(folder, ansible, machine, [])
    found.create("bus1")
    return found
