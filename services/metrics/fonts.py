"""Fonts for class names in any script, from the packages that bring them.

Nanum Gothic covers Hangul, Latin, kana and the common Han characters, DejaVu Sans most other
alphabets and symbols. What neither has is shown as a box that names its script.
"""

from __future__ import annotations

import functools
import importlib.util
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from matplotlib.ft2font import FT2Font
from PIL import ImageFont


@functools.cache
def font_files() -> tuple[Path, ...]:
    """Lists the font files to look for a character in, best first; the last has every character.

    The packages are not imported: importing one of them changes the settings of matplotlib.
    """
    nanum = _folder("koreanize_matplotlib") / "fonts"
    others = _folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    return (
        nanum / "NanumGothicBold.ttf",
        others / "DejaVuSans-Bold.ttf",
        others / "LastResortHE-Regular.ttf",
    )


def runs(text: str, size_px: int) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
    """Cuts a text into parts that one font has all characters of, in the order of the text.

    Marks and joiners stay with the character before them.
    """
    start, current = 0, -1
    for position, character in enumerate(text):
        if current >= 0 and unicodedata.category(character) in ("Mn", "Me", "Cf"):
            continue
        wanted = _font_of(character)
        if character.isspace() and current >= 0:
            wanted = current
        if wanted != current and current >= 0:
            yield text[start:position], _font(current, size_px)
            start = position
        current = wanted
    if text:
        yield text[start:], _font(current, size_px)


@functools.lru_cache(maxsize=64)
def _font(index: int, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_files()[index], size_px)


@functools.lru_cache(maxsize=4096)
def _font_of(character: str) -> int:
    *known, last = range(len(font_files()))
    return next((index for index in known if ord(character) in _characters(index)), last)


@functools.cache
def _characters(index: int) -> frozenset[int]:
    return frozenset(FT2Font(str(font_files()[index])).get_charmap())


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} brings the fonts of pictures; install detflow[metrics]"
        )
    return Path(spec.submodule_search_locations[0])
