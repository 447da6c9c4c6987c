"""The Envoy that reads the xDS files: what it has loaded, what it rejects, and which endpoints it finds healthy."""

from __future__ import annotations

import fcntl
import http.client
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stickyring.fleet.plugins.module_utils.admin import Admin, listener_of
from ansible_collections.stickyring.fleet.plugins.module_utils.unit import Unit
from ansible_collections.stickyring.fleet.plugins.module_utils.xds import (
    CLUSTER,
    ENDPOINTS,
    SECRET,
    Resource,
    Stats,
    XdsFile,
    endpoints_of,
)

POLL_SECONDS = 0.1
JOURNAL_SECONDS = 3
HEALTH_SECONDS = 5
REASON_LENGTH = 500
STAND_IN = "stand-in.invalid"
"""The first name of a certificate that the edge has made itself (templates/acme_certificates.sh.j2)."""
EXPIRES_SOON = timedelta(days=14)
"""Time enough to find out why a certificate was not renewed."""


class NotApplied(Exception):
    """Envoy rejected a step or did not finish it in time; the message is Envoy's reason."""


class Envoy:
    """The process, as its admin interface, its unit and its journal show it."""

    def __init__(self, module: AnsibleModule, files: list[XdsFile]) -> None:
        self.files = files
        self.timeout: int = module.params["timeout"]
        self.healthy_timeout: int = module.params["healthy_timeout"]
        self.admin = Admin(module.params["admin_socket"])
        self.unit = Unit(module)
        self.stray = self.find_main_socket(mend=module.params["state"] == "present" and not module.check_mode)
        self.answers = self.admin.answers()
        self.started = time.time()
        self.before: Stats = {}
        self.remember()

    def remember(self) -> None:
        """Keeps the counters that later ones are compared with."""
        self.before = self.admin.stats() if self.answers else {}

    def leaving_sockets(self) -> list[Path]:
        """The admin sockets of processes that have handed over their ports (files/hand_over.py of the role)."""
        return sorted(Path(self.admin.path).parent.glob("leaving-*.sock"))

    def leaving_processes(self) -> list[str]:
        """What these processes call themselves."""
        return [path.stem.removeprefix("leaving-") for path in self.leaving_sockets() if listener_of(path) is not None]

    def leaving_websockets(self) -> Counter[str]:
        """Number of open WebSockets that these processes carry, by listener."""
        found = Counter[str]()
        for path in self.leaving_sockets():
            with suppress(OSError):  # it has just ended
                found.update(Admin(str(path)).websockets())
        return found

    def find_main_socket(self, *, mend: bool) -> bool:
        """Whether the admin socket is not the main process', because a hand-over was killed.

        To mend that, the main process' socket is renamed back if nobody listens on the admin socket. Otherwise another
        hand-over is needed.
        """
        lock = Path(self.admin.path).with_name("lock")
        if not (self.unit.active() and lock.exists()):
            return False
        with lock.open() as held:
            # What a killed reload has started may still be at work.
            fcntl.flock(held, fcntl.LOCK_EX)
            main = self.unit.shown["MainPID"]
            mine = next((path for path in self.leaving_sockets() if str(listener_of(path)) == main), None)
            if mine is None or not mend or listener_of(Path(self.admin.path)) is not None:
                return mine is not None
            mine.rename(self.admin.path)
            return False

    def await_answer_of_running_unit(self) -> None:
        """Waits while the unit runs and Envoy does not answer yet; NotApplied after the timeout.

        Without an answer, a rejected file would not be noticed, and Envoy would get the files in no order. The caller
        handles an Envoy without a socket.
        """
        deadline = time.monotonic() + self.timeout
        while not self.answers and self.unit.active():
            if time.monotonic() > deadline:
                if self.without_socket():
                    return
                raise NotApplied(
                    f"{self.unit.name} runs, but its admin interface at {self.admin.path} has not answered for"
                    f" {self.timeout} s. Nothing was written. If Envoy hangs, run `systemctl stop {self.unit.name}`"
                    " and then this again."
                )
            time.sleep(POLL_SECONDS)
            self.unit.look()
            self.answers = self.admin.answers()
        self.remember()

    def without_socket(self) -> bool:
        """Whether the unit runs and has no admin socket, as an earlier version of the role started it."""
        return self.unit.active() and not self.answers and not Path(self.admin.path).exists()

    def expect_answer(self) -> None:
        """Waits until Envoy answers; NotApplied with the last lines of its journal."""
        if self.answers:
            return
        try:
            self.wait(
                f"Asking Envoy at {self.admin.path}",
                lambda: [] if self.admin.answers() else ["its admin interface does not answer"],
            )
        except NotApplied as error:
            raise NotApplied(f"{error}. {in_one_line(self.unit.journal('--lines', '5'))}".strip()) from error
        self.answers = True
        self.remember()

    def wait(self, what: str, problems_now: Callable[[], list[str]], timeout: int | None = None) -> None:
        """Polls until there are no problems; NotApplied with the last ones after the timeout."""
        patience = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        while True:
            try:
                problems = problems_now()
            except OSError as error:
                problems = [f"Envoy's admin interface does not answer ({error})"]
            if not problems:
                return
            if time.monotonic() > deadline:
                raise NotApplied(f"{what}: not done after {patience} s: {'; '.join(problems)}")
            time.sleep(POLL_SECONDS)

    def problems(self, files: Iterable[XdsFile]) -> list[str]:
        """What Envoy has not loaded yet of these files; NotApplied when it has rejected any file since the start."""
        stats = self.admin.stats()
        rejected = [file.path for file in self.files if file.refusals(stats) > file.refusals(self.before)]
        if rejected:
            raise NotApplied(f"Envoy rejected {', '.join(rejected)}: {self.reason()}")
        dump = self.admin.dump()
        return [line for file in files for line in file.version_problems(stats) + file.activity_problems(dump)]

    def served(self) -> list[Resource]:
        """The sections of Envoy's running configuration that have its clusters and their endpoints."""
        dump = self.admin.dump()
        return [dump[kind] for kind in ("ClustersConfigDump", "EndpointsConfigDump") if kind in dump]

    def serving_problems(self) -> list[str]:
        """What Envoy has not loaded yet of all files, and listeners whose port is closed."""
        return self.problems(self.files) or [line for file in self.files for line in file.port_problems()]

    def health_problems(self) -> list[str]:
        """Endpoints that Envoy does not find healthy, one line each; none if the healthy timeout is 0."""
        if not self.healthy_timeout:
            return []
        hosts = self.admin.hosts()
        return [line for file in self.files for line in file.health_problems(hosts)]

    def expiring(self) -> tuple[list[str], list[str]]:
        """Certificates that Envoy serves, one sentence each: those that no client takes, and those that expire soon."""
        invalid: list[str] = []
        soon: list[str] = []
        if not any(file.type == SECRET for file in self.files):
            return invalid, soon
        now = datetime.now(UTC)
        for names, end in self.admin.certificates():
            certificate = f"the certificate for {', '.join(name for name in names if name != STAND_IN)}"
            if STAND_IN in names:
                invalid.append(f"{certificate} is a stand-in, because the ACME directory has given none yet")
            elif end <= now:
                invalid.append(f"{certificate} expired on {end:%F}")
            elif end - now < EXPIRES_SOON:
                soon.append(f"{certificate} expires on {end:%F}")
        return invalid, soon

    def prove(self) -> None:
        """Waits until Envoy has loaded the files and its ports are open."""
        self.wait("Loading the configuration", self.serving_problems)

    def prove_healthy(self) -> None:
        """Waits until Envoy finds every endpoint healthy."""
        self.wait("Waiting until Envoy finds every endpoint healthy", self.health_problems, self.healthy_timeout)

    def reason(self) -> str:
        """Envoy's message about a rejected update; waits up to JOURNAL_SECONDS until it is in the journal."""
        deadline = time.monotonic() + JOURNAL_SECONDS
        while True:
            listeners = self.admin.dump().get("ListenersConfigDump", {}).get("dynamic_listeners", [])
            found = [item["error_state"]["details"] for item in listeners if "error_state" in item]
            found = found or self.reasons_in_journal()
            if found or not self.unit.name or time.monotonic() > deadline:
                return "; ".join(dict.fromkeys(map(in_one_line, found))) or "its log has the reason"
            time.sleep(POLL_SECONDS)

    def reasons_in_journal(self) -> list[str]:
        """What Envoy has logged since the start about rejected files; config_dump shows only rejected listeners."""
        log = self.unit.journal("--since", f"@{self.started:.6f}")
        # A message may span lines; the next record begins with a time in brackets or is a line of the access log.
        return re.findall(r"Filesystem config update (?:rejected|failure): (.*?)(?=\n[\[{]|\Z)", log, re.DOTALL)

    def rejected_listeners(self) -> list[str]:
        """Listeners that Envoy serves in another version than the one that it rejected."""
        found = self.admin.dump().get("ListenersConfigDump", {}).get("dynamic_listeners", [])
        return [item["name"] for item in found if "error_state" in item and "active_state" in item]

    def leaving(self) -> list[dict[str, str]]:
        """Endpoints that Envoy has and the files do not, or not at that address: name and address of each."""
        wanted = {place for file in self.files if file.type == ENDPOINTS for place in file.endpoints()}
        found: dict[tuple[str, int], str] = {}
        for item in self.admin.dump().get("EndpointsConfigDump", {}).get("dynamic_endpoint_configs", []):
            found |= endpoints_of(item["endpoint_config"])
        return [
            {"name": name, "address": f"{address}:{port}"}
            for (address, port), name in sorted(found.items(), key=lambda item: item[1])
            if (address, port) not in wanted
        ]

    def newcomers(self) -> dict[tuple[str, int], tuple[str, str]]:
        """Endpoints that Envoy does not have yet, by address and port: name and health path."""
        present = {(address, port) for _, address, port in self.admin.hosts()} if self.answers else set()
        paths = {
            cluster["name"]: check["http_health_check"]["path"]
            for file in self.files
            if file.type == CLUSTER
            for cluster in file.resources
            for check in cluster.get("health_checks", [])
        }
        return {
            place: (name, paths[file.names()[0]])
            for file in self.files
            if file.type == ENDPOINTS and file.names()[0] in paths
            for place, name in file.checked_endpoints().items()
            if place not in present
        }

    def expect_healthy_newcomers(self) -> None:
        """Waits until every new endpoint answers this host; NotApplied with those that do not."""
        newcomers = self.newcomers()

        def problems() -> list[str]:
            return [
                f"{name} ({address}:{port}) does not answer {path} with 200 ({reason})"
                for (address, port), (name, path) in newcomers.items()
                if (reason := unhealthy(address, port, path))
            ]

        self.wait("New endpoints are not healthy, so nothing was written", problems, self.healthy_timeout)


def unhealthy(address: str, port: int, path: str) -> str:
    """Why the address does not answer the path with 200; empty when it does."""
    connection = http.client.HTTPConnection(address, port, timeout=HEALTH_SECONDS)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return "" if status == 200 else f"status {status}"


def in_one_line(reason: str) -> str:
    """The reason without line breaks and without the rejected message, which Envoy prints before or after it."""
    words = " ".join(reason.split()).partition('): {"')[0]
    return words if len(words) <= REASON_LENGTH else f"... {words[-REASON_LENGTH:]}"
