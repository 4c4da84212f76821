"""COCO detection files: `images`, `annotations` and `categories` in one JSON object.

The files may lie anywhere in the archive; several are several splits, or parts of one. An image is
found by its `file_name` relative to the file, to the folder of the file's split or to `images/`,
else by the only path that ends like it. Classes come in the order of their ids.

Boxes are taken from `bbox` (x, y, width, height in pixels of the upright image); polygons and RLE
masks are not decoded. `iscrowd` is kept. `width` and `height` of an image are ignored: the image
itself says how large it is.
"""

from __future__ import annotations

import re
import reprlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from services.preprocess.domain import MAX_KEPT_PROBLEMS, InvalidData, Problem, Reason
from services.preprocess.formats.json_stream import members
from services.preprocess.formats.layout import (
    MAX_CLASSES,
    Format,
    Labels,
    LabelsBuilder,
    Layout,
    PathIndex,
    ReadFile,
    Rows,
    Sample,
    class_name_problem,
    folder_of,
    stem_of,
)
from services.preprocess.formats.splits import split_of_folder, split_of_name

MAX_ANNOTATIONS = 10_000_000

_KEYS = frozenset({"images", "annotations", "categories"})
_MANY_FILES = 1000
_HINTS = re.compile(r"coco|instances|annotation|label", re.IGNORECASE)
_MAX_NEAR = 20
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60
_UNKNOWN, _LEFT_OUT = -1, -2


class _Problems:
    """Problems in the order they are found, the first million kept."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.num_more = 0

    def add(self, where: str, reason: Reason, description: str, num_left_out: int = 1) -> None:
        if len(self.kept) < MAX_KEPT_PROBLEMS:
            self.kept.append(Problem(where, reason, description, num_left_out))
        else:
            self.num_more += 1

    def extend(self, others: _Problems) -> None:
        room = MAX_KEPT_PROBLEMS - len(self.kept)
        self.kept.extend(others.kept[:room])
        self.num_more += others.num_more + max(len(others.kept) - room, 0)


@dataclass(slots=True)
class _File:
    """What one file holds; numbers are indexes into its arrays."""

    path: str
    problems: _Problems = field(default_factory=_Problems)
    keys: set[str] = field(default_factory=set)
    class_names: dict[int, str] = field(default_factory=dict)
    known_names: set[str] = field(default_factory=set)
    has_keypoints: bool = False
    images: list[tuple[int, int, str]] = field(default_factory=list)  # number, id, file_name
    numbers: array[int] = field(default_factory=lambda: array("i"))
    image_ids: array[int] = field(default_factory=lambda: array("q"))
    category_ids: array[int] = field(default_factory=lambda: array("q"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    crowds: array[int] = field(default_factory=lambda: array("b"))
    ids: array[int] = field(default_factory=lambda: array("q"))
    numbers_of_ids: array[int] = field(default_factory=lambda: array("i"))
    has_box: bool = False
    num_annotations: int = 0


@dataclass(frozen=True, slots=True)
class Found:
    """The COCO files of an archive.

    Attributes:
        files: Those that can be read.
        broken: JSON files that cannot.
        partial: The first file that lacks one of the three lists.
    """

    files: list[_File] = field(default_factory=list)
    broken: list[InvalidData] = field(default_factory=list)
    partial: InvalidData | None = None


def find_files(index: PathIndex, read: ReadFile) -> Found:
    """Reads the JSON files of an archive and keeps those that describe images by boxes.

    Args:
        index: Paths of the archive.
        read: Reads a file.

    Raises:
        InvalidData: ARCHIVE_LIMIT: more annotations than are read.
    """
    paths = [path for path in index.paths if path.casefold().endswith(".json")]
    if len(paths) > _MANY_FILES:  # such as one file for each image, of another program
        paths = [path for path in paths if _HINTS.search(path.rpartition("/")[2])][:_MANY_FILES]
    files: list[_File] = []
    broken: list[InvalidData] = []
    partial = None
    for path in paths:
        try:
            file = _read_file(path, read(path))
        except InvalidData as error:
            if error.problem.reason is Reason.ARCHIVE_LIMIT:
                raise
            broken.append(error)
            continue
        if file.keys == _KEYS:
            files.append(file)
        elif len(file.keys) == 2 and partial is None:
            missing = ", ".join(sorted(_KEYS - file.keys))
            partial = InvalidData(
                path,
                Reason.CORRUPT_LABEL,
                f"has no list of {missing}; a COCO detection file needs images, annotations and"
                " categories",
            )
    if any(not file.has_keypoints for file in files):  # beside which the same images come again
        files = [file for file in files if not file.has_keypoints]
    return Found(files, broken, partial)


def find_layout(index: PathIndex, found: Found) -> Layout:
    """Pairs the images of COCO files with those of the archive.

    Args:
        index: Paths of the archive.
        found: What `find_files` found; at least one file.

    Raises:
        InvalidData: The classes of a file are wrong, or those of two files differ.
    """
    names = _class_names(found.files)
    classes = {name: i for i, name in enumerate(names)}
    problems = _Problems()
    for error in found.broken:
        problems.add(error.problem.where, error.problem.reason, error.problem.description)
    described: dict[str, str] = {}
    samples: list[Sample] = []
    for file in found.files:
        samples.extend(_samples(index, file, classes, described))
        problems.extend(file.problems)
    for path in index.images:
        if path not in described:
            problems.add(path, Reason.NOT_LISTED, "no COCO file lists it; it was left out", 0)
    return Layout(
        Format.COCO,
        tuple(sorted(samples, key=lambda sample: sample.image)),
        names,
        tuple(problems.kept),
        problems.num_more,
    )


def read_rows(rows: Rows, size: tuple[int, int]) -> Labels:
    """Checks the annotations of one image.

    Args:
        rows: The annotations.
        size: Width and height of the upright image in pixels.
    """
    builder = LabelsBuilder(*size)
    values = zip(
        rows.numbers.tolist(),
        rows.classes.tolist(),
        rows.boxes.tolist(),
        rows.crowds.tolist(),
        strict=True,
    )
    for number, key, (x, y, width, height), crowd in values:
        where = f"{rows.path} annotations[{number}].bbox"
        builder.add(where, key, (x, y, x + width, y + height), crowd=crowd)
    return builder.build()


def _read_file(path: str, data: bytes) -> _File:
    file = _File(path)
    for key, number, value in members(path, data):
        if key not in _KEYS:
            continue
        if number is None:
            if value != []:
                raise InvalidData(
                    f"{path} {key}", Reason.CORRUPT_LABEL, "is no list; export it as COCO"
                )
            if key in file.keys:
                raise InvalidData(
                    f"{path} {key}", Reason.CORRUPT_LABEL, "is there twice; keep one list"
                )
            file.keys.add(key)
        elif key == "annotations":
            _read_annotation(file, number, value)
        elif key == "images":
            _read_image(file, number, value)
        else:
            _read_category(file, number, value)
    if file.keys == _KEYS and file.num_annotations and not file.has_box:
        raise InvalidData(
            f"{path} annotations[0].bbox",
            Reason.BAD_BOX,
            "no annotation of this file has a bbox; masks alone are not read",
        )
    return file


def _read_category(file: _File, number: int, value: Any) -> None:
    place = f"{file.path} categories[{number}]"
    if not isinstance(value, dict):
        raise InvalidData(place, Reason.CORRUPT_LABEL, "is no object with id and name")
    category_id, name = value.get("id"), value.get("name")
    if not _is_id(category_id):
        raise InvalidData(f"{place}.id", Reason.CORRUPT_LABEL, _no_id(category_id))
    name = name.strip() if isinstance(name, str) else ""
    if problem := class_name_problem(name):
        raise InvalidData(f"{place}.name", Reason.UNKNOWN_CLASS, f"{problem}; name the class")
    if category_id in file.class_names:
        raise InvalidData(
            f"{place}.id", Reason.DUPLICATE_ID, f"id {category_id} is there twice; number them anew"
        )
    if name in file.known_names:
        raise InvalidData(
            f"{place}.name", Reason.DUPLICATE_NAME, f"class {name!r} is there twice; rename one"
        )
    if len(file.class_names) == MAX_CLASSES:
        raise InvalidData(
            place, Reason.UNKNOWN_CLASS, f"more than {MAX_CLASSES} classes; are the names right?"
        )
    file.class_names[category_id] = name
    file.known_names.add(name)
    file.has_keypoints = file.has_keypoints or "keypoints" in value


def _read_image(file: _File, number: int, value: Any) -> None:
    problems = file.problems
    place = f"{file.path} images[{number}]"
    if not isinstance(value, dict):
        problems.add(place, Reason.CORRUPT_LABEL, "is no object with id and file_name")
        return
    image_id, name = value.get("id"), value.get("file_name")
    if not _is_id(image_id):
        problems.add(f"{place}.id", Reason.CORRUPT_LABEL, _no_id(image_id))
    elif not isinstance(name, str) or not name:
        problems.add(f"{place}.file_name", Reason.CORRUPT_LABEL, f"is {_shown(name)}, no text")
    else:
        file.images.append((number, image_id, name))


def _read_annotation(file: _File, number: int, value: Any) -> None:
    file.num_annotations += 1
    if number >= MAX_ANNOTATIONS:
        raise InvalidData(
            f"{file.path} annotations[{number}]",
            Reason.ARCHIVE_LIMIT,
            f"more than {MAX_ANNOTATIONS} annotations in one file are not read; split it",
        )

    def refuse(name: str, reason: Reason, description: str) -> None:
        file.problems.add(f"{file.path} annotations[{number}]{name}", reason, description)

    if not isinstance(value, dict):
        refuse("", Reason.CORRUPT_LABEL, "is no object with image_id, category_id and bbox")
        return
    box, image_id, category_id = value.get("bbox"), value.get("image_id"), value.get("category_id")
    crowd, own_id = value.get("iscrowd", 0), value.get("id")
    if box is not None:
        file.has_box = True
    if not (isinstance(box, list) and len(box) == 4):
        refuse(".bbox", Reason.BAD_BOX, f"is {_shown(box)}, not [x, y, width, height]; correct it")
    elif bool in map(type, box) or not _extend(file.boxes, box):
        refuse(".bbox", Reason.BAD_BOX, f"{_shown(box)} holds what is no number; correct it")
    elif not _is_id(image_id):
        del file.boxes[-4:]
        refuse(".image_id", Reason.CORRUPT_LABEL, _no_id(image_id))
    elif not _is_id(category_id):
        del file.boxes[-4:]
        refuse(".category_id", Reason.CORRUPT_LABEL, _no_id(category_id))
    elif crowd not in (0, 1):
        del file.boxes[-4:]
        refuse(".iscrowd", Reason.CORRUPT_LABEL, f"is {_shown(crowd)}, not 0 or 1; correct it")
    elif own_id is not None and not _is_id(own_id):
        del file.boxes[-4:]
        refuse(".id", Reason.CORRUPT_LABEL, _no_id(own_id))
    else:
        file.numbers.append(number)
        file.image_ids.append(image_id)
        file.category_ids.append(category_id)
        file.crowds.append(bool(crowd))
        if own_id is not None:
            file.ids.append(own_id)
            file.numbers_of_ids.append(len(file.numbers) - 1)


def _extend(boxes: array[float], box: list[Any]) -> bool:
    """Appends four numbers, or none if one of them is not a number."""
    length = len(boxes)
    try:
        boxes.extend(box)
    except (TypeError, OverflowError):
        del boxes[length:]
        return False
    return True


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _no_id(value: Any) -> str:
    return f"is {_shown(value)}, not a whole number; correct it"


def _shown(value: Any) -> str:
    return "missing" if value is None else _SHOWN.repr(value)


def _class_names(files: list[_File]) -> tuple[str, ...]:
    """Returns the class names in the order of their ids in the first file.

    Raises:
        InvalidData: EMPTY_DATASET, AMBIGUOUS_LAYOUT.
    """
    first = files[0]
    if not first.class_names:
        raise InvalidData(
            f"{first.path} categories", Reason.EMPTY_DATASET, "there are no classes; name them"
        )
    names = tuple(name for _, name in sorted(first.class_names.items()))
    for file in files[1:]:
        if different := set(names) ^ set(file.class_names.values()):
            raise InvalidData(
                f"{file.path} categories",
                Reason.AMBIGUOUS_LAYOUT,
                f"class {min(different)!r} is in only one of it and {first.path}; give all files"
                " the same classes",
            )
    return names


def _samples(
    index: PathIndex,
    file: _File,
    classes: dict[str, int],
    described: dict[str, str],
) -> Iterator[Sample]:
    """Yields the images of a file that are in the archive, with their annotations."""
    problems = file.problems
    paths, sample_of_id = _find_images(index, file, described)
    keep = _without_duplicates(file)
    image_ids = np.asarray(file.image_ids)
    sample_numbers = _look_up(image_ids, sample_of_id)
    class_of_id = {i: classes[name] for i, name in file.class_names.items()}
    category_ids = np.asarray(file.category_ids)
    class_ids = _look_up(category_ids, class_of_id)
    numbers = np.asarray(file.numbers)
    for i in np.flatnonzero(keep & (sample_numbers == _UNKNOWN)).tolist():
        problems.add(
            f"{file.path} annotations[{numbers[i]}].image_id",
            Reason.MISSING_IMAGE,
            f"there is no image with the id {image_ids[i]}; correct it or delete the annotation",
        )
    for i in np.flatnonzero(keep & (sample_numbers >= 0) & (class_ids == _UNKNOWN)).tolist():
        problems.add(
            f"{file.path} annotations[{numbers[i]}].category_id",
            Reason.UNKNOWN_CLASS,
            f"there is no category with the id {category_ids[i]}; correct it or declare it",
        )
    good = np.flatnonzero(keep & (sample_numbers >= 0) & (class_ids >= 0))
    order = good[np.argsort(sample_numbers[good], kind="stable")]
    ends = np.searchsorted(sample_numbers[order], np.arange(len(paths) + 1))
    boxes = np.asarray(file.boxes).reshape(-1, 4)
    crowds = np.asarray(file.crowds).astype(np.bool_)
    own_split = _split_of_file(file.path)
    for i, path in enumerate(paths):
        chosen = order[ends[i] : ends[i + 1]]
        rows = Rows(
            file.path,
            numbers[chosen],
            class_ids[chosen].astype(np.int32),
            boxes[chosen],
            crowds[chosen],
        )
        yield Sample(path, None, own_split or split_of_folder(folder_of(path)), rows)


def _find_images(
    index: PathIndex, file: _File, described: dict[str, str]
) -> tuple[list[str], dict[int, int]]:
    """Returns the images found, and by image id the index among them, or _LEFT_OUT."""
    problems = file.problems
    firsts: dict[int, int] = {}
    unclear: set[int] = set()  # ids of which is not known which image the annotations mean
    for number, image_id, _ in file.images:
        if (first := firsts.setdefault(image_id, number)) != number:
            problems.add(
                f"{file.path} images[{number}].id",
                Reason.DUPLICATE_ID,
                f"id {image_id} is that of images[{first}] too; number them anew",
                1 if image_id in unclear else 2,
            )
            unclear.add(image_id)
    near = _folders_near(index, file.path)
    paths: list[str] = []
    sample_of_id: dict[int, int] = {}
    for number, image_id, name in file.images:
        sample_of_id[image_id] = _LEFT_OUT
        place = f"{file.path} images[{number}].file_name"
        try:
            path = index.find_image(name, near)
        except LookupError as error:
            problems.add(
                place, Reason.AMBIGUOUS_LAYOUT, f"{name!r:.200} can be {error}; name the folder too"
            )
            continue
        if path is None:
            problems.add(
                place, Reason.MISSING_IMAGE, f"there is no image {name!r:.200}; add or delete it"
            )
        elif path in described:
            problems.add(
                place,
                Reason.DUPLICATE_NAME,
                f"{path} is described by {described[path]} already; delete one",
            )
        else:
            described[path] = f"{file.path} images[{number}]"
            if image_id not in unclear:
                sample_of_id[image_id] = len(paths)
                paths.append(path)
    return paths, sample_of_id


def _without_duplicates(file: _File) -> NDArray[np.bool_]:
    """Returns a mask over the annotations: the first of each id."""
    keep = np.ones(len(file.numbers), np.bool_)
    ids = np.asarray(file.ids)
    owners = np.asarray(file.numbers_of_ids)
    _, firsts, groups = np.unique(ids, return_index=True, return_inverse=True)
    for i in np.flatnonzero(firsts[groups] != np.arange(len(ids))).tolist():
        first, own = file.numbers[owners[firsts[groups[i]]]], file.numbers[owners[i]]
        file.problems.add(
            f"{file.path} annotations[{own}].id",
            Reason.DUPLICATE_ID,
            f"id {ids[i]} is that of annotations[{first}] too; number them anew",
        )
        keep[owners[i]] = False
    return keep


def _look_up(ids: NDArray[np.int64], table: dict[int, int]) -> NDArray[np.int64]:
    """Returns table[id] for each id, _UNKNOWN where there is none."""
    if not table:
        return np.full(len(ids), _UNKNOWN, np.int64)
    keys = np.array(sorted(table), np.int64)
    values = np.array([table[key] for key in keys.tolist()], np.int64)
    at = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
    return np.where(keys[at] == ids, values[at], _UNKNOWN)


def _split_of_file(path: str) -> str | None:
    """Returns the split that the name of a file says, else its folder: instances_val2017.json."""
    words = re.split(r"[\W_]+", stem_of(path))
    splits = {split for word in words if (split := split_of_name(word)) is not None}
    return splits.pop() if len(splits) == 1 else split_of_folder(folder_of(path))


def _folders_near(index: PathIndex, path: str) -> list[str]:
    folder = folder_of(path)
    parent = folder_of(folder)
    split = _split_of_file(path)
    same_split = sorted({f for f in map(folder_of, index.images) if split_of_folder(f) == split})
    return [
        folder,
        *(same_split[:_MAX_NEAR] if split else ()),
        f"{folder}/images",
        parent,
        f"{parent}/images",
    ]
