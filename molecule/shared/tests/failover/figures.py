"""Writes what each fault costs its users, for the benchmark to read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles

FIGURES = Path(__file__).parents[4] / ".artifacts" / "failover.json"


def percentile_99(values: Iterable[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def keep(fault: str, costs: Iterable[float], bound: float, unit: str = "s") -> dict[str, float]:
    """Prints, writes and returns the figures of a fault from what it cost each user."""
    values = sorted(costs)
    p99 = percentile_99(values)
    figures = {"median": median(values), "p99": p99, "last": values[-1], "bound": bound, "users": len(values)}
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(known | {fault: figures | {"unit": unit}}, indent=1) + "\n")
    print(fault, figures)
    return figures
