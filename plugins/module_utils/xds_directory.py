"""The directory of Envoy's xDS files on the host: contents, owners and modes."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.stickyring.fleet.plugins.module_utils.xds import XdsFile, is_secret


class NotProven(Exception):
    """The directory does not hold the wanted files; the message names those that differ."""


class XdsDirectory:
    """The directory and its wanted files."""

    def __init__(self, module: AnsibleModule, files: list[XdsFile]) -> None:
        self.module = module
        self.files = files
        self.path = Path(module.params["directory"])

    def read(self, path: str) -> str | None:
        """The file's text; None when it does not exist."""
        try:
            return (self.path / path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def differs(self, file: XdsFile) -> bool:
        """Whether the file has to be written."""
        return self.read(file.path) != file.text

    def surplus(self) -> list[str]:
        """Files that exist and are not wanted. Hidden files are ignored: an interrupted write leaves them."""
        found = {str(path.relative_to(self.path)) for path in self.path.rglob("[!.]*") if path.is_file()}
        return sorted(found - {file.path for file in self.files})

    def folders(self) -> list[Path]:
        """The directory and its sub-directories."""
        return sorted({self.path, *((self.path / file.path).parent for file in self.files)})

    def make_folders(self) -> None:
        """Creates them."""
        for folder in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            self.own(folder, "0755")

    def put(self, path: str, text: str) -> None:
        """Writes the file with its owner and mode, and renames it into place, because Envoy reads it at once."""
        target = self.path / path
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
            self.own_file(temporary, text)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """Deletes the file."""
        (self.path / path).unlink()

    def own(self, path: Path, mode: str, group: str | None = None) -> bool:
        """Sets owner, group and mode, except in check mode; True when that changed something."""
        arguments = {**self.module.params, "mode": mode, "attributes": None}
        arguments["group"] = group or arguments["group"]
        wanted = self.module.load_file_common_arguments(arguments, path=str(path))
        return bool(self.module.set_fs_attributes_if_different(wanted, changed=False))

    def own_file(self, path: Path, text: str) -> bool:
        """The same for a file with this text: private keys are for Envoy only."""
        if is_secret(text):
            return self.own(path, "0640", self.module.params["secrets_group"])
        return self.own(path, "0644")

    def own_files(self) -> bool:
        """The same for all files that exist as wanted."""
        changed = [self.own_file(self.path / file.path, file.text) for file in self.files]
        return any(changed)

    def would_own(self, path: Path, mode: str) -> bool:
        """Whether the path has another owner, group or mode."""
        checking, self.module.check_mode = self.module.check_mode, True
        try:
            return self.own(path, mode)
        finally:
            self.module.check_mode = checking

    def wrongly_owned(self) -> list[str]:
        """Files with the wanted text and another owner, group or mode."""
        checking, self.module.check_mode = self.module.check_mode, True
        try:
            return [
                file.path
                for file in self.files
                if not self.differs(file) and self.own_file(self.path / file.path, file.text)
            ]
        finally:
            self.module.check_mode = checking

    def difference(self, texts: dict[str, str]) -> list[dict[str, str]]:
        """Files and their new texts as Ansible shows them under --diff; of private keys only the version."""

        def shown(text: str) -> str:
            return "".join(re.findall(r'^  "version_info": .*\n', text, re.MULTILINE)) if is_secret(text) else text

        return [
            {"before_header": path, "after_header": path, "before": shown(self.read(path) or ""), "after": shown(text)}
            for path, text in texts.items()
        ]

    def prove(self) -> None:
        """NotProven when files, owners or modes are not as wanted. Changes nothing."""
        texts = {file.path: file.text for file in self.files if self.differs(file)} | dict.fromkeys(self.surplus(), "")
        names = [*texts, *(f"{path} (owner or mode)" for path in self.wrongly_owned())]
        if not names:
            return
        message = f"{self.path} differs from what the variables say, and was not changed: {', '.join(names)}."
        if self.module._diff:
            # Ansible shows no diff of a task that failed, so it is part of the message.
            lines = [
                line
                for part in self.difference(texts)
                for line in difflib.unified_diff(
                    part["before"].splitlines(),
                    part["after"].splitlines(),
                    f"{part['before_header']} on the host",
                    f"{part['after_header']} wanted",
                    lineterm="",
                )
            ]
            message = "\n".join([message, *lines])
        raise NotProven(message)
