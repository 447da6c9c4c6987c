"""Virtual machines on this machine: QEMU processes with a disk, a network of their own, and a power switch.

They are emulated (TCG), so any machine will do, and slow. All that a run makes is in FOLDER and on BRIDGE; the image,
which takes two minutes to build, is kept in .artifacts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import longrun

FOLDER = Path("/var/lib/stickyring-vm")
OWNER, IMAGE, KNOWN_HOSTS = FOLDER / "owner", FOLDER / "image", FOLDER / "known_hosts"
KEY = IMAGE / "deploy_key"
CONNECTIONS = FOLDER / "ssh"
"""Those that Ansible keeps open between its runs."""
IMAGES = longrun.PROJECT / ".artifacts" / "vm"
SCRIPTS = longrun.PROJECT / "roles" / "stickyring_lab" / "files"
SUITE = "bookworm"
PACKAGES = ("python3-venv",)
"""As the lab's hosts have them: the machines reach no mirror."""
USER = "deploy"
BRIDGE, TAP = "stickyring-vm", "stickyvm-"
PREFIX = "198.18.18"
"""Of the network for benchmarks (RFC 2544), which is routed nowhere."""
SUBNET, GATEWAY = f"{PREFIX}.0/24", f"{PREFIX}.1"
QEMU = "qemu-system-x86_64"
MEMORY_MIB = 1024
SHUTDOWN_SECONDS, BOOT_SECONDS = 300.0, 600.0
COMMAND_SECONDS = 120
LOOK_SECONDS = 1.0
CONSOLE_LINES = 15


class MachineError(Exception):
    """A machine does not do what it must; the text says which and what."""


class Machine:
    """One of them. It is off until it is started, and its disk is new when it is started for the first time."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._disk, self._console = FOLDER / f"{name}.qcow2", FOLDER / f"{name}.console"
        self._errors = FOLDER / f"{name}.errors"
        self._tap = f"{TAP}{name}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Switch it on; it takes a minute or more to boot."""
        if not self._disk.exists():
            call("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", IMAGE / "disk.raw", self._disk)
            call("ip", "tuntap", "add", self._tap, "mode", "tap")
            call("ip", "link", "set", self._tap, "master", BRIDGE, "up")
        mac = ":".join(f"{number:02x}" for number in (2, 0, *map(int, self.address.split("."))))
        kernel = [
            # Mitigations take an emulated processor long, and protect it from nothing.
            "root=/dev/vda rw console=ttyS0 net.ifnames=0 mitigations=off",
            f"systemd.hostname={self.name}",
            # Without a gateway: nothing leaves the bridge.
            f"ip={self.address}:::255.255.255.0:{self.name}:eth0:off",
        ]
        arguments = {
            "-name": self.name,
            "-machine": "q35",
            "-accel": "tcg,thread=multi",
            "-cpu": "max",
            "-m": f"{MEMORY_MIB}",
            "-display": "none",
            "-serial": f"file:{self._console}",
            "-kernel": IMAGE / "vmlinuz",
            "-initrd": IMAGE / "initrd.img",
            "-append": " ".join(kernel),
            # What the guest has flushed is in this machine's memory, and outlives a power cut of the guest.
            "-drive": f"file={self._disk},if=virtio,cache=unsafe",
            "-netdev": f"tap,id=net0,ifname={self._tap},script=no,downscript=no",
            "-device": f"virtio-net-pci,netdev=net0,mac={mac}",
            "-object": "rng-random,id=rng0,filename=/dev/urandom",
        }
        words = [str(word) for pair in arguments.items() for word in pair]
        command = [QEMU, "-nodefaults", "-no-reboot", *words, "-device", "virtio-rng-pci,rng=rng0"]
        with self._errors.open("wb") as errors:
            # A session of its own: an interrupt is for the run, which then switches it off.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
            )

    def cut(self) -> None:
        """Cut its power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def reboot(self) -> None:
        """Have it reboot itself; return when it has come up again.

        As the system starts anew, so does QEMU: with the code that one has translated before, booting took seven
        minutes instead of one, most of them in page_collection_lock (QEMU 7.2).
        """
        before = self.wait()
        self.run("sudo systemctl reboot")
        try:
            if self._process is not None:
                self._process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            raise MachineError(f"{self.name} has not shut down in {SHUTDOWN_SECONDS:.0f} s") from None
        self.start()
        self.wait(before)

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there over SSH, as the user whom Ansible is; after two minutes it counts as failed."""
        words = [*self.ssh(), command]
        try:
            return subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", f"no end in {COMMAND_SECONDS} s")

    def ssh(self) -> list[str]:
        """Return the command that reaches it, with the image's key, and only if it has the key that is known."""
        options = [
            f"UserKnownHostsFile={KNOWN_HOSTS}",
            "StrictHostKeyChecking=yes",
            "BatchMode=yes",
            "ConnectTimeout=20",
        ]
        return ["ssh", "-F", "none", "-i", str(KEY), *(f"-o{one}" for one in options), f"{USER}@{self.address}"]

    def wait(self, before: str = "") -> str:
        """Wait until it has booted, another time than `before`; return the id of this boot.

        Raises MachineError if that takes too long, or if systemd has failed units.
        """
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise MachineError(f"{self.name} is off: {self._errors.read_text() or 'QEMU has ended'}")
            said = self.run("cat /proc/sys/kernel/random/boot_id; systemctl is-system-running --wait").stdout.split()
            if len(said) == 2 and said[0] != before:
                if said[1] == "running":
                    return said[0]
                if said[1] == "degraded":
                    failed = self.run("systemctl --failed --plain --no-legend").stdout
                    raise MachineError(f"{self.name} has booted with failed units: {failed.strip()}")
            time.sleep(LOOK_SECONDS)
        console = self._console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        raise MachineError("\n".join([f"{self.name} has not booted in {BOOT_SECONDS:.0f} s:", *console]))


@contextmanager
def claimed() -> Iterator[None]:
    """Let one run at a time have the machines, and no other clone's be touched; exit with the reason if they are."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            # In the abstract namespace: no file, and it ends with the process however that ends.
            lock.bind("\0stickyring-vm")
        except OSError:
            sys.exit("Another run of `make vm` is under way on this machine.")
        owner = OWNER.read_text().strip() if OWNER.exists() else ""
        if owner not in ("", str(longrun.PROJECT)) and Path(owner).exists():
            sys.exit(f"The virtual machines here belong to {owner}: run `molecule/vm.py --down` there first.")
        yield


def image() -> Path:
    """Return the folder of the image, which is built unless it is there."""
    scripts = [SCRIPTS / "build_image.sh", SCRIPTS / "build_disk.sh"]
    recipe = b"".join(script.read_bytes() for script in scripts) + " ".join((SUITE, *PACKAGES)).encode()
    built = IMAGES / hashlib.sha256(recipe).hexdigest()[:12]
    if not built.exists():
        shutil.rmtree(IMAGES, ignore_errors=True)
        print("Building the image (2 minutes)", flush=True)
        partial = IMAGES / "partial"
        partial.mkdir(parents=True)
        try:
            command = ["sh", str(scripts[1]), SUITE, str(partial), *PACKAGES]
            if status := longrun.play(command, {"TMPDIR": str(partial)}, lambda line: None):
                raise MachineError(f"the image could not be built: build_disk.sh has ended with {status}")
            partial.rename(built)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return built


def prepare(hosts: Mapping[str, str]) -> dict[str, Machine]:
    """Make network, image and folder for machines of these names and addresses; return the machines, which are off."""
    FOLDER.mkdir(mode=0o755)
    OWNER.write_text(f"{longrun.PROJECT}\n")
    # The bridge's own route is preferred while it is there; without it nothing may leave towards a real network.
    call("ip", "route", "add", "blackhole", SUBNET, "metric", "4000")
    call("ip", "link", "add", BRIDGE, "type", "bridge")
    call("ip", "address", "add", f"{GATEWAY}/24", "dev", BRIDGE)
    call("ip", "link", "set", BRIDGE, "up")
    IMAGE.symlink_to(image())
    KNOWN_HOSTS.write_text(f"{','.join(hosts.values())} {(IMAGE / 'host_key.pub').read_text()}")
    CONNECTIONS.mkdir()
    return {name: Machine(name, address) for name, address in hosts.items()}


def remove() -> None:
    """Remove all that a run has made but the image, also what is left of one that was killed."""
    for connection in CONNECTIONS.glob("*"):
        subprocess.run(["ssh", "-o", f"ControlPath={connection}", "-O", "exit", "-"], capture_output=True, check=False)
    while running := processes():
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)
    interfaces = Path("/sys/class/net")
    for interface in [*interfaces.glob(f"{TAP}*"), *interfaces.glob(BRIDGE)]:
        call("ip", "link", "delete", interface.name)
    call("ip", "route", "flush", "type", "blackhole", "exact", SUBNET)
    shutil.rmtree(IMAGES / "partial", ignore_errors=True)
    shutil.rmtree(FOLDER, ignore_errors=True)


def processes() -> list[int]:
    """Return the ids of the QEMU processes whose disk is in FOLDER."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = file.read_bytes()
            if words.startswith(QEMU.encode()) and f"file={FOLDER}/".encode() in words:
                found.append(int(file.parent.name))
    return found


def call(*command: str | Path) -> None:
    """Run a command that must succeed; raises MachineError with what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
