"""YOLO: one text file per image, one `class cx cy w h` row per box, as shares of the image.

Layouts, each below any folder: `images/<split>/a.jpg` with `labels/<split>/a.txt`,
`<split>/images/a.jpg` with `<split>/labels/a.txt`, `images/a.jpg` with `labels/a.txt`, `a.jpg` with
`labels/a.txt`, and `a.txt` beside `a.jpg`. Classes come from data.yaml (`names`), else from
classes.txt or obj.names, else they are named class_0, class_1, ...

The split of an image is what data.yaml or a list (train.txt) says of it, else what its folder is
called. Paths in those files are compared with the names in the archive and never followed; a
`download` is never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal, localcontext
from typing import TypeVar

from services.preprocess.domain import InvalidData, Problem, Reason
from services.preprocess.formats.data_yaml import DataYaml, read_data_yaml
from services.preprocess.formats.layout import (
    MAX_CLASSES,
    MAX_LABEL_BYTES,
    Format,
    Labels,
    LabelsBuilder,
    Layout,
    PathIndex,
    ReadFile,
    Sample,
    folder_of,
    read_class_list,
    replace_folder,
    stem_of,
)
from services.preprocess.formats.splits import find_splits

_IMAGE_FOLDERS = frozenset("images jpegimages image imgs img".split())
_LABEL_FOLDERS = frozenset({"labels"})
_YAML_STEMS = frozenset({"data", "dataset", "obj", "custom"})
_CLASS_FILES = frozenset({"classes.txt", "obj.names", "classes.names", "_darknet.labels"})
_NO_LABELS = frozenset(
    "classes labels names train val valid validation test predefined_classes notes license".split()
)
_NUM_COLUMNS = 5
DIGITS = 40
"""Decimal digits that boxes are computed with."""
_RESOLUTION = Decimal("1e-30")
_MAX_EDGE = 1_000_000

T = TypeVar("T")


def is_there(index: PathIndex) -> bool:
    """Says whether there are label rows for images, or a data.yaml."""
    return (
        any(stem_of(path).casefold() == "data" for path in _yaml_files(index))
        or any(_labels_of(index, image) for image in index.images)
        or any(_in_labels(path) for path in _text_files(index))
    )


def find_layout(index: PathIndex, read: ReadFile) -> Layout:
    """Pairs label files with images; images without one are background.

    Args:
        index: Paths of the archive.
        read: Reads a file; used for data.yaml, class lists and lists of images.

    Raises:
        InvalidData: UNKNOWN_LAYOUT, BAD_DATA_YAML or AMBIGUOUS_LAYOUT.
    """
    labels: dict[str, str] = {}
    owners: dict[str, str] = {}
    problems: list[Problem] = []
    for image in index.images:
        found = _labels_of(index, image)
        if len(found) > 1:
            problems.append(
                Problem(
                    found[1],
                    Reason.AMBIGUOUS_LAYOUT,
                    f"{image} has the label file {found[0]} too; delete one",
                )
            )
        elif found and found[0] in owners:
            problems.append(
                Problem(
                    image,
                    Reason.DUPLICATE_NAME,
                    f"{owners[found[0]]} has the same label file {found[0]}; rename one",
                )
            )
        if found:
            labels[image] = found[0]
            owners.setdefault(found[0], image)
    folders = {folder_of(image) for image in labels}
    images = [
        image
        for image in index.images
        if folder_of(image) in folders
        or replace_folder(folder_of(image), _IMAGE_FOLDERS, "labels") is not None
    ]
    if not images:
        raise InvalidData(
            "archive",
            Reason.UNKNOWN_LAYOUT,
            "no image has a label file; put images into images/ and labels into labels/",
        )
    used = {label for image in index.images for label in _labels_of(index, image)}
    problems.extend(
        Problem(
            path,
            Reason.MISSING_IMAGE,
            f"there is no image {stem_of(path)}.* for it; add the image or delete the label file",
        )
        for path in _text_files(index)
        if path not in used and _is_label(path, folders)
    )
    described = _find_yaml(index, read)
    lists = [path for path in _text_files(index) if path not in used and not _in_labels(path)]
    splits = find_splits(index, images, lists, described.hints if described else {}, read, problems)
    return Layout(
        Format.YOLO,
        tuple(Sample(image, labels.get(image), splits.get(image)) for image in images),
        described.names if described else _read_class_lists(index, read),
        tuple(problems),
    )


def parse_labels(path: str, data: bytes, size: tuple[int, int], num_classes: int | None) -> Labels:
    """Reads the rows of a label file.

    Args:
        path: Path of the file, for messages, which add the line from 1.
        data: Its content.
        size: Width and height of the upright image in pixels.
        num_classes: Declared classes; None if only the labels tell.

    Raises:
        InvalidData: CORRUPT_LABEL: the file is no text or too long.
    """
    if len(data) > MAX_LABEL_BYTES:
        raise InvalidData(
            path, Reason.CORRUPT_LABEL, f"label files above {MAX_LABEL_BYTES} bytes are not read"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(
            path, Reason.CORRUPT_LABEL, "not a text file; export the labels again"
        ) from error
    builder = LabelsBuilder(*size)
    for number, row in enumerate(text.splitlines(), start=1):
        columns = row.split()
        if not columns:
            continue
        where = f"{path}:{number}"
        if len(columns) != _NUM_COLUMNS:
            builder.refuse(
                Problem(
                    where,
                    Reason.BAD_BOX,
                    f"the row has {len(columns)} columns, not 5 (class cx cy w h);"
                    " polygons and confidences are not read",
                )
            )
            continue
        try:
            values = [float(column) for column in columns[1:]]
        except ValueError:
            builder.refuse(
                Problem(where, Reason.BAD_BOX, f"{row[:80]!r} has a column that is no number")
            )
            continue
        if (problem := _class_problem(columns[0], num_classes)) is not None:
            builder.refuse(Problem(where, Reason.UNKNOWN_CLASS, problem))
            continue
        x1, y1, x2, y2 = (
            _to_pixels(columns[1:], *size) if all(map(math.isfinite, values)) else values
        )
        builder.add(where, int(columns[0]), (x1, y1, x2, y2))
    return builder.build()


def to_edges(centre: Decimal, extent: Decimal, side: int) -> tuple[float, float]:
    """Turns centre and length, as shares of a side, into two edges in pixels, each rounded once.

    Call it with DIGITS of precision. What downloads write gives the very edges they were made of.
    """
    return _edge((centre - extent / 2) * side), _edge((centre + extent / 2) * side)


def _edge(value: Decimal) -> float:
    # An edge at 0 comes out as 3e-40 of a third of something.
    return float(value.quantize(_RESOLUTION) if abs(value) < _MAX_EDGE else value)


def _to_pixels(columns: list[str], width: int, height: int) -> tuple[float, float, float, float]:
    with localcontext(prec=DIGITS):
        cx, cy, w, h = (Decimal(column) for column in columns)
        (x1, x2), (y1, y2) = to_edges(cx, w, width), to_edges(cy, h, height)
        return x1, y1, x2, y2


def _class_problem(column: str, num_classes: int | None) -> str | None:
    limit = MAX_CLASSES if num_classes is None else num_classes
    if not (column.isascii() and column.isdigit()):
        return f"class {column[:40]!r} is no whole number from 0"
    if len(column) > 9 or int(column) >= limit:
        return f"class {column[:40]} is not below {limit}, the number of classes; declare it"
    return None


def _text_files(index: PathIndex) -> Iterator[str]:
    return (path for path in index.paths if path.casefold().endswith(".txt"))


def _in_labels(path: str) -> bool:
    return (
        replace_folder(folder_of(path), _LABEL_FOLDERS, "") is not None
        and stem_of(path).casefold() not in _NO_LABELS
    )


def _is_label(path: str, labelled_folders: set[str]) -> bool:
    if _in_labels(path):
        return True
    stem = stem_of(path).casefold()
    return (
        folder_of(path) in labelled_folders
        and stem not in _NO_LABELS
        and not stem.startswith("readme")
    )


def _labels_of(index: PathIndex, image: str) -> list[str]:
    """Returns the label files of an image: one, unless it is labelled in several layouts."""
    folder, stem = folder_of(image), stem_of(image)
    folders = [replace_folder(folder, _IMAGE_FOLDERS, "labels"), f"{folder}/labels", folder]
    found = (index.find(f"{f}/{stem}.txt".lstrip("/")) for f in folders if f is not None)
    return list(dict.fromkeys(label for label in found if label is not None))


def _yaml_files(index: PathIndex) -> list[str]:
    return [path for path in index.paths if path.casefold().endswith((".yaml", ".yml"))]


def _topmost(paths: list[str]) -> list[str]:
    top = min((path.count("/") for path in paths), default=0)
    return [path for path in paths if path.count("/") == top]


def _find_yaml(index: PathIndex, read: ReadFile) -> DataYaml | None:
    """Reads data.yaml, else any YAML file with names, nearest to the top.

    Raises:
        InvalidData: BAD_DATA_YAML, or AMBIGUOUS_LAYOUT: two of them differ.
    """
    paths = _yaml_files(index)
    meant = [path for path in paths if stem_of(path).casefold() in _YAML_STEMS]
    found: dict[str, DataYaml] = {}
    for path in _topmost(meant or paths):
        try:
            found[path] = read_data_yaml(path, read(path))
        except InvalidData:
            if meant:
                raise
    return _same(found)


def _read_class_lists(index: PathIndex, read: ReadFile) -> tuple[str, ...] | None:
    paths = [p for p in index.paths if p.rpartition("/")[2].casefold() in _CLASS_FILES]
    return _same({path: read_class_list(path, read(path)) for path in _topmost(paths)})


def _same(found: Mapping[str, T]) -> T | None:
    """Returns what all files say.

    Raises:
        InvalidData: AMBIGUOUS_LAYOUT: they differ.
    """
    first = next(iter(found.items()), None)
    for path, value in found.items():
        if first and value != first[1]:
            raise InvalidData(
                path,
                Reason.AMBIGUOUS_LAYOUT,
                f"it differs from {first[0]}; keep one of them",
            )
    return first[1] if first else None
