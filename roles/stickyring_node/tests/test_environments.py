"""The environment files of the instances, read back as systemd reads them."""

import re
import shlex

from ansible_collections.stickyring.fleet.plugins.filter import node


def read(text: str) -> dict[str, str]:
    """Read by the shell's rules, which are the same as systemd's for double quotes and backslashes."""
    return dict(word.split("=", 1) for word in shlex.split(text, comments=True))


def test_each_instance_has_its_own_port_name_and_socket() -> None:
    shared = {"STICKYRING_MAX_CONNECTIONS": 100, "TITLE": 'a "quoted" \\ title # 1'}
    files = node.node_environments(
        [1, 2], service="chat", host="[2001:db8::1]", port=7001, name="node1", shared=shared, header="# managed"
    )
    said = {path: read(text) for path, text in files.items()}
    digests = [one.pop("STICKYRING_ENVIRONMENT") for one in said.values()]
    assert len(set(digests)) == len(digests)
    assert said == {
        f"/etc/chat/{instance}.env": {
            "STICKYRING_LISTEN": f"[2001:db8::1]:{7000 + instance}",
            "STICKYRING_NODE_NAME": f"node1-{instance}",
            "STICKYRING_CONTROL": f"/run/chat/{instance}/control.sock",
            "STICKYRING_MAX_CONNECTIONS": "100",
            "TITLE": 'a "quoted" \\ title # 1',
        }
        for instance in (1, 2)
    }


def test_a_text_has_the_digest_of_its_content() -> None:
    digest = node.node_with_digest
    assert digest("A=1\nD=\n", "D") == digest("A=1\nD=\n", "D")
    assert digest("A=1\nD=\n", "D") != digest("A=2\nD=\n", "D")
    assert re.fullmatch(r"A=1\nD=[0-9a-f]{64}\n", digest("A=1\nD=\n", "D"))
