"""How far the training is, in numbers a person watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from detflow.v1.training_pb2 import TrainingProgress
from services.trainer.worker.spec import Spec

_TRAINING_PERCENT = 98.0
"""The rest is for the predictions."""


class Progress:
    """Turns steps into TrainingProgress: percent of the whole training, time elapsed and left.

    Args:
        spec: What the worker does.
        report: Told of every progress; it may drop some.
    """

    def __init__(self, spec: Spec, report: Callable[[TrainingProgress], None]) -> None:
        self._spec = spec
        self._report = report
        self._began: float | None = None
        self._epochs_before: float = spec.epochs_done
        self._last = TrainingProgress(
            attempt=spec.attempt,
            epoch=spec.epochs_done,
            num_epochs=spec.epochs,
            percent=_TRAINING_PERCENT * min(1.0, spec.epochs_done / spec.epochs),
        )

    def begin(self, device: str, num_steps: int) -> None:
        """Starts the clock: the first step is next."""
        self._began = time.monotonic()
        self._last.device = device
        self._last.num_steps = num_steps
        self._last.step = self._spec.steps_done
        self._epochs_before = self._spec.epochs_done + self._spec.steps_done / num_steps

    def prepare(self, done: int, total: int) -> None:
        """Reports how many of the bundle's shards are there, as steps."""
        self._send(
            stage="prepare data",
            percent=self._last.percent,
            eta_seconds=None,
            step=done,
            num_steps=total,
        )

    def check(self, done: int, total: int) -> None:
        """Reports how many of the checks before the first step are done, as steps."""
        self._send(
            stage="check",
            percent=self._last.percent,
            eta_seconds=None,
            step=done,
            num_steps=total,
        )

    def validate(self) -> None:
        """Reports that a batch of the validation split comes next."""
        self._send(stage="validate", percent=self._last.percent, eta_seconds=None)

    def predict(self, done: int, total: int) -> None:
        """Reports how many batches are predicted."""
        share = done / total
        percent = _TRAINING_PERCENT + (100.0 - _TRAINING_PERCENT) * share
        self._send(stage="predict", percent=percent, eta_seconds=None)

    def step(
        self,
        *,
        epoch: int,
        step: int,
        losses: Mapping[str, float],
        learning_rate: float,
        data_wait_share: float,
        loader_shares: Mapping[str, float],
        memory_bytes: int,
    ) -> None:
        """Reports a finished step of training."""
        done = epoch - 1 + step / self._last.num_steps
        done_here = done - self._epochs_before
        elapsed = self._elapsed()
        self._last.losses.clear()
        self._last.losses.update(losses)
        self._last.loader_shares.clear()
        self._last.loader_shares.update(loader_shares)
        self._send(
            stage="train",
            percent=_TRAINING_PERCENT * done / self._spec.epochs,
            eta_seconds=elapsed / done_here * (self._spec.epochs - done) if done_here else None,
            epoch=epoch,
            step=step,
            learning_rate=learning_rate,
            data_wait_share=data_wait_share,
            memory_bytes=memory_bytes,
        )

    def _elapsed(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    def _send(
        self, *, stage: str, percent: float, eta_seconds: float | None, **values: float
    ) -> None:
        message = self._last
        message.stage = stage
        message.percent = max(message.percent, min(100.0, percent))
        message.elapsed_seconds = self._elapsed()
        message.ClearField("eta_seconds")
        if eta_seconds is not None:
            message.eta_seconds = eta_seconds
        for name, value in values.items():
            setattr(message, name, value)
        sent = TrainingProgress()
        sent.CopyFrom(message)
        self._report(sent)
