"""The calls of the SDK as coroutines and async iterators: each runs in a thread of its own."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import typing
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from detflow.client.cancelling import Scope

Result = TypeVar("Result")

MAX_CALLS = 1000
"""Calls of one client that are under way at once; more of them wait."""

CALLS = ("models", "hyperparameters", "show")
"""Methods of the client itself that are calls."""

_END = object()


class Threads:
    """Where the calls of one client run."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(MAX_CALLS, thread_name_prefix="detflow")

    async def run(self, function: Callable[[], Result], scope: Scope | None = None) -> Result:
        """Calls a function in a thread.

        If the coroutine is cancelled, so are the function's calls, and it ends when the function
        has: nothing goes on behind the caller's back.

        Args:
            function: What is called.
            scope: What its calls belong to; by default a new one.
        """
        scope = scope or Scope()
        run = functools.partial(contextvars.copy_context().run, scope.run, function)
        running = asyncio.get_running_loop().run_in_executor(self._pool, run)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            scope.cancel()
            running.add_done_callback(_seen)
            await asyncio.wait([running])
            raise

    async def iterate(self, start: Callable[[], Iterator[Result]]) -> AsyncGenerator[Result, None]:
        """Yields what an iterator yields; its calls end when this is closed."""
        scope = Scope()
        try:
            items = await self.run(start, scope)
            while (item := await self.run(lambda: next(items, _END), scope)) is not _END:
                yield typing.cast(Result, item)
        finally:
            scope.cancel()

    def method(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Makes the coroutine function of a method; an async iterator of what gives an iterator."""

        @functools.wraps(call)
        def begun(*args: Any, **options: Any) -> Any:
            if callable(progress := options.get("progress")):
                options["progress"] = _in_loop(progress)
            bound = functools.partial(call, *args, **options)
            return self.iterate(bound) if is_iterator else self.run(bound)

        is_iterator = gives_iterator(call)
        return begun

    def close(self) -> None:
        """Lets no more calls begin."""
        self._pool.shutdown(wait=False)


class Noun:
    """One noun of the SDK, whose methods are awaited.

    Args:
        noun: The one whose methods block.
        threads: Where they run.
    """

    def __init__(self, noun: object, threads: Threads) -> None:
        self.__doc__ = noun.__doc__
        for name in methods_of(type(noun)):
            setattr(self, name, threads.method(getattr(noun, name)))


def methods_of(noun: type) -> list[str]:
    """Returns the names of the public methods of a class."""
    return [
        name for name, _ in inspect.getmembers(noun, inspect.isfunction) if not name.startswith("_")
    ]


def gives_iterator(call: Callable[..., Any]) -> bool:
    """Says whether what a method returns comes bit by bit."""
    returned = typing.get_origin(typing.get_type_hints(call).get("return"))
    return returned in (Iterator, Generator)


def _in_loop(progress: Callable[[Any], object]) -> Callable[[Any], None]:
    """Makes a callback for the thread of a call that calls back in the event loop of the caller."""
    loop = asyncio.get_running_loop()
    return lambda message: typing.cast(None, loop.call_soon_threadsafe(progress, message))


def _seen(running: asyncio.Future[Any]) -> None:
    """Takes note of how a cancelled call ended, which nobody asks for any more."""
    if not running.cancelled():
        running.exception()
