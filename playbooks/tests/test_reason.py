"""A failed run ends with the reason."""

import os
import subprocess
import sys
from pathlib import Path

PLAYBOOKS = Path(__file__).parents[1]
RUN = """\
- ansible.builtin.import_playbook: {playbooks}/parts/require_every_host.yml
  vars: {{__stickyring_lost_state: None.}}
- hosts: a
  gather_facts: false
  tasks:
    - block:
        - ansible.builtin.fail: {{msg: rescued}}
      rescue:
        - ansible.builtin.command: "false"
          ignore_errors: true
    - name: Ask everybody
      ansible.builtin.command: sh -c "echo {{{{ item }}}} said so >&2; exit {{{{ item }}}}"
      loop: [0, 3]
"""


def test_the_last_line_is_the_failure_that_ended_the_run(tmp_path: Path) -> None:
    playbook = tmp_path / "run.yml"
    playbook.write_text(RUN.format(playbooks=PLAYBOOKS))
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "a,", "-c", "local", playbook],
        env=os.environ | {"ANSIBLE_CONFIG": str(PLAYBOOKS.parent / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    recap, _, reason = done.stdout.rpartition("REASON")
    assert "PLAY RECAP" in recap
    assert reason.strip("* \n") == "a failed at `Ask everybody`: non-zero return code 3 said so"
