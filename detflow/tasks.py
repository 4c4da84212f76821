"""Background tasks: waking them, and ending them for sure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


class Bell:
    """Tells whoever in this process waits that something happened.

    Listen first, look second, wait third: what happens in between is not missed.
    """

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """Returns what the next ring sets."""
        return self._next

    async def ring(self) -> None:
        """Wakes all that listen; a coroutine, so that it can be done after a commit."""
        self._next.set()
        self._next = asyncio.Event()


async def wait(event: asyncio.Event, seconds: float) -> bool:
    """Waits for an event, at most `seconds`; says whether it came.

    The limit is for what sets no event: another replica's work, the passing of a deadline.
    """
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def cancel_all(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until every one has ended.

    A library that uses `asyncio.wait_for` may swallow a cancellation (CPython 3.11 loses it when
    the awaited thing is done at the same moment), so it is repeated.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)
