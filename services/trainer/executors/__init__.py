"""Where workers run: an executor starts one and gives a handle on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from detflow.v1.worker_pb2 import WorkerSpec


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended.

    Attributes:
        code: Exit code; minus the number of the signal that killed it.
        last_lines: Last lines of what it wrote to stdout and stderr, oldest first.
    """

    code: int
    last_lines: Sequence[str]

    def describe(self) -> str:
        """Says in words how it ended."""
        if self.code == -9:
            return "was killed (signal 9); often that is the system running out of memory"
        return f"was ended by signal {-self.code}" if self.code < 0 else f"exited with {self.code}"


class Handle(Protocol):
    """A started worker."""

    async def wait(self) -> Exit:
        """Waits until it has ended, however often this is called."""

    async def terminate(self, grace_seconds: float) -> None:
        """Ends it and everything it started: politely, and after the grace period by force."""

    async def close(self) -> None:
        """Removes what it leaves behind, once it has ended."""


class Executor(Protocol):
    """Starts workers."""

    @property
    def num_slots(self) -> int:
        """Workers that may run at once."""

    async def start(self, spec: WorkerSpec) -> Handle:
        """Starts a worker.

        Raises:
            OSError: It could not be started.
        """

    async def discard(self, training_id: str, attempt: int) -> None:
        """Removes what an attempt of an earlier process left behind here, if anything."""

    async def is_abandoned(self, training_id: str, attempt: int) -> bool:
        """Says whether neither the trainer nor the worker of an attempt lives any more.

        False where that cannot be known: then the lease of the attempt has to run out.
        """

    async def list_leftovers(self) -> list[tuple[str, int]]:
        """Returns training id and attempt of everything that lies here."""
