"""Files with a service's secrets, below /etc/<service>/secrets: an environment file, and one file for each credential.

Shared by the filters on the controller and the modules on the hosts, so that both compute the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

ENVIRONMENT = "environment"
"""For systemd.exec(5), EnvironmentFile."""
CREDENTIALS = "credentials"
"""Folder for LoadCredential: systemd loads each file in it as `secret_NAME`."""
PREFIX = "secret_"
DIGEST = "STICKYRING_SECRETS"
"""Variable and credential with the digest; in a process they show from which secrets it was started."""
HEADER = "# Ansible managed: role stickyring_node"


def secret_texts(secrets: Mapping[str, object]) -> dict[str, str]:
    """Return the secrets as texts, in the order of their names."""
    return {name: str(secrets[name]) for name in sorted(secrets)}


def secrets_digest(secrets: Mapping[str, object]) -> str:
    """Return the SHA-256 of names and values.

    Whoever has it can guess a short secret: print it no more than the secrets.
    """
    return hashlib.sha256(json.dumps(secret_texts(secrets)).encode()).hexdigest()


def quoted(value: str) -> str:
    """Return a value in the notation of an environment file, which may have several lines."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def secret_files(secrets: Mapping[str, object]) -> dict[str, str]:
    """Return ``{path below the folder: text}``. The digest keeps the folder of credentials from being empty."""
    texts = secret_texts(secrets) | {DIGEST: secrets_digest(secrets)}
    lines = [HEADER, *(f"{name}={quoted(value)}" for name, value in texts.items()), ""]
    return {ENVIRONMENT: "\n".join(lines)} | {f"{CREDENTIALS}/{name}": value for name, value in texts.items()}


def secrets_in(folder: Path, owner: tuple[int, int]) -> dict[str, str] | None:
    """Return the secrets in a folder as the module writes it; None if anything in it is missing, extra or different."""
    try:
        paths = [folder, *folder.rglob("*")]
        for path in paths:
            status = path.lstat()
            mode = 0o40700 if path in {folder, folder / CREDENTIALS} else 0o100600
            if (status.st_uid, status.st_gid, status.st_mode) != (*owner, mode):
                return None
        found = {str(path.relative_to(folder)): path.read_bytes().decode() for path in paths if path.is_file()}
    except (OSError, UnicodeDecodeError):
        return None
    names = [path.removeprefix(f"{CREDENTIALS}/") for path in found if path.startswith(f"{CREDENTIALS}/")]
    secrets = {name: found[f"{CREDENTIALS}/{name}"] for name in names if name != DIGEST}
    return secrets if found == secret_files(secrets) else None
