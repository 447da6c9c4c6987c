"""Build step: copies the JavaScript client that the pages load from its npm package into the distribution."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CLIENT_SHA256 = "d5d79a35039e860b32bdef4795528b05c2f788d4b2d9dacc913120e2878f7b3f"
"""SHA-256 of dist/socket.io.min.js in socket.io-client 4.8.4; package-lock.json pins the package."""

CLIENT_IN_PACKAGE = "node_modules/socket.io-client/dist/socket.io.min.js"
CLIENT_IN_PAGES = "src/stickyring/pages/socket.io.min.js"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class ClientScriptHook(BuildHookInterface[Any]):
    """Puts the pinned client script beside the pages before a wheel, an editable install or an sdist is made.

    npm runs only if the script is missing or is not the pinned one; npm's own configuration names the registry. The
    script is checked against CLIENT_SHA256, and the build fails with one line if it differs.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make sure that the pinned script exists."""
        script = Path(self.root, CLIENT_IN_PAGES)
        if script.is_file() and _sha256(script) == CLIENT_SHA256:
            return
        npm = shutil.which("npm")
        if npm is None:
            sys.exit(f"{CLIENT_IN_PAGES} must be fetched by npm, which is not installed: apt-get install npm (Debian)")
        # npm works in a copy, so that a build leaves no node_modules behind in the source tree.
        with tempfile.TemporaryDirectory(prefix="stickyring-client-") as scratch:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(Path(self.root, name), scratch)
            run = subprocess.run(
                [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"],
                cwd=scratch,
                check=False,
                capture_output=True,
                text=True,
            )
            if run.returncode != 0:
                sys.exit(f"npm ci failed with exit code {run.returncode}: {' '.join(run.stderr.split())}")
            brought = Path(scratch, CLIENT_IN_PACKAGE)
            if not brought.is_file():
                sys.exit(f"the npm package that package-lock.json names does not contain {CLIENT_IN_PACKAGE}")
            if (found := _sha256(brought)) != CLIENT_SHA256:
                sys.exit(f"{CLIENT_IN_PACKAGE} has the wrong SHA-256: {found}, but hatch_build.py pins {CLIENT_SHA256}")
            # Renamed into place, so that a second build at the same time never packs half a file.
            script.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=script.parent, prefix=".socket.io.", delete=False) as copy:
                copy.write(brought.read_bytes())
            Path(copy.name).chmod(0o644)
            Path(copy.name).replace(script)
