"""Memory: a limit that ends in an exception, what is in use and what is left."""

from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from detflow.errors import InvalidArgument

if TYPE_CHECKING:  # it takes seconds, and reads the environment that library.prepare sets
    import torch

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = psutil.Process()
_NEARLY = 0.88
"""Share of the limit from which on it counts as reached."""
_LEAST_LEFT_BYTES = 256 << 20
"""For the smallest network and the threads that are still to be started, which fail badly."""


def set_limit(num_bytes: int) -> None:
    """Makes allocations fail in this process once it holds so much.

    What counts is what the system calls data: private memory it may write to, used or not. Without
    a limit the system kills the process, or another one, when memory has run out, and nobody
    learns why. Address space as a whole would be the wrong thing to limit: libraries reserve far
    more of it than they ever use. So do GPU drivers, whatever the kind: where there is a GPU no
    limit is set.

    Args:
        num_bytes: Bytes; 0 sets no limit.

    Raises:
        InvalidArgument: BAD_SETTING, the libraries alone take nearly as much.
    """
    import torch

    if num_bytes and not torch.cuda.is_available():
        least = _data_bytes() + _LEAST_LEFT_BYTES
        if num_bytes < least:
            raise InvalidArgument(
                f"DETFLOW_WORKER_MEMORY_BYTES is {num_bytes}; a worker needs at least {least}",
                reason="BAD_SETTING",
            )
        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def watch(layers: Iterable[torch.nn.Module]) -> None:
    """Has layers refuse to learn when memory comes close to the limit, if there is one.

    At the limit itself native code may crash as well as fail, so it had better not be reached: a
    step's memory grows from layer to layer.
    """
    if _limit() is not None:
        for layer in layers:
            layer.register_forward_pre_hook(_check_room)


def _check_room(layer: object, arguments: object) -> None:
    import torch

    if torch.is_grad_enabled() and is_nearly_used_up():
        raise MemoryError("close to the limit of this process")


def used_bytes(device: torch.device) -> int:
    """Returns what the training has in use: of the device on a GPU, of the process otherwise."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.memory_allocated(device))
    return int(_PROCESS.memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """Returns the most that was in use so far."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if psutil.MACOS else 1024)


def is_nearly_used_up() -> bool:
    """Says whether the process has come close to its limit: what fails then fails for want of it.

    Not every library says so when an allocation fails. What was freed since still counts, because
    the C library keeps it.
    """
    limit = _limit()
    return limit is not None and _data_bytes() > _NEARLY * limit


def free_bytes() -> int:
    """Returns how much more main memory this process can have: machine, container and own limit."""
    rooms = [psutil.virtual_memory().available, *_rooms_in_cgroups()]
    if (limit := _limit()) is not None:
        rooms.append(int(_NEARLY * limit) - _data_bytes())
    return max(0, min(rooms))


def _limit() -> int | None:
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _data_bytes() -> int:
    return int(_PROCESS.memory_info().data) if psutil.LINUX else 0


def _rooms_in_cgroups() -> Iterator[int]:
    """Yields what is left in each control group around this process that has a limit."""
    try:
        group = Path("/proc/self/cgroup").read_text().rsplit("::/", 1)[-1].strip()
        folder = _CGROUPS / group
        while folder.is_relative_to(_CGROUPS):
            limit = folder / "memory.max"
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                cached = dict(
                    line.split() for line in (folder / "memory.stat").read_text().splitlines()
                )
                used = int((folder / "memory.current").read_text())
                yield int(text) - used + int(cached.get("inactive_file", 0))
            folder = folder.parent
    except OSError:
        return  # no control groups of the second version here
