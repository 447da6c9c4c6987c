"""A bus on three hosts, on loopback: what tests and the benchmark start of it."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

READY_SECONDS = 20.0
DOWN_AFTER_SECONDS = 1.5
"""Sentinels give up a server that is silent for so long."""


def server_program() -> str:
    """Return the path of Redis' server.

    Raises:
        FileNotFoundError: there is none.
    """
    # Debian's redis-tools has the same program under the name of its check of dump files.
    program = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    if program is None:
        raise FileNotFoundError("the bus needs Redis: apt-get install redis-tools")
    return program


def free_port() -> int:
    """Return a port that stays free while nothing listens on it: no connection goes out from it."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(first // 2, first)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _wait_until(question: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not question():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {READY_SECONDS:g} s: {what}")
        time.sleep(0.02)


class Trio:
    """A primary, two replicas and three Sentinels of one user alone, with passwords, and with TLS or without it."""

    def __init__(self, folder: Path, *, tls: bool = True) -> None:
        self.folder, self.tls = folder, tls
        ports: set[int] = set()
        while len(ports) < 6:
            ports.add(free_port())
        self.servers, self.sentinels = [*ports][:3], [*ports][3:]
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        scheme, trusted = ("rediss", f"?ssl_ca_certs={folder}/bus.pem") if tls else ("redis", "")
        self.url = f"{scheme}+sentinel://nodes:of-the-nodes@{hosts}/0/bus{trusted}"
        if tls:
            self._make_certificate()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        """By port; those that were killed stay in it."""
        self._users = folder / "users.acl"
        self._users.write_text(
            "user default on >of-the-replicas ~* &* +@all\nuser nodes on >of-the-nodes ~* &* +@all\n"
        )

    def _make_certificate(self) -> None:
        files = f"-keyout {self.folder}/key.pem -out {self.folder}/bus.pem"
        make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
        name = "-subj /CN=bus -addext subjectAltName=IP:127.0.0.1"
        subprocess.run(f"{make} {name} {files}".split(), check=True, capture_output=True)

    def start(self) -> None:
        """Start them; return when the replicas follow and the Sentinels know each other.

        Raises:
            FileNotFoundError: there is no Redis.
            TimeoutError: they do not find each other.
        """
        for port in self.servers:
            follow = [] if port == self.servers[0] else ["--replicaof", f"127.0.0.1 {self.servers[0]}"]
            (self.folder / str(port)).mkdir()
            data = ["--dir", f"{self.folder}/{port}", "--appendonly", "yes", "--save", ""]
            # By default, a primary waits for 5 s for more replicas that want a copy.
            replication = ["--min-replicas-to-write", "1", "--repl-diskless-sync-delay", "0"]
            users = ["--aclfile", str(self._users), "--masterauth", "of-the-replicas"]
            self._start(port, *data, *users, *replication, *follow)
        # A Sentinel asks a primary for its replicas when it starts, and then every 10 s.
        _wait_until(self._has_replicas, "replicas follow")
        for port in self.sentinels:
            settings = self.folder / f"{port}.conf"
            settings.write_text(
                f"sentinel monitor bus 127.0.0.1 {self.servers[0]} 2\nsentinel auth-pass bus of-the-replicas\n"
                f"sentinel down-after-milliseconds bus {DOWN_AFTER_SECONDS * 1000:.0f}\n"
                "sentinel failover-timeout bus 5000\n"
            )
            self._start(port, str(settings), "--sentinel")
        _wait_until(lambda: all(self._knows_all(port) for port in self.sentinels), "the Sentinels know each other")

    def _start(self, port: int, *options: str) -> None:
        listen = ["--bind", "127.0.0.1", "--port", "0" if self.tls else str(port)]
        if self.tls:
            listen += [
                *("--tls-port", str(port), "--tls-replication", "yes", "--tls-auth-clients", "no"),
                *("--tls-cert-file", f"{self.folder}/bus.pem", "--tls-key-file", f"{self.folder}/key.pem"),
                *("--tls-ca-cert-file", f"{self.folder}/bus.pem"),
            ]
        with (self.folder / f"{port}.log").open("ab") as log:
            self.processes[port] = subprocess.Popen(
                ["redis-server", *options, *listen], executable=server_program(), stdout=log, stderr=log
            )

    def client(self, port: int) -> Any:
        password = "of-the-replicas" if port in self.servers else None
        trusted = f"{self.folder}/bus.pem"
        return redis.Redis("127.0.0.1", port, password=password, ssl=self.tls, ssl_ca_certs=trusted)

    def _knows_all(self, port: int) -> bool:
        try:
            state = self.client(port).sentinel_master("bus")
        except redis.RedisError:
            return False
        return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == 2)

    def _has_replicas(self) -> bool:
        try:
            return bool(self.client(self.servers[0]).info("replication")["min_slaves_good_slaves"] == 2)
        except redis.RedisError:
            return False

    def primary(self) -> int:
        found: int = self.client(self.sentinels[0]).sentinel_get_master_addr_by_name("bus")[1]
        return found

    def kill(self, port: int) -> None:
        self.processes[port].kill()
        self.processes[port].wait(10)

    def signal(self, port: int, number: signal.Signals) -> None:
        self.processes[port].send_signal(number)

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(10)
