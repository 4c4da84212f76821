"""What every annotation format yields: which images there are, their labels, the classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from services.preprocess.domain import InvalidData, Problem, check_box
from services.preprocess.headers import EXTENSIONS
from services.preprocess.images import extension_of

MAX_LABEL_BYTES = 4 << 20
MAX_CLASSES = 10_000

_OTHER_PICTURES = frozenset(
    ".gif .svg .pdf .heic .heif .avif .jp2 .jxl .psd .ico .tga .ppm .pgm .pnm .exr .hdr".split()
)

ReadFile: TypeAlias = Callable[[str], bytes]
"""Reads a file of the archive by its path."""

ClassKey: TypeAlias = int | str
"""A class as a label file names it: YOLO by index, Pascal VOC by name."""

# As in the names of resources: controls, and overrides that make one name look like another.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Format(StrEnum):
    """Layouts that are read."""

    YOLO = "YOLO"
    VOC = "VOC"


@dataclass(frozen=True, slots=True)
class Sample:
    """An image, the label file that belongs to it, and the archive's split, if there are such."""

    image: str
    label: str | None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What a format found in an archive before any image is decoded.

    Attributes:
        format: The format.
        samples: Images in the order of their paths.
        class_names: Declared classes; None if only the labels tell.
        problems: Labels without image and the like.
    """

    format: Format
    samples: tuple[Sample, ...]
    class_names: tuple[str, ...] | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Labels:
    """The boxes of one image.

    Attributes:
        classes: One class per box.
        boxes: Flat x1, y1, x2, y2 per box in pixels of the upright image.
        problems: Boxes that are wrong and therefore not among them, and warnings.
        crowds: Whether each box is a crowd region; empty if none is.
    """

    classes: tuple[ClassKey, ...] = ()
    boxes: tuple[float, ...] = ()
    problems: tuple[Problem, ...] = ()
    crowds: tuple[bool, ...] = ()


class LabelsBuilder:
    """Collects the boxes of one image of `width` x `height` pixels, checking each."""

    def __init__(self, width: int, height: int) -> None:
        self._width = width
        self._height = height
        self._classes: list[ClassKey] = []
        self._boxes: list[float] = []
        self._problems: list[Problem] = []

    def add(self, where: str, key: ClassKey, box: tuple[float, float, float, float]) -> None:
        """Adds a box (x1, y1, x2, y2 in pixels), or the problem with it."""
        try:
            inside, warning = check_box(where, *box, self._width, self._height)
        except InvalidData as error:
            self._problems.append(error.problem)
            return
        if warning is not None:
            self._problems.append(warning)
        self._classes.append(key)
        self._boxes.extend(inside)

    def refuse(self, problem: Problem) -> None:
        """Records what could not be read as a box."""
        self._problems.append(problem)

    def build(self) -> Labels:
        """Returns what was collected."""
        return Labels(tuple(self._classes), tuple(self._boxes), tuple(self._problems))


class PathIndex:
    """The paths of an archive, found without regard to case (names are unique in that sense)."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(paths)
        self._by_key = {path.casefold(): path for path in self.paths}
        self._images: dict[tuple[str, str], str] = {}
        self.images = [path for path in self.paths if is_picture(path)]
        for path in self.images:
            self._images.setdefault((folder_of(path).casefold(), stem_of(path).casefold()), path)

    def find(self, path: str) -> str | None:
        """Returns the path as it is spelt in the archive."""
        return self._by_key.get(path.casefold())

    def find_image(self, folder: str, stem: str) -> str | None:
        """Returns the image of this stem in a folder, whatever its extension."""
        return self._images.get((folder.casefold(), stem.casefold()))


def is_picture(path: str) -> bool:
    """Says whether a name is that of a picture, of a supported format or not."""
    extension = extension_of(path)
    return extension in EXTENSIONS or extension in _OTHER_PICTURES


def folder_of(path: str) -> str:
    """Returns the folder of a path, without a slash at the end; empty at the top."""
    return path.rpartition("/")[0]


def stem_of(path: str) -> str:
    """Returns the last part of a path without its extension."""
    return path.rpartition("/")[2].rpartition(".")[0]


def replace_folder(folder: str, names: frozenset[str], other: str) -> str | None:
    """Replaces the last folder that bears one of the (lower-case) names; None if none does."""
    parts = folder.split("/")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].casefold() in names:
            return (
                "/".join([*parts[:i], other, *parts[i + 1 :]])
                if other
                else "/".join([*parts[:i], *parts[i + 1 :]])
            )
    return None


def class_name_problem(name: str) -> str:
    """Says what is wrong with a class name; empty if nothing is."""
    if not name.strip():
        return "a class name is empty"
    if len(name) > 200 or _CONTROLS.search(name):
        return (
            f"class name {name[:50]!r} is longer than 200 characters, or has control characters or"
            " such that change the direction of writing"
        )
    return ""
