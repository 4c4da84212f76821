"""One COCO file in memory: columns instead of objects; everything wrong is named by its path."""

from __future__ import annotations

import reprlib
from array import array
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from services.preprocess.domain import MAX_KEPT_PROBLEMS, InvalidData, Problem, Reason
from services.preprocess.formats.json_stream import members
from services.preprocess.formats.layout import MAX_CLASSES, class_name_problem

KEYS = frozenset({"images", "annotations", "categories"})

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


class Problems:
    """Problems in the order they are found, the first million kept."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.num_more = 0

    def add(self, where: str, reason: Reason, description: str, num_left_out: int = 1) -> None:
        """Adds a problem."""
        if len(self.kept) < MAX_KEPT_PROBLEMS:
            self.kept.append(Problem(where, reason, description, num_left_out))
        else:
            self.num_more += 1

    def extend(self, others: Problems) -> None:
        """Adds those of another list."""
        room = MAX_KEPT_PROBLEMS - len(self.kept)
        self.kept.extend(others.kept[:room])
        self.num_more += others.num_more + max(len(others.kept) - room, 0)


@dataclass(slots=True)
class File:
    """What one file holds: columns with a row for each annotation that is whole.

    `numbers` are indexes of the annotations in the file; `images` are number, id and file_name;
    `ids` are those of annotations that have one, `numbers_of_ids` the rows they belong to.
    """

    path: str
    problems: Problems = field(default_factory=Problems)
    keys: set[str] = field(default_factory=set)
    class_names: dict[int, str] = field(default_factory=dict)
    known_names: set[str] = field(default_factory=set)
    has_keypoints: bool = False
    images: list[tuple[int, int, str]] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("i"))
    image_ids: array[int] = field(default_factory=lambda: array("q"))
    category_ids: array[int] = field(default_factory=lambda: array("q"))
    boxes: array[float] = field(default_factory=lambda: array("d"))
    crowds: array[int] = field(default_factory=lambda: array("b"))
    ids: array[int] = field(default_factory=lambda: array("q"))
    numbers_of_ids: array[int] = field(default_factory=lambda: array("i"))
    has_box: bool = False
    num_annotations: int = 0


def read_file(path: str, data: bytes) -> File:
    """Reads a JSON file as far as it is one of COCO.

    Args:
        path: Path of the file, for messages.
        data: Its content.

    Returns:
        The file; it describes images by boxes only if `keys` are all of KEYS.

    Raises:
        InvalidData: CORRUPT_LABEL, ARCHIVE_LIMIT, or what is wrong with its categories.
    """
    file = File(path)
    for key, number, value in members(path, data):
        if key not in KEYS:
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
    if file.keys == KEYS and file.num_annotations and not file.has_box:
        raise InvalidData(
            f"{path} annotations[0].bbox",
            Reason.BAD_BOX,
            "no annotation of this file has a bbox; masks alone are not read",
        )
    return file


def _read_category(file: File, number: int, value: Any) -> None:
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


def _read_image(file: File, number: int, value: Any) -> None:
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


def _read_annotation(file: File, number: int, value: Any) -> None:
    file.num_annotations += 1

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
