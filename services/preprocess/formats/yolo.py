"""YOLO: one text file per image, one `class cx cy w h` row per box, as shares of the image.

Layouts: `images/<split>/a.jpg` with `labels/<split>/a.txt`, `<split>/images/a.jpg` with
`<split>/labels/a.txt`, `images/a.jpg` with `labels/a.txt`, and `a.txt` beside `a.jpg`. Classes come
from data.yaml (`names`), else classes.txt, else they are named class_0, class_1, ...

Of data.yaml only `names` and `nc` are read; its paths and its `download` are never followed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import yaml

from detflow.boxes import as_boxes, from_normalized_cxcywh
from services.preprocess.domain import InvalidData, Problem, Reason
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
    class_name_problem,
    folder_of,
    replace_folder,
    stem_of,
)
from services.preprocess.formats.splits import split_of_folder

_IMAGE_FOLDERS = frozenset({"images", "jpegimages"})
_LABEL_FOLDERS = frozenset({"labels"})
_YAML_STEMS = frozenset({"data", "dataset", "obj", "custom"})
_CLASS_FILES = frozenset({"classes.txt", "obj.names", "classes.names", "_darknet.labels"})
_NO_LABELS = frozenset(
    "classes labels names train val valid test predefined_classes notes license".split()
)
_MAX_YAML_BYTES = 256 << 10
_MAX_YAML_DEPTH = 10
_NUM_COLUMNS = 5


def is_there(index: PathIndex) -> bool:
    """Says whether there are label rows for images, or a data.yaml."""
    return (
        next(_yaml_files(index), None) is not None
        or any(_label_of(index, image) for image in index.images)
        or any(_in_labels(path) for path in _text_files(index))
    )


def find_layout(index: PathIndex, read: ReadFile) -> Layout:
    """Pairs label files with images; images without one are background.

    Args:
        index: Paths of the archive.
        read: Reads a file; used for data.yaml and classes.txt.

    Raises:
        InvalidData: UNKNOWN_LAYOUT, BAD_DATA_YAML or AMBIGUOUS_LAYOUT.
    """
    labels = {image: _label_of(index, image) for image in index.images}
    labelled_folders = {folder_of(image) for image, label in labels.items() if label}
    samples = tuple(
        Sample(image, labels[image], split_of_folder(folder_of(image)))
        for image in index.images
        if folder_of(image) in labelled_folders
        or replace_folder(folder_of(image), _IMAGE_FOLDERS, "labels") is not None
    )
    if not samples:
        raise InvalidData(
            "archive",
            Reason.UNKNOWN_LAYOUT,
            "no image has a label file; put images into images/ and labels into labels/",
        )
    used = {sample.label for sample in samples}
    problems = tuple(
        Problem(
            path,
            Reason.MISSING_IMAGE,
            f"there is no image {stem_of(path)}.* for it; add the image or delete the label file",
        )
        for path in _text_files(index)
        if path not in used and _is_label(path, labelled_folders)
    )
    return Layout(Format.YOLO, samples, _class_names(index, read), problems)


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
        if all(math.isfinite(v) for v in values):
            values = from_normalized_cxcywh(as_boxes(values), *size)[0].tolist()
        x1, y1, x2, y2 = values
        builder.add(where, int(columns[0]), (x1, y1, x2, y2))
    return builder.build()


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


def _label_of(index: PathIndex, image: str) -> str | None:
    folder, stem = folder_of(image), stem_of(image)
    replaced = replace_folder(folder, _IMAGE_FOLDERS, "labels")
    found = index.find(f"{replaced}/{stem}.txt") if replaced is not None else None
    return found or index.find(f"{folder}/{stem}.txt".lstrip("/"))


def _yaml_files(index: PathIndex) -> Iterator[str]:
    return (
        path
        for path in index.paths
        if path.casefold().endswith((".yaml", ".yml")) and stem_of(path).casefold() in _YAML_STEMS
    )


def _class_names(index: PathIndex, read: ReadFile) -> tuple[str, ...] | None:
    """Reads the class names of the data.yaml, else of the class list, nearest to the top."""
    lists = (p for p in index.paths if p.rpartition("/")[2].casefold() in _CLASS_FILES)
    for candidates, parse in ((_yaml_files(index), _parse_yaml), (lists, _parse_list)):
        by_depth = sorted(candidates, key=lambda path: (path.count("/"), path))
        if not by_depth:
            continue
        parsed = [parse(p, read(p)) for p in by_depth if p.count("/") == by_depth[0].count("/")]
        if any(names != parsed[0] for names in parsed):
            raise InvalidData(
                by_depth[1],
                Reason.AMBIGUOUS_LAYOUT,
                f"its classes differ from those of {by_depth[0]}; keep one of them",
            )
        return parsed[0]
    return None


def _parse_list(path: str, data: bytes) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(path, Reason.CORRUPT_LABEL, "not a UTF-8 text file") from error
    return _check_names(path, [line.strip() for line in text.splitlines() if line.strip()])


def _parse_yaml(path: str, data: bytes) -> tuple[str, ...]:
    def bad(description: str) -> InvalidData:
        return InvalidData(path, Reason.BAD_DATA_YAML, description)

    if len(data) > _MAX_YAML_BYTES:
        raise bad(f"files above {_MAX_YAML_BYTES} bytes are not read; keep names and nc only")
    try:
        _check_yaml_events(path, data)
        content = yaml.load(data, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else "unreadable"
        raise bad(f"not plain YAML ({line}); keep names and nc only") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise bad("names must be numbered 0, 1, 2, ... without gaps")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise bad("names is missing; list the class names there")
    if not all(isinstance(name, str | int | float) for name in names):
        raise bad("names must be a list of texts")
    num_classes = content.get("nc", len(names))
    if num_classes != len(names):
        raise bad(f"nc is {num_classes!r} but there are {len(names)} names; correct one")
    return _check_names(path, [str(name) for name in names])


def _check_names(path: str, names: list[str]) -> tuple[str, ...]:
    problem = next((text for name in names if (text := class_name_problem(name))), "")
    if not names or len(names) > MAX_CLASSES:
        problem = f"{len(names)} classes; there must be 1 to {MAX_CLASSES}"
    elif len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        problem = f"class {twice!r} is there twice"
    if problem:
        raise InvalidData(path, Reason.BAD_DATA_YAML, f"{problem}; correct the class names")
    return tuple(names)


def _check_yaml_events(path: str, data: bytes) -> None:
    """Refuses aliases and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(data, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise InvalidData(path, Reason.BAD_DATA_YAML, "aliases are not read; write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_YAML_DEPTH:
            raise InvalidData(path, Reason.BAD_DATA_YAML, "it is nested too deeply; flatten it")
