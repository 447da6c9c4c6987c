"""Ansible callback: ends a failed run with the reason."""

from __future__ import annotations

DOCUMENTATION = r"""
name: reason
type: aggregate
author:
  - The stickyring authors (!UNKNOWN)
short_description: Print at the end why a run has failed
description:
  - Prints after the recap which hosts could not be reached and which have failed, at which task and why.
  - Failures that were rescued are not repeated. Without a failure it prints nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ansible.executor.stats import AggregateStats
from ansible.executor.task_result import CallbackTaskResult
from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    """Keeps the last failure of each host until the end."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "reason"

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def v2_runner_on_failed(self, result: CallbackTaskResult, ignore_errors: bool = False) -> None:
        """Keeps why a task has failed; earlier failures of the host were rescued."""
        if not ignore_errors:
            self._keep(result, f"failed at `{result.task.get_name()}`: {' '.join(_messages(result.result))}")

    def v2_runner_on_unreachable(self, result: CallbackTaskResult) -> None:
        """Keeps at which task a host, or the host that the task was delegated to, could not be reached."""
        if not result.task.ignore_unreachable:
            asked = result.result.get("_ansible_delegated_vars", {}).get("ansible_delegated_host")
            towards = f" towards {asked}" if asked else ""
            said = " ".join(_messages(result.result))
            self._keep(result, f"could not be reached at `{result.task.get_name()}`{towards}: {said}")

    def _keep(self, result: CallbackTaskResult, reason: str) -> None:
        host = result.host.get_name()
        # Moved to the end: hosts are listed in the order of their last failures.
        self.reasons.pop(host, None)
        self.reasons[host] = reason

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        """Prints the reasons."""
        hosts: dict[str, list[str]] = {}
        for host, reason in self.reasons.items():
            if host in stats.failures or host in stats.dark:
                hosts.setdefault(reason, []).append(host)
        if hosts:
            self._display.banner("REASON")
        for reason, same in hosts.items():
            self._display.display(f"{', '.join(same)} {reason}", color="red")


def _messages(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the messages of a task's result, or of its failed items."""
    failed = [one for one in result.get("results", []) if one.get("failed") or one.get("unreachable")]
    for one in failed:
        yield from _messages(one)
    if failed:
        return
    yield str(result.get("msg", "")).strip()
    if "rc" in result:
        yield str(result.get("stderr") or result.get("stdout") or "").strip()
