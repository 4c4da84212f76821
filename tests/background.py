"""Background work of a test, ended with it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from detflow.tasks import cancel_all


@asynccontextmanager
async def running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs coroutines while the context is open."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        await cancel_all(tasks)
