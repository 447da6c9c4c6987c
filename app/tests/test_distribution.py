"""The wheel, and the build step that adds the client script."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

APP = Path(__file__).parents[1]
SCRIPT = "src/stickyring/pages/socket.io.min.js"
SOURCES = ("hatch_build.py", "package.json", "package-lock.json", "pyproject.toml")

NODE_ALONE = ("gunicorn", "eventlet", "prometheus_client", "pythonjsonlogger")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the distribution's sources, with the installed client script."""
    copy = tmp_path / "app"
    shutil.copytree(APP / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(APP / name, copy)
    # Hatchling leaves out files that git ignores unless configured otherwise.
    (copy / ".gitignore").write_text("socket.io.min.js\n")
    return copy


def build(tree: Path, kind: str = "wheel", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", tree.parent / "dist", tree],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def built(tree: Path, pattern: str) -> Path:
    (found,) = (tree.parent / "dist").glob(pattern)
    return found


def npm_that_brings(folder: Path, script: bytes) -> str:
    """Return a PATH with an npm that installs `script` as the client script, and logs its calls."""
    programs = folder / "bin"
    programs.mkdir()
    (folder / "brought.js").write_bytes(script)
    npm = programs / "npm"
    npm.write_text(
        "#!/bin/sh -e\n"
        f'echo "$@" >> "{folder}/npm.log"\n'
        "mkdir -p node_modules/socket.io-client/dist\n"
        f'cp "{folder}/brought.js" node_modules/socket.io-client/dist/socket.io.min.js\n'
    )
    npm.chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


def test_wheel_holds_pages_script_and_type_marker(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(built(tree, "*.whl")) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("stickyring/")}
        script = wheel.read("stickyring/pages/socket.io.min.js")
    sources = {path.relative_to(tree / "src").as_posix() for path in (tree / "src").rglob("*") if path.is_file()}
    assert names == sources
    assert {"stickyring/py.typed", "stickyring/pages/index.html", "stickyring/pages/index2.html"} <= names
    for page in ("index.html", "index2.html"):
        wanted = re.findall(r'(?:src|href)="([^"]+\.(?:js|css))"', (tree / "src/stickyring/pages" / page).read_text())
        assert {f"stickyring/pages/{name}" for name in wanted} <= names, "a page asks for a file that is not packed"
    assert script == (APP / SCRIPT).read_bytes()


def test_wheel_is_reproducible(tree: Path) -> None:
    def digest(**environment: str) -> str:
        done = build(tree, **environment)
        assert done.returncode == 0, done.stderr
        return hashlib.sha256(built(tree, "*.whl").read_bytes()).hexdigest()

    first = digest(SOURCE_DATE_EPOCH="1700000000")
    for path in tree.rglob("*"):
        os.utime(path, (1, 1))
        if path.is_file():
            path.chmod(0o600)
    assert digest(SOURCE_DATE_EPOCH="1700000000") == first
    assert digest(SOURCE_DATE_EPOCH="1800000000") != first, "the digest must notice a change"


def test_sdist_carries_all_that_a_wheel_needs(tree: Path, tmp_path: Path) -> None:
    done = build(tree, "sdist")
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(built(tree, "*.tar.gz"), tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert build(unpacked, PATH="/nonexistent").returncode == 0, "the script came along, so npm is not needed"


def test_npm_is_not_run_when_the_script_is_there(tree: Path, tmp_path: Path) -> None:
    done = build(tree, PATH=npm_that_brings(tmp_path, b"never read"))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "npm.log").exists()


@pytest.mark.parametrize("present", [None, b"tampered"])
def test_a_missing_or_changed_script_is_installed_again(tree: Path, tmp_path: Path, present: bytes | None) -> None:
    genuine = (tree / SCRIPT).read_bytes()
    if present is None:
        (tree / SCRIPT).unlink()
    else:
        (tree / SCRIPT).write_bytes(present)
    done = build(tree, PATH=npm_that_brings(tmp_path, genuine))
    assert done.returncode == 0, done.stderr
    assert (tree / SCRIPT).read_bytes() == genuine
    assert (tmp_path / "npm.log").read_text().startswith("ci --ignore-scripts")


def test_tampered_script_from_npm_is_refused(tree: Path, tmp_path: Path) -> None:
    genuine = hashlib.sha256((tree / SCRIPT).read_bytes()).hexdigest()
    tampered = (tree / SCRIPT).read_bytes() + b"alert(1)"
    (tree / SCRIPT).unlink()
    done = build(tree, PATH=npm_that_brings(tmp_path, tampered))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if "wrong SHA-256" in line]
    assert genuine in line
    assert hashlib.sha256(tampered).hexdigest() in line
    assert "Traceback" not in done.stderr
    assert not (tree / SCRIPT).exists()


def test_without_npm_the_message_names_the_package(tree: Path) -> None:
    (tree / SCRIPT).unlink()
    done = build(tree, PATH="/nonexistent")
    assert done.returncode != 0
    assert "apt-get install npm" in done.stderr
    assert "Traceback" not in done.stderr


def without_node(program: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program that cannot import the packages of the extra `node`."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({NODE_ALONE}))\n"
    return subprocess.run([sys.executable, "-c", blocked + program], capture_output=True, text=True, check=False)


def test_delivery_and_ring_do_not_need_the_node_extra() -> None:
    done = without_node(
        "import socketio, stickyring.delivery, stickyring.ring; stickyring.delivery.Sender(socketio.AsyncClient())"
    )
    assert (done.returncode, done.stderr) == (0, "")
    asked = [Requirement(text) for text in requires("stickyring") or ()]
    assert {one.name for one in asked if one.marker is None} == {"click", "python-socketio", "xxhash"}


def test_serve_without_the_node_extra_says_what_to_install() -> None:
    done = without_node("from stickyring.cli import main; main(['serve'])")
    assert (done.returncode, done.stderr) == (1, "Error: gunicorn is not installed: pip install stickyring[node]\n")


def test_without_the_node_the_other_commands_are_listed() -> None:
    done = without_node("from stickyring.cli import main; main(['--help'])")
    assert (done.returncode, done.stderr) == (0, "")
    assert "probe" in done.stdout
    assert "Serve APPLICATION as one instance" in done.stdout
