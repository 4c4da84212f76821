"""Where commands write files."""

from __future__ import annotations

import os
import re
from pathlib import Path

import typer

_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]")


def check_out(out: Path) -> None:
    """Refuses at once what could not be written after minutes of work."""
    folder = out if out.is_dir() else out.parent
    if not folder.is_dir():
        raise typer.BadParameter(f"-o {out}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK):
        raise typer.BadParameter(f"-o {out}: the folder {folder} cannot be written to")


def file_name(display_name: str, extension: str) -> str:
    """Returns the name that a file gets after what it holds."""
    return (_UNSAFE.sub("_", display_name).lstrip(".") or "download") + extension
