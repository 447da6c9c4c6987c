"""A run that is limited to the edges renders the same files, byte for byte, as a whole run."""

import re
from typing import Any

from testinfra.host import Host

# One edge is enough, because each run deploys all of them.
testinfra_hosts = ["ansible://edge1?sudo=true"]

FILES = "find /etc/stickyring-edge /etc/systemd/system/stickyring-edge.service -type f -exec sha256sum {} + | sort -k 2"


def test_a_limited_run_leaves_the_configuration_of_a_whole_run(host: Host, inventory: Any, ansible: Any) -> None:
    whole = host.check_output(FILES)
    assert whole.count("/xds/") >= 4, "no configuration to compare"
    # Or this run may have something to build on the controller, which counts as a change of the edge that asks for it.
    ansible("ansible-playbook", "-i", inventory, "playbooks/artifacts.yml")
    output = ansible("ansible-playbook", "-i", inventory, "site.yml", "--limit", "edge").stdout
    assert set(re.findall(r"^edge\S* .*changed=(\d+)", output, re.MULTILINE)) == {"0"}
    assert host.check_output(FILES) == whole
