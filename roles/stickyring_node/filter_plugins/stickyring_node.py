"""Jinja filters of the role: what stands in the environment file of each instance, and what tells such texts apart."""

from __future__ import annotations

import hashlib
from typing import Any


def stickyring_node_environments(
    instances: list[int], *, service: str, host: str, port: int, name: str, shared: dict[str, Any], header: str
) -> dict[str, str]:
    """Return ``{path: text}`` in the notation of systemd.exec(5), EnvironmentFile.

    host: address of a URL, an IPv6 one in brackets. port: of instance 1. name: of the node. shared: variables that all
    instances have. header: a comment that opens each text.
    """

    def own(instance: int) -> dict[str, str]:
        return {
            "STICKYRING_LISTEN": f"{host}:{port + instance - 1}",
            "STICKYRING_NODE_NAME": f"{name}-{instance}",
            "STICKYRING_CONTROL": f"/run/{service}/{instance}/control.sock",
        }

    return {f"/etc/{service}/{instance}.env": _text(header, own(instance) | shared) for instance in instances}


def _text(header: str, variables: dict[str, Any]) -> str:
    quoted = {key: str(value).replace("\\", "\\\\").replace('"', '\\"') for key, value in variables.items()}
    lines = [header.rstrip(), *(f'{key}="{value}"' for key, value in quoted.items()), "STICKYRING_ENVIRONMENT=", ""]
    return stickyring_node_with_digest("\n".join(lines), "STICKYRING_ENVIRONMENT")


def stickyring_node_with_digest(text: str, variable: str) -> str:
    """Return the text with its own SHA-256 as the value of a variable that has none in it.

    Every process that starts from it has the variable, so that it tells of itself what it was started from.
    """
    return text.replace(f"{variable}=\n", f"{variable}={hashlib.sha256(text.encode()).hexdigest()}\n")


class FilterModule:
    """The role's filters."""

    def filters(self) -> dict[str, Any]:
        """Name to function, as Ansible asks for them."""
        return {
            "stickyring_node_environments": stickyring_node_environments,
            "stickyring_node_with_digest": stickyring_node_with_digest,
        }
