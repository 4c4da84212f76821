"""Which stack runs on this machine, by the lock of its data folder; standard library only."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BASE_PORT = 7100
"""Port of the gateway; the services take the ports after it."""
ACCESS = "access"
"""Folder of a stack's tokens in its data folder."""
OWNER_TOKEN = "owner-token"
"""File in it with the token that commands and the SDK send."""


class StackError(Exception):
    """The stack cannot start or go on; the message is one sentence with the remedy."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """A stack that runs now.

    Attributes:
        pid: Process id of its supervisor.
        port: Port of its gateway.
        ready: Whether every process has become ready.
    """

    pid: int
    port: int
    ready: bool

    @property
    def address(self) -> str:
        """Address of the gateway, as the client takes it."""
        return f"127.0.0.1:{self.port}"


def default_data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Returns $DETFLOW_DATA_DIR, or detflow's folder among the user's application data."""
    if chosen := environ.get("DETFLOW_DATA_DIR"):
        return Path(chosen).expanduser().resolve()
    shared = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(shared).expanduser().resolve() / "detflow"


def running(data_dir: Path) -> Running | None:
    """Returns the stack that uses `data_dir` now, or None."""
    try:
        file = (data_dir / "lock").open()
    except OSError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read()
            # Between taking the lock and writing who holds it the file is empty.
            return Running(**json.loads(text)) if text else Running(pid=0, port=0, ready=False)
    return None


def owner_token(data_dir: Path) -> str:
    """Returns the token that lets its bearer do everything on the stack of `data_dir`, or "".

    "" where there is none, or where it belongs to another user of the machine.
    """
    try:
        return (data_dir / ACCESS / OWNER_TOKEN).read_text(encoding="ascii").strip()
    except (FileNotFoundError, PermissionError):
        return ""


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[tuple[Path, Callable[[Running], None]]]:
    """Makes the folder and holds its lock; yields its full path and what writes down who holds it.

    The kernel gives the lock back however the process ends: a lock file is never stale.

    Raises:
        StackError: Another stack holds the lock, or the folder cannot be used.
    """
    data_dir = data_dir.resolve()
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StackError(
            f"cannot use {data_dir} ({error.strerror}): choose another with --data-dir"
        ) from error
    with open(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = json.loads(file.read() or "{}")
            raise StackError(
                f"detflow runs already on {data_dir}: pid {other.get('pid')},"
                f" http://127.0.0.1:{other.get('port')}; stop it or choose another --data-dir"
            ) from None

        def note(state: Running) -> None:
            # One write, so that a reader never sees a part.
            text = json.dumps(dataclasses.asdict(state))
            file.seek(0)
            file.truncate()
            file.write(text)
            file.flush()

        yield data_dir, note
        file.truncate(0)
