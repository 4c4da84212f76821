"""Where workers run: an executor starts one and gives a handle on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from detflow.v1.worker_pb2 import WorkerSpec


class Device(StrEnum):
    """What a worker computes on."""

    CPU = "cpu"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What an executor has in all; a worker takes as many slots of one kind as it has devices.

    Attributes:
        num_cpu: Workers, or processes of one worker, that may compute on CPUs at once.
        num_gpu: GPUs.
        num_nodes: Machines; a worker on several takes as many slots on each.
    """

    num_cpu: int
    num_gpu: int = 0
    num_nodes: int = 1

    def of(self, device: Device) -> int:
        """Returns how many slots there are of a kind."""
        return self.num_gpu if device is Device.CUDA else self.num_cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What one worker gets: it counts against the slots as long as the worker is there.

    Attributes:
        device: Kind of slots it takes.
        num_nodes: Machines.
        num_per_node: GPUs per machine; on CPUs, processes per machine.
    """

    device: Device = Device.CPU
    num_nodes: int = 1
    num_per_node: int = 1

    @property
    def num_slots(self) -> int:
        """Slots it takes in all."""
        return self.num_nodes * self.num_per_node


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker ended.

    Attributes:
        code: Exit code; minus the number of the signal that killed it.
        last_lines: Last lines of what it wrote to stdout and stderr, oldest first.
        out_of_memory: The system killed it because memory ran out.
    """

    code: int
    last_lines: Sequence[str]
    out_of_memory: bool = False

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
    def slots(self) -> Slots:
        """What there is in all. May change while it runs, e.g. with the machines of a cluster."""

    async def start(self, spec: WorkerSpec, devices: Devices) -> Handle:
        """Starts a worker on devices that the caller knows to be free.

        A worker on GPUs sees only its own, one on CPUs sees none.

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
