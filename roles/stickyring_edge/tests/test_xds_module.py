"""The module that writes Envoy's files, against a fake Envoy."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.stickyring.fleet.plugins.module_utils import admin, host, xds
from ansible_collections.stickyring.fleet.plugins.module_utils.envoy import Envoy
from fake_envoy import FakeEnvoy, run_module

TYPE = "type.googleapis.com/"
Files = dict[str, list[dict[str, Any]]]
NOTHING = hashlib.sha256(b"").hexdigest()
"""The digest without start files."""


def assignment(cluster: str, ports: list[int]) -> dict[str, Any]:
    return {
        "@type": TYPE + xds.ENDPOINTS,
        "cluster_name": cluster,
        "endpoints": [
            {
                "lb_endpoints": [
                    {
                        "endpoint": {
                            "hostname": f"node-{port}",
                            "address": {"socket_address": {"address": "192.0.2.1", "port_value": port}},
                        }
                    }
                    for port in ports
                ]
            }
        ],
    }


@pytest.fixture
def files(open_port: int) -> Files:
    address = {"socket_address": {"address": "0.0.0.0", "port_value": open_port}}
    return {
        "listeners.json": [{"@type": TYPE + xds.LISTENER, "name": "sticky", "address": address}],
        "clusters.json": [{"@type": TYPE + xds.CLUSTER, "name": "nodes"}],
        "routes/sticky.json": [{"@type": TYPE + xds.ROUTES, "name": "sticky"}],
        "endpoints/nodes.json": [assignment("nodes", [8001, 8002])],
    }


def run(directory: Path, files: Files, admin_socket: str, **parameters: object) -> dict[str, Any]:
    """The module's result, as Ansible would read it."""
    return run_module(directory, files, admin_socket, **parameters)


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_version_depends_on_the_content_and_not_on_the_order_of_keys() -> None:
    assert xds.version_of([{"a": 1, "b": 2}]) == xds.version_of([{"b": 2, "a": 1}])
    assert xds.version_of([{"a": 1, "b": 2}]) != xds.version_of([{"a": 1, "b": 3}])


def test_without_an_envoy_the_files_are_written_once(directory: Path, files: Files, no_envoy: str) -> None:
    first = run(directory, files, no_envoy)
    assert first["changed"]
    assert not first["proven"]
    assert set(contents(directory)) == set(files)
    for path, resources in files.items():
        assert json.loads((directory / path).read_text()) == {
            "version_info": first["versions"][path],
            "resources": resources,
        }
        assert (directory / path).stat().st_mode & 0o777 == 0o644

    assert not run(directory, files, no_envoy)["changed"]


def test_a_file_with_another_mode_is_corrected(directory: Path, files: Files, no_envoy: str) -> None:
    run(directory, files, no_envoy)
    (directory / "clusters.json").chmod(0o666)
    assert run(directory, files, no_envoy)["changed"]
    assert (directory / "clusters.json").stat().st_mode & 0o777 == 0o644


def test_check_mode_changes_nothing_and_shows_the_difference(directory: Path, files: Files, no_envoy: str) -> None:
    result = run(directory, files, no_envoy, _ansible_check_mode=True)
    assert result["changed"]
    assert not directory.exists()
    assert {part["after_header"]: part["before"] for part in result["diff"]} == dict.fromkeys(files, "")

    run(directory, files, no_envoy)
    before = contents(directory)
    files["clusters.json"][0]["connect_timeout"] = "3s"
    result = run(directory, files, no_envoy, _ansible_check_mode=True)
    [part] = result["diff"]
    assert part["after_header"] == "clusters.json"
    assert "connect_timeout" in part["after"]
    assert "connect_timeout" not in part["before"]
    assert contents(directory) == before


def test_a_proof_names_differing_files_and_does_not_change_them(
    directory: Path, files: Files, envoy: FakeEnvoy
) -> None:
    run(directory, files, envoy.socket)
    (directory / "routes" / "old.json").write_text((directory / "routes" / "sticky.json").read_text())
    before = contents(directory)
    wanted = deepcopy(files)
    wanted["clusters.json"][0]["connect_timeout"] = "3s"
    result = run(directory, wanted, envoy.socket, state="proven")
    assert result["failed"]
    assert "was not changed: clusters.json, routes/old.json." in result["msg"]
    assert "connect_timeout" not in result["msg"]
    shown = run(directory, wanted, envoy.socket, state="proven", _ansible_diff=True)["msg"]
    assert "--- clusters.json on the host" in shown
    assert '+      "connect_timeout": "3s"' in shown
    assert contents(directory) == before
    # With state present the files are written, and then the proof succeeds.
    assert run(directory, wanted, envoy.socket)["changed"]
    assert run(directory, wanted, envoy.socket, state="proven")["proven"]


def test_a_proof_without_files_creates_nothing(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    message = run(directory, files, envoy.socket, state="proven")["msg"]
    assert all(path in message for path in files)
    assert not directory.exists()


def test_a_proof_names_a_file_with_another_mode_and_does_not_change_it(
    directory: Path, files: Files, envoy: FakeEnvoy
) -> None:
    run(directory, files, envoy.socket)
    (directory / "clusters.json").chmod(0o666)
    assert (
        "was not changed: clusters.json (owner or mode)." in run(directory, files, envoy.socket, state="proven")["msg"]
    )
    assert (directory / "clusters.json").stat().st_mode & 0o777 == 0o666


def test_a_proof_asks_the_running_envoy(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    assert run(directory, files, envoy.socket, state="proven")["proven"]
    envoy.stats["cluster_manager.cds.version_text"] = "older"
    message = run(directory, files, envoy.socket, state="proven")["msg"]
    assert "clusters.json: Envoy is at version older" in message


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"endpoints/nodes.json": [assignment("nodes", [])]}, "endpoints/nodes.json: the endpoint list is empty"),
        ({"endpoints/nodes.json": [assignment("nodes", [1]), assignment("b", [1])]}, "exactly one resource"),
        ({"clusters.json": []}, "clusters.json: no resources"),
        ({"clusters.json": [{"@type": "type.googleapis.com/x", "name": "a"}]}, "one type out of"),
    ],
)
def test_invalid_files_are_refused_before_anything_is_written(
    directory: Path, files: Files, envoy: FakeEnvoy, wrong: Files, words: str
) -> None:
    run(directory, files, envoy.socket)
    before = contents(directory)
    result = run(directory, files | wrong, envoy.socket)
    assert result["failed"]
    assert words in result["msg"]
    assert contents(directory) == before


def test_a_running_envoy_is_proven_and_not_changed(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    assert run(directory, files, envoy.socket)["proven"]
    loads = list(envoy.loads)
    result = run(directory, files, envoy.socket, state="proven")
    assert result["proven"]
    assert not result["changed"]
    assert envoy.loads == loads


def test_only_what_changed_is_written(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    files["endpoints/nodes.json"] = [assignment("nodes", [8001, 8003])]
    assert run(directory, files, envoy.socket)["written"] == ["endpoints/nodes.json"]


def test_endpoints_that_leave_are_reported(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    assert run(directory, files, envoy.socket)["left"] == []
    files["endpoints/nodes.json"] = [assignment("nodes", [8001, 8003])]
    gone = run(directory, files, envoy.socket, _ansible_check_mode=True)["left"]
    assert gone == run(directory, files, envoy.socket)["left"]
    assert gone == [{"name": "node-8002", "address": "192.0.2.1:8002"}]
    place = files["endpoints/nodes.json"][0]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]
    place["socket_address"]["address"] = "192.0.2.9"
    assert run(directory, files, envoy.socket)["left"] == [{"name": "node-8001", "address": "192.0.2.1:8001"}]
    assert run(directory, files, envoy.socket)["left"] == []


def test_a_resource_is_written_before_another_names_it(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    places = {path: envoy.loads.index(path) for path in files}
    assert places["endpoints/nodes.json"] < places["clusters.json"] < places["listeners.json"]
    assert places["routes/sticky.json"] < places["listeners.json"]


def test_a_cluster_leaves_only_after_the_routes_left_it(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    files["clusters.json"] = [{"@type": TYPE + xds.CLUSTER, "name": "others"}]
    files["endpoints/others.json"] = [assignment("others", [8001])]
    del files["endpoints/nodes.json"]
    files["routes/sticky.json"][0]["virtual_hosts"] = []
    envoy.loads.clear()
    # The fake keeps the endpoints of a removed cluster; the module ignores them.
    result = run(directory, files, envoy.socket)
    assert envoy.history == [["nodes"], ["others", "nodes"], ["others"]]
    assert envoy.loads == ["endpoints/others.json", "clusters.json", "routes/sticky.json", "clusters.json"]
    assert result["removed"] == ["endpoints/nodes.json"]
    assert set(contents(directory)) == set(files)


@pytest.mark.parametrize("path", ["clusters.json", "listeners.json", "routes/sticky.json", "endpoints/nodes.json"])
def test_a_change_that_envoy_rejects_is_rolled_back(directory: Path, files: Files, envoy: FakeEnvoy, path: str) -> None:
    run(directory, files, envoy.socket)
    before = contents(directory)
    bad = deepcopy(files)
    bad[path][0]["refuse"] = "no such thing"
    # Envoy accepts this file, but it is part of the rejected change.
    bad["clusters.json"][0]["connect_timeout"] = "3s"
    result = run(directory, bad, envoy.socket)
    assert result["failed"]
    assert f"Envoy rejected {path}" in result["msg"]
    assert "keeps serving them" in result["msg"]
    assert contents(directory) == before
    assert not run(directory, files, envoy.socket)["changed"]
    # Negative control: without the fault, the same change succeeds.
    del bad[path][0]["refuse"]
    assert "failed" not in run(directory, bad, envoy.socket)


def test_envoys_own_words_are_in_the_message(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    files["listeners.json"][0]["refuse"] = "message {\n" + "x" * 2000 + "\n}: Proto constraint\nviolated"
    message = run(directory, files, envoy.socket)["msg"]
    assert "}: Proto constraint violated. The change was rolled back" in message
    assert len(message) < 800


def test_a_rejected_first_configuration_leaves_no_files(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    files["clusters.json"][0]["refuse"] = "no"
    assert run(directory, files, envoy.socket)["failed"]
    assert contents(directory) == {}


def test_a_change_that_envoy_never_loads_is_rolled_back_and_reported(
    directory: Path, files: Files, envoy: FakeEnvoy
) -> None:
    run(directory, files, envoy.socket)
    before = contents(directory)
    envoy.ignores_changes = True
    files["clusters.json"][0]["connect_timeout"] = "3s"
    message = run(directory, files, envoy.socket)["msg"]
    assert "not done after 1 s: clusters.json: Envoy is at version" in message
    assert "Envoy has not loaded them yet" in message
    assert contents(directory) == before


def test_a_rejected_file_is_written_again_when_the_cause_is_gone(
    directory: Path, files: Files, envoy: FakeEnvoy
) -> None:
    run(directory, files, envoy.socket)
    del envoy.stats["listener_manager.lds.version_text"]
    # Not rejected: Envoy may still be loading the file, so it is not written again.
    assert run(directory, files, envoy.socket)["failed"]
    envoy.stats["listener_manager.lds.update_rejected"] = 1
    result = run(directory, files, envoy.socket)
    assert result["written"] == ["listeners.json"]
    assert result["proven"]


def test_a_listener_whose_port_is_closed_is_not_proven(
    directory: Path, files: Files, envoy: FakeEnvoy, closed_port: int
) -> None:
    files["listeners.json"][0]["address"]["socket_address"]["port_value"] = closed_port
    message = run(directory, files, envoy.socket)["msg"]
    assert f"listener sticky: 127.0.0.1:{closed_port} accepts no connection" in message


def test_an_unhealthy_endpoint_is_named(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    assert run(directory, files, envoy.socket, state="proven", healthy_timeout=1)["proven"]
    envoy.unhealthy = {8002}
    message = run(directory, files, envoy.socket, state="proven", healthy_timeout=1)["msg"]
    assert "node-8002 (192.0.2.1:8002) of cluster nodes is not healthy: failed_active_health_check" in message
    assert "node-8001" not in message
    # Without a healthy timeout, health is not checked.
    assert run(directory, files, envoy.socket, state="proven")["proven"]


def test_an_unhealthy_new_endpoint_does_not_join(
    directory: Path, files: Files, envoy: FakeEnvoy, closed_port: int
) -> None:
    """Old members may be down; this host checks the new one before anything is written."""
    run(directory, files, envoy.socket)
    envoy.unhealthy = {8001, 8002}
    before = contents(directory)
    files["clusters.json"][0]["health_checks"] = [{"http_health_check": {"path": "/ready"}}]
    members = files["endpoints/nodes.json"][0]["endpoints"][0]["lb_endpoints"]
    address = {"address": "127.0.0.1", "port_value": closed_port}
    members.append({"endpoint": {"hostname": "node-new", "address": {"socket_address": address}}})
    message = run(directory, files, envoy.socket, healthy_timeout=1)["msg"]
    assert f"node-new (127.0.0.1:{closed_port}) does not answer /ready with 200" in message
    assert "node-8001" not in message
    assert contents(directory) == before
    address["port_value"] = envoy.port
    assert "endpoints/nodes.json" in run(directory, files, envoy.socket, healthy_timeout=1)["written"]


def test_websockets_are_counted_once_newcomers_are_healthy(
    directory: Path, files: Files, envoy: FakeEnvoy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users who connect during the wait are counted."""
    run(directory, files, envoy.socket)
    files["listeners.json"][0]["per_connection_buffer_limit_bytes"] = 1
    asked = Envoy.expect_healthy_newcomers

    def wait(edge: Any) -> None:
        asked(edge)
        envoy.stats["http.sticky.downstream_cx_upgrades_active"] = 5

    monkeypatch.setattr(Envoy, "expect_healthy_newcomers", wait)
    # Check mode does not wait.
    assert run(directory, files, envoy.socket, healthy_timeout=1, _ansible_check_mode=True)["ends"] == ""
    message = run(directory, files, envoy.socket, healthy_timeout=1)["msg"]
    assert "listener sticky changes: 5 open websockets end." in message


def test_an_endpoint_without_health_checks_is_not_waited_for(
    directory: Path, files: Files, envoy: FakeEnvoy, closed_port: int
) -> None:
    """An unhealthy node would be refused (see above); this endpoint disables health checks."""
    run(directory, files, envoy.socket)
    files["clusters.json"][0]["health_checks"] = [{"http_health_check": {"path": "/ready"}}]
    members = files["endpoints/nodes.json"][0]["endpoints"][0]["lb_endpoints"]
    endpoint = {
        "hostname": "nobody",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": closed_port}},
        "health_check_config": {"disable_active_health_check": True},
    }
    members.append({"endpoint": endpoint})
    assert "endpoints/nodes.json" in run(directory, files, envoy.socket, healthy_timeout=1)["written"]


def test_envoy_may_spell_an_address_otherwise(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    def place(address: str) -> dict[str, Any]:
        wanted = deepcopy(files["endpoints/nodes.json"][0])
        for item in wanted["endpoints"][0]["lb_endpoints"]:
            item["endpoint"]["address"]["socket_address"]["address"] = address
        return wanted

    files["endpoints/nodes.json"] = [place("2001:DB8:0:0::1")]
    run(directory, files, envoy.socket)
    envoy.loaded["cluster.nodes"] = [place("2001:db8::1")]
    assert run(directory, files, envoy.socket, state="proven", healthy_timeout=1)["proven"]
    envoy.loaded["cluster.nodes"] = [place("2001:db8::2")]
    message = run(directory, files, envoy.socket, state="proven", healthy_timeout=1)["msg"]
    assert "cluster nodes has other endpoints than endpoints/nodes.json" in message


def test_an_envoy_that_must_answer_and_does_not(directory: Path, files: Files, no_envoy: str) -> None:
    run(directory, files, no_envoy)
    message = run(directory, files, no_envoy, state="proven")["msg"]
    assert f"Asking Envoy at {no_envoy}" in message
    assert "does not answer" in message


class Systemd:
    """Stand-ins for systemctl and journalctl."""

    def __init__(self, programs: Path) -> None:
        self.said = programs / "journal"
        self.said.touch()
        self.shown = programs / "unit"
        self.show()
        for name, command in (("journalctl", f"cat {self.said}"), ("systemctl", f"cat {self.shown}")):
            (programs / name).write_text(f"#!/bin/sh\n{command}\n")
            (programs / name).chmod(0o755)

    def show(self, **properties: object) -> None:
        """Sets what systemctl shows; by default a unit that does not run."""
        shown = {"ActiveState": "inactive", "MainPID": 0, "NeedDaemonReload": "no", **properties}
        self.shown.write_text("".join(f"{name}={value}\n" for name, value in shown.items()))

    def start(self, **properties: object) -> None:
        """Makes this process the unit's main process."""
        self.show(ActiveState="active", MainPID=os.getpid(), **properties)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setattr(admin, "ADMIN_SECONDS", 0.5)
    return Systemd(programs)


def test_the_journal_has_the_reason_when_the_admin_interface_has_not(
    directory: Path, files: Files, envoy: FakeEnvoy, systemd: Systemd
) -> None:
    run(directory, files, envoy.socket)
    systemd.said.write_text(
        "[2026-01-01][1][info][main] before\n"
        "[2026-01-01][1][warning][config] Filesystem config update rejected: Error adding cluster(s) nodes:\n"
        "constraint violated\n"
        '[2026-01-01][1][warning][config] Filesystem config update failure: not a duration): {"resources":[]}\n'
        '{"time":"2026-01-01","path":"/"}\n'
    )
    files["clusters.json"][0]["refuse"] = "told nowhere but in the log"
    message = run(directory, files, envoy.socket, unit="edge.service")["msg"]
    assert (
        "Envoy rejected clusters.json: Error adding cluster(s) nodes: constraint violated; not a duration. The change"
        in message
    )


def test_the_journal_is_in_the_message_if_envoy_does_not_answer(
    directory: Path, files: Files, no_envoy: str, systemd: Systemd
) -> None:
    systemd.said.write_text("[critical] cannot bind 0.0.0.0:9002\n")
    run(directory, files, no_envoy)
    message = run(directory, files, no_envoy, state="proven", unit="edge.service")["msg"]
    assert message.endswith("does not answer. [critical] cannot bind 0.0.0.0:9002")


def test_nothing_is_written_while_a_running_envoy_does_not_answer(
    directory: Path, files: Files, no_envoy: str, systemd: Systemd
) -> None:
    systemd.start()
    Path(no_envoy).touch()
    message = run(directory, files, no_envoy, unit="edge.service")["msg"]
    assert message.startswith(f"edge.service runs, but its admin interface at {no_envoy} has not answered")
    assert not directory.exists()
    # A stopped unit does not have to answer.
    systemd.show()
    result = run(directory, files, no_envoy, unit="edge.service")
    assert set(result["written"]) == set(files)
    assert not result["proven"]


def test_an_envoy_of_an_earlier_version_is_taken_over_only_when_its_websockets_may_end(
    directory: Path, files: Files, no_envoy: str, systemd: Systemd
) -> None:
    """Its admin interface is on a port, and its files are YAML."""
    systemd.start()
    directory.mkdir(parents=True)
    (directory / "clusters.yaml").touch()
    message = run(directory, files, no_envoy, unit="edge.service")["msg"]
    assert "no running service was changed: edge.service runs without an admin socket" in message
    assert set(contents(directory)) == {"clusters.yaml"}
    planned = run(directory, files, no_envoy, unit="edge.service", _ansible_check_mode=True)
    assert planned["ends"].endswith("has to be restarted: all its open websockets end")
    result = run(directory, files, no_envoy, unit="edge.service", may_end_websockets=True)
    assert (set(result["written"]), result["removed"], result["proven"]) == (set(files), ["clusters.yaml"], False)
    assert set(contents(directory)) == set(files)


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """The file that records what Envoy was started from."""
    return tmp_path / "started-from"


@pytest.mark.parametrize("clock", [-3600, 0, 3600])
def test_a_process_is_up_to_date_if_the_record_matches(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd, clock: float
) -> None:
    def told(noted: str) -> tuple[bool, bool]:
        record.write_text(noted)
        os.utime(record, (time.time() + clock,) * 2)
        result = run(directory, files, envoy.socket, unit="edge.service", start_record=str(record))
        return result["up_to_date"], result["recorded"]

    assert told(NOTHING) == (False, True)
    systemd.start()
    assert told(NOTHING) == (True, True)
    assert told("pending") == (False, False)
    assert told("d0") == (False, False)
    systemd.start(NeedDaemonReload="yes")
    assert told(NOTHING) == (False, True)


def test_an_edge_without_a_record_is_not_restarted(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd
) -> None:
    systemd.start()
    result = run(directory, files, envoy.socket, unit="edge.service", start_record=str(record))
    assert (result["up_to_date"], result["recorded"]) == (True, False)


def test_the_digest_of_start_files_is_the_same_as_in_earlier_versions(
    directory: Path, files: Files, envoy: FakeEnvoy, tmp_path: Path
) -> None:
    """Otherwise the next run would restart every edge."""
    start_files = [
        {"name": "binary", "path": str(tmp_path / "current"), "link": "releases/0123456789ab"},
        {"name": "bootstrap", "path": str(tmp_path / "bootstrap"), "content": "admin: {}\n"},
        {"name": "unit", "path": str(tmp_path / "unit"), "content": "[Unit]\n"},
    ]
    digest = run(directory, files, envoy.socket, start_files=start_files)["start_digest"]
    assert digest == "476288e7f909694a032d3b93b4eab50a5b7bac9ac1cdb5adb688db4054f25dc5"


def test_differing_start_files_are_named(directory: Path, files: Files, envoy: FakeEnvoy, tmp_path: Path) -> None:
    bootstrap, link = tmp_path / "bootstrap", tmp_path / "current"
    bootstrap.write_text("as wanted")
    bootstrap.chmod(0o644)
    link.symlink_to("releases/1")

    def differing(content: str = "as wanted", target: str = "releases/1") -> list[str]:
        start_files = [
            {"name": "binary", "path": str(link), "link": target},
            {"name": "bootstrap", "path": str(bootstrap), "content": content},
        ]
        names: list[str] = run(directory, files, envoy.socket, start_files=start_files)["differing"]
        return names

    assert differing() == []
    assert differing(content="else", target="releases/2") == ["binary", "bootstrap"]
    bootstrap.chmod(0o600)
    assert differing() == ["bootstrap"]
    bootstrap.unlink()
    link.unlink()
    assert differing() == ["binary", "bootstrap"]


@pytest.mark.parametrize(("state", "enabled"), [("enabled", True), ("disabled", False), ("masked", False)])
def test_whether_it_starts_at_boot(
    directory: Path, files: Files, envoy: FakeEnvoy, systemd: Systemd, state: str, enabled: bool
) -> None:
    systemd.start(UnitFileState=state)
    assert run(directory, files, envoy.socket, unit="edge.service")["enabled"] is enabled


@pytest.fixture
def compare(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Runs the module with state compared, on an edge where everything is in order."""
    tmp_path.chmod(0o755)
    (tmp_path / "envoy").touch()
    (tmp_path / "current").symlink_to("releases/1")
    record.write_text(hashlib.sha256(b"releases/1").hexdigest())
    systemd.start(UnitFileState="enabled")
    run(directory, files, envoy.socket)

    def compared(**parameters: str) -> dict[str, Any]:
        before, began = contents(directory), time.monotonic()
        result = run(
            directory,
            files,
            envoy.socket,
            state="compared",
            timeout=60,
            healthy_timeout=60,
            unit="edge.service",
            start_files=[{"name": "binary", "path": str(tmp_path / "current"), "link": "releases/1"}],
            start_record=str(record),
            needed=[str(tmp_path / "envoy")],
            **parameters,
        )
        assert time.monotonic() - began < 10, "it waits"
        assert not result["changed"]
        assert contents(directory) == before
        return result

    return compared


def test_an_account_that_is_gone_is_not_in_order(compare: Callable[..., dict[str, Any]]) -> None:
    assert compare(account="root")["in_order"]
    assert not compare(account="nobody-has-this-name")["in_order"]


def test_clusters_and_endpoints_are_told_if_all_is_in_order(compare: Callable[..., dict[str, Any]]) -> None:
    told = {section["@type"]: section for section in compare()["config_dump"]["configs"]}
    assert set(told) == {"a.ClustersConfigDump", "a.EndpointsConfigDump"}
    assert told["a.ClustersConfigDump"]["dynamic_active_clusters"]
    assert "config_dump" not in compare(account="nobody-has-this-name")


@pytest.mark.parametrize(
    "fault",
    [
        lambda tmp_path: (tmp_path / "etc/xds/routes/sticky.json").unlink(),
        lambda tmp_path: (tmp_path / "etc/xds/clusters.json").write_text("else"),
        lambda tmp_path: (tmp_path / "etc/xds/clusters.json").chmod(0o600),
        lambda tmp_path: (tmp_path / "etc/xds/routes").chmod(0o700),
        lambda tmp_path: tmp_path.chmod(0o700),
        lambda tmp_path: (tmp_path / "etc/xds/stranger.json").touch(),
        lambda tmp_path: (tmp_path / "envoy").unlink(),
        lambda tmp_path: (tmp_path / "current").unlink(),
        lambda tmp_path: (tmp_path / "started-from").write_text("pending"),
        lambda tmp_path: (tmp_path / "started-from").unlink(),
    ],
)
def test_each_fault_on_disk_is_not_in_order(
    compare: Callable[[], dict[str, Any]], tmp_path: Path, envoy: FakeEnvoy, fault: Callable[[Path], None]
) -> None:
    envoy.ignores_changes = True
    assert compare()["in_order"]
    fault(tmp_path)
    result = compare()
    assert (result["in_order"], result["proven"]) == (False, False)


@pytest.mark.parametrize(
    "fault",
    [
        lambda envoy, _: envoy.stats.update({"cluster_manager.cds.version_text": "older"}),
        lambda envoy, _: envoy.unhealthy.add(8001),
        lambda envoy, _: envoy.stop(),
        lambda _, systemd: systemd.start(UnitFileState="disabled"),
        lambda _, systemd: systemd.start(UnitFileState="enabled", NeedDaemonReload="yes"),
        lambda _, systemd: systemd.show(UnitFileState="enabled"),
    ],
)
def test_each_fault_of_the_process_is_not_in_order(
    compare: Callable[[], dict[str, Any]],
    envoy: FakeEnvoy,
    systemd: Systemd,
    fault: Callable[[FakeEnvoy, Systemd], None],
) -> None:
    fault(envoy, systemd)
    assert not compare()["in_order"]


@pytest.mark.parametrize(
    ("capabilities", "port", "forbidden"),
    [(0, 443, [443]), (0, 1024, []), (host.CAP_NET_BIND_SERVICE, 443, [])],
)
def test_a_port_that_the_process_may_not_open_is_told(
    directory: Path,
    files: Files,
    envoy: FakeEnvoy,
    systemd: Systemd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: int,
    port: int,
    forbidden: list[int],
) -> None:
    files["listeners.json"][0]["address"]["socket_address"]["port_value"] = port
    process = tmp_path / "proc" / str(os.getpid())
    process.mkdir(parents=True)
    (process / "status").write_text(f"Name:\tenvoy\nCapEff:\t{capabilities:016x}\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    systemd.start()
    assert run(directory, files, envoy.socket, unit="edge.service", state="compared")["forbidden"] == forbidden
    # Only a restart helps, which ends open WebSockets.
    envoy.stats["http.sticky.downstream_cx_upgrades_active"] = 3
    ends = run(directory, files, envoy.socket, unit="edge.service", _ansible_check_mode=True)["ends"]
    assert ("Envoy may not open port 443 yet" in ends) == bool(forbidden)
    systemd.show()
    assert run(directory, files, envoy.socket, unit="edge.service", state="compared")["forbidden"] == []


def test_a_leftover_is_not_in_order(compare: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    leftover = tmp_path / "leftover"
    found = compare(unwanted=[str(leftover)])
    assert (found["in_order"], found["left_over"]) == (True, [])
    leftover.mkdir()
    found = compare(unwanted=[str(leftover)])
    assert (found["in_order"], found["left_over"]) == (False, [str(leftover)])


@pytest.mark.parametrize(("text", "in_order"), [("wanted", True), ("other", False), (None, False)])
def test_a_further_file_with_another_text_is_not_in_order(
    compare: Callable[..., dict[str, Any]], tmp_path: Path, text: str | None, in_order: bool
) -> None:
    further = tmp_path / "further"
    if text is not None:
        further.write_text(text)
    assert compare(texts={str(further): "wanted"})["in_order"] == in_order


def test_a_port_that_is_closed_is_not_in_order(
    compare: Callable[[], dict[str, Any]], directory: Path, files: Files, envoy: FakeEnvoy, closed_port: int
) -> None:
    files["listeners.json"][0]["address"]["socket_address"]["port_value"] = closed_port
    run(directory, files, envoy.socket)
    assert not compare()["in_order"]


def test_a_restart_that_an_earlier_run_left_undone_ends_websockets_too(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd
) -> None:
    started = {"unit": "edge.service", "start_record": str(record)}
    systemd.start()
    run(directory, files, envoy.socket, **started)
    record.write_text("pending")
    # No WebSocket is open, so the change is allowed.
    assert not run(directory, files, envoy.socket, **started)["up_to_date"]
    envoy.stats |= {f"http.{name}.downstream_cx_upgrades_active": count for name, count in (("sticky", 3), ("x", 4))}
    message = run(directory, files, envoy.socket, **started)["msg"]
    assert "Envoy's process is older than its files: 7 open websockets end." in message
    assert run(directory, files, envoy.socket, **started, may_end_websockets=True)["proven"]
    # A proof does not restart Envoy, so it is allowed.
    assert run(directory, files, envoy.socket, unit="edge.service", state="proven")["proven"]
    record.write_text(NOTHING)
    assert run(directory, files, envoy.socket, **started)["ends"] == ""


def test_a_rejected_listener_that_is_tried_again_may_end_websockets(
    directory: Path, files: Files, envoy: FakeEnvoy
) -> None:
    """Envoy still serves the listener in its version before the rejection."""
    run(directory, files, envoy.socket)
    envoy.stats |= {"listener_manager.lds.update_rejected": 1, "http.sticky.downstream_cx_upgrades_active": 1}
    envoy.stats["listener_manager.lds.version_text"] = "older"
    assert run(directory, files, envoy.socket, _ansible_check_mode=True)["ends"] == ""
    envoy.refused = {"sticky"}
    message = run(directory, files, envoy.socket)["msg"]
    assert "listener sticky changes: 1 open websocket ends." in message


def test_a_file_in_another_format_counts_as_different(directory: Path, files: Files, envoy: FakeEnvoy) -> None:
    run(directory, files, envoy.socket)
    envoy.stats["http.sticky.downstream_cx_upgrades_active"] = 1
    path = directory / "listeners.json"
    path.write_text("resources:\n- name: sticky\n")
    assert "listener sticky changes" in run(directory, files, envoy.socket)["msg"]


@pytest.fixture
def with_certificate(files: Files) -> Files:
    secret = {"@type": TYPE + xds.SECRET, "name": "sticky", "tls_certificate": {"certificate_chain": {}}}
    return files | {"certificates/sticky.json": [secret]}


KEY = "-----BEGIN PRIVATE KEY-----\nAbCd\n-----END PRIVATE KEY-----\n"


def test_only_the_group_can_read_a_private_key(directory: Path, with_certificate: Files, envoy: FakeEnvoy) -> None:
    keys = {"certificates/sticky.json": KEY}
    result = run(directory, with_certificate, envoy.socket, private_keys=keys, _ansible_diff=True)
    path = directory / "certificates" / "sticky.json"
    assert result["proven"]
    assert envoy.loads.index("certificates/sticky.json") < envoy.loads.index("listeners.json")
    assert json.loads(path.read_text())["resources"][0]["tls_certificate"]["private_key"] == {"inline_string": KEY}
    assert path.stat().st_mode & 0o777 == 0o640
    other = {"certificates/sticky.json": KEY.replace("AbCd", "EfGh")}
    changed = run(directory, with_certificate, envoy.socket, private_keys=other, _ansible_diff=True)
    assert changed["written"] == ["certificates/sticky.json"]
    told = run(directory, with_certificate, envoy.socket, private_keys=keys, state="proven", _ansible_diff=True)
    assert "was not changed: certificates/sticky.json." in told["msg"]
    assert not any(secret in json.dumps([result, changed, told]) for secret in ("AbCd", "EfGh"))
    # A proof reports a mode that is too open, and a run corrects it.
    path.chmod(0o644)
    assert (
        "certificates/sticky.json (owner or mode)"
        in (run(directory, with_certificate, envoy.socket, private_keys=other, state="proven")["msg"])
    )
    assert run(directory, with_certificate, envoy.socket, private_keys=other)["changed"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_certificate_is_proven_by_its_version(directory: Path, with_certificate: Files, envoy: FakeEnvoy) -> None:
    keys = {"certificates/sticky.json": KEY}
    run(directory, with_certificate, envoy.socket, private_keys=keys)
    envoy.stats["sds.sticky.version_text"] = "older"
    message = run(directory, with_certificate, envoy.socket, private_keys=keys, state="proven")["msg"]
    assert "certificates/sticky.json: Envoy is at version older" in message


def test_a_host_without_user_namespaces_is_refused_before_a_file_is_written(
    directory: Path, files: Files, no_envoy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = tmp_path / "proc" / "sys" / "user" / "max_user_namespaces"
    allowed.parent.mkdir(parents=True)
    allowed.write_text("0\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    refused = run(directory, files, no_envoy, unit="stickyring-edge.service")
    assert "user.max_user_namespaces is 0 on this host" in refused["msg"]
    assert not directory.exists()


@pytest.mark.parametrize(("capabilities", "refuses"), [("0000003fffffffff", False), ("0000003ffeffffff", True)])
def test_a_host_that_allows_too_few_open_files_is_refused_before_a_file_is_written(
    directory: Path,
    files: Files,
    no_envoy: str,
    systemd: Systemd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capabilities: str,
    refuses: bool,
) -> None:
    """A systemd that may raise its own limit gives what the unit wants."""
    system = tmp_path / "proc" / "1"
    system.mkdir(parents=True)
    (system / "status").write_text(f"Name:\tsystemd\nCapEff:\t{capabilities}\nSeccomp:\t0\n")
    (system / "limits").write_text("Limit  Soft Limit  Hard Limit  Units\nMax open files  1024  20000  files\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    result = run(directory, files, no_envoy, unit="edge.service", open_files=20001)
    assert bool(result.get("failed")) == refuses
    if refuses:
        assert result["msg"] == (
            "Nothing was changed. systemd on this host can give a service at most 20000 open files, but"
            " stickyring_edge_limit_nofile is 20001: lower it, and stickyring_edge_max_connections to at most half of"
            " it."
        )
    assert directory.exists() != refuses
    assert not run(directory, files, no_envoy, unit="edge.service", open_files=20000).get("failed")


@pytest.mark.parametrize("tracked", [None, 0, 39999, 40000])
def test_a_host_that_tracks_too_few_connections_is_refused_before_a_file_is_written(
    directory: Path,
    files: Files,
    no_envoy: str,
    systemd: Systemd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracked: int | None,
) -> None:
    """Not one that tracks none, or any number."""
    netfilter = tmp_path / "proc" / "sys" / "net" / "netfilter"
    netfilter.mkdir(parents=True)
    if tracked is not None:
        (netfilter / "nf_conntrack_max").write_text(f"{tracked}\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    result = run(directory, files, no_envoy, unit="edge.service", connections=20000)
    refuses = tracked == 39999
    assert bool(result.get("failed")) == refuses
    assert directory.exists() != refuses
    if refuses:
        assert result["msg"] == (
            "Nothing was changed. net.netfilter.nf_conntrack_max is 39999 on this host, but"
            " stickyring_edge_max_connections is 20000, and each client takes two connections: lower it, or raise the"
            " other, for example with sysctl -w net.netfilter.nf_conntrack_max=80000, and permanently in /etc/sysctl.d."
        )


def test_a_hand_over_keeps_websockets_and_needs_no_permission(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd
) -> None:
    started = {"unit": "edge.service", "start_record": str(record), "hands_over": True}
    systemd.start()
    record.write_text(NOTHING)
    result = run(directory, files, envoy.socket, **started)
    assert (result["hands_over"], result["reconnects"], result["ends"]) == (False, "", "")
    listener = files["listeners.json"][0]
    listener["per_connection_buffer_limit_bytes"] = 1
    planned = run(directory, files, envoy.socket, **started, _ansible_check_mode=True)
    assert (planned["hands_over"], planned["reconnects"]) == (True, ""), "some may open until it has changed"
    envoy.stats["http.sticky.downstream_cx_upgrades_active"] = 3
    planned = run(directory, files, envoy.socket, **started, _ansible_check_mode=True)
    assert (planned["hands_over"], planned["ends"]) == (True, "")
    assert planned["reconnects"] == "listener sticky changes: 3 open websockets reconnect"
    assert record.read_text() == NOTHING
    assert run(directory, files, envoy.socket, **started)["hands_over"]
    assert record.read_text() == "pending", "a run that is interrupted now is completed by the next"
    again = run(directory, files, envoy.socket, **started)
    assert (again["hands_over"], again["written"]) == (True, [])
    # Users of a listener that leaves its port could not come back.
    listener["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": 1}}
    message = run(directory, files, envoy.socket, **started)["msg"]
    assert "listener sticky changes: 3 open websockets end." in message
    # Without a hand-over, all of that ends WebSockets.
    assert "3 open websockets end." in run(directory, files, envoy.socket, unit="edge.service")["msg"]


def test_a_rejected_hand_over_leaves_the_record(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd
) -> None:
    started = {"unit": "edge.service", "start_record": str(record), "hands_over": True}
    systemd.start()
    record.write_text(NOTHING)
    run(directory, files, envoy.socket, **started)
    envoy.stats["http.sticky.downstream_cx_upgrades_active"] = 3
    files["listeners.json"][0]["refuse"] = "no"
    assert "rolled back" in run(directory, files, envoy.socket, **started)["msg"]
    assert record.read_text() == NOTHING
    record.unlink()
    assert "rolled back" in run(directory, files, envoy.socket, **started)["msg"]
    assert not record.exists(), "without a record, a running unit counts as up to date"


def test_a_host_that_lets_too_few_files_be_watched_is_refused_a_hand_over(
    directory: Path,
    files: Files,
    envoy: FakeEnvoy,
    record: Path,
    systemd: Systemd,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = {"unit": "edge.service", "start_record": str(record), "hands_over": True}
    systemd.start()
    run(directory, files, envoy.socket, **started)
    limit = tmp_path / "proc" / "sys" / "fs" / "inotify" / "max_user_instances"
    limit.parent.mkdir(parents=True)
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    files["listeners.json"][0]["per_connection_buffer_limit_bytes"] = 1
    limit.write_text(f"{2 * len(files) - 1}\n")
    message = run(directory, files, envoy.socket, **started)["msg"]
    assert message.startswith(
        f"Nothing was changed. fs.inotify.max_user_instances is {2 * len(files) - 1} on this host"
    )
    limit.write_text(f"{2 * len(files)}\n")
    assert run(directory, files, envoy.socket, **started)["hands_over"]


def test_a_reload_that_goes_on_is_waited_for(
    directory: Path, files: Files, envoy: FakeEnvoy, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd.show(ActiveState="reloading")
    monkeypatch.setattr(time, "sleep", lambda _: systemd.start())
    assert run(directory, files, envoy.socket, unit="edge.service")["proven"]
    assert "ActiveState=active" in systemd.shown.read_text()


def test_what_a_killed_hand_over_left_is_found(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd
) -> None:
    started = {"unit": "edge.service", "start_record": str(record), "hands_over": True}
    systemd.start()
    run(directory, files, envoy.socket, **started)
    admin_socket = Path(envoy.socket)
    admin_socket.with_name("lock").touch()
    leaving = admin_socket.with_name("leaving-first.sock")
    admin_socket.rename(leaving)
    assert not run(directory, files, envoy.socket, **started, state="compared")["in_order"]
    assert leaving.exists(), "only a run that changes something mends it"
    assert run(directory, files, envoy.socket, **started)["proven"], "the main process' socket has its name again"
    assert not leaving.exists()
    # Now another process has taken the name, and answers as Envoy does.
    admin_socket.rename(leaving)
    relay = f"""
import os, socketserver, socket
class Relay(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.socket(socket.AF_UNIX) as to:
            to.connect({str(leaving)!r})
            to.sendall(self.request.recv(65536))
            to.shutdown(socket.SHUT_WR)
            while data := to.recv(65536):
                self.request.sendall(data)
socketserver.ThreadingUnixStreamServer({str(admin_socket)!r}, Relay).serve_forever()
"""
    with subprocess.Popen([sys.executable, "-c", relay]) as other:
        while admin.listener_of(admin_socket) != other.pid:
            assert other.poll() is None
        planned = run(directory, files, envoy.socket, **started, _ansible_check_mode=True)
        other.terminate()
    assert (planned["hands_over"], planned["leaving"]) == (True, ["first"])


def test_websockets_of_leaving_processes_end_with_a_restart(
    directory: Path, files: Files, envoy: FakeEnvoy, record: Path, systemd: Systemd, tmp_path: Path
) -> None:
    started = {"unit": "edge.service", "start_record": str(record)}
    systemd.start()
    run(directory, files, envoy.socket, **started)
    record.write_text("pending")
    (Path(envoy.socket).parent / "leaving-first.sock").symlink_to(envoy.socket)
    systemd.show(ActiveState="active", MainPID=1)
    envoy.stats["http.sticky.downstream_cx_upgrades_active"] = 3
    assert "6 open websockets end." in run(directory, files, envoy.socket, **started)["msg"]
    # And those of a listener whose port is closed, where the others are handed over.
    files["listeners.json"][0]["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": 1}}
    message = run(directory, files, envoy.socket, **started, hands_over=True)["msg"]
    assert "listener sticky changes: 6 open websockets end." in message
