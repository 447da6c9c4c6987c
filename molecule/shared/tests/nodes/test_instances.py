"""The application's instances on every node: running, sandboxed, answering."""

import re
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from testinfra.host import Host

testinfra_hosts = ["ansible://nodes?sudo=true"]

EXPOSURE_LIMIT = 1.5


@pytest.fixture
def node(host: Host, hosts: dict[str, Any]) -> Any:
    """The host under test, as the inventory describes it."""
    return hosts[host.backend.host if host.backend.host in hosts else host.backend.get_hostname()]


@pytest.fixture
def units(node: Any) -> list[str]:
    """The units that this host should run."""
    service = node.variables["stickyring_node_service"]
    return [f"{service}@{number}.service" for number in range(1, int(node.variables["stickyring_node_instances"]) + 1)]


def properties(host: Host, unit: str, *names: str) -> dict[str, str]:
    shown = host.check_output(f"systemctl show {unit} --property={','.join(names)}")
    return dict(line.split("=", 1) for line in shown.splitlines())


def test_exactly_the_wanted_instances_run(host: Host, node: Any, units: list[str]) -> None:
    listed = host.check_output(
        f"systemctl list-units --plain --no-legend --all '{node.variables['stickyring_node_service']}@*'"
    )
    assert {line.split()[0]: line.split()[2] for line in listed.splitlines()} == dict.fromkeys(units, "active")
    assert all(host.service(unit).is_enabled for unit in units)


def test_no_instance_was_restarted_by_a_crash(host: Host, units: list[str]) -> None:
    assert {properties(host, unit, "NRestarts")["NRestarts"] for unit in units} == {"0"}


def test_the_sandbox_is_in_force(host: Host, node: Any, units: list[str]) -> None:
    for unit in units:
        pid = properties(host, unit, "MainPID")["MainPID"]
        status = dict(re.findall(r"^(\w+):\s+(.+)$", host.file(f"/proc/{pid}/status").content_string, re.M))
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"
        assert properties(host, unit, "MemoryDenyWriteExecute")["MemoryDenyWriteExecute"] == "yes"
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
        assert host.check_output(f"ps -o user:32= -p {pid}") == node.variables["stickyring_node_service"]


def test_the_exposure_is_small(host: Host, units: list[str]) -> None:
    for unit in units:
        verdict = host.run(f"systemd-analyze security --no-pager {unit}").stdout
        exposure = float(re.search(r"Overall exposure level for \S+: ([0-9.]+)", verdict)[1])
        assert exposure <= EXPOSURE_LIMIT, verdict


def test_the_current_release_is_complete(host: Host, node: Any) -> None:
    service = node.variables["stickyring_node_service"]
    release = host.check_output(f"readlink --canonicalize-existing /opt/{service}/current")
    assert release.startswith(f"/opt/{service}/releases/")
    assert host.file(f"{release}/.complete").exists


def test_every_instance_answers_on_the_wire(node: Any) -> None:
    variables = node.variables
    first = int(variables["stickyring_node_port"])
    for port in range(first, first + int(variables["stickyring_node_instances"])):
        base = f"http://{variables['stickyring_address']}:{port}"
        with urlopen(base + variables["stickyring_node_health_path"], timeout=5) as answer:
            assert answer.status == 200
        with pytest.raises(HTTPError) as refused:
            urlopen(base + "/no-such-path", timeout=5)
        assert refused.value.code == 404


def test_the_application_cannot_write_its_own_release(host: Host, node: Any) -> None:
    service = node.variables["stickyring_node_service"]
    assert host.run(f"runuser -u {service} -- touch /opt/{service}/current/bin/planted").rc != 0
    assert host.run(f"runuser -u {service} -- true").rc == 0
