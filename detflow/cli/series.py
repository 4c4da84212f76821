"""How the series of a training are shown: as plots on a terminal, elsewhere as numbers."""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence

from detflow.cli import output, plots
from detflow.errors import InvalidArgument
from detflow.v1 import metrics_pb2

_QUALITY = ("map50_95", "map50", "precision", "recall", "f1")


def chosen(names: Iterable[str], patterns: Sequence[str]) -> Sequence[str]:
    """Returns the names that match a pattern, such as `val/map50` or `train/*`.

    Raises:
        InvalidArgument: Nothing matches one of them.
    """
    known = list(names)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise InvalidArgument(
                f"no series {pattern!r}; there are {', '.join(known)}"
                if known
                else f"no series {pattern!r}: nothing is measured yet",
                reason="SERIES_NOT_FOUND",
            )
    return [name for name in known if matches(name, patterns)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Says whether a name is one of the patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def say_series(series: Sequence[metrics_pb2.MetricSeries]) -> None:
    """Draws series on a terminal; prints their numbers where the output is none."""
    console = plots.terminal()
    by_step = any(one.positions for one in series)
    if console is not None:
        points = {one.name: (one.positions or one.epochs, one.values) for one in series}
        for place, plot in enumerate(plots_of(points, by_step)):
            if place:
                output.say()
            console.print(plots.drawn(plot, console))
    elif by_step:
        output.say_table(
            ("SERIES", "EPOCHS DONE", "VALUE"),
            (
                (one.name, f"{position:.4f}", number(one.name, value))
                for one in series
                for position, value in zip(one.positions, one.values, strict=True)
            ),
            empty="nothing is measured yet",
        )
    else:
        rows = by_epoch(series)
        output.say_table(
            ("EPOCH", *(output.printable(one.name) for one in series)),
            (
                (
                    f"{epoch}",
                    *(
                        "-" if value is None else number(one.name, value)
                        for one, value in zip(series, values, strict=True)
                    ),
                )
                for epoch, values in rows.items()
            ),
            empty="no epoch is finished yet",
        )


def number(name: str, value: float) -> str:
    """Renders a value of the series, or a dash where it is none: NaN, or infinite."""
    if not math.isfinite(value):
        return "-"
    return output.size(round(value)) if name.endswith("_bytes") else f"{value:.5g}"


def by_epoch(series: Sequence[metrics_pb2.MetricSeries]) -> Mapping[int, Sequence[float | None]]:
    """Returns for each epoch the value of each series; None where it has none."""
    values = [dict(zip(one.epochs, one.values, strict=True)) for one in series]
    epochs = sorted({epoch for one in values for epoch in one})
    return {epoch: [one.get(epoch) for one in values] for epoch in epochs}


def plots_of(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]], by_step: bool
) -> list[plots.Plot]:
    """Puts series that measure the same in one plot: `train/box_loss` with `val/box_loss`.

    Args:
        points: Positions and values by name.
        by_step: Positions are epochs done when a step was measured; otherwise epochs, from 1.
    """
    groups: dict[str, list[str]] = {}
    for name in points:
        what = name.rpartition("/")[2]
        groups.setdefault("quality" if what in _QUALITY else what, []).append(name)
    titles = sorted(groups, key=lambda title: title != "quality")  # the rest as it came
    return [
        plots.Plot(
            title=title,
            x_label="epochs done" if by_step else "epoch",
            whole_x=not by_step,
            y_range=(0.0, 1.0) if title == "quality" else None,
            lines=[
                plots.Line(name=output.printable(name), xs=points[name][0], ys=points[name][1])
                for name in groups[title][start : start + plots.MAX_LINES]
            ],
        )
        for title in titles
        for start in range(0, len(groups[title]), plots.MAX_LINES)
    ]
