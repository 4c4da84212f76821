"""Faults on purpose: named places where a process can be made to fail, for tests of what survives.

`DETFLOW_FAULTS=outbox.after_publish:kill:3` kills the process with SIGKILL when it comes to that
place for the third time. Several are separated by commas. Each happens once, in whichever process
of a data folder comes there first: what has happened is noted in its file faults.log, and is not
armed again after a restart.

Nothing is armed by accident: faults are refused unless DETFLOW_ACCESS=open, which is taken on
loopback only, and a process that has some says so when it starts. Without faults a place costs one
look into an empty dictionary.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from detflow.errors import InvalidArgument, Unavailable
from detflow.settings import Settings

log = logging.getLogger(__name__)

JOURNAL = "faults.log"
DELAY_SECONDS = 1.0

POINTS: Mapping[str, str] = {
    "postgres.before_commit": "a transaction has done its work and is not committed",
    "postgres.after_commit": "a transaction is committed, and its caller does not know it",
    "outbox.before_publish": "an event is committed and not in the stream",
    "outbox.after_publish": "an event is in the stream, and its row does not say so",
    "consumer.before_ack": "the effect of an event is committed, the event not acknowledged",
    "consumer.after_ack": "an event is acknowledged",
    "store.before_put": "an object is about to be written",
    "store.half_put": "half of an object is on the disk, under the name of an unfinished one",
    "store.after_put": "an object is stored, and nothing points to it",
    "upload.before_part": "bytes of an upload are in memory only",
    "upload.after_part": "a part of an upload is stored and no row names it",
    "checkpoint.before_store": "a checkpoint is a copy in memory",
    "checkpoint.after_store": "a checkpoint is stored and not recorded",
    "checkpoint.after_record": "the record of a checkpoint waits to be published",
    "spool.before_publish": "a worker's record is in its memory only",
    "spool.after_publish": "a worker's record is in the stream, and the worker does not know it",
    "training.after_claim": "an attempt is claimed and its worker not started",
    "preflight.before_store": "a training in the queue was tried, and nobody knows the result",
    "evaluation.before_store": "a split is measured, and its figures are in memory only",
    "evaluation.after_store": "the figures of a split are committed",
    "export.before_store": "a model is exported, and its row says that it is being made",
    "export.after_store": "the row of an export says that it was made",
}
"""Every place, and how things stand there."""


class Action(StrEnum):
    """What can happen at a place."""

    KILL = "kill"  # the process ends at once, as by kill -9
    STOP = "stop"  # it is frozen until somebody sends SIGCONT
    ERROR = "error"  # the step fails as if what it needs were away
    ENOSPC = "enospc"  # the step fails as if the disk were full
    DELAY = "delay"  # the whole process stands still for a second


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is to happen once.

    Attributes:
        point: Where; a key of POINTS.
        action: What.
        nth: How often the process comes there until it happens.
    """

    point: str
    action: Action
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.point}:{self.action}:{self.nth}"


class _Armed:
    """The faults of one place, and how often the process came there."""

    def __init__(self, journal: Path) -> None:
        self.faults: dict[int, Fault] = {}
        self._journal = journal
        self._count = 0
        self._lock = threading.Lock()

    def reach(self) -> None:
        with self._lock:
            self._count += 1
            fault = self.faults.pop(self._count, None)
            if fault is None:
                return
            with self._journal.open("a") as file:  # before it happens: afterwards may be too late
                file.write(f"{fault}\n")
        log.warning("fault on purpose: %s", fault)
        _do(fault)


_armed: dict[str, _Armed] = {}


def point(name: str) -> None:
    """Marks a place: what was planned for it happens here.

    Raises:
        Unavailable: FAULT_INJECTED, where `error` was planned.
        OSError: ENOSPC, where `enospc` was planned.
    """
    if name in _armed:
        _armed[name].reach()


def is_armed(name: str) -> bool:
    """Says whether something is planned for a place that takes work to come to."""
    return name in _armed


def arm(settings: Settings) -> None:
    """Plans what the settings name, for this process, and says so.

    Raises:
        InvalidArgument: BAD_SETTING: no such place or action, or access is not open.
    """
    _armed.clear()
    if not settings.faults:
        return
    if settings.access != "open":
        raise InvalidArgument(
            "DETFLOW_FAULTS makes processes fail on purpose and works with DETFLOW_ACCESS=open"
            " only; unset it",
            reason="BAD_SETTING",
        )
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    journal = settings.data_dir / JOURNAL
    happened = journal.read_text().splitlines() if journal.exists() else []
    for fault in parse(settings.faults):
        if str(fault) not in happened:
            _armed.setdefault(fault.point, _Armed(journal)).faults[fault.nth] = fault
            log.warning("this process will fail on purpose: %s", fault)


def parse(text: str) -> list[Fault]:
    """Reads `point:action[:nth]`, separated by commas.

    Raises:
        InvalidArgument: BAD_SETTING.
    """
    faults = []
    for part in text.split(","):
        name, _, rest = part.strip().partition(":")
        action, _, nth = rest.partition(":")
        if name not in POINTS or action not in list(Action) or not (nth or "1").isdecimal():
            raise InvalidArgument(
                f"DETFLOW_FAULTS has {part.strip()!r}: write point:action or point:action:nth, with"
                f" one of {', '.join(Action)} as action and one of {', '.join(POINTS)} as point",
                reason="BAD_SETTING",
            )
        faults.append(Fault(name, Action(action), int(nth or 1)))
    return faults


def _do(fault: Fault) -> None:
    match fault.action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.DELAY:
            time.sleep(DELAY_SECONDS)
        case Action.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case Action.ERROR:
            raise Unavailable(f"failed on purpose at {fault.point}", reason="FAULT_INJECTED")
