"""How far a backup or its restoration is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far it is now.

    Attributes:
        step: Number of the step, from 1.
        num_steps: How many there are.
        name: What the step does.
        percent: How much of the step is done, 0 to 100.
        eta_seconds: Estimated seconds to the end of the step; None where nothing is known yet.
    """

    step: int
    num_steps: int
    name: str
    percent: float
    eta_seconds: float | None


Report: TypeAlias = Callable[[Progress], None]


class Step:
    """A step under way.

    Args:
        report: Told of every advance.
        step: Number of the step, from 1.
        num_steps: How many there are.
        name: What it does.
        total: What there is to do, in any unit.
    """

    def __init__(self, report: Report, step: int, num_steps: int, name: str, total: float) -> None:
        self._report, self._number, self._num_steps = report, step, num_steps
        self._name, self._total, self._done = name, total, 0.0
        self._begin = time.monotonic()
        self.advance(0)

    def advance(self, by: float) -> None:
        """Says that so much more is done."""
        self._done += by
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        elapsed = time.monotonic() - self._begin
        self._report(
            Progress(
                step=self._number,
                num_steps=self._num_steps,
                name=self._name,
                percent=100 * share,
                eta_seconds=elapsed * (1 - share) / share if share > 0 else None,
            )
        )
