"""What is said of variables with which the bus would not work."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.filter.bus import bus_mistakes

PASSWORD = "at-least-sixteen-characters"
GOOD: dict[str, Any] = {
    "address": "192.0.2.20",
    "password": PASSWORD,
    "emitter_password": "",
    "replication_password": "",
    "accepted_passwords": {},
    "port": 6379,
    "sentinel_port": "26379",
    "memory_mib": 256,
    "max_connections": 5000,
    "peers": ["192.0.2.20"],
    "tls": {},
}
THREE = {"peers": ["192.0.2.20", "192.0.2.21", "192.0.2.22"], "replication_password": "of-the-hosts-among-them"}


@pytest.mark.parametrize("changes", [{}, THREE, {"peers": []}, {"emitter_password": "of-those-who-only-emit"}])
def test_good_variables_are_taken(changes: dict[str, Any]) -> None:
    assert bus_mistakes(GOOD | changes, {}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"password": ""}, "password: give one of at least 16 characters"),
        ({"password": "short"}, "password: give one of at least 16 characters"),
        ({"emitter_password": "short"}, "emitter_password: give one of at least 16 characters"),
        ({"emitter_password": PASSWORD}, "emitter_password: give another one than to the nodes"),
        (THREE | {"replication_password": ""}, "replication_password: with several hosts, give one of at least 16"),
        (THREE | {"replication_password": PASSWORD}, "replication_password: give another one than to the nodes"),
        (THREE | {"replication_password": 'sixteen "quoted" ones'}, "replication_password: use letters, digits"),
        (
            {"accepted_passwords": {"nodes": [PASSWORD, "short"]}},
            "accepted_passwords.nodes: give passwords of at least",
        ),
        (
            THREE | {"peers": ["192.0.2.20", "192.0.2.21"]},
            "peers: 192.0.2.20, 192.0.2.21 are 2. Give the addresses of one host or of three",
        ),
        (THREE | {"address": "192.0.2.9"}, "peers: 192.0.2.20, 192.0.2.21, 192.0.2.22 are without this host's"),
        ({"port": 80}, "port: 80 is not between 1024 and 65535"),
        ({"sentinel_port": "x"}, "sentinel_port: x is not between 1024 and 65535"),
        ({"memory_mib": 8}, "memory_mib: 8 is too little: 64 or more"),
        ({"max_connections": 9}, "max_connections: 9 is too few: 100 or more"),
        ({"tls": {"certificate": "/a.pem"}}, "tls: give certificate and key"),
        ({"tls": {"certificate": "/a.pem", "key": "b.pem"}}, "tls.certificate /a.pem is no file on the controller"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], words: str) -> None:
    found = bus_mistakes(GOOD | changes, {})
    assert found
    assert found[0].startswith(f"stickyring_bus_{words}")


def test_a_certificate_has_to_be_for_the_address_of_the_host(tmp_path: Path) -> None:
    certificate, key = tmp_path / "bus.pem", tmp_path / "bus.key"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -subj /CN=bus"
    name = f"-addext subjectAltName=IP:192.0.2.20 -keyout {key} -out {certificate}"
    subprocess.run([*make.split(), *name.split()], check=True, capture_output=True)
    tls = {"tls": {"certificate": str(certificate), "key": str(key)}}
    pems = {str(path): path.read_text() for path in (certificate, key)}
    assert bus_mistakes(GOOD | tls, pems) == []
    other = GOOD | tls | {"address": "192.0.2.21", "peers": []}
    assert bus_mistakes(other, pems) == [
        f"stickyring_bus_tls.certificate {certificate} has no subjectAltName IP:192.0.2.21"
    ]
    with_ca = GOOD | {"tls": {**tls["tls"], "ca": "/ca.pem"}}
    assert bus_mistakes(with_ca, pems) == ["stickyring_bus_tls.ca /ca.pem is no file on the controller"]
