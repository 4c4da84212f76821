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
_STAGE_FACTOR = 3.0
_SUSPENDED_SECONDS = 5.0
_TRAIN = "train"
_CHECK = "check"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long nothing may happen, in seconds.

    Attributes:
        provisioning: Before the training begins, apart from a step that is tried before.
        first_step: Before the first step's end, tried or real: nothing is known of the pace yet,
            and one step of a large model on a CPU takes minutes.
        progress: Afterwards, at least. More if 20 times the longest of the recent steps is, or, in
            a stage that reports nothing of itself, 3 times the last stretch of training.
    """

    provisioning: float = 120.0
    first_step: float = 900.0
    progress: float = 60.0


class ProgressClock:
    """Measures how long a worker has made no progress.

    Args:
        patience: What to allow.
        now: Monotonic clock in seconds.
    """

    def __init__(self, patience: Patience, now: Callable[[], float] = time.monotonic) -> None:
        self._patience = patience
        self._now = now
        self._last_seen: object = None
        self._state: State | None = None
        self._epochs = -1
        self._stage = ""
        self._stage_began = now()
        self._num_reports = 0  # in this stage
        self._train_seconds = 0.0  # of the last stretch of training between two other stages
        self._intervals: deque[float] = deque(maxlen=_RECENT)  # between steps
        self._last_change = self._last_look = now()

    def reset(self) -> None:
        """Begins to measure again: progress could not be seen for a while."""
        self._last_change = self._now()

    def observe(self, progress: TrainingProgress) -> None:
        """Takes note of what the worker reports; the same report again is no progress."""
        seen = (progress.stage, progress.epoch, progress.step, progress.elapsed_seconds)
        if seen == self._last_seen:
            return
        self._last_seen = seen
        now = self._now()
        if progress.stage != self._stage:
            if self._stage == _TRAIN:
                self._train_seconds = now - self._stage_began
            self._stage, self._stage_began, self._num_reports = progress.stage, now, 0
        else:
            self._num_reports += 1
            if self._stage == _TRAIN:
                self._intervals.append(now - self._last_change)
        self._last_change = now

    def observe_state(self, state: State, num_epochs_done: int) -> None:
        """Takes note of what the worker's records have led to."""
        if (state, num_epochs_done) != (self._state, self._epochs):
            self._state, self._epochs = state, num_epochs_done
            self.reset()

    def stall(self) -> DeadlineExceeded | None:
        """Returns what is wrong if there was no progress for too long; ask every second."""
        now = self._now()
        if now - self._last_look > _SUSPENDED_SECONDS:
            self.reset()  # this process stood still, so it saw nothing
        self._last_look = now
        idle, allowed = now - self._last_change, self._allowed_seconds()
        if idle <= allowed:
            return None
        doing = self._stage or "starting"
        return DeadlineExceeded(
            f"the worker made no progress for {idle:.0f} s in stage {doing!r};"
            f" {allowed:.0f} s are allowed",
            reason="STALLED",
            metadata={
                "stage": doing,
                "idle_seconds": f"{idle:.0f}",
                "allowed_seconds": f"{allowed:.0f}",
            },
        )

    def _allowed_seconds(self) -> float:
        if self._state is State.PROVISIONING:
            if self._stage == _CHECK:  # a step is tried, and validation
                return self._patience.first_step
            return self._patience.provisioning
        if not self._intervals:
            return self._patience.first_step
        allowed = max(self._patience.progress, _FACTOR * max(self._intervals))
        if self._stage != _TRAIN and self._num_reports == 0:
            allowed = max(allowed, _STAGE_FACTOR * self._train_seconds)
        return allowed
