"""Tells whether the system killed a process because memory ran out.

There is no message of it to the parent, so this is the rule: a process that ended by SIGKILL, sent
by none of us, was killed for memory if since the last look, a second before, a count of such kills
grew (of its control group or of the machine), or if at that look hardly any memory was left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_LEAST_SHARE = 0.03
"""Of all memory; with less left the kernel is about to kill."""


class MemoryWatch:
    """Looks at what the kernel tells of memory. Children of this process share its control group.

    Args:
        root: Root of the file system; another in tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._counts: list[int] = []
        self._was_short = False
        self.look()

    def look(self) -> None:
        """Takes note of how things stand."""
        self._counts = list(self._num_kills())
        self._was_short = any(share < _LEAST_SHARE for share in self._free_shares())

    def ran_out(self) -> bool:
        """Says whether a process killed since the last look was killed for memory."""
        counts = list(self._num_kills())
        grew = len(counts) == len(self._counts) and any(
            now > before for now, before in zip(counts, self._counts, strict=True)
        )
        return grew or self._was_short

    def _num_kills(self) -> Iterator[int]:
        """Yields every count of kills there is, always in the same order."""
        group = self._root / "sys/fs/cgroup"
        for path in (
            self._root / "proc/vmstat",
            group / self._group("") / "memory.events",
            group / "memory" / self._group("memory") / "memory.oom_control",
        ):
            if (number := _read(path).get("oom_kill")) is not None:
                yield number

    def _free_shares(self) -> Iterator[float]:
        """Yields what is left of the machine's memory and of the control group's."""
        machine = _read(self._root / "proc/meminfo")
        if "MemTotal" in machine and "MemAvailable" in machine:
            yield machine["MemAvailable"] / machine["MemTotal"]
        group = self._root / "sys/fs/cgroup" / self._group("")
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit and used is not None:
            # What files have cached is given up before anybody is killed.
            cached = _read(group / "memory.stat").get("inactive_file", 0)
            yield 1 - (used - cached) / limit

    def _group(self, controller: str) -> str:
        """Returns the path of this process's control group, in version 1 by its controller."""
        for line in _text(self._root / "proc/self/cgroup").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                return path.strip("/")
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # this system tells nothing of it
        return ""


def _number(path: Path) -> int | None:
    """Reads a file that holds one number; None for "max" or no such file."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> dict[str, int]:
    """Reads lines of a name and a number."""
    words = (line.replace(":", " ").split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
