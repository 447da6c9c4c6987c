"""The systemd unit that runs Envoy, and what its process was started from."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stickyring.fleet.plugins.module_utils.host import (
    CAP_NET_BIND_SERVICE,
    FIRST_FREE_PORT,
    has_capability,
)

RELOADING_SECONDS = 0.5


class Unit:
    """The unit as systemd showed it last; without a name it counts as not running."""

    def __init__(self, module: AnsibleModule) -> None:
        self.name: str | None = module.params["unit"]
        self.module = module
        self.shown: dict[str, str] = {}
        self.look()

    def look(self) -> None:
        """Asks systemd."""
        if not self.name:
            return
        properties = "ActiveState,UnitFileState,NeedDaemonReload,MainPID"
        command = ["systemctl", "show", f"--property={properties}", self.name]
        while True:
            output = self.module.run_command(command, check_rc=True)[1]
            self.shown = dict(line.split("=", 1) for line in output.splitlines())
            # A reload goes on if the run that wanted it was killed; the unit bounds how long.
            if self.shown.get("ActiveState") != "reloading":
                return
            time.sleep(RELOADING_SECONDS)

    def active(self) -> bool:
        """Whether it runs."""
        return self.shown.get("ActiveState") == "active"

    def may_open(self, port: int) -> bool:
        """Whether its process may listen on this port; True if it does not run."""
        free = port >= FIRST_FREE_PORT or not self.active()
        return free or has_capability(self.shown["MainPID"], CAP_NET_BIND_SERVICE)

    def enabled(self) -> bool:
        """Whether it starts at boot."""
        return self.shown.get("UnitFileState") == "enabled"

    def up_to_date(self) -> bool:
        """Whether it was started from the start files. False if a run was interrupted before it restarted the unit.

        Without a record, as earlier versions left it, a running unit counts as up to date.
        """
        record = self.module.params["start_record"]
        if not self.active() or self.shown["NeedDaemonReload"] == "yes":
            return False
        return record is None or not Path(record).exists() or self.recorded()

    def recorded(self) -> bool:
        """Whether the record says that it was started from the start files."""
        record = self.module.params["start_record"]
        return record is not None and Path(record).exists() and Path(record).read_text() == self.start_digest()

    def start_digest(self) -> str:
        """SHA-256 of the start files."""
        texts = (
            file["link"] if file["content"] is None else file["content"] for file in self.module.params["start_files"]
        )
        return hashlib.sha256("".join(texts).encode()).hexdigest()

    def journal(self, *options: str) -> str:
        """The unit's journal; empty without a name."""
        if not self.name:
            return ""
        command = ["journalctl", "--unit", self.name, "--output", "cat", "--no-pager", *options]
        return str(self.module.run_command(command)[1])
