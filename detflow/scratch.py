"""Scratch folders that do not outlive the process that made them."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK_NAME = "lock"


class Scratch:
    """A folder of this process under `parent`; those of dead processes are removed.

    A process holds a lock on a file in its folder, which the system drops with the process.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        for folder in parent.iterdir():
            if folder.is_dir():
                _remove_if_abandoned(folder)
        self.path = Path(tempfile.mkdtemp(dir=parent))
        self._lock = os.open(self.path / _LOCK_NAME, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def folder(self, name: str) -> Path:
        """Makes a folder for one piece of work."""
        path = self.path / name
        path.mkdir()
        return path

    def close(self) -> None:
        """Removes the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR)
    except FileNotFoundError:  # another process is making it just now, or is removing it
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)
