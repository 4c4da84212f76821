"""Reading once for all who ask at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")


class SharedRead(Generic[Key, T]):
    """Shares one read among callers, none of whom gets what began to be read before they asked.

    So a hundred watchers that come back at once, after a restart, cost two snapshots and not a
    hundred. The value is shared: nobody may change it.

    Args:
        read: Reads the value of a key.
    """

    def __init__(self, read: Callable[[Key], Awaitable[T]]) -> None:
        self._read = read
        self._waiting: dict[Key, asyncio.Task[T]] = {}  # not begun: whoever asks now may join
        self._running: dict[Key, asyncio.Task[T]] = {}

    async def get(self, key: Key) -> T:
        """Returns what a read that begins from now on finds, or raises what it raises."""
        task = self._waiting.get(key)
        if task is None:
            task = asyncio.create_task(self._run(key, self._running.get(key)))
            task.add_done_callback(_look_at)
            self._waiting[key] = task
        return await asyncio.shield(task)  # a caller that leaves takes it from nobody

    async def _run(self, key: Key, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            await asyncio.wait([before])
        task = self._waiting.pop(key)
        self._running[key] = task
        try:
            return await self._read(key)
        finally:
            if self._running.get(key) is task:
                del self._running[key]


def _look_at(task: asyncio.Task[T]) -> None:
    """Looks at an error that all callers may have left before it came."""
    if not task.cancelled():
        task.exception()
