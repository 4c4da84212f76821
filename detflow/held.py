"""Folders of work under way, held by a lock as long as a process lives that works in them."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

_NAME = ".held"


def hold(folder: Path) -> IO[bytes]:
    """Holds a folder until the file is closed in every process that has it.

    A child that inherits it holds on: the kernel frees it when all of them are gone, however they
    went.
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


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Removes those of the folders that are abandoned."""
    for folder in folders:
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
