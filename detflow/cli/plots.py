"""Lines drawn in the terminal with plotext: as wide as it, coloured where it has colours."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import plotext
from rich.console import Console, Group
from rich.text import Text

from detflow.cli.output import printable

MAX_LINES = 8
_MAX_WIDTH = 120
_HEIGHT = 16
_NUM_TICKS = 5
# Codes of the 16 colours that a terminal's own theme makes legible on its background.
_COLOURS = (4, 1, 2, 5, 3, 6, 12, 9)
_PLAIN_MARKERS = ("*", "o", "+", "x", "#", "@", "%", "&")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line of a plot.

    Attributes:
        name: Its name in the legend.
        xs: Positions, increasing.
        ys: As many values; NaN and infinities are left out.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """Lines over one axis.

    Attributes:
        title: What it shows.
        x_label: What is on the horizontal axis.
        lines: At most `MAX_LINES`.
        x_range: Ends of the horizontal axis; None fits it to the lines.
        y_range: Ends of the vertical axis; None fits it to the lines.
        whole_x: The horizontal axis counts something, e.g. epochs.
    """

    title: str
    x_label: str
    lines: Sequence[Line]
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    whole_x: bool = False


def terminal() -> Console | None:
    """Returns the terminal that plots can be drawn on; None where the output is none."""
    console = Console(highlight=False)
    return console if console.is_terminal and not console.options.ascii_only else None


def bar(share: float, width: int) -> str:
    """Draws a bar of `share` of the width; what is there is always seen."""
    cell = "#" if Console().options.ascii_only else "█"
    return cell * max(round(share * width), share > 0)


def drawn(plot: Plot, console: Console, *, height: int = _HEIGHT) -> Group:
    """Draws a plot for a terminal: title and legend, then the lines within `height` rows."""
    has_colours = console.color_system is not None and not console.no_color
    finite = [_finite(line) for line in plot.lines]
    legend = Text(printable(plot.title))
    for number, line in enumerate(plot.lines):
        marker, style = ("━", f"color({_COLOURS[number]})") if has_colours else (_mark(number), "")
        legend.append("   ").append(marker, style).append(f" {printable(line.name)}")
        if not finite[number].xs:
            legend.append(" (nothing measured)")
    if not any(line.xs for line in finite):
        return Group(legend)
    return Group(
        legend, Text.from_ansi(_canvas(plot, finite, (console.width, height), has_colours))
    )


def _canvas(plot: Plot, lines: Sequence[Line], size: tuple[int, int], has_colours: bool) -> str:
    # plotext keeps one figure for the whole process, so each drawing begins it anew.
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(min(size[0], _MAX_WIDTH), size[1])
    for number, line in enumerate(lines):
        if not line.xs:
            continue
        draw = plotext.plot if len(line.xs) > 1 else plotext.scatter
        if has_colours:
            marker = "braille" if len(line.xs) > 1 else "•"
            draw(line.xs, line.ys, marker=marker, color=_COLOURS[number])
        else:
            draw(line.xs, line.ys, marker=_mark(number))
    low, high = plot.x_range or _ends([line.xs for line in lines])
    ticks = _ticks(low, high, whole=plot.whole_x)
    plotext.xlim(low, high)
    plotext.xticks(ticks, [_number(tick) for tick in ticks])
    low, high = plot.y_range or _ends([line.ys for line in lines])
    ticks = _ticks(low, high)
    plotext.ylim(low, high)
    plotext.yticks(ticks, [_number(tick) for tick in ticks])
    plotext.xlabel(plot.x_label)
    return str(plotext.build()).rstrip()


def _mark(number: int) -> str:
    return _PLAIN_MARKERS[number % len(_PLAIN_MARKERS)]


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    return Line(name=line.name, xs=[x for x, _ in points], ys=[y for _, y in points])


def _ends(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns lowest and highest value, apart even if there is but one."""
    everything = list(itertools.chain.from_iterable(values))
    low, high = min(everything), max(everything)
    if low < high:
        return low, high
    margin = abs(low) / 2 or 0.5
    return low - margin, high + margin


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns round numbers of the range, about as many as `_NUM_TICKS`."""
    rough = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
    if whole:
        step = max(math.ceil(step), 1)
    return [
        round(number * step, 12)
        for number in range(math.ceil(low / step), math.floor(high / step * 1.000001) + 1)
    ]


def _number(value: float) -> str:
    return f"{value:.4g}"
