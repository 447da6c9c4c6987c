"""One probe, from the URL to the report."""

import asyncio
import json
import signal
import time
from typing import TextIO

import click

from stickyring.tools.probe.failures import LOGIN_REFUSED
from stickyring.tools.probe.http_report import HttpReport
from stickyring.tools.probe.load import Load
from stickyring.tools.probe.progress import shown
from stickyring.tools.probe.report import Report
from stickyring.tools.probe.settings import Dialect, Manner, Shape
from stickyring.tools.probe.targets import Target, judge
from stickyring.tools.terminal import console_for_stdout


async def measure(target: Target, dialect: Dialect, shape: Shape) -> Report:
    """Run all sessions and show progress. SIGINT ends the run early; the report covers the sessions so far.

    Raises:
        click.ClickException: the application rejected the first session, so no other was tried.
    """
    load = Load(target, dialect, shape, announce=click.echo)
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        # A second SIGINT ends the process without waiting for sessions to close.
        loop.remove_signal_handler(signal.SIGINT)
        load.interrupt()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    begin = time.perf_counter()
    try:
        async with shown(load):
            await load.run()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    if load.rejected is not None:
        anonymous = dialect.auth is None and not dialect.headers
        advice = "; log in with --auth or --header" if anonymous and load.rejected.startswith(LOGIN_REFUSED) else ""
        raise click.ClickException(f"{load.rejected}{advice}")
    report = HttpReport if Manner.HTTP in shape.manners else Report
    return report(target, dialect, shape, load.records, load.interrupted, time.perf_counter() - begin)


async def judge_and_measure(url: str, dialect: Dialect, shape: Shape, *, owned: bool) -> Report:
    """Probe `url` if load is allowed there.

    Raises:
        TargetError: load is not allowed, or nothing listens there.
    """
    return await measure(await judge(url, owned=owned, timeout=dialect.timeout), dialect, shape)


def publish(report: Report, json_file: TextIO | None) -> int:
    """Print the tables, write the JSON file, and return the exit status."""
    console_for_stdout().print(report)
    if json_file is not None:
        json.dump(report.as_json(), json_file, indent=2)
        json_file.write("\n")
    if report.interrupted:
        return 130
    return 0 if report.sticky else 1
