"""Ending background tasks for sure."""

import asyncio
from collections.abc import Iterable


async def cancel_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits until every one has ended.

    A library that uses `asyncio.wait_for` may swallow a cancellation (CPython 3.11 loses it when
    the awaited thing is done at the same moment), so it is repeated.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)
