"""What every single step measured, on its way into the records: some steps at a time."""

from __future__ import annotations

import time

from detflow.v1.training_pb2 import StepMetrics
from detflow.v1.worker_pb2 import WorkerRecord
from services.trainer.worker.loop import Step
from services.trainer.worker.records import Spool

BLOCK_SECONDS = 5.0
"""A block is written once its first step is that old,"""
BLOCK_STEPS = 512
"""or once it has so many steps: about 30 kB."""


class StepBlocks:
    """Collects the values of steps and writes them as blocks of one epoch each.

    A resume leaves no gap if what a checkpoint has learnt from is written before the record that
    tells of it: `flush` before each checkpoint, and at the end of each epoch.

    Args:
        records: Where to write them.
        attempt: The attempt that measures.
        num_steps: Steps per epoch.
    """

    def __init__(self, records: Spool, attempt: int, num_steps: int) -> None:
        self._records = records
        self._attempt = attempt
        self._num_steps = num_steps
        self._first = 0, 0
        self._columns: dict[str, list[float]] = {}
        self._began = 0.0
        self._peak_bytes = 0

    def add(self, step: Step, memory_bytes: int) -> None:
        """Adds a step, right after the one before it.

        Args:
            step: The step.
            memory_bytes: In use after it.
        """
        if not self._columns:
            self._first, self._began = (step.epoch, step.number), time.monotonic()
        self._peak_bytes = max(self._peak_bytes, memory_bytes)
        values = {
            **{f"train/{name}": value for name, value in step.own_losses.items()},
            "lr": step.learning_rate,
            "images_per_second": step.images_per_second,
            "data_wait_share": step.own_wait_share,
            "memory_bytes": memory_bytes,
        }
        for name, value in values.items():
            self._columns.setdefault(name, []).append(value)
        age = time.monotonic() - self._began
        if age >= BLOCK_SECONDS or len(self._columns["lr"]) >= BLOCK_STEPS:
            self.flush()

    def flush(self) -> None:
        """Writes what is collected."""
        if not self._columns:
            return
        epoch, first_step = self._first
        block = StepMetrics(
            attempt=self._attempt,
            epoch=epoch,
            first_step=first_step,
            num_steps=self._num_steps,
            columns=[
                StepMetrics.Column(name=name, values=values)
                for name, values in self._columns.items()
            ],
        )
        self._columns = {}
        self._records.write(WorkerRecord(steps=block))

    def end_epoch(self) -> int:
        """Writes what is left of an epoch; returns the most memory in use after one of its steps.

        0 if it had none here.
        """
        self.flush()
        peak, self._peak_bytes = self._peak_bytes, 0
        return peak
