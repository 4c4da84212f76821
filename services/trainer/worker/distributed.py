"""Training on several devices: a process for each learns from its part of every batch.

Rank 0 is the worker that everybody knows: it alone talks to NATS, measures, and writes checkpoints
and weights. The other ranks read the same bundle and checkpoint, compute gradients and follow.
After the last backward pass of an update the gradients of all ranks are added up in one message.
So the ranks are a way to compute the parts of a batch (`batches.split_batch`) at the same time: the
weights become what one device would make of them with parts of this size.

A rank that fails says why in the store in which the ranks have met, which rank 0 keeps; one that
dies is known by its closed connections. Either ends the attempt. When rank 0 ends, for whatever
reason, the others do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from detflow import errors
from detflow.errors import DetflowError, FailedPrecondition, Unavailable
from detflow.processes import dying_with_parent
from detflow.v1.common_pb2 import Failure
from services.trainer.worker.spec import ALONE, Place

RANK_COMMAND = (sys.executable, "-m", "services.trainer.worker")

# Nobody waits that long: who does not come is killed by the trainer, for rank 0 makes no progress.
_PATIENCE = timedelta(days=1)
_POLL_SECONDS = 0.05
_EXPLANATION_SECONDS = 3.0
_LOOPBACK = "127.0.0.1"

T = TypeVar("T")


class RankLost(Unavailable):
    """Another rank has ended."""


class Ranks:
    """The processes that train together, as one of them sees them.

    Until they are connected, and where there is only one, nothing is sent to anybody.

    Args:
        place: Which of them this one is.
        check: Called while waiting for others; raises to stop.
    """

    def __init__(self, place: Place = ALONE, check: Callable[[], None] = lambda: None) -> None:
        if place.num_nodes > 1 and not place.address:
            raise FailedPrecondition(
                f"a training on {place.num_nodes} machines needs a cluster; set "
                "DETFLOW_EXECUTOR=ray, or train on one machine",
                reason="NO_CLUSTER",
            )
        self.place = place
        self._check = check
        self._store: Any = None
        self._address = place.address
        self._connected = False
        self._on_gpu = False
        self._others: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def is_first(self) -> bool:
        """Whether this is the one that measures, saves and reports."""
        return self.place.rank == 0

    @property
    def num_ranks(self) -> int:
        """Processes in all."""
        return self.place.num_ranks

    def choose_device(self, wanted: str) -> torch.device:
        """Returns the device of this rank: each has its own GPU.

        Args:
            wanted: cpu, cuda, or auto for a GPU if there is one.

        Raises:
            FailedPrecondition: NO_GPU.
        """
        if wanted == "cuda" and not torch.cuda.is_available():
            raise FailedPrecondition(
                "device=cuda, but the worker sees no GPU; set device=auto to train without one, or "
                "let the trainer run where nvidia-smi lists one",
                reason="NO_GPU",
            )
        self._on_gpu = wanted != "cpu" and torch.cuda.is_available()
        if not self._on_gpu:
            return torch.device("cpu")
        device = torch.device("cuda", self.place.local_rank)
        torch.cuda.set_device(device)
        return device

    def prepare(self, network: nn.Module) -> None:
        """Makes batch statistics on GPUs those of all ranks; on CPUs they are averaged."""
        if self.num_ranks > 1 and self._on_gpu:
            # It knows timm's layers, which do more than normalise; torch's own would lose that.
            from timm.layers.norm_act import convert_sync_batchnorm

            convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]

    def take(self, items: Sequence[T]) -> Sequence[T]:
        """Returns this rank's part of what all of them have in the same order."""
        return items[self.place.rank :: self.num_ranks]

    @contextlib.contextmanager
    def meeting(self, network: nn.Module) -> Iterator[None]:
        """Connects the ranks, with the weights of rank 0; ends those of this machine on leaving.

        Raises:
            RankLost: One has ended before it came.
            DetflowError: What one says it failed with.
        """
        if self.num_ranks == 1:
            yield
            return
        try:
            self._meet()
            self._align(network)
            yield
        finally:
            self._part()

    @contextlib.contextmanager
    def explaining(self, explain: Callable[[Exception], DetflowError]) -> Iterator[None]:
        """Tells rank 0 what a block of another rank fails with.

        Args:
            explain: Turns an exception into an error with a status code.
        """
        self._open_store()
        try:
            yield
        except RankLost:
            raise  # the one that was lost, or rank 0 itself, knows why
        except Exception as error:
            told = errors.failure(explain(error)).SerializeToString()
            with contextlib.suppress(RuntimeError):  # rank 0 is gone: nobody wants to know
                self._store.set(f"failure/{self.place.rank}", told)
            raise

    def add_up(self, sums: torch.Tensor, num_images: int) -> torch.Tensor:
        """Returns the mean of values over the images of all ranks.

        Args:
            sums: Means over this rank's images, shape (n,), on any device.
            num_images: Images of this rank.
        """
        if not self._connected:
            return sums
        message = torch.cat((sums.double().cpu() * num_images, torch.tensor([float(num_images)])))
        with self._together():
            dist.all_reduce(message)
        return message[:-1] / message[-1]

    @torch.no_grad()
    def combine(self, network: nn.Module) -> None:
        """Adds up the gradients of all ranks, and averages what layers remember of their inputs.

        A rank whose images need some weights not at all has no gradient there: that is zero.
        """
        if not self._connected:
            return
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        memories = _memories(network)
        for memory in memories:
            memory /= self.num_ranks
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        with self._together():
            _exchange([*gradients, *memories], dist.all_reduce)

    @torch.no_grad()
    def leave_to_first(self, network: nn.Module, *, pending: bool) -> None:
        """Leaves what the ranks have apart from each other to rank 0, which writes a checkpoint.

        A resume from it finds nothing else, so this makes going on the same as a resume.

        Args:
            network: What learns.
            pending: Whether there are gradients of which no update has been made yet.
        """
        if not self._connected:
            return
        if pending:
            self.combine(network)
            if not self.is_first:
                for weight in network.parameters():
                    weight.grad = None
        with self._together():
            # Unequal parts of a batch draw unequally many numbers.
            random = torch.get_rng_state()
            _broadcast(random)
            torch.set_rng_state(random)
            if self._on_gpu:
                random = torch.cuda.get_rng_state()
                _broadcast(random)
                torch.cuda.set_rng_state(random)

    def agree(self, decision: bool) -> bool:
        """Returns what rank 0 has decided; the others wait for it."""
        if not self._connected:
            return decision
        message = torch.tensor([int(decision)])
        with self._together():
            dist.broadcast(message, src=0)
        return bool(message)

    def _meet(self) -> None:
        """Waits until all ranks are ready, then connects them."""
        self._open_store()
        if self.place.local_rank == 0:
            self._start_others()
        self._store.set(f"ready/{self.place.rank}", b"")
        keys = [f"ready/{rank}" for rank in range(self.num_ranks)]
        while not self._store.check(keys):
            self._check()
            self._raise_failure()
            if lost := self._ended():
                self._explain_loss(lost)
            time.sleep(_POLL_SECONDS)
        if self.place.num_nodes == 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
        with self._together():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self._on_gpu else "gloo",
                store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=self.place.rank,
                world_size=self.num_ranks,
                timeout=_PATIENCE,
            )
        self._connected = True

    @torch.no_grad()
    def _align(self, network: nn.Module) -> None:
        """Gives all ranks the weights of rank 0."""
        with self._together():
            _exchange([*network.parameters(), *_memories(network)], _broadcast)

    def _open_store(self) -> None:
        if self._store is not None or self.num_ranks == 1:
            return
        host, _, port = (self.place.address or f"{_LOOPBACK}:0").rpartition(":")
        # Our own socket: the store would listen on every address of the machine.
        listener = socket.create_server((host, int(port))) if self.is_first else None
        port = str(listener.getsockname()[1]) if listener else port
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            host,
            int(port),
            is_master=self.is_first,
            timeout=_PATIENCE,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
        self._address = f"{host}:{port}"

    def _start_others(self) -> None:
        """Starts the other ranks of this machine; they die with this one."""
        for number in range(1, self.place.num_per_node):
            rank = self.place.rank + number
            command = [*RANK_COMMAND, str(self.place.file), f"--rank={rank}"]
            self._others[rank] = subprocess.Popen(
                dying_with_parent([*command, f"--address={self._address}"]),
                stdin=subprocess.DEVNULL,
            )

    def _part(self) -> None:
        self._connected = False
        for process in self._others.values():
            process.send_signal(signal.SIGKILL)
        for process in self._others.values():
            process.wait()
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Does something that every rank does; says who is missing if that fails."""
        try:
            yield
        except RuntimeError as error:
            self._check()  # told to stop, and the others too
            self._explain_loss(self._ended(), error)

    def _explain_loss(self, ended: str, error: Exception | None = None) -> None:
        """Raises why another rank has ended, which it or the system may need a moment to tell."""
        deadline = time.monotonic() + _EXPLANATION_SECONDS
        while self.is_first and time.monotonic() < deadline:
            self._raise_failure()
            ended = ended or self._ended()
            time.sleep(_POLL_SECONDS)
        raise RankLost(
            f"{ended or 'a process'} of the {self.num_ranks} that train together has ended; the "
            "training goes on from its last checkpoint",
            reason="RANK_LOST",
        ) from error

    def _raise_failure(self) -> None:
        """Raises what another rank has said it failed with, if one has."""
        if not self.is_first:
            return
        for rank in range(1, self.num_ranks):
            if self._store.check([f"failure/{rank}"]):
                failure = Failure.FromString(self._store.get(f"failure/{rank}"))
                raise errors.from_status(failure.status)

    def _ended(self) -> str:
        """Names a rank of this machine that has ended, if one has."""
        for rank, process in self._others.items():
            if (code := process.poll()) is not None:
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                return f"rank {rank} ({how})"
        return ""


def _memories(network: nn.Module) -> list[torch.Tensor]:
    """Returns what layers remember of their inputs; integers only count steps, alike everywhere."""
    return [memory for memory in network.buffers() if memory.is_floating_point()]


def _exchange(tensors: Sequence[torch.Tensor], send: Callable[[torch.Tensor], object]) -> None:
    """Sends tensors as one message and puts what comes of it in their place."""
    message = torch.cat([tensor.reshape(-1) for tensor in tensors])
    send(message)
    parts = torch.split(message, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _broadcast(message: torch.Tensor) -> None:
    dist.broadcast(message, src=0)
