"""The records of an attempt on their way to JetStream: in order, numbered without holes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from detflow.v1.training_pb2 import LogLines
from detflow.v1.worker_pb2 import WorkerRecord

MAX_SPOOLED = 4096
"""Records kept while NATS is away: hours of a training. Beyond that the oldest log lines are given
up, then the oldest values of steps, which leave a gap in their series; all else is rare."""


class Spool:
    """A queue of records between the training and the thread that publishes.

    A record gets its number when it is first taken out, so that dropped ones leave no hole.

    Args:
        training: Name of the training.
        attempt: The attempt that writes.
        max_records: Records above which the oldest log lines, or else steps, are dropped.
    """

    def __init__(self, training: str, attempt: int, max_records: int = MAX_SPOOLED) -> None:
        self.num_dropped = 0
        self._training = training
        self._attempt = attempt
        self._max_records = max_records
        self._next_seq = 1
        self._queue: deque[tuple[WorkerRecord, Future[int]]] = deque()
        self._lock = threading.Lock()
        self._wake: Callable[[], None] = lambda: None

    def on_write(self, wake: Callable[[], None]) -> None:
        """Sets what is called, from any thread, after each write."""
        self._wake = wake

    def write(self, part: WorkerRecord) -> Future[int]:
        """Adds a record; never blocks.

        Args:
            part: Record with `what` set; training, attempt and number are filled in.

        Returns:
            The record's number, once JetStream has stored it. Cancelled if the record is dropped.
        """
        stored: Future[int] = Future()
        part.training, part.attempt = self._training, self._attempt
        with self._lock:
            self._queue.append((part, stored))
            if len(self._queue) > self._max_records:
                self._drop_oldest()
        self._wake()
        return stored

    def log(self, *lines: str) -> None:
        """Adds lines to the training's log."""
        self.write(WorkerRecord(log=LogLines(attempt=self._attempt, lines=lines)))

    def peek(self) -> WorkerRecord | None:
        """Returns the oldest record, numbered, without removing it; None if there is none."""
        with self._lock:
            if not self._queue:
                return None
            record = self._queue[0][0]
            if not record.seq:
                record.seq = self._next_seq
                self._next_seq += 1
            return record

    def remove(self, record: WorkerRecord) -> None:
        """Removes the oldest record, which JetStream has stored."""
        with self._lock:
            first, stored = self._queue.popleft()
        assert first is record
        stored.set_result(record.seq)

    def clear(self) -> None:
        """Gives up everything that is not stored: this attempt has no say any more."""
        with self._lock:
            while self._queue:
                self._queue.popleft()[1].cancel()

    @property
    def is_empty(self) -> bool:
        """Whether everything written is stored."""
        return not self._queue

    def _drop_oldest(self) -> None:
        for kind in ("log", "steps"):
            for index, (record, stored) in enumerate(self._queue):
                if record.WhichOneof("what") == kind and not record.seq:
                    del self._queue[index]
                    stored.cancel()
                    self.num_dropped += 1
                    return
