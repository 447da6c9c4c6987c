"""The lab's edge with certificates of an authority, Debian's pebble, which runs on a host of the lab."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import testinfra.host

NAME, AUTHORITY = "chat.example.test", "acme.example.test"
DIRECTORY = f"https://{AUTHORITY}:14000/dir"
PEBBLE, FOLDER = "pebble-of-the-lab", "/root/pebble"
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")
START_SECONDS = 20
TRUSTED = f"/usr/local/share/ca-certificates/{AUTHORITY}.crt"


@dataclass(frozen=True)
class Fleet:
    """inventory: a copy of the lab's, with a listener at 443 whose certificate for `name` is from pebble; address: the
    edge's; root: the certificate that pebble signs with."""

    inventory: Path
    name: str
    address: str
    root: Path

    def context(self) -> ssl.SSLContext:
        """Trusts pebble alone."""
        return ssl.create_default_context(cafile=str(self.root))


@pytest.fixture(scope="session")
def authority(
    nodes: list[Any], edge: Any, machine: Callable[..., testinfra.host.Host], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The authority's certificate; it asks the edge for NAME, and the edge finds and trusts it."""
    host, of_edge = machine(nodes[0].name), machine(edge.name)
    here, there = (one.variables["stickyring_address"] for one in (nodes[0], edge))
    made = tmp_path_factory.mktemp("authority")
    subprocess.run(
        [
            *("openssl", "req", "-x509", *KEY, "-days", "2", "-subj", f"/CN={AUTHORITY}"),
            *(
                "-addext",
                f"subjectAltName=DNS:{AUTHORITY},IP:{here}",
                "-keyout",
                made / "key.pem",
                "-out",
                made / "cert.pem",
            ),
        ],
        check=True,
        capture_output=True,
    )
    settings = {
        "listenAddress": "[::]:14000",
        "managementListenAddress": "[::]:15000",
        "certificate": f"{FOLDER}/cert.pem",
        "privateKey": f"{FOLDER}/key.pem",
        "httpPort": 80,
        "tlsPort": 443,
        "ocspResponderURL": "",
        "externalAccountBindingRequired": False,
    }
    (made / "pebble.json").write_text(json.dumps({"pebble": settings}))
    host.check_output("apt-get update -q && apt-get install -qy --no-install-recommends pebble")
    host.check_output(f"mkdir -p {FOLDER}")
    for file in made.iterdir():
        host.check_output(f"printf %%s %s > {FOLDER}/{file.name}", file.read_text())
    host.check_output(f"echo '{there} {NAME} www.{NAME}' >> /etc/hosts")
    of_edge.check_output(f"echo '{here} {AUTHORITY}' >> /etc/hosts")
    of_edge.check_output(f"printf %%s %s > {TRUSTED} && update-ca-certificates", (made / "cert.pem").read_text())
    # It refuses a share of all nonces, as an authority may; only its waiting is left out.
    program = f"/usr/bin/pebble -config {FOLDER}/pebble.json"
    host.check_output(f"systemd-run --unit {PEBBLE} --setenv PEBBLE_VA_NOSLEEP=1 {program}")
    (made / "root.pem").write_bytes(ask(f"https://{here}:15000/roots/0", made / "cert.pem"))
    yield made / "root.pem"
    host.check_output(f"systemctl stop {PEBBLE} && rm -r {FOLDER}")
    of_edge.check_output(f"rm {TRUSTED} && update-ca-certificates")


def ask(url: str, trusted: Path) -> bytes:
    """What a server that has just been started answers."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(url, context=ssl.create_default_context(cafile=str(trusted)), timeout=5) as answer:
                return bytes(answer.read())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="session")
def fleet(authority: Path, inventory: Path, edge: Any, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("certificates") / "inventory"
    shutil.copytree(inventory, folder)
    account = folder / "account.pem"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", account], check=True
    )
    (folder / "group_vars" / "edge").mkdir()
    (folder / "group_vars" / "edge.yml").rename(folder / "group_vars" / "edge" / "lab.yml")
    listeners = [
        *edge.variables["stickyring_edge_listeners"],
        {"name": "public", "port": 443, "address": "::", "cluster": "nodes", "tls": {"acme": [NAME]}},
        {"name": "http", "port": 80, "address": "::", "redirect_port": 443},
    ]
    settings = {
        "stickyring_edge_listeners": listeners,
        "stickyring_edge_acme_directory": DIRECTORY,
        "stickyring_edge_acme_account_key": str(account),
        "stickyring_edge_acme_terms_agreed": True,
    }
    (folder / "group_vars" / "edge" / "public.json").write_text(json.dumps(settings))
    return Fleet(folder, NAME, edge.variables["stickyring_address"], authority)


@pytest.fixture(scope="session")
def deploy(fleet: Fleet, ansible: Any) -> Callable[..., Any]:
    """Runs playbooks/edge.yml with other settings."""
    return lambda *arguments, **options: ansible(
        "ansible-playbook", "-i", fleet.inventory, "playbooks/edge.yml", *arguments, **options
    )
