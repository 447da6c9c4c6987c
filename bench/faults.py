"""The part "faults": what failures cost users, measured by the suites that assert the limits."""

import json
from dataclasses import dataclass
from typing import Any

from bench.lab import CREATE, ROOT, SITE, Control, LabError, before_the_lab, lab
from bench.report import Figure, Part
from bench.rounds import Rounds

NODES = 3
SUITES = "molecule/shared/tests/failover"
FOUND = ROOT / ".artifacts/failover.json"
"""The file into which the suites write their figures."""
OPTIONS = ("-p", "no:cacheprovider", "--ansible-inventory")
LOG = "faults"
COLUMNS = {
    "median": "median user",
    "p99": "99th percentile",
    "last": "last user",
    "bound": "bound that the suites assert",
}


@dataclass(frozen=True)
class Profile:
    """How often the suites run on the same hosts."""

    rounds: int


PROFILES = {"quick": Profile(rounds=1), "full": Profile(rounds=5)}


def measure(rounds: Rounds, profile: Profile) -> Part:
    """Run the suites on fresh hosts; a fault that exceeds its limit ends the run.

    Raises:
        LabError: there is a lab already, or a suite fails.
    """
    found = []
    with before_the_lab(rounds, LOG) as folder:
        control = Control(folder, rounds, LOG)
        rounds.say("making hosts")
        with lab(control, NODES):
            control.play(NODES, SITE)
            for _ in rounds.go(profile.rounds, "faults"):
                FOUND.unlink(missing_ok=True)
                control.run("pytest", SUITES, *OPTIONS, str(control.inventory(NODES)))
                found.append(_found())
    return _part(found)


def _found() -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(FOUND.read_text())
    except FileNotFoundError:
        raise LabError(f"{SUITES} have left no figures") from None
    return found


def _part(found: list[dict[str, dict[str, Any]]]) -> Part:
    part = Part(
        "faults",
        "Faults",
        [Figure(fault, fault, figures["unit"], False, True) for fault, figures in found[0].items()],
        COLUMNS,
        {
            "hosts": f"ansible-playbook {CREATE}; ansible-playbook {SITE}",
            "faults": f"pytest {SUITES} {' '.join(OPTIONS)} inventory/lab",
        },
        "median",
        setting="The hosts were the lab's, on this machine, and shared its cores with the clients, who have default "
        "options and talk three times a second, or, where there are 2000, every five seconds. Seconds are from a "
        "user's last answer before the fault to the next one; of users who only listen, or where they are said to "
        "connect again, from the fault to the connection.",
    )
    for faults in found:
        for fault, figures in faults.items():
            for column in COLUMNS:
                part.add(column, {fault: figures[column]})
    part.more = {"users": {fault: [faults[fault]["users"] for faults in found] for fault in found[0]}}
    return part
