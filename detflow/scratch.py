"""Scratch folders that do not outlive the process that made them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from detflow.held import hold, remove_abandoned


class Scratch:
    """A folder of this process under `parent`; those of dead processes are removed."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent.iterdir())
        self.path = Path(tempfile.mkdtemp(dir=parent))
        self._held = hold(self.path)

    def folder(self, name: str) -> Path:
        """Makes a folder for one piece of work."""
        path = self.path / name
        path.mkdir()
        return path

    def close(self) -> None:
        """Removes the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()
