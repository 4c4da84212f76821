"""What every annotation format yields: which images there are, their labels, the classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from detflow.image_headers import EXTENSIONS, extension_of
from services.preprocess.domain import InvalidData, Problem, Reason, check_box

MAX_LABEL_BYTES = 4 << 20
MAX_LIST_BYTES = 64 << 20
MAX_CLASSES = 10_000

_OTHER_PICTURES = frozenset(
    ".gif .svg .pdf .heic .heif .avif .jp2 .jxl .psd .ico .tga .ppm .pgm .pnm .exr .hdr".split()
)

ReadFile: TypeAlias = Callable[[str], bytes]
"""Reads a file of the archive by its path."""

ClassKey: TypeAlias = int | str
"""A class as a label file names it: YOLO by index, Pascal VOC by name."""

# As in the names of resources: controls, and overrides that make one name look like another.
# Nor lone surrogates and U+FFFE, which no text file can hold.
_CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


class Format(StrEnum):
    """Layouts that are read."""

    YOLO = "YOLO"
    VOC = "VOC"
    COCO = "COCO"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The annotations of one image in a file that holds those of many.

    Attributes:
        path: The file.
        numbers: Index of each annotation in the file, shape (n,).
        classes: Index into the layout's class names, shape (n,).
        boxes: x, y, width, height in pixels, shape (n, 4); not checked yet.
        crowds: Whether each is a crowd region, shape (n,).
    """

    path: str
    numbers: NDArray[np.int32]
    classes: NDArray[np.int32]
    boxes: NDArray[np.float64]
    crowds: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Sample:
    """An image with its label file or annotations and the archive's split, where there are such."""

    image: str
    label: str | None
    split: str | None = None
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What a format found in an archive before any image is decoded.

    Attributes:
        format: The format.
        samples: Images in the order of their paths.
        class_names: Declared classes; None if only the labels tell.
        problems: Labels without image and the like, and warnings; at most MAX_KEPT_PROBLEMS.
        num_more_problems: How many were not kept.
        left_out: Images that are no samples because of a problem.
    """

    format: Format
    samples: tuple[Sample, ...]
    class_names: tuple[str, ...] | None
    problems: tuple[Problem, ...]
    num_more_problems: int = 0
    left_out: frozenset[str] = frozenset()


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
        self._crowds: list[bool] = []
        self._problems: list[Problem] = []

    def add(
        self,
        where: str,
        key: ClassKey,
        box: tuple[float, float, float, float],
        *,
        crowd: bool = False,
    ) -> None:
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
        self._crowds.append(crowd)

    def refuse(self, problem: Problem) -> None:
        """Records what could not be read as a box."""
        self._problems.append(problem)

    def build(self) -> Labels:
        """Returns what was collected."""
        return Labels(
            tuple(self._classes),
            tuple(self._boxes),
            tuple(self._problems),
            tuple(self._crowds) if any(self._crowds) else (),
        )


class PathIndex:
    """The paths of an archive, found without regard to case and Unicode form.

    Names are unique in that sense.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = sorted(paths)
        self._by_key = {_key(path): path for path in self.paths}
        self._by_stem: dict[tuple[str, str], list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        self.images = [path for path in self.paths if is_picture(path)]
        for path in self.images:
            key = _key(path)
            self._by_stem.setdefault((folder_of(key), stem_of(key)), []).append(path)
            self._by_name.setdefault(key.rpartition("/")[2], []).append(path)

    def find(self, path: str) -> str | None:
        """Returns the path as it is spelt in the archive."""
        return self._by_key.get(_key(path))

    def find_images(self, folder: str, stem: str) -> list[str]:
        """Returns the images of this stem in a folder, whatever their extension."""
        return self._by_stem.get((_key(folder), _key(stem)), [])

    def find_image(self, reference: str, near: Iterable[str] = ()) -> str | None:
        """Returns the image that a path in some file means, wherever that path was written.

        An image in one of the folders `near` comes first, then the only one whose path ends like
        the reference, then the only one of this name. Nothing outside the archive is looked at.

        Raises:
            LookupError: Several images could be meant; the text names two.
        """
        parts = [p for p in reference.replace("\\", "/").split("/") if p not in ("", ".", "..")]
        wanted = "/".join(parts)
        named = self._by_name.get(_key(parts[-1]), []) if parts else []
        if len(named) > 1:
            for folder in near:
                if (found := self.find(f"{folder}/{wanted}".lstrip("/"))) is not None:
                    return found
            suffix = "/" + _key(wanted)
            ending = [path for path in named if ("/" + _key(path)).endswith(suffix)]
            named = ending if len(ending) == 1 else named
        if len(named) > 1:
            raise LookupError(f"{named[0]} and {named[1]}")
        return named[0] if named else None


def is_picture(path: str) -> bool:
    """Says whether a name is that of a picture, of a supported format or not."""
    extension = extension_of(path)
    return extension in EXTENSIONS or extension in _OTHER_PICTURES


def _key(path: str) -> str:
    return path.casefold() if path.isascii() else unicodedata.normalize("NFC", path).casefold()


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
            f"class name {name[:50]!r} is longer than 200 characters, or has control characters,"
            " such that change the direction of writing, or such that are none"
        )
    return ""


def text_lines(path: str, data: bytes) -> list[str]:
    """Returns the lines of a UTF-8 text file.

    Raises:
        InvalidData: CORRUPT_LABEL: it is no such file, or longer than MAX_LIST_BYTES.
    """
    if len(data) > MAX_LIST_BYTES:
        raise InvalidData(
            path, Reason.CORRUPT_LABEL, f"lists above {MAX_LIST_BYTES} bytes are not read"
        )
    try:
        return [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise InvalidData(
            path, Reason.CORRUPT_LABEL, "not a UTF-8 text file; write it again"
        ) from error


def read_class_list(path: str, data: bytes) -> tuple[str, ...]:
    """Reads a file with one class name in each line.

    Raises:
        InvalidData: CORRUPT_LABEL or BAD_DATA_YAML.
    """
    lines = (line.strip() for line in text_lines(path, data))
    return check_class_names(path, [line for line in lines if line])


def check_class_names(path: str, names: Sequence[str]) -> tuple[str, ...]:
    """Checks a list of class names; blanks around them do not count.

    Raises:
        InvalidData: BAD_DATA_YAML: one is empty or twice, or there are none or too many.
    """
    names = [name.strip() for name in names]
    problem = next((text for name in names if (text := class_name_problem(name))), "")
    if not names or len(names) > MAX_CLASSES:
        problem = f"{len(names)} classes; there must be 1 to {MAX_CLASSES}"
    elif len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        problem = f"class {twice!r} is there twice"
    if problem:
        raise InvalidData(path, Reason.BAD_DATA_YAML, f"{problem}; correct the class names")
    return tuple(names)
