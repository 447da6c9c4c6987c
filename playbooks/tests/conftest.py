"""Ansible finds its collections itself, once it is told before a test imports a part of one."""

from pathlib import Path

from ansible.plugins.loader import init_plugin_loader

init_plugin_loader([str(Path(__file__).parents[2] / "collections")])
