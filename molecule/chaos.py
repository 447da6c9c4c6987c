#!/usr/bin/env python3
"""Runs operations and faults on the running lab in an order that a seed decides, and checks the lab after each.

If there are faults of the bus among them, it gives the lab a bus first, and users who listen to events over it.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from stickyring.ring import Ring

PROJECT = Path(__file__).parents[1]
sys.path[:0] = [str(PROJECT / "molecule" / "shared" / "tests"), str(PROJECT / "app" / "tests")]
import environment  # noqa: E402 - in shared/tests
from bus_crowd import Crowd, History, Speaking  # noqa: E402 - of the application's tests
from lab_bus import ROOMS, LabBus  # noqa: E402
from residents import Residents  # noqa: E402

LISTENER_PORT = 9002
USERS = [f"user-{number}" for number in range(60)]
LISTENERS = 30
"""Users of the JavaScript client who listen to events over the bus."""
HEARD = 0.9
"""The least share of events that they have to hear."""
EDGE_UNIT, NODE_UNIT = "stickyring-edge.service", "stickyring-node@1.service"
SETTLED_SECONDS = 60
CURRENT = "/opt/stickyring-node/current"
CONTROL = "--control /run/stickyring-node/1/control.sock"
TASKS = 50
"""The assumed number of tasks of a playbook that has not run yet."""
EXAMPLES = """
examples:
  make chaos                                            seed 1, 60 operations
  make chaos SEED=2 OPERATIONS=10
  molecule/chaos.py --seed 1 --operations 5 --only stop --only kill
"""


class Broken(Exception):
    """A check has failed."""


class Lab:
    """The hosts of inventory/lab, a bus beside them if there is one, and the users who are connected to them."""

    residents: Residents

    def __init__(self, chance: random.Random, bus: LabBus) -> None:
        self.bus = bus
        groups = json.loads(environment.run("ansible-inventory", "--list").stdout)
        self.edge, self.nodes = groups["edge"]["hosts"][0], groups["nodes"]["hosts"]
        self.edge_address = groups["_meta"]["hostvars"][self.edge]["ansible_host"]
        self.chance = chance
        self.killed = 0
        self._updates = 0
        self._tasks: dict[str, int] = {}

    def do(self, name: str, command: str) -> str:
        """Runs a command on a host, which must succeed; returns its output."""
        return self.bus.do(name, command)

    def play(self, *arguments: str) -> None:
        """Runs a playbook, kills it and its processes here at a random task, and runs it again to its end."""
        left = self.chance.randint(1, self._tasks.get(arguments[0], TASKS))

        def here(_: str) -> bool:
            nonlocal left
            left -= 1
            return not left

        told = environment.interrupt_where(here, *arguments)
        if not left:
            self.killed += 1
            task = told[-1].removeprefix("TASK ").strip("* \n")
            print(f"({arguments[0]} killed at {task}) ", end="", flush=True)
        self.finish(*arguments)

    def finish(self, *arguments: str) -> None:
        """Runs a playbook to its end; it must succeed."""
        done = environment.run("ansible-playbook", *arguments, check=False)
        if done.returncode:
            raise Broken(f"{' '.join(arguments)} has failed:\n{done.stdout[-3000:]}{done.stderr}")
        self._tasks[arguments[0]] = done.stdout.count("\nTASK [")

    def releases(self) -> dict[str, str]:
        """The release that is current on each node."""
        told = environment.run("ansible", "nodes", "--become", "--one-line", "--args", f"readlink {CURRENT}").stdout
        return dict(re.findall(r"^(\S+) \|.*releases/(\S+)$", told, re.MULTILINE))

    def release(self) -> str:
        """A new name for a release."""
        self._updates += 1
        return f"chaos-{os.getpid()}-{self._updates}"

    def mode(self) -> list[str]:
        """The options that choose how nodes restart: in surge mode or not."""
        surge = self.chance.choice(("true", "false"))
        return ["-e", f"stickyring_node_surge={surge}", "-e", "stickyring_node_proving_time=2"]

    def leave(self, node: str) -> None:
        """Waits until no user is on the node."""
        self.residents.wait(lambda: all(one.node != f"{node}-1" for one in self.residents), SETTLED_SECONDS)


def stop(lab: Lab, node: str) -> None:
    """systemctl stop, and start"""
    since = lab.do(node, "date +%s")
    lab.do(node, f"systemctl stop {NODE_UNIT}")
    told = lab.do(node, f"journalctl --unit={NODE_UNIT} --output=cat --no-pager --since=@{since}")
    drained = re.search(r'"message": "drained".*', told)
    if drained is None or json.loads("{" + drained[0])["sessions"]:
        raise Broken(f"{node} has stopped before all its users had left")
    lab.do(node, f"systemctl start {NODE_UNIT}")


def kill(lab: Lab, node: str) -> None:
    """SIGKILL to all processes"""
    lab.do(node, f"systemctl kill --signal=KILL --kill-whom=all {NODE_UNIT}")


def kill_worker(lab: Lab, node: str) -> None:
    """SIGKILL to the worker"""
    lab.do(node, f"pkill -KILL --parent $(systemctl show --property=MainPID --value {NODE_UNIT})")


def hang(lab: Lab, node: str) -> None:
    """SIGSTOP to all processes"""
    lab.do(node, f"systemctl kill --signal=STOP --kill-whom=all {NODE_UNIT}")
    lab.leave(node)


def cut(lab: Lab, node: str) -> None:
    """no packets from the node to the edge, until its users are on other nodes"""
    route = f"blackhole {lab.edge_address}/32"
    lab.do(node, f"ip route add {route}")
    try:
        lab.leave(node)
    finally:
        lab.do(node, f"ip route del {route}")


def drain(lab: Lab, node: str) -> None:
    """stickyring drain, and undrain"""
    lab.do(node, f"{CURRENT}/bin/stickyring drain {CONTROL}")
    lab.leave(node)
    lab.do(node, f"{CURRENT}/bin/stickyring undrain {CONTROL}")


def restart_edge(lab: Lab, node: str) -> None:
    """systemctl restart of the edge"""
    lab.do(lab.edge, f"systemctl restart {EDGE_UNIT}")


def update(lab: Lab, node: str) -> None:
    """rolling_update.yml to another release"""
    release = lab.release()
    lab.play("playbooks/rolling_update.yml", "-e", f"stickyring_node_release={release}", *lab.mode())
    if set(lab.releases().values()) != {release}:
        raise Broken(f"after the update to {release}: {lab.releases()}")


def roll_back(lab: Lab, node: str) -> None:
    """rolling_update.yml to another release, and rollback.yml"""
    before = lab.releases()
    lab.finish("playbooks/rolling_update.yml", "-e", f"stickyring_node_release={lab.release()}", *lab.mode())
    lab.play("playbooks/rollback.yml", *lab.mode())
    if lab.releases() != before:
        raise Broken(f"after the rollback: {lab.releases()}, and not {before}")


def remove(lab: Lab, node: str) -> None:
    """remove_node.yml, and site.yml, which adds the node again"""
    lab.play("playbooks/remove_node.yml", "-e", f"stickyring_node={node}")
    lab.play("site.yml")


def change_edge(lab: Lab, node: str) -> None:
    """edge.yml with other routes, cluster or hash policy, and with the inventory's"""
    lab.play("playbooks/edge.yml", "-e", json.dumps(lab.chance.choice(EDGE_CHANGES)))
    lab.play("playbooks/edge.yml")


def replace_envoy(lab: Lab, node: str) -> None:
    """edge.yml with another bootstrap, so that another Envoy takes over, and with the inventory's"""
    since = time.monotonic()
    lab.play("playbooks/edge.yml", "-e", f"stickyring_edge_max_heap_mib={lab.chance.randrange(1000, 2000)}")
    lab.play("playbooks/edge.yml")
    polling = [one for one in lab.residents if one.transports == ["polling"]]
    if disturbed := [one for one in polling if one.count("disconnect", since)]:
        raise Broken(f"a polling user was disconnected: {disturbed[0]}")
    if "leaving" in lab.do(lab.edge, "ls /run/stickyring-edge"):
        raise Broken("a replaced Envoy still runs")


def wait_for_primary(condition: Callable[[], bool]) -> None:
    """Waits until another host of the bus is the primary."""
    deadline = time.monotonic() + SETTLED_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise Broken(f"no other host of the bus has taken over within {SETTLED_SECONDS} s")
        time.sleep(0.2)


def restart_bus(lab: Lab, node: str) -> None:
    """systemctl restart of the bus' primary"""
    lab.bus.restart(wait_for_primary)


def kill_bus(lab: Lab, node: str) -> None:
    """SIGKILL to the bus' primary"""
    lab.bus.kill(wait_for_primary)


def stop_bus(lab: Lab, node: str) -> None:
    """systemctl stop of the bus' primary, and start once another host has taken over"""
    lab.bus.stop(wait_for_primary)


def freeze_bus(lab: Lab, node: str) -> None:
    """SIGSTOP to the bus' primary and its Sentinel until another host has taken over"""
    lab.bus.freeze(wait_for_primary)


def wipe_bus(lab: Lab, node: str) -> None:
    """the bus' primary comes back with an empty disk"""
    lab.bus.wipe(wait_for_primary)


EDGE_CHANGES = (
    {"stickyring_edge_route_timeout": 90},
    {"stickyring_edge_circuit_breaker_max_requests": 90000},
    {"stickyring_edge_max_request_body_bytes": 900000, "stickyring_edge_paths": [{"prefix": "/events", "timeout": 0}]},
    {"stickyring_edge_hash_policies": [{"query_parameter": {"name": "client_id"}}]},
)
OPERATIONS: dict[str, tuple[Callable[[Lab, str], None], int]] = {
    "stop": (stop, 4),
    "kill": (kill, 4),
    "kill-worker": (kill_worker, 4),
    "hang": (hang, 2),
    "cut": (cut, 2),
    "drain": (drain, 4),
    "restart-edge": (restart_edge, 2),
    "update": (update, 1),
    "roll-back": (roll_back, 1),
    "remove": (remove, 1),
    "change-edge": (change_edge, 1),
    "replace-envoy": (replace_envoy, 1),
    "restart-bus": (restart_bus, 1),
    "kill-bus": (kill_bus, 1),
    "stop-bus": (stop_bus, 1),
    "freeze-bus": (freeze_bus, 1),
    "wipe-bus": (wipe_bus, 1),
}
"""The operations, and how often each comes relative to the others."""
EVERYWHERE = {"restart-edge", "replace-envoy", "update", "roll-back", "remove"}
"""Operations that users of other nodes may notice too."""
AT_THE_BUS = (restart_bus, kill_bus, stop_bus, freeze_bus, wipe_bus)
NOWHERE = {"change-edge", *(name for name, (operation, _) in OPERATIONS.items() if operation in AT_THE_BUS)}
"""Operations that no user may notice."""


class Before(NamedTuple):
    """The state before an operation on a node: the time, Envoy's process, and the users on that node."""

    moment: float
    envoy: str
    users: set[str]


def look(lab: Lab, node: str) -> Before:
    """The state to compare with afterwards."""
    envoy = lab.do(lab.edge, f"systemctl show {EDGE_UNIT} --property=MainPID --value")
    return Before(time.monotonic(), envoy, {one.user for one in lab.residents if one.node == f"{node}-1"})


def rest(lab: Lab) -> None:
    """Moves all users to their assigned nodes; raises Broken if ring, users or messages are wrong."""
    with tempfile.TemporaryDirectory() as folder:
        playbooks = [f"playbooks/{name}.yml" for name in ("verify", "rebalance", "plan")]
        lab.finish(*playbooks, "-e", f"stickyring_directory={folder}")
        plan = json.loads(Path(folder, lab.edge, "plan.json").read_text())
        ring = Ring.load(json.loads(Path(folder, lab.edge, "before.json").read_text()))
    if plan["changes"]:
        raise Broken(f"the ring is not the inventory's: {plan['changes']}")
    home = {user: {ring.owner(user)} for user in USERS}
    try:
        lab.residents.wait(lambda: lab.residents.homes() == home, SETTLED_SECONDS)
    except TimeoutError as error:
        raise Broken(f"users are not on their assigned nodes: {error}") from None
    # A connection can look alive: if a polling client sent its last message to a node that had just gone, the Python
    # client notices only when its poll ends.
    lab.residents.wait_for_answers(time.monotonic(), SETTLED_SECONDS)
    if lost := [one for one in lab.residents if one.lost]:
        raise Broken(f"messages were lost: {lost[0]}")


def check(lab: Lab, name: str, node: str, before: Before) -> None:
    """Raises Broken if the operation had an effect that it must not have."""
    rest(lab)
    if name not in {"restart-edge", "replace-envoy"} and look(lab, node).envoy != before.envoy:
        raise Broken("Envoy was restarted")
    spared = [one for one in lab.residents if name in NOWHERE or one.user not in before.users]
    disturbed = [one for one in spared if one.count("disconnect", before.moment)]
    if name not in EVERYWHERE and disturbed:
        raise Broken(f"an unaffected user was disconnected: {disturbed[0]}")


def deploy_bus(lab: Lab) -> None:
    """Gives the lab a bus of three hosts."""
    lab.bus.write("bus1", "bus2", "bus3")
    others = os.environ.get("ANSIBLE_INVENTORY", "inventory/lab").split(",")[1:]
    os.environ["ANSIBLE_INVENTORY"] = ",".join([str(lab.bus.inventory), *others])
    lab.finish("molecule/shared/create.yml")
    lab.finish("site.yml")


@contextmanager
def listeners(lab: Lab, folder: Path, url: str) -> Iterator[Callable[[], str]]:
    """Connects listeners, who hear events over the bus; yields what ends them and returns what they heard.

    That raises Broken if they missed events unknowingly or got them twice.
    """
    crowd = Crowd(environment.javascript_client(folder), LISTENERS, [url])

    def end() -> str:
        heard: History = crowd.end()
        # The last ones are on their way, and a session that was not recovered misses some, knowingly.
        if heard.faults or heard.heard < speaking.number * LISTENERS * HEARD:
            raise Broken(f"of {speaking.number} events, {LISTENERS} listeners heard {heard.heard}: {heard.faults[:5]}")
        return (
            f"; {heard.heard} events heard by {LISTENERS} listeners, {heard.recovered} of their sessions recovered, "
            f"{heard.not_recovered} not"
        )

    # Not to the residents, who expect answers only.
    with Speaking(lab.bus.url("emitter"), ROOMS, timeout=60) as speaking:
        yield end


def main() -> None:
    """Runs the operations; if a check fails, exits with 1 and the sequence."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1, help="decides the sequence (default 1)")
    parser.add_argument("--operations", type=int, default=60, help="number of operations (default 60)")
    parser.add_argument(
        "--only", action="append", choices=OPERATIONS, help="run only this operation; may be given several times"
    )
    given = parser.parse_args()
    if given.operations < 1:
        parser.error("--operations: give 1 or more")

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chance = random.Random(given.seed)
    names = given.only or [*OPERATIONS]
    weights = [OPERATIONS[name][1] for name in names]
    played: list[str] = []
    began = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lab = Lab(chance, LabBus(PROJECT / "inventory" / "lab", folder / "inventory"))
        with_bus = any(OPERATIONS[name][0] in AT_THE_BUS for name in names)
        url = f"http://{lab.edge_address}:{LISTENER_PORT}"
        try:
            if with_bus:
                deploy_bus(lab)
            residents = lab.residents = stack.enter_context(Residents(url, USERS))
            end = stack.enter_context(listeners(lab, folder, url)) if with_bus else str
            residents.settle(SETTLED_SECONDS)
            rest(lab)
            while len(played) < given.operations:
                (name,), node = chance.choices(names, weights), chance.choice(lab.nodes)
                played.append(f"{name} {node}")
                before = look(lab, node)
                print(f"{len(played):3} {played[-1]:22}", end="", flush=True)
                OPERATIONS[name][0](lab, node)
                check(lab, name, node, before)
                print(f"held, {time.monotonic() - before.moment:.0f} s", flush=True)
            heard = end()
        except Exception as error:  # the sequence is reported with every error
            print("BROKEN")
            sys.exit(f"seed {given.seed}: {type(error).__name__}: {error}\nafter: {', '.join(played)}")
        except KeyboardInterrupt:
            sys.exit(
                f"\nseed {given.seed}: interrupted after {len(played)} operations; run site.yml to restore the lab"
            )
    answers = sum(len(one.answers) for one in residents)
    repeated = sum(len(one.repeated) for one in residents)
    print(
        f"seed {given.seed}: {len(played)} operations in {time.monotonic() - began:.0f} s, {lab.killed} playbooks "
        f"killed on the way; {answers} messages of {len(residents.connections)} clients, "
        f"{repeated} sent again, none lost{heard}"
    )


if __name__ == "__main__":
    main()
