"""A fault during a run ends it with the cause, and running services keep serving unchanged."""

import hashlib
import json
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[4]
ARTIFACTS = PROJECT / ".artifacts"


@pytest.fixture
def unharmed(machine: Any, hosts: Any, programs: Path, edge_url: Any) -> Iterator[None]:
    """Checks after the test that every process is the same as before, and that users are served."""

    def processes() -> dict[str, str]:
        units = {"edge": "stickyring-edge.service", "nodes": "stickyring-node@1.service"}
        return {
            name: machine(name).check_output(
                f"systemctl show {units[host.groups[0]]} --property=MainPID,NRestarts,ActiveState"
            )
            for name, host in hosts.items()
        }

    before = processes()
    yield
    assert processes() == before
    subprocess.run(
        [programs / "stickyring", "probe", edge_url("sticky"), "--ids", "10"],
        check=True,
        capture_output=True,
        timeout=120,
    )


@pytest.fixture
def refusal(inventory: Path, ansible: Any) -> Any:
    """Runs a playbook that must fail; returns its output in one line."""

    def run(playbook: str, variables: dict[str, Any]) -> str:
        done = ansible(
            "ansible-playbook", "-i", inventory, playbook, "--extra-vars", json.dumps(variables), check=False
        )
        output = " ".join((done.stdout + done.stderr).split())
        assert done.returncode != 0, output
        return output

    return run


@pytest.fixture
def broken_wheelhouse(tmp_path: Path) -> dict[str, str]:
    """The wheelhouse with a broken stickyring wheel, and requirements with the hash of that file."""
    unpacked = tmp_path / "wheelhouse"
    shutil.unpack_archive(ARTIFACTS / "wheelhouse.tar", unpacked)
    (wheel,) = (unpacked / "stickyring").glob("*.whl")
    good = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing.txt", "")
    bad = hashlib.sha256(wheel.read_bytes()).hexdigest()
    requirements = tmp_path / "requirements.txt"
    text = (ARTIFACTS / "requirements.txt").read_text()
    assert good in text
    requirements.write_text(text.replace(good, bad))
    with tarfile.open(tmp_path / "wheelhouse.tar", "w") as archive:
        archive.add(unpacked, arcname=".")
    return {
        "stickyring_node_requirements": str(requirements),
        "stickyring_node_wheelhouse": str(tmp_path / "wheelhouse.tar"),
    }


@pytest.mark.usefixtures("unharmed")
def test_a_broken_wheel(refusal: Any, broken_wheelhouse: dict[str, str]) -> None:
    assert ".dist-info directory not found" in refusal("playbooks/nodes.yml", broken_wheelhouse)


@pytest.mark.usefixtures("unharmed")
def test_a_wheel_whose_hash_is_not_the_locked_one(
    refusal: Any, broken_wheelhouse: dict[str, str], tmp_path: Path
) -> None:
    requirements = tmp_path / "other.txt"
    requirements.write_text((ARTIFACTS / "requirements.txt").read_text() + "# another release\n")
    output = refusal("playbooks/nodes.yml", broken_wheelhouse | {"stickyring_node_requirements": str(requirements)})
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in output


@pytest.fixture
def taken_port(machine: Any) -> Iterator[int]:
    """A port of node2 that another service listens on."""
    port = 8101
    node = machine("node2")
    node.check_output(f"systemd-run --unit=squatter python3 -m http.server {port}")
    while not node.socket(f"tcp://0.0.0.0:{port}").is_listening:
        assert node.service("squatter").is_running
    yield port
    node.check_output("systemctl stop squatter")


@pytest.mark.usefixtures("unharmed")
def test_a_port_that_is_in_use_on_a_node(refusal: Any, taken_port: int) -> None:
    output = refusal("playbooks/nodes.yml", {"stickyring_node_port": taken_port})
    assert "node2" in output
    assert f"port {taken_port}" in output
    assert "python3" in output, "the holder is not named"


@pytest.mark.usefixtures("unharmed")
def test_another_port_for_nodes_that_serve(refusal: Any, hosts: Any) -> None:
    now = hosts["node1"].variables
    output = refusal("playbooks/nodes.yml", {"stickyring_node_port": 8101})
    place = f"{now['stickyring_address']}:{now['stickyring_node_port']}"
    assert f"node1 serves users at {place}; the inventory says {now['stickyring_address']}:8101." in output
    assert "playbooks/remove_node.yml -e stickyring_node=node1, then site.yml" in output


@pytest.mark.usefixtures("unharmed")
def test_an_edge_binary_with_another_checksum(refusal: Any) -> None:
    meant = "0" * 64
    found = (ARTIFACTS / "envoy-1.40.0" / "envoy.sha256").read_text().split()[0]
    output = refusal("playbooks/edge.yml", {"stickyring_edge_envoy_sha256": meant})
    assert meant in output
    assert found in output


@pytest.mark.usefixtures("unharmed")
def test_a_configuration_that_envoy_rejects(refusal: Any, machine: Any) -> None:
    """The role does not know every rule of Envoy's, for example which substitutions a header may contain."""
    files = "find /etc/stickyring-edge/xds -name '*.json' -exec sha256sum {} +"
    before = machine("edge1").check_output(files)
    attributes = [{"name": "Comment", "value": "%NO_SUCH_WORD%"}]
    policies = [{"cookie": {"name": "user", "ttl": "0s", "attributes": attributes}}]
    output = refusal("playbooks/edge.yml", {"stickyring_edge_hash_policies": policies})
    assert "Not supported field in StreamInfo: NO_SUCH_WORD" in output, "Envoy's own message is missing"
    assert machine("edge1").check_output(files) == before
