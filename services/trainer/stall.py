"""Tells a slow worker from a dead one by its own pace."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from detflow.errors import DeadlineExceeded
from detflow.v1.training_pb2 import TrainingProgress
from services.trainer.domain import State

_RECENT = 20
_FACTOR = 20.0
_SUSPENDED_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long nothing may happen, in seconds.

    Attributes:
        provisioning: Before the first training step.
        progress: Afterwards, at least; 20 times the longest of the recent steps if that is more.
    """

    provisioning: float = 120.0
    progress: float = 60.0


class ProgressClock:
    """Measures how long a worker has made no progress.

    Args:
        now: Monotonic clock in seconds.
    """

    def __init__(self, patience: Patience, now: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._now = now
        self._last_seen: object = None
        self._state: State | None = None
        self._epochs = -1
        self._intervals: deque[float] = deque(maxlen=_RECENT)
        self._last_change = self._last_look = now()

    def reset(self) -> None:
        """Begins to measure again: progress could not be seen for a while."""
        self._last_change = self._now()

    def observe(self, progress: TrainingProgress) -> None:
        """Takes note of what the worker reports."""
        seen = (progress.stage, progress.epoch, progress.step, progress.percent)
        if seen != self._last_seen:
            self._last_seen = seen
            self._change()

    def observe_state(self, state: State, num_epochs_done: int) -> None:
        """Takes note of what the worker's records have led to."""
        if state is not self._state:
            self._intervals.clear()  # the pace of another phase says nothing about this one
            self._state = state
            self.reset()
        if num_epochs_done != self._epochs:
            self._epochs = num_epochs_done
            self.reset()

    def stall(self) -> DeadlineExceeded | None:
        """Returns what is wrong if there was no progress for too long; ask every second."""
        now = self._now()
        if now - self._last_look > _SUSPENDED_SECONDS:
            self.reset()  # this process stood still, so it saw nothing
        self._last_look = now
        if self._state is State.PROVISIONING:
            allowed, doing = self._patience.provisioning, "preparing"
        else:
            slowest = max(self._intervals, default=0.0)
            allowed, doing = max(self._patience.progress, _FACTOR * slowest), "training"
        idle = now - self._last_change
        if idle <= allowed:
            return None
        return DeadlineExceeded(
            f"the worker made no progress for {idle:.0f} s while {doing};"
            f" {allowed:.0f} s are allowed",
            reason="STALLED",
            metadata={"idle_seconds": f"{idle:.0f}", "allowed_seconds": f"{allowed:.0f}"},
        )

    def _change(self) -> None:
        now = self._now()
        self._intervals.append(now - self._last_change)
        self._last_change = now
