"""Folders of attempts, held by a lock as long as the trainer or the worker of the attempt lives."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

_NAME = ".held"


def hold(folder: Path) -> IO[bytes]:
    """Holds a folder until the file is closed in every process that has it.

    Let the worker inherit it: the kernel frees it when all of them are gone, however they went.
    """
    unnamed = folder / f"{_NAME}.new"
    file = unnamed.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    unnamed.rename(folder / _NAME)  # held from the moment that anybody can see it
    return file


def is_abandoned(folder: Path) -> bool:
    """Says whether a folder was held and all who held it are gone."""
    try:
        with (folder / _NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:  # it is held, never was, or the folder is being removed
        return False
