"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from detflow.errors import InvalidArgument


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file beside `path` that takes its place when all went well.

    Raises:
        InvalidArgument: UNWRITABLE_FILE.
    """
    partial = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")
    with _named(path):
        file = open(partial, "xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with _named(path):
            partial.replace(path)
    except BaseException:
        partial.unlink()
        raise


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgument(
            f"cannot write {path} ({error.strerror}): name a file in a folder that is there",
            reason="UNWRITABLE_FILE",
        ) from error
