"""The series of a training while they grow: `detflow metrics --watch`."""

import threading
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live

from detflow.cli import output, plots
from detflow.cli.series import matches, number, plots_of
from detflow.cli.session import Session
from detflow.v1 import metrics_pb2, training_pb2

WATCHED = ("*/map50*", "*/precision", "*/recall", "*_loss")
"""What is watched unless something is asked for."""

_MAX_KEPT = 2000
_MIN_ROWS = 9
_MAX_ROWS = 16
_REFRESHES_PER_SECOND = 4


class Growing:
    """Series as a watch tells them, with what later attempts made void taken out.

    Args:
        patterns: Names or patterns of the series that are kept.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = patterns
        self._points: dict[str, dict[float, float]] = {}
        self._attempt = 0
        self._lock = threading.Lock()

    def on_snapshot(self, series: Sequence[metrics_pb2.MetricSeries]) -> None:
        """Begins with a snapshot."""
        with self._lock:
            self._attempt = 0
            self._points = {
                one.name: {
                    float(position): value
                    for position, value in zip(one.positions or one.epochs, one.values, strict=True)
                }
                for one in series
                if matches(one.name, self._patterns)
            }

    def on_points(self, points: metrics_pb2.MetricPoints) -> Mapping[str, float]:
        """Takes in an epoch; returns what of it is kept, by name."""
        kept = {name: value for name, value in points.values.items() if self._keeps(name)}
        with self._lock:
            self._void(points.attempt, float(points.epoch))
            for name, value in kept.items():
                self._add(name, float(points.epoch), value)
        return kept

    def on_steps(self, steps: training_pb2.StepMetrics) -> Mapping[str, float]:
        """Takes in some steps; returns the last value of each series that is kept, by name."""
        numbers = range(steps.first_step, steps.first_step + max(_lengths(steps), default=0))
        positions = [steps.epoch - 1 + number / max(steps.num_steps, 1) for number in numbers]
        columns = {one.name: one.values for one in steps.columns if self._keeps(one.name)}
        with self._lock:
            if positions:
                self._void(steps.attempt, positions[0])
            for name, values in columns.items():
                for position, value in zip(positions, values, strict=False):
                    self._add(name, position, value)
        return {name: values[-1] for name, values in columns.items() if values}

    def points(self) -> Mapping[str, tuple[Sequence[float], Sequence[float]]]:
        """Returns positions and values of each series, sorted by name."""
        with self._lock:
            return {
                name: (list(points), list(points.values()))
                for name, points in sorted(self._points.items())
            }

    def _keeps(self, name: str) -> bool:
        return matches(name, self._patterns)

    def _void(self, attempt: int, position: float) -> None:
        """Forgets what earlier attempts measured behind the place where a new one went on."""
        if attempt <= self._attempt:
            return
        self._attempt = attempt
        for points in self._points.values():
            for at in [at for at in points if at >= position]:
                del points[at]

    def _add(self, name: str, position: float, value: float) -> None:
        points = self._points.setdefault(name, {})
        points[position] = value
        if len(points) > 2 * _MAX_KEPT:
            self._points[name] = _thinned(points)


def _lengths(steps: training_pb2.StepMetrics) -> Iterable[int]:
    return (len(column.values) for column in steps.columns)


def _thinned(points: Mapping[float, float]) -> dict[float, float]:
    """Keeps lowest and highest of every four points in a row, so that no peak is lost."""
    items = list(points.items())
    kept: dict[float, float] = {}
    for start in range(0, len(items), 4):
        stretch = items[start : start + 4]
        ends = (min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1]))
        kept.update(sorted(ends))
    return kept


def watch_series(s: Session, training: str, patterns: Sequence[str], *, steps: bool) -> None:
    """Follows a training's series until nothing more will be measured.

    On a terminal the plots are drawn again as they grow and stay at the end; elsewhere every epoch,
    every batch of steps and every evaluation is a line. In JSON every message is a line.
    """
    messages = s.client.metrics.watch(training, steps=steps)
    if s.json:
        for message in messages:
            output.say_json(message, one_line=True)
        return
    growing = Growing(patterns)
    console = plots.terminal()
    if console is None:
        for message in messages:
            _take(growing, message, steps=steps, aloud=True)
        return
    with Live(
        console=console,
        transient=True,
        refresh_per_second=_REFRESHES_PER_SECOND,
        get_renderable=lambda: _screen(growing, console, steps),
    ):
        for message in messages:
            _take(growing, message, steps=steps, aloud=False)
    for plot in plots_of(growing.points(), steps):
        console.print(plots.drawn(plot, console))


def _take(
    growing: Growing, message: metrics_pb2.WatchMetricsResponse, *, steps: bool, aloud: bool
) -> None:
    """Takes in a message; says it `aloud` as a line."""
    line = ""
    if message.HasField("snapshot"):
        snapshot = message.snapshot
        growing.on_snapshot(snapshot.step_series if steps else snapshot.series)
        last = max((one.epochs[-1] for one in snapshot.series if one.epochs), default=0)
        line = f"after epoch {last}" if last else "no epoch is finished yet"
        if last and not steps:
            line += _values({name: ys[-1] for name, (_, ys) in growing.points().items() if ys})
    elif message.HasField("points") and not steps:
        line = f"epoch {message.points.epoch}" + _values(growing.on_points(message.points))
    elif message.HasField("steps") and steps:
        one = message.steps
        last = one.first_step + max(_lengths(one), default=1) - 1
        line = f"epoch {one.epoch}, step {last}/{one.num_steps}" + _values(growing.on_steps(one))
    elif message.HasField("evaluation"):
        line = f"measured {message.evaluation.name.rpartition('/')[2]}"
    if aloud and line:
        output.say(line)


def _values(values: Mapping[str, float]) -> str:
    return "".join(
        f", {output.printable(name)} {number(name, value)}"
        for name, value in sorted(values.items())
    )


def _screen(growing: Growing, console: Console, steps: bool) -> Group:
    """Draws the plots in equal parts of the terminal; those that do not fit are left out."""
    found = plots_of(growing.points(), steps)
    shown = found[: max(console.height // (_MIN_ROWS + 1), 1)]
    height = max(console.height // max(len(shown), 1) - 2, 5)
    return Group(*(plots.drawn(plot, console, height=min(height, _MAX_ROWS)) for plot in shown))
