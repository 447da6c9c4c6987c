"""An edge after an interrupted run or a fault: the next run repairs it, or reports why it cannot."""

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

testinfra_hosts = ["ansible://edge?sudo=true"]

UNIT = "stickyring-edge.service"
FILES = "find /etc/stickyring-edge /etc/systemd/system/stickyring-edge.service -type f -exec sha256sum {} + | sort -k 2"


def envoy_pid(host: Host) -> str:
    return host.check_output(f"systemctl show {UNIT} --property=MainPID --value")


@pytest.fixture
def deploy(inventory: Any, ansible: Any) -> Any:
    """Runs playbooks/edge.yml with other settings; returns how many tasks changed something."""

    def run(*settings: str) -> int:
        options = [word for setting in settings for word in ("-e", setting)]
        done = ansible("ansible-playbook", "-i", inventory, "playbooks/edge.yml", *options)
        return int(re.search(r"changed=(\d+)", done.stdout)[1])

    return run


def test_a_run_that_was_killed_before_the_restart_is_completed(host: Host, deploy: Any) -> None:
    before = envoy_pid(host)
    # A file time in the future is no reason to restart.
    host.check_output("touch --date=tomorrow /etc/stickyring-edge/bootstrap.yaml")
    assert deploy() == 0
    assert envoy_pid(host) == before
    # The record that such a run leaves.
    host.check_output("echo pending > /etc/stickyring-edge/started-from")
    assert deploy() == 2
    after = envoy_pid(host)
    assert after != before
    assert deploy() == 0
    assert envoy_pid(host) == after


def test_an_envoy_that_an_earlier_version_has_started(host: Host, deploy: Any, inventory: Any, ansible: Any) -> None:
    """Its admin interface is on a port, so the run cannot know which WebSockets a restart would end."""
    on_a_port = ("s|^    pipe:$|    socket_address:|", "s|^      path: /run/.*|      address: 127.0.0.1|")
    edits = " ".join(f"-e '{edit}'" for edit in (*on_a_port, "s|^      mode: 384$|      port_value: 9901|"))
    host.check_output(f"sed -i {edits} /etc/stickyring-edge/bootstrap.yaml && systemctl restart {UNIT}")
    before = envoy_pid(host)
    command = ("ansible-playbook", "-i", inventory, "playbooks/edge.yml", "-e", "stickyring_edge_load_timeout=2")
    done = ansible(*command, check=False)
    assert done.returncode != 0
    assert f"{UNIT} runs without an admin socket, as an earlier version" in " ".join(done.stdout.split())
    assert envoy_pid(host) == before
    fast = "stickyring_edge_load_timeout=2"
    deploy("stickyring_edge_may_end_websockets=true", fast)
    assert envoy_pid(host) != before
    assert not host.socket("tcp://127.0.0.1:9901").is_listening
    assert deploy(fast) == 0
    after = envoy_pid(host)
    assert deploy() == 1, "the file with the times of a hand-over"
    assert envoy_pid(host) == after


@pytest.fixture
def hung_envoy(host: Host) -> Iterator[None]:
    host.check_output(f"systemctl kill --signal=STOP {UNIT}")
    yield
    host.check_output(f"systemctl kill --signal=CONT {UNIT}")


@pytest.mark.usefixtures("hung_envoy")
def test_an_envoy_that_hangs_is_named_and_its_files_stay(host: Host, inventory: Any, ansible: Any) -> None:
    before = host.check_output(FILES)
    began = time.monotonic()
    done = ansible(
        "ansible-playbook", "-i", inventory, "playbooks/edge.yml", "-e", "stickyring_edge_load_timeout=5", check=False
    )
    assert done.returncode != 0
    assert "has not answered for 5 s" in " ".join(done.stdout.split())
    assert time.monotonic() - began < 60
    assert host.check_output(FILES) == before


def test_verify_refuses_what_is_not_deployed_and_writes_nothing(host: Host, inventory: Any, ansible: Any) -> None:
    """The negative control of every successful verify: the inventory has other routes than the edge serves."""
    before, pid = host.check_output(FILES), envoy_pid(host)
    policies = '{"stickyring_edge_hash_policies": [{"header": {"header_name": "x-other"}}]}'
    done = ansible("ansible-playbook", "-i", inventory, "playbooks/verify.yml", "--diff", "-e", policies, check=False)
    output = " ".join(done.stdout.split())
    assert done.returncode != 0
    assert "differs from what the variables say, and was not changed" in output
    assert "x-other" in output, "--diff shows no difference"
    assert (host.check_output(FILES), envoy_pid(host)) == (before, pid)
