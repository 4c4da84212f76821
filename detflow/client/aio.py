"""The client for asyncio.

Type checkers read aio.pyi beside it instead, which tools/async_stub.py makes of `Client`.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from detflow.client import DEFAULT_ADDRESS, Client
from detflow.client.threads import CALLS, Noun, Threads


class AsyncClient:
    """A connection to one detflow, for asyncio: the nouns and methods of `Client`, awaited.

    What gives an iterator there gives an async iterator here. Watches go on by themselves where a
    stream breaks; one that is closed (`contextlib.aclosing`), or whose task is cancelled, ends its
    call. A cancelled coroutine ends when what it has begun has ended. Functions given as `progress`
    are called in the event loop.

    Example:
        async with detflow.AsyncClient() as client:
            training = await client.trainings.find("V_0")
            async for message in client.trainings.watch(training.name):
                print(message.WhichOneof("what"))

    Args:
        address: As of `Client`, and so the others.
        options: As of `Client`.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, **options: Any) -> None:
        self._client = Client(address, **options)
        self._threads = Threads()
        self.address = address
        for name, noun in self._client.nouns().items():
            setattr(self, name, Noun(noun, self._threads))
        for name in CALLS:
            setattr(self, name, self._threads.method(getattr(self._client, name)))

    async def close(self) -> None:
        """Closes the connection; running calls and watches end."""
        await self._threads.run(self._client.close)
        self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
