"""How the command line prints: text for people, JSON for programs, progress for both."""

import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import orjson
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from detflow.errors import DetflowError


def printable(text: str) -> str:
    """Replaces what would control a terminal or change the direction of writing."""
    return "".join(
        "\ufffd" if unicodedata.category(character) in ("Cc", "Cf") else character
        for character in text
    )


def say(text: str = "") -> None:
    """Prints a line for people."""
    print(text, flush=True)


def complain(text: str) -> None:
    """Prints an error on stderr, in one line."""
    print(f"detflow: {' '.join(printable(line) for line in text.splitlines())}", file=sys.stderr)


def complain_about(error: DetflowError) -> None:
    """Prints an error with what is wrong in detail."""
    complain(error.message)
    for violation in error.violations:
        print(
            f"  {printable(violation.field)}: {violation.reason}:"
            f" {printable(violation.description)}",
            file=sys.stderr,
        )
    if error.total > len(error.violations) > 0:
        print(f"  and {error.total - len(error.violations)} more", file=sys.stderr)


def as_dict(message: Message) -> dict[str, Any]:
    """Renders a message as the HTTP API does."""
    value: dict[str, Any] = MessageToDict(message, always_print_fields_with_no_presence=True)
    return value


def say_json(value: Message | Mapping[str, Any], *, one_line: bool = False) -> None:
    """Prints JSON, as the HTTP API would answer."""
    document = as_dict(value) if isinstance(value, Message) else dict(value)
    option = 0 if one_line else orjson.OPT_INDENT_2
    say(orjson.dumps(document, option=option).decode())


def say_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, empty: str) -> None:
    """Prints aligned columns, or `empty` where there are no rows."""
    lines = [[printable(cell) for cell in row] for row in rows]
    if not lines:
        say(empty)
        return
    lines.insert(0, list(header))
    widths = [max(cell_len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = (
            cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)
        )
        say("  ".join(cells).rstrip())


def say_fields(fields: Mapping[str, str]) -> None:
    """Prints one thing as "name  value" lines."""
    width = max(len(name) for name in fields)
    for name, value in fields.items():
        say(f"{name:<{width}}  {printable(value)}")


def duration(seconds: float) -> str:
    """Renders a duration as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(num_bytes: int) -> str:
    """Renders a number of bytes."""
    if num_bytes < 1000:
        return f"{num_bytes} B"
    value = float(num_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.3g} {unit}"


class Bar:
    """Progress: a live bar in a terminal; otherwise a line per stage and per ten percent.

    Args:
        silent: Show nothing.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._stage = ""
        self._tenth = -1
        self._live: Live | None = None
        if sys.stdout.isatty() and not silent:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%"),
                expand=True,
            )
            self._task = self._progress.add_task("", total=100.0)
            self._details = Text()
            # What is said beside the bar has a line of its own: a narrow terminal keeps both.
            self._live = Live(
                Group(self._progress, self._details),
                console=Console(highlight=False),
                transient=True,
                refresh_per_second=8,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Prints a line that stays."""
        if self._silent:
            return
        if self._live is not None:
            self._live.console.print(Text(printable(text)))
        else:
            say(printable(text))

    def update(self, stage: str, percent: float, details: str = "") -> None:
        """Shows how far a stage is, in percent, with further facts."""
        if self._silent:
            return
        if self._live is not None:
            self._progress.update(
                self._task, description=escape(printable(stage)), completed=percent
            )
            self._details.plain = printable(details)
            return
        tenth = int(percent // 10)
        if stage != self._stage or tenth > self._tenth:
            self._stage, self._tenth = stage, tenth
            say(f"{printable(stage)} {percent:.0f}% {printable(details)}".rstrip())
