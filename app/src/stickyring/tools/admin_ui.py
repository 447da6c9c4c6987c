"""`stickyring admin-ui`: Socket.IO's Admin UI from its npm package, in a folder for `stickyring.admin`."""

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import click

PAGE = ("@socket.io/admin-ui@0.5.1", "9bc44acc6b53c1798cfc8fa2af2e071b33d454ba9ec3b673b87f87768d003666")
"""A package, and the SHA-256 of its tarball."""
ICONS = ("@mdi/font@7.4.47", "66131558352dc8df724feac30f3b7bf7ee7311a79e4f8436f3637c0993edb773")
"""The icons, which the page would load from another host."""
ICON_FILES = ("css/materialdesignicons.min.css", "fonts/materialdesignicons-webfont.woff2")
FROM_ELSEWHERE = re.compile(r'<link rel="stylesheet" href="https://[^"]*">')
OWN_ICONS = f'<link rel="stylesheet" href="{ICON_FILES[0]}">'
EPILOG = """\b
Examples:
  stickyring admin-ui ../chat/src/chat/admin_ui
  stickyring admin-ui ../chat/src/chat/admin_ui --replace
"""


@click.command(epilog=EPILOG)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Replace the page that is in the folder.")
def admin_ui(*, folder: Path, replace: bool) -> None:
    """Write Socket.IO's Admin UI into FOLDER, which becomes a part of your application.

    npm fetches two packages, whose SHA-256 is checked. The page then loads nothing from other hosts. The application
    serves it with `stickyring.admin`.
    """
    if folder.exists() and not replace:
        raise click.ClickException(f"{folder} exists: --replace replaces it")
    if folder.exists() and not _is_page(folder):
        raise click.ClickException(f"{folder} is not a folder that this command has written")
    with tempfile.TemporaryDirectory() as scratch:
        page, icons = (_unpacked(Path(scratch), *package) for package in (PAGE, ICONS))
        made = Path(scratch, "made")
        shutil.copytree(page / "ui" / "dist", made, ignore=shutil.ignore_patterns("*.map"))
        for name in ICON_FILES:
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copy(icons / name, made / name)
        index = made / "index.html"
        index.write_text(FROM_ELSEWHERE.sub("", index.read_text()).replace("</head>", f"{OWN_ICONS}</head>"))
        # Beside the folder: a rename within a file system is never seen half done.
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
            shutil.copytree(made, Path(beside, "new"))
            if folder.exists():
                folder.replace(Path(beside, "old"))
            Path(beside, "new").replace(folder)
    click.echo(f"{folder}: {PAGE[0]}, with the icons of {ICONS[0]}")


def _is_page(folder: Path) -> bool:
    index = folder / "index.html"
    return folder.is_dir() and not folder.is_symlink() and index.is_file() and OWN_ICONS in index.read_text()


def _unpacked(scratch: Path, package: str, sha256: str) -> Path:
    """Fetch a package with npm, check it, and return the folder of what is in it.

    Raises:
        click.ClickException: npm fails, or brings something else.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise click.ClickException("npm is not installed: apt-get install npm (Debian)")
    # npm's own configuration names the registry.
    run = subprocess.run([npm, "pack", package, "--silent"], cwd=scratch, check=False, capture_output=True, text=True)
    if run.returncode != 0:
        raise click.ClickException(f"npm cannot fetch {package}: {' '.join((run.stdout + run.stderr).split())}")
    tarball = scratch / run.stdout.split()[-1]
    if (found := hashlib.sha256(tarball.read_bytes()).hexdigest()) != sha256:
        raise click.ClickException(f"{package} has the SHA-256 {found} instead of {sha256}")
    folder = tarball.with_suffix("")
    shutil.unpack_archive(tarball, folder)
    return folder / "package"
