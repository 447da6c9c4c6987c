"""The contenders: each is a command that serves the same echo on a loopback port."""

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.load import COMPRESSION, LoadError, Target

HERE = Path(__file__).parent
ROOT = HERE.parent
ARTIFACTS = ROOT / "roles/stickyring_artifacts/files"
NAME = "bench"
OURS, PYPY, GEVENT, OURS_ASGI, ASGI = "ours", "ours-pypy", "ours-gevent", "ours-asgi", "asgi"
STOCK, PLAIN, NODEJS, STUB = "stock", "stock-plain", "nodejs", "stub"
PYPY_NURSERY = "4M"
"""As in the node role."""
PYTHON_VERSION = "3.13"
"""The version of Debian 13's python3, for which packages are installed."""
READY_SECONDS = 20.0
LOOK_SECONDS = 0.005
READY = b"GET /socket.io/?EIO=4&transport=polling HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


class PrepareError(Exception):
    """A contender cannot be installed; the text is one line."""


@dataclass(frozen=True)
class Contender:
    """A server under measurement: `command` gets the port to listen on, `offer` is as in `Target`.

    One that `compiles` at run time needs seconds of each kind of load before it reaches its full speed.
    """

    key: str
    title: str
    command: Callable[[int], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    offer: str = COMPRESSION
    compiles: bool = False

    def shown(self) -> str:
        """Return the command as typed in the root of the tree."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*variables, *self.command(8001)]).replace(f"{HERE.parent}/", "")


def contenders(folder: Path) -> list[Contender]:
    """Return all contenders; missing packages are installed in `folder`."""
    python, node = _debians(folder, "python3"), ours(folder)
    stock, gevent, asgi = (
        install(folder, key, _packages, HERE / f"requirements-{name}.txt")
        for key, name in ((STOCK, "stock"), (GEVENT, "gevent"), (ASGI, "asgi"))
    )
    beside_ours = node.environment["PYTHONPATH"]
    nodejs = install(folder, NODEJS, node_modules, HERE / "socketio-node/package-lock.json")
    packages = HERE / "socketio-node/package.json"
    stock_way = Contender(
        STOCK,
        f"stock: gunicorn {_pinned('stock', 'gunicorn')}, eventlet",
        # Its default of 1000 connections would hang the thousandth.
        lambda port: [
            *(*python, "-m", "gunicorn", "--worker-class", "eventlet", "-w", "1", "--worker-connections", "10000"),
            *("--bind", f"127.0.0.1:{port}", "application:stock()"),
        ],
        {"PYTHONPATH": str(stock)},
    )
    return [
        node,
        _ours_on_pypy(folder),
        Contender(
            GEVENT,
            f"stickyring, gevent {_pinned('gevent', 'gevent')}",
            # stickyring.echo requires eventlet, so the same echo comes from here.
            lambda port: [
                *node.command(port),
                "--worker-class=gunicorn.workers.ggevent.GeventWorker",
                "application:tuned('gevent')",
            ],
            {"PYTHONPATH": f"{gevent}:{beside_ours}"},
        ),
        Contender(
            OURS_ASGI,
            "stickyring, asgi",
            lambda port: [*node.command(port), "--worker-class=asgi", "application:asgi()"],
            {"PYTHONPATH": beside_ours},
        ),
        stock_way,
        # It accepts offered compression, and has no option against it.
        replace(stock_way, key=PLAIN, title="stock, to clients without compression", offer=""),
        Contender(
            ASGI,
            f"ASGI: uvicorn {_pinned('asgi', 'uvicorn')}",
            lambda port: [
                *(*python, "-m", "uvicorn", "--factory", "application:asgi", "--port", str(port)),
                # Engine.IO has its own pings; the load does not support WebSocket's. Only the stock setup compresses.
                *("--ws-ping-interval", "3600", "--ws-per-message-deflate", "false"),
                *("--log-level", "warning", "--no-access-log"),
            ],
            {"PYTHONPATH": f"{asgi}:{beside_ours}"},
        ),
        Contender(
            NODEJS,
            f"Node.js socket.io {json.loads(packages.read_text())['dependencies']['socket.io']}",
            lambda port: ["node", str(HERE / "socketio-node/server.js"), str(port), NAME],
            {"NODE_ENV": "production", "NODE_PATH": str(nodejs / "node_modules")},
            compiles=True,
        ),
    ]


def _pinned(requirements: str, package: str) -> str:
    """Return the version of a package in a contender's requirements."""
    text = (HERE / f"requirements-{requirements}.txt").read_text()
    version: str = re.findall(rf"^{package}==([0-9.]+)", text, re.MULTILINE)[0]
    return version


@functools.cache
def ours(folder: Path) -> Contender:
    """Return our service with its defaults, on the Python that the hosts of the lab have."""
    python = _debians(folder, "python3")
    site = _site(folder, OURS, PYTHON_VERSION)
    return Contender(OURS, "stickyring, eventlet", lambda port: _serve(python, port), {"PYTHONPATH": str(site)})


def python_title(folder: Path) -> str:
    """Return the Python of the contenders that are not on PyPy."""
    return f"CPython {told_version(*_debians(folder, 'python3'), '--version')} of Debian 13"


def _ours_on_pypy(folder: Path) -> Contender:
    pypy = _debians(folder, "pypy3")
    site = _site(folder, PYPY, "pypy3.11")
    return Contender(
        PYPY,
        f"stickyring, eventlet, PyPy {told_version(*pypy, '--version', of='PyPy ')}",
        lambda port: _serve(pypy, port),
        {"PYTHONPATH": str(site), "PYPY_GC_NURSERY": PYPY_NURSERY},
        compiles=True,
    )


def _debians(folder: Path, name: str) -> list[str]:
    """Return the command of a program of Debian 13, with Debian 13's loader and libraries."""
    debian = install(folder, "debian-13", _debian_13, HERE / "debian-13-packages.txt")
    program = debian / "usr/bin" / name
    libraries = f"{debian}/usr/lib/{platform.machine()}-linux-gnu"
    (loader,) = Path(libraries).glob("ld-linux-*.so.*")
    return [str(loader), "--library-path", libraries, "--argv0", str(program), str(program.resolve())]


def _site(folder: Path, key: str, python_version: str) -> Path:
    """Return the packages of our service, from the deployment's wheels for such a Python."""
    made, lock = folder / key, ROOT / "app/requirements.lock"
    build(made, "wheelhouse", lock, "--project", ROOT / "app", "--python-version", python_version)
    return install(folder, key, _unpacked, made / "wheelhouse.tar")


def stub(place: str = "stub") -> Contender:
    """Return the stub, which shows how fast the load itself can be; as a node behind an edge, it has a place."""
    return Contender(STUB, "stub", lambda port: [sys.executable, str(HERE / "stub.py"), str(port), place])


def _serve(python: list[str], port: int) -> list[str]:
    program = "from stickyring.cli import main; main()"
    return [*python, "-c", program, "serve", "--listen", f"127.0.0.1:{port}", "--node-name", NAME]


def install(folder: Path, key: str, make: Callable[[Path, Path], None], pinned: Path) -> Path:
    """Install what a file pins, in a folder whose name depends on the file's content; incomplete ones do not count.

    Raises:
        PrepareError: it cannot be installed.
    """
    digest = hashlib.sha256(pinned.read_bytes() + PYTHON_VERSION.encode()).hexdigest()[:12]
    place = folder / f"{key}-{digest}"
    if not (place / ".installed").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            make(place, pinned)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            raise PrepareError(f"cannot install {key}: {said.strip().splitlines()[-1]}") from None
        (place / ".installed").touch()
    return place


def build(directory: Path, artifact: str, lock: Path, *options: str | Path) -> None:
    """Make an artifact from its lock, as the deployment does.

    Raises:
        PrepareError: it cannot be made.
    """
    where = ("--directory", directory, "--architecture", platform.machine())
    try:
        run(sys.executable, ARTIFACTS / "artifacts.py", *where, f"--{artifact}", lock, *options)
    except subprocess.CalledProcessError as error:
        raise PrepareError(f"cannot make {artifact}: {error.stderr.strip().splitlines()[-1]}") from None


def told_version(*command: str, of: str = "") -> str:
    """Return the first version after the text `of` in a program's output.

    Raises:
        PrepareError: it does not start, or prints no version.
    """
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(of + r"(\d+\.\d+\.\d+)", done.stdout + done.stderr)
    if done.returncode or not found:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise PrepareError(f"{command[-2]} does not start, and says: {said}")
    return found[1]


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command that installs something.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)


def _packages(place: Path, locked: Path) -> None:
    """Install the packages of a lock for Debian 13's Python."""
    run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--target", place),
        *("--python-version", PYTHON_VERSION, "--only-binary", ":all:"),
        *("--require-hashes", "--requirement", locked),
    )


def _debian_13(place: Path, listed: Path) -> None:
    """Unpack packages of Debian 13 and their dependencies from this machine's mirror."""
    index = ("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian")
    mirrors = subprocess.run(index, check=True, capture_output=True, text=True).stdout.split()
    if not mirrors:
        raise PrepareError("apt knows no Debian mirror: run apt-get update")
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    run(
        *("mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(listed.read_text().split())}"),
        *("trixie", place, f"deb [signed-by={keyring}] {mirrors[0]} trixie main"),
    )


def _unpacked(place: Path, wheelhouse: Path) -> None:
    """Unpack the wheels as an installation does, without commands."""
    with tarfile.open(wheelhouse) as archive:
        for member in archive:
            if member.name.endswith(".whl") and (stream := archive.extractfile(member)):
                with zipfile.ZipFile(io.BytesIO(stream.read())) as wheel:
                    wheel.extractall(place)


def node_modules(place: Path, locked: Path) -> None:
    """Install the packages of a package-lock.json."""
    for name in ("package.json", "package-lock.json"):
        shutil.copy(locked.with_name(name), place)
    run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=place)


@dataclass(frozen=True)
class Server:
    """A running contender: all processes of its session."""

    target: Target
    ready_seconds: float
    processes: tuple[int, ...]

    def cpu_seconds(self) -> float:
        """CPU seconds of all its processes so far, from their CPU-time clocks (clock_getcpuclockid(3)), which have a
        resolution of nanoseconds instead of the hundredths of a second in /proc/PID/stat.
        """
        try:
            return sum(time.clock_gettime(~process << 3 | 2) for process in self.processes)
        except OSError:
            raise LoadError(f"{self.target.title} has lost a process") from None

    def user_seconds(self) -> float:
        """CPU seconds spent outside the kernel, as sampled by its clock ticks (proc_pid_stat(5))."""
        ticks = 0
        for process in self.processes:
            ticks += int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Memory of all its processes in bytes; shared memory counts once."""
        return self._proportional("Pss:")

    def heap(self) -> int:
        """Memory that is not of files, which does not depend on other processes that use the same files."""
        return self._proportional("Pss_Anon:", "Pss_Shmem:")

    def _proportional(self, *kinds: str) -> int:
        """The sum of these lines of /proc/PID/smaps_rollup, in bytes."""
        total = 0
        for process in self.processes:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith(kinds):
                    total += int(line.split()[1]) * 1024
        return total


def signal_all(server: Server, number: signal.Signals) -> None:
    """Send a signal to all processes of a server."""
    for process in server.processes:
        os.kill(process, number)


@contextlib.contextmanager
def running(contender: Contender, core: int, log: Path) -> Iterator[Server]:
    """Run a contender on one core; enter the block when it answers, and end it after the block.

    Raises:
        LoadError: it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    mine = os.sched_getaffinity(0)
    process = None
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        begun = time.perf_counter()
        os.sched_setaffinity(0, {core})
        with log.open("wb") as output:
            process = subprocess.Popen(
                contender.command(port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=HERE,
                env={**environment, **contender.environment},
                start_new_session=True,
            )
        os.sched_setaffinity(0, mine)
        while not _answers(port):
            if process.poll() is not None or time.perf_counter() > begun + READY_SECONDS:
                said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise LoadError(f"{contender.title} does not start, and says: {said[-1][:300]}")
            time.sleep(LOOK_SECONDS)
        seconds = time.perf_counter() - begun
        yield Server(Target(contender.title, port, NAME, offer=contender.offer), seconds, _session(process.pid))
    except OSError as error:
        if process is None:
            raise LoadError(f"{contender.title} does not start: {error}") from None
        raise
    finally:
        os.sched_setaffinity(0, mine)
        if process is not None:
            process.kill()
            process.wait()
            _end_session(process.pid)


def end_all() -> None:
    """End servers that a run has left, for example one that was starting when the run was interrupted."""
    own = os.getpid()
    for child in map(int, Path(f"/proc/{own}/task/{own}/children").read_text().split()):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        _end_session(child)


def _end_session(leader: int) -> None:
    """End the processes of a session after its leader: while a master runs, it would start new workers."""
    for member in _session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def _answers(port: int) -> bool:
    """Whether a handshake is accepted."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=READY_SECONDS) as connection:
            connection.sendall(READY)
            return connection.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


def _session(leader: int) -> tuple[int, ...]:
    """The processes of a session (proc_pid_stat(5), field 6)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(entry.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(entry.parent.name))
    return tuple(found)
