"""Progress of a long operation on core NATS, at most ten times a second."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.events import Bus
from detflow.v1.common_pb2 import Progress

log = telemetry.get_logger(__name__)

_INTERVAL_SECONDS = 0.1
_RATE_SECONDS = 10.0


class ProgressReporter:
    """Publishes how far one operation is; the percentage never decreases.

    Args:
        bus: Connection.
        subject: detflow.progress.{kind}.{id}.
        spans: Where the percentage begins and ends in stages that are not the whole work.
    """

    def __init__(
        self, bus: Bus, subject: str, spans: Mapping[str, tuple[float, float]] | None = None
    ) -> None:
        self._bus = bus
        self._subject = subject
        self._start = time.monotonic()
        self._next = 0.0
        self._spans = spans or {}
        self._percent = 0.0
        self._stage = ""
        self._recent: deque[tuple[float, int]] = deque()

    async def update(self, stage: str, num_done: int = 0, num_total: int = 0) -> None:
        """Reports the state; dropped if the last report was less than 0.1 s ago in this stage.

        Args:
            stage: What is happening, e.g. "check".
            num_done: Units finished.
            num_total: Units in all; 0 while unknown.
        """
        now = time.monotonic()
        if stage != self._stage:
            self._stage = stage
            self._recent.clear()
        elif now < self._next and num_done < num_total:
            return
        self._next = now + _INTERVAL_SECONDS
        progress = self._measure(now, num_done, num_total)
        try:
            await self._bus.publish(self._subject, progress.SerializeToString())
        except Unavailable:  # progress is a courtesy; the work goes on
            log.debug("progress lost", subject=self._subject)

    def _measure(self, now: float, num_done: int, num_total: int) -> Progress:
        self._recent.append((now, num_done))
        while now - self._recent[0][0] > _RATE_SECONDS:
            self._recent.popleft()
        since, done_then = self._recent[0]
        rate = (num_done - done_then) / (now - since) if now > since else 0.0
        if num_total:
            begin, end = self._spans.get(self._stage, (0.0, 100.0))
            percent = begin + (end - begin) * min(1.0, num_done / num_total)
            self._percent = max(self._percent, percent)
        return Progress(
            stage=self._stage,
            num_done=num_done,
            num_total=num_total,
            percent=self._percent,
            elapsed_seconds=now - self._start,
            eta_seconds=(num_total - num_done) / rate if num_total and rate > 0 else None,
            rate=rate,
        )
