"""Makes this collection importable for the tests."""

from pathlib import Path

from ansible.plugins.loader import init_plugin_loader

init_plugin_loader([str(Path(__file__).parents[2] / "collections")])
