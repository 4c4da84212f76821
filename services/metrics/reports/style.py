"""How charts look: fonts, colours, axes. Nothing of pyplot, whose state threads would share."""

from __future__ import annotations

import io
import logging
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from services.metrics.fonts import font_files

INK, INK_2, LINE, SURFACE, SOFT = "#16202b", "#55616f", "#dfe3e8", "#ffffff", "#e0f2ef"
BRAND, OK, BAD, WARN = "#0b6b63", "#1f6b3a", "#b3261e", "#8a5300"
SERIES = (BRAND, "#b45309", "#4f46e5", "#be185d", "#0369a1", "#4d7c0f", "#7c3aed", INK_2)
"""Colours of lines, in the order they are taken."""

WIDTH = 5.8
"""Width of a chart in inches; at 200 dots an inch a PNG is 1160 px wide."""

_FONTS = ("NanumGothic.ttf", "NanumGothicBold.ttf")
_MAX_LETTERS = 26


def _register_fonts() -> list[str]:
    """Makes fonts known that have Hangul; returns the families to draw with, first choice first."""
    # Each family lacks some weight and has one near it; no need to say so for every chart.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    folder = font_files()[0].parent
    for name in _FONTS:
        font_manager.fontManager.addfont(folder / name)
    known = set(font_manager.fontManager.get_font_names())
    wanted = ("NanumGothic", "DejaVu Sans", "Noto Sans CJK KR", "Noto Sans CJK JP")
    return [family for family in wanted if family in known]


_RC: dict[str, Any] = {
    "font.family": _register_fonts(),
    "font.size": 9.5,
    "text.parse_math": False,  # a class may be called $100$
    "text.color": INK,
    "axes.unicode_minus": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK_2,
    "axes.labelsize": 9,
    "axes.titlesize": 11.5,
    "axes.titleweight": 600,
    "axes.titlelocation": "left",
    "axes.titlepad": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK_2,
    "ytick.labelcolor": INK_2,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": SURFACE,
    "svg.fonttype": "path",  # letters as they look here, whatever fonts a reader has
    "svg.hashsalt": "detflow",
}


@contextmanager
def styled() -> Iterator[None]:
    """Draws in detflow's style; of one thread at a time, since matplotlib's settings are global."""
    with matplotlib.rc_context(cast(Any, _RC)), warnings.catch_warnings():
        # A letter that no font has is drawn as a box; the tables have it as it is.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """Makes an empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=200)


def axes(drawing: Figure, title: str, x: str = "", y: str = "") -> Axes:
    """Adds the only axes of a figure."""
    area = drawing.add_subplot()
    area.set_title(title)
    area.set_xlabel(x)
    area.set_ylabel(y)
    return area


def legend(area: Axes, num_columns: int = 4) -> None:
    """Puts the legend below, where it hides nothing."""
    area.figure.legend(loc="outside lower center", ncols=num_columns, handlelength=1.6)


def render(drawing: Figure, *, svg: bool) -> bytes:
    """Makes the file of a figure: the same figure gives the same bytes."""
    file = io.BytesIO()
    if svg:
        drawing.savefig(file, format="svg", metadata={"Date": None, "Creator": "detflow"})
    else:
        drawing.savefig(file, format="png", metadata={"Software": "detflow"})
    return file.getvalue()


def label(text: str) -> str:
    """Makes what a user named fit for a chart: one line, not too long, nothing invisible."""
    seen = "".join(
        "\ufffd" if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") else letter
        for letter in text
    )
    seen = seen.replace("\\", "\N{SET MINUS}")  # Korean fonts draw a won sign for a backslash
    return seen if len(seen) <= _MAX_LETTERS else seen[: _MAX_LETTERS - 1] + "…"
