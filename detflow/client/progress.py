"""Progress of long calls: told to a function, or shown as a bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from detflow.v1 import common_pb2, training_pb2

Message = TypeVar("Message", bound="Progressing", contravariant=True)


class Progressing(Protocol):
    """A message of progress."""

    @property
    def stage(self) -> str:
        """What is done."""

    @property
    def percent(self) -> float:
        """How much of it, 0..100."""


OnProgress = Callable[[common_pb2.Progress], None]
"""Is called with what is being done."""

Progress = OnProgress | bool | None
"""A function; or True for a bar in terminals and notebooks, and lines on stderr elsewhere."""

TrainingProgress = Callable[[training_pb2.TrainingProgress], None] | bool | None
"""The same for a training."""


@contextlib.contextmanager
def shown(
    progress: Callable[[Message], None] | bool | None,
) -> Iterator[Callable[[Message], None] | None]:
    """Gives the function that is to be called with progress; a bar goes when the work is over."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        with _bar() as update:
            yield update


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progressing], None]]:
    # Only here: who wants no bar need not wait for it to be imported.
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        yield _Lines().update
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=100.0)

        def update(message: Progressing) -> None:
            bar.update(task, description=escape(_words(message)), completed=message.percent)

        yield update


class _Lines:
    """A line for each stage, and for each ten percent of it."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def update(self, message: Progressing) -> None:
        now = (message.stage, int(message.percent // 10))
        if now != self._last:
            self._last = now
            print(f"{_words(message)} {message.percent:.0f}%", file=sys.stderr, flush=True)


def _words(message: Progressing) -> str:
    if isinstance(message, training_pb2.TrainingProgress) and message.epoch:
        return f"{message.stage}, epoch {message.epoch}/{message.num_epochs}"
    if isinstance(message, common_pb2.Progress) and message.num_done and not message.num_total:
        return f"{message.stage}, {message.num_done / 1e6:.1f} MB"  # a file of unknown size
    return message.stage
