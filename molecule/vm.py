#!/usr/bin/env python3
"""Takes an edge and two nodes through their life as real virtual machines, under traffic.

They are deployed, rebooted, cut off from power, updated and removed, with kernels of their own. The run writes
docs/vms.md, also when a step fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import longrun
import machines
import yaml

sys.path.insert(0, str(longrun.PROJECT / "molecule" / "shared" / "tests"))
from residents import Connection, Residents

REPORT = longrun.PROJECT / "docs" / "vms.md"
LAB = longrun.PROJECT / "inventory" / "lab" / "group_vars"
INVENTORY = machines.FOLDER / "inventory"
EDGE, REBOOTED, CUT = "edge1", "node1", "node2"
HOSTS = {name: f"{machines.PREFIX}.{last}" for name, last in ((EDGE, 10), (REBOOTED, 11), (CUT, 12))}
STICKY, UNKEYED = (f"http://{HOSTS[EDGE]}:{port}" for port in (9002, 9003))
USERS = [f"user-{number}" for number in range(10)]
PAUSE, ANSWER_SECONDS = 1.0, 180.0
SETTLED_SECONDS = 180
PATIENT = ["--timeout", "60", "--concurrency", "10"]
"""Options of `stickyring probe`: an emulated machine takes its time."""
RELEASE = "vm-update"
SECRET = {"TOKEN": "not-a-secret-outside-these-machines"}
SERVICE = "stickyring-node"
CREDENTIAL = f"/run/credentials/{SERVICE}@1.service/secret_TOKEN"
ABOUT = f"""\
An edge and two nodes on Debian 12, each with its own kernel and {machines.MEMORY_MIB} MiB, emulated by QEMU without
KVM: everything takes many times the seconds that it takes on real machines.

{len(USERS)} users stay connected while the nodes serve, each over WebSocket, over polling, and over polling with an
upgrade. Each connection sends a message {PAUSE} s after the answer to the one before; a silence is the time from one
answer to the next, so it contains that pause. A step is ok if afterwards every user is on one node, the one that the
ring has for them, and every message was answered within {ANSWER_SECONDS:.0f} s. The run ends with the first step that
fails.
"""
RECAP = re.compile(r"\S+ +: ok=\d+ +changed=(\d+) ")
EXAMPLES = """
examples:
  make vm                      the whole way, about 50 minutes, into docs/vms.md
  make vm KEEP=1               the machines stay, and the last lines say how to use them
  molecule/vm.py --down        remove what KEEP=1, or a run that was killed, has left
"""


class Failed(Exception):
    """A step has not done what it must; the text says what."""


class Step(NamedTuple):
    """What is done, how many minutes it takes, how, and the nodes whose users may notice it."""

    name: str
    minutes: int
    act: Callable[[Journey], None]
    nodes: tuple[str, ...] = ()


class Row(NamedTuple):
    """One line of the report: a step, "ok" or why it failed, its seconds, and what clients noticed."""

    step: str
    result: str
    seconds: float
    noticed: str


class Journey:
    """The machines, the users who are connected to them, and the instances where each has to be: {user: {instance}}."""

    fleet: Mapping[str, machines.Machine]
    residents: Residents

    def __init__(self) -> None:
        self.nodes = [REBOOTED, CUT]
        self.release: dict[str, object] = {}
        self.homes: dict[str, set[str]] = {}

    def describe(self) -> None:
        """Write the inventory as it is now."""
        known = f"-o UserKnownHostsFile={machines.KNOWN_HOSTS} -o StrictHostKeyChecking=yes"
        every = {
            "stickyring_address": "{{ ansible_host }}",
            "ansible_user": machines.USER,
            "ansible_ssh_private_key_file": str(machines.KEY),
            "ansible_ssh_common_args": known,
            "stickyring_probe_options": PATIENT,
        }
        listeners = yaml.safe_load((LAB / "edge.yml").read_text())["stickyring_edge_listeners"]
        served = yaml.safe_load((LAB / "nodes.yml").read_text())
        groups = {
            "all": {"vars": every},
            "edge": {"hosts": hosts([EDGE]), "vars": {"stickyring_edge_listeners": listeners}},
            "nodes": {"hosts": hosts(self.nodes), "vars": served | self.release},
        }
        INVENTORY.mkdir(exist_ok=True)
        (INVENTORY / "hosts.json").write_text(json.dumps(groups, indent=2) + "\n")

    def run(self, command: str, *, status: int = 0) -> list[str]:
        """Run a command that must end with this status; return its output's lines."""
        lines: list[str] = []
        ended = longrun.play(shlex.split(command), environment(), lines.append)
        if ended != status:
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it has said nothing")
            raise Failed(f"`{command}` has ended with {ended} instead of {status}: {last}")
        return lines

    def rest(self) -> None:
        """Wait until every user is at home with all connections, and has got an answer there; nothing may be lost."""
        try:
            self.residents.wait(lambda: self.residents.homes() == self.homes, SETTLED_SECONDS)
        except TimeoutError as error:
            raise Failed(f"users are not on the node that the ring has for them: {error}") from None
        self.residents.wait_for_answers(time.monotonic(), SETTLED_SECONDS)
        if lost := [one for one in self.residents if one.lost]:
            print(*lost, sep="\n", flush=True)
            users = ", ".join(f"{one.user} ({'+'.join(one.transports)})" for one in lost)
            raise Failed(f"messages were not answered in {ANSWER_SECONDS:.0f} s: of {users}")


def hosts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the hosts of a group as an inventory has them."""
    return {name: {"ansible_host": HOSTS[name]} for name in names}


def environment() -> dict[str, str]:
    """Return what Ansible and the probe need to know of the machines."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_INVENTORY": str(INVENTORY),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_SSH_CONTROL_PATH_DIR": str(machines.CONNECTIONS),
        "ANSIBLE_TIMEOUT": "60",
    }


def boot(journey: Journey) -> None:
    """Make the machines, and switch all on at once."""
    journey.fleet = machines.prepare(HOSTS)
    for machine in journey.fleet.values():
        machine.start()
    for machine in journey.fleet.values():
        machine.wait()


def deploy(journey: Journey) -> None:
    """Deploy to hosts that have nothing."""
    journey.describe()
    journey.run("ansible-playbook site.yml")


def connect(journey: Journey) -> None:
    """Have every user connect in three ways, and find all three on one node; both nodes get users."""
    journey.residents.settle(SETTLED_SECONDS)
    journey.homes = journey.residents.homes()
    served = {node for home in journey.homes.values() for node in home}
    if served != {f"{node}-1" for node in journey.nodes}:
        raise Failed(f"all users are on {', '.join(served)}")


def deploy_again(journey: Journey) -> None:
    """Find nothing to do."""
    if tasks := changed(journey.run("ansible-playbook site.yml")):
        raise Failed(f"site.yml has changed something again: changed={tasks}")


def control(journey: Journey) -> None:
    """See sessions stay with an id, and break without one."""
    probe = shlex.join(["--i-own-this-target", "--connections", "1", *PATIENT])
    journey.run(f"stickyring probe {STICKY} --ids 60 {probe}")
    figures = machines.FOLDER / "no-key.json"
    journey.run(f"stickyring probe {UNKEYED} --ids 20 --no-key --json {figures} {probe}", status=1)
    if not json.loads(figures.read_text())["transports"]["polling"]["invalid_session"]:
        raise Failed("the control has failed to fail: without an id, polling must meet Invalid session")


def reboot(journey: Journey) -> None:
    """Reboot a node, and return its users."""
    journey.fleet[REBOOTED].reboot()
    bring_home(journey)


def cut_power(journey: Journey) -> None:
    """Cut a node's power, wait until its users are elsewhere, switch it on again, and return them."""
    machine = journey.fleet[CUT]
    before = machine.wait()
    machine.cut()
    residents = journey.residents
    residents.wait(lambda: all(one.node not in ("", f"{CUT}-1") for one in residents), SETTLED_SECONDS)
    machine.start()
    machine.wait(before)
    bring_home(journey)


def bring_home(journey: Journey) -> None:
    """Prove that all is well, and ask users to reconnect who are not at home, as README has it after a fault."""
    journey.run("ansible-playbook playbooks/verify.yml playbooks/rebalance.yml")


def update(journey: Journey) -> None:
    """Bring the nodes to another release and to a secret, one after another.

    Only the application may read the secret as a credential. In the lab's containers, systemd passes none.
    """
    journey.release = {"stickyring_node_release": RELEASE, "stickyring_node_secrets": SECRET}
    journey.describe()
    journey.run("ansible-playbook playbooks/rolling_update.yml")
    for node in journey.nodes:
        machine = journey.fleet[node]
        current = machine.run("readlink /opt/stickyring-node/current").stdout.strip()
        if Path(current).name != RELEASE:
            raise Failed(f"{node} serves {current or 'no release'} after the update")
        as_service = f"sudo setpriv --reuid {SERVICE} --regid {SERVICE} --clear-groups"
        if machine.run(f"{as_service} cat {CREDENTIAL}").stdout != SECRET["TOKEN"]:
            raise Failed(f"{node} does not pass the secret to its instance as a credential")
        if machine.run(f"cat {CREDENTIAL}").returncode == 0:
            raise Failed(f"on {node}, {machines.USER} can read the secret")


def remove_node(journey: Journey) -> None:
    """Remove a node, delete its line, and find nothing of it on its host."""
    journey.run(f"ansible-playbook playbooks/remove_node.yml -e stickyring_node={CUT}")
    journey.nodes.remove(CUT)
    journey.describe()
    journey.homes = {user: {f"{REBOOTED}-1"} for user in USERS}
    look = "systemctl list-units --all --plain --no-legend 'stickyring*'; ls -d /opt/stickyring*"
    if left := journey.fleet[CUT].run(look).stdout.split():
        raise Failed(f"on {CUT} something is left: {' '.join(left)}")


def verify(journey: Journey) -> None:
    """Prove what is deployed, and find nothing to do for it."""
    deploy_again(journey)
    journey.run("ansible-playbook playbooks/verify.yml")


FRESH = (
    Step("boot of three fresh machines", 3, boot),
    Step("deploy: `site.yml`", 12, deploy),
)
SERVING = (
    Step("users connect", 1, connect),
    Step("no-op: `site.yml` again", 2, deploy_again),
    Step("negative control: without an id, clients meet `Invalid session`", 2, control),
    Step(f"reboot of {REBOOTED}", 6, reboot, (REBOOTED,)),
    Step(f"power cut of {CUT}", 7, cut_power, (CUT,)),
    Step("update to another release with a secret: `rolling_update.yml`", 15, update, (REBOOTED, CUT)),
    Step(f"removal of {CUT}: `remove_node.yml`", 4, remove_node, (CUT,)),
    Step("verify: `site.yml` changes nothing, `verify.yml`", 4, verify),
)


def main() -> None:
    """Go all the way; exit with 1 where a step fails, with 130 where this is interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--keep", action="store_true", help="leave the machines, however it ends but by an interrupt")
    what.add_argument("--down", action="store_true", help="only remove the machines, and what belongs to them")
    given = parser.parse_args()
    if os.geteuid():
        sys.exit("Run this as root: it makes machines and a network.")
    longrun.heed_interrupts()
    with machines.claimed():
        if given.down:
            machines.remove()
            return
        commit, began = longrun.committed(), time.monotonic()
        keep = False
        rows: list[Row] = []
        try:
            machines.remove()
            failed = travel(rows)
            keep = given.keep
            write(rows, commit, time.monotonic() - began)
        except KeyboardInterrupt:
            print("\nInterrupted.", flush=True)
            sys.exit(130)
        finally:
            if not keep:
                say("Removing the machines")
                longrun.ignore_interrupts()
                machines.remove()
    if keep:
        print(how_to_use())
    if failed:
        sys.exit(f"\nFailed: {failed}")


def travel(rows: list[Row]) -> str:
    """Take the steps until one fails, and add a row for each; return which has failed and why, or nothing."""
    journey, failed = Journey(), ""
    try:
        for step in FRESH:
            take(step, journey, rows)
        with Residents(STICKY, USERS, PAUSE, answer=ANSWER_SECONDS) as journey.residents:
            try:
                for step in SERVING:
                    take(step, journey, rows)
            except Failed as error:
                failed = str(error)
    except Failed as error:
        failed = str(error)
    except AssertionError as error:
        # Clients that cannot end: that may be what a step has done to them, which comes first.
        failed = failed or f"clients could not say goodbye: {error}"
    return failed


def take(step: Step, journey: Journey, rows: list[Row]) -> None:
    """Take one step and add its row; raises Failed where it fails, or where somebody notices it who may not."""
    say(f"{len(rows) + 1}/{len(FRESH) + len(SERVING)} {step.name} (about {step.minutes} min)")
    began, noticed = time.monotonic(), ""
    before = journey.homes
    try:
        step.act(journey)
        if before:
            journey.rest()
            touched = {user for user, home in before.items() if home & {f"{node}-1" for node in step.nodes}}
            noticed = notice(journey.residents, began, touched)
    except Exception as error:  # whatever it is, it belongs to its step
        reason = " ".join(str(error).split()).replace("|", "/") or type(error).__name__
        rows.append(Row(step.name, f"failed: {reason}", time.monotonic() - began, noticed))
        raise Failed(f"{step.name}: {error}") from error
    rows.append(Row(step.name, "ok", time.monotonic() - began, noticed))
    print(f"ok, {rows[-1].seconds:.0f} s; {noticed}", flush=True)


def notice(connections: Iterable[Connection], since: float, touched: set[str]) -> str:
    """Return what connections have noticed since then; raises Failed where somebody else's was disconnected."""
    theirs: list[Connection] = []
    others: list[Connection] = []
    for one in connections:
        (theirs if one.user in touched else others).append(one)
    said = []
    if theirs:
        silences = [one.silence(since) for one in theirs]
        most = max(one.count("disconnect", since) for one in theirs)
        said.append(
            f"{len(theirs)} connections of {len(touched)} users: silent for {max(silences):.1f} s at most, "
            f"{statistics.median(silences):.1f} s in the median, disconnected {most} times at most"
        )
    if others:
        if disturbed := sorted({one.user for one in others if one.count("disconnect", since)}):
            raise Failed(f"disconnected were {', '.join(disturbed)}, who were not to notice it")
        name, longest = "others" if theirs else "connections", max(one.silence(since) for one in others)
        said.append(f"{len(others)} {name}: silent for {longest:.1f} s at most, none disconnected")
    return "; ".join(said)


def changed(lines: Iterable[str]) -> int:
    """Return how many changes the recap of an Ansible run has, of all hosts together."""
    return sum(int(found[1]) for line in lines if (found := RECAP.match(line)))


def say(text: str) -> None:
    """Show a line of progress."""
    print(f"\n==> {time.strftime('%H:%M:%S')} {text}", flush=True)


def write(rows: list[Row], commit: str, seconds: float) -> None:
    """Write the report."""
    lines = [
        "# Virtual machines",
        "",
        longrun.origin("make vm", commit, seconds),
        ABOUT,
        "| step | result | seconds | what clients noticed |",
        "|---|---|---|---|",
        *(f"| {row.step} | {row.result} | {row.seconds:.0f} | {row.noticed} |" for row in rows),
        "",
    ]
    REPORT.write_text("\n".join(lines))


def how_to_use() -> str:
    """Return how to use machines that are kept."""
    ssh = {name: shlex.join(machines.Machine(name, address).ssh()) for name, address in HOSTS.items()}
    return "\n".join(
        [
            "",
            "The machines are up:",
            f"  export ANSIBLE_INVENTORY={INVENTORY}",
            "  ansible-playbook playbooks/verify.yml",
            f"  stickyring probe {STICKY} --i-own-this-target",
            *(f"  {command}" for command in ssh.values()),
            f"Their consoles are written into {machines.FOLDER}/*.console. `molecule/vm.py --down` removes all.",
        ]
    )


if __name__ == "__main__":
    main()
