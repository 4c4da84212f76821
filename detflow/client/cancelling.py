"""Calls that another thread can end: how `AsyncClient` cancels what it has begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol, TypeVar

from detflow.errors import Cancelled


class Call(Protocol):
    """A call under way, as gRPC returns it."""

    def cancel(self) -> object:
        """Ends it."""

    def is_active(self) -> bool:
        """Says whether it goes on."""


Begun = TypeVar("Begun", bound=Call)
Result = TypeVar("Result")


class Scope:
    """What one thread does for somebody who may not want it any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._over = threading.Event()

    def run(self, function: Callable[[], Result]) -> Result:
        """Calls a function; what it begins belongs to this scope."""
        token = _current.set(self)
        try:
            return function()
        finally:
            _current.reset(token)

    def cancel(self) -> None:
        """Ends its calls, those that begin later included; pauses and long loops end as well."""
        self._over.set()
        with self._lock:
            calls = [*self._calls]
        for call in calls:
            call.cancel()

    def take(self, call: Call) -> None:
        """Takes in a call that has begun."""
        with self._lock:
            self._calls = [*(one for one in self._calls if one.is_active()), call]
        if self._over.is_set():
            call.cancel()

    def wait(self, seconds: float) -> None:
        """Waits; 0 only looks.

        Raises:
            Cancelled: It was cancelled.
        """
        if self._over.wait(seconds):
            raise Cancelled("the caller has cancelled this")


_current: ContextVar[Scope | None] = ContextVar("detflow_scope", default=None)


def is_scoped() -> bool:
    """Says whether calls may be cancelled from another thread."""
    return _current.get() is not None


def begun(call: Begun) -> Begun:
    """Gives a call that has begun to the scope of this thread, if it has one."""
    if (scope := _current.get()) is not None:
        scope.take(call)
    return call


def pause(seconds: float) -> None:
    """Waits before a repetition.

    Raises:
        Cancelled: The caller has cancelled it.
    """
    if (scope := _current.get()) is not None:
        scope.wait(seconds)
    else:
        time.sleep(seconds)


def check() -> None:
    """Is called in loops that make no calls.

    Raises:
        Cancelled: The caller has cancelled it.
    """
    if (scope := _current.get()) is not None:
        scope.wait(0.0)
