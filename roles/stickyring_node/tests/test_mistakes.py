"""The check of the role's variables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.stickyring.fleet.plugins.filter import node

ROLE = Path(__file__).parents[1]
OPTIONS = yaml.safe_load((ROLE / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
GOOD: dict[str, Any] = {
    name.removeprefix("stickyring_node_"): value
    for name, value in yaml.safe_load((ROLE / "defaults" / "main.yml").read_text()).items()
}
GOOD |= {"application": "chat:app", "address": "192.0.2.1", "release": "1.0+abc_D-1", "name": "node1", "instances": 2}
GOOD |= {"bus_url": ""}


def check(**changed: object) -> list[str]:
    found: list[str] = node.node_mistakes(GOOD | changed)
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"service": "a"},
        {"service": "a" * 31},
        {"application": "chat:app"},
        {"application": "_a.b_c:_make('x', y=1)"},
        {"port": 1024},
        {"port": 65534},
        {"port": 65535, "instances": 1},
        {"instances": 1},
        {"environment": {"REDIS_URL": "redis://x", "_x1": ""}},
        {"secrets": {"A": "", "_b": 1, "C": 1.5, "D": "'\" \\ $HOME %n\nsecond line\t{{ x }}"}},
        {"name": "Node1.Example.COM"},
        {"bus_url": "rediss://nodes:p%40ss@[2001:db8::20]:6379/0"},
        {"bus_url": "redis+sentinel://nodes:x@a:26379,b:26379/0/bus"},
        {"bus_url": "rediss+sentinel://nodes:x@a:26379,b:26379/0/bus?ssl_ca_data=-----BEGIN%20"},
        {"bus_url": ""},
        {"name": "192.0.2.1"},
        {"address": "2001:db8::1"},
        {"edges": ["192.0.2.10", "2001:db8::10"]},
        {"watchdog": 0, "drain_timeout": 0, "proving_time": "0"},
        {"watchdog": 3},
        {"prove": "no", "surge": "True", "start_timeout": "90"},
        {"worker_class": "egg:gunicorn#sync"},
        {"release": 1.4},
    ],
)
def test_good_variables_have_no_mistake(changed: dict[str, Any]) -> None:
    assert check(**changed) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"edges": ["edge1.example.com"]}, "edges is ['edge1.example.com']: give a list of IP addresses"),
        ({"edges": "192.0.2.10"}, "edges is '192.0.2.10': give a list"),
        ({"service": ""}, "stickyring_node_service '' also names a user"),
        ({"service": "Chat"}, "stickyring_node_service 'Chat' also names a user"),
        ({"service": "1chat"}, "also names a user"),
        ({"service": "chat@1"}, "also names a user"),
        ({"service": "../chat"}, "also names a user"),
        ({"service": "chat\n"}, "also names a user"),
        ({"service": "a" * 32}, "at most 31"),
        ({"application": "chat"}, "stickyring_node_application 'chat' is neither module:attribute nor"),
        ({"application": "chat:app.wsgi"}, "is neither module:attribute"),
        ({"application": "chat app:app"}, "is neither module:attribute"),
        ({"application": 'chat:make("x")'}, 'contains one of " \\ % $'),
        ({"application": "chat:make('%n')"}, 'contains one of " \\ % $'),
        ({"application": "chat:make('$HOME')"}, 'contains one of " \\ % $'),
        ({"application": "chat:make('a\\b')"}, 'contains one of " \\ % $'),
        ({"release": ""}, "stickyring_node_release '' may contain only letters"),
        ({"release": ".."}, "stickyring_node_release '..' may contain only letters"),
        ({"release": "a/b"}, "may contain only letters"),
        ({"instances": 0}, "stickyring_node_instances is 0: give a whole number from 1 to 64"),
        ({"instances": "-1"}, "stickyring_node_instances is '-1': give a whole number"),
        ({"instances": 10**9}, "stickyring_node_instances is 1000000000: give a whole number"),
        ({"port": 1023}, "stickyring_node_port is 1023: give a whole number from 1024 to 65535"),
        ({"port": 65535}, "stickyring_node_port 65535 is too high for 2 instances"),
        ({"releases_kept": 1}, "stickyring_node_releases_kept is 1"),
        ({"health_path": "healthz"}, "stickyring_node_health_path 'healthz' does not begin with /"),
        ({"limit_nofile": 10099}, "stickyring_node_limit_nofile 10099 is too low for 10000 connections"),
        ({"name": "node 1"}, "stickyring_node_name 'node 1' may contain only letters"),
        ({"name": "chat@node1"}, "rename the host in the inventory, or set its stickyring_node_name"),
        ({"name": "2001:db8::1"}, "stickyring_node_name '2001:db8::1' may contain only letters"),
        ({"name": None}, "stickyring_node_name None may contain only letters"),
        ({"name": "knöten"}, "stickyring_node_name 'knöten' may contain only letters"),
        ({"address": "node1.example.com"}, "is no IP address: set stickyring_address to the one"),
        ({"watchdog": 1}, "stickyring_node_watchdog is 1: give 3 or more, or 0 to turn it off"),
        ({"watchdog": "-1"}, "stickyring_node_watchdog is '-1': give a whole number from 0"),
        ({"drain_timeout": -1}, "stickyring_node_drain_timeout is -1: give a whole number from 0"),
        ({"drain_timeout": 2.5}, "stickyring_node_drain_timeout is 2.5: give a whole number"),
        ({"start_timeout": True}, "stickyring_node_start_timeout is True: give a whole number"),
        ({"start_timeout": "010"}, "stickyring_node_start_timeout is '010': give a whole number"),
        ({"proving_time": "$(reboot)"}, "stickyring_node_proving_time is '$(reboot)': give a whole number"),
        ({"messages_per_second": -1}, "stickyring_node_messages_per_second is -1: give a whole number from 0 to"),
        ({"bytes_per_second": "1MB"}, "stickyring_node_bytes_per_second is '1MB': give a whole number from 0 to"),
        (
            {"sessions_per_address": "few"},
            "stickyring_node_sessions_per_address is 'few': give a whole number from 0 to",
        ),
        ({"enforce_limits": "later"}, "stickyring_node_enforce_limits is 'later': give true or false"),
        ({"surge": "soon"}, "stickyring_node_surge is 'soon': give true or false"),
        ({"log_level": "loud"}, "stickyring_node_log_level 'loud' is none of debug"),
        ({"python": "python2"}, "stickyring_node_python 'python2' is neither python3 nor pypy3"),
        ({"worker_class": "a b"}, "stickyring_node_worker_class 'a b' is no worker class"),
        ({"worker_class": "asgi", "python": "pypy3"}, "stickyring_node_worker_class asgi needs stickyring_node_python"),
        ({"health_path": "/a b"}, "stickyring_node_health_path '/a b' does not begin with /, or contains"),
        ({"index_url": "http://a b"}, "stickyring_node_index_url 'http://a b' contains other than visible"),
        ({"environment": "A=1"}, "stickyring_node_environment is 'A=1': give a dictionary"),
        ({"environment": {"A-B": 1}}, "stickyring_node_environment: 'A-B' cannot name an environment variable"),
        ({"environment": {"1A": 1}}, "stickyring_node_environment: '1A' cannot name"),
        ({"environment": {"GOOD": 1, "STICKYRING_LISTEN": 1}}, "STICKYRING_LISTEN is reserved for the runtime"),
        ({"secrets": "A=hunter2"}, "stickyring_node_secrets is no dictionary: give {NAME: value}"),
        ({"secrets": ["hunter2"]}, "stickyring_node_secrets is no dictionary"),
        ({"secrets": None}, "stickyring_node_secrets is no dictionary"),
        ({"secrets": {"A-B": "hunter2"}}, "stickyring_node_secrets: 'A-B' cannot name an environment variable"),
        ({"secrets": {"STICKYRING_UNIT": "hunter2"}}, "STICKYRING_UNIT is reserved for the runtime"),
        ({"bus_url": "192.0.2.20:6379"}, "stickyring_node_bus_url is no URL of a Redis or Valkey: give redis://"),
        ({"bus_url": "http://nodes:hunter2@192.0.2.20"}, "stickyring_node_bus_url is no URL"),
        ({"bus_url": "redis://a b"}, "stickyring_node_bus_url is no URL"),
        ({"secrets": {"A": "hunter2"}, "environment": {"A": 1}}, "A is in stickyring_node_environment too: remove it"),
        (
            {"secrets": {"A": True}},
            "stickyring_node_secrets: A is neither a text nor a number: put its value in quotes",
        ),
        ({"secrets": {"A": None}}, "A is neither a text nor a number"),
        ({"secrets": {"A": ["hunter2"]}}, "A is neither a text nor a number"),
        ({"secrets": {"A": "hunter2\0"}}, "stickyring_node_secrets: A contains a NUL character"),
        ({"secrets": {"A": "hunter2\ud800"}}, "A contains characters that UTF-8 does not have"),
        ({"secrets": {"A": "hunter2" * 10000}}, "A has 70000 bytes: 65536 are the most"),
    ],
)
def test_each_mistake_is_reported(changed: dict[str, Any], words: str) -> None:
    [mistake] = check(**changed)
    assert words in mistake
    assert "hunter2" not in mistake


def test_every_option_is_checked_by_its_type() -> None:
    """Ansible does not validate argument_specs everywhere, and accepts -1 and 10**9 as numbers."""
    kinds = {"int": set(node.RANGES), "bool": set(node.BOOLEANS)}
    for kind, judged in kinds.items():
        assert {f"stickyring_node_{name}" for name in judged} == {
            n for n, one in OPTIONS.items() if one["type"] == kind
        }
    chosen = {name: one["choices"] for name, one in OPTIONS.items() if "choices" in one}
    assert chosen == {f"stickyring_node_{name}": node.TEXTS[name][0].split("|") for name in ("python", "log_level")}
    # Only Ansible reads these, as names of files on the controller.
    files = {"requirements", "wheelhouse"}
    judged_names = {*node.TEXTS, *node.RANGES, *node.BOOLEANS, "address", "edges", "environment"}
    judged_names |= {"secrets", "bus_url"} | files
    assert {f"stickyring_node_{name}" for name in judged_names} == set(OPTIONS)
    composed = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["__stickyring_node_judged_names"]
    assert {*composed, "application", "release"} == judged_names - files


def test_variables_that_are_not_given_are_not_checked() -> None:
    assert node.node_mistakes({"service": "chat"}) == []
    [mistake] = node.node_mistakes({"service": ""})
    assert mistake.startswith("stickyring_node_service '' also names a user")
