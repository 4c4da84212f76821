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
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.preprocess.domain import InvalidData, Reason
from services.preprocess.formats.coco_file import KEYS, File, Problems, read_file
from services.preprocess.formats.layout import (
    Format,
    Labels,
    LabelsBuilder,
    Layout,
    PathIndex,
    ReadFile,
    Rows,
    Sample,
    folder_of,
    stem_of,
)
from services.preprocess.formats.splits import split_of_folder, split_of_name

_MANY_FILES = 1000
_HINTS = re.compile(r"coco|instances|annotation|label", re.IGNORECASE)
_MAX_NEAR = 20
_UNKNOWN, _LEFT_OUT = -1, -2


@dataclass(frozen=True, slots=True)
class Found:
    """The COCO files of an archive.

    Attributes:
        files: Those that can be read.
        broken: JSON files that cannot.
        partial: The first file that lacks one of the three lists.
    """

    files: list[File] = field(default_factory=list)
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
    files: list[File] = []
    broken: list[InvalidData] = []
    partial = None
    for path in paths:
        try:
            file = read_file(path, read(path))
        except InvalidData as error:
            if error.problem.reason is Reason.ARCHIVE_LIMIT:
                raise
            broken.append(error)
            continue
        if file.keys == KEYS:
            files.append(file)
        elif len(file.keys) == 2 and partial is None:
            missing = ", ".join(sorted(KEYS - file.keys))
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
    problems = Problems()
    for error in found.broken:
        problems.add(error.problem.where, error.problem.reason, error.problem.description)
    described: dict[str, str] = {}
    samples: list[Sample] = []
    for file in found.files:
        samples.extend(_samples(index, file, classes, described))
        problems.extend(file.problems)
    return Layout(
        Format.COCO,
        tuple(sorted(samples, key=lambda sample: sample.image)),
        names,
        tuple(problems.kept),
        problems.num_more,
        frozenset(described),
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


def _class_names(files: list[File]) -> tuple[str, ...]:
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
    file: File,
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
    index: PathIndex, file: File, described: dict[str, str]
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


def _without_duplicates(file: File) -> NDArray[np.bool_]:
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
