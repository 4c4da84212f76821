"""The splits that an archive brings along: which names mean train, val and test."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from services.preprocess.domain import InvalidData, Problem, Reason
from services.preprocess.formats.layout import (
    PathIndex,
    ReadFile,
    folder_of,
    is_picture,
    stem_of,
    text_lines,
)

_NAMES = re.compile(r"(train|training|val|valid|validation|test|testing)(?:20\d\d)?")
_CANONICAL = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


def split_of_name(name: str) -> str | None:
    """Returns the split that a folder or file (without extension) is named after.

    Examples:
        >>> split_of_name("Valid"), split_of_name("train2017"), split_of_name("trains")
        ('val', 'train', None)
    """
    found = _NAMES.fullmatch(name.casefold())
    return _CANONICAL.get(found[1], found[1]) if found else None


def split_of_folder(folder: str) -> str | None:
    """Returns the split that the deepest folder with such a name stands for."""
    splits = (split_of_name(part) for part in reversed(folder.split("/")))
    return next((split for split in splits if split is not None), None)


def find_splits(
    index: PathIndex,
    images: Sequence[str],
    lists: Iterable[str],
    hints: Mapping[str, Sequence[str]],
    read: ReadFile,
    problems: list[Problem],
) -> dict[str, str]:
    """Finds the split of each image that has one, in a YOLO archive.

    Args:
        index: Paths of the archive.
        images: Those of them that are samples.
        lists: Text files; those named after a split or in a hint are read.
        hints: Folders or lists by split, as data.yaml names them.
        read: Reads a file.
        problems: Gets a warning for each line of a list that names no image.

    Raises:
        InvalidData: AMBIGUOUS_LAYOUT: two lists have the same image.
    """
    hinted = {_clean(text): split for split, texts in hints.items() for text in texts}
    by_folder = _by_hints(images, hints)
    by_list: dict[str, str] = {}
    for path in lists:
        split = split_of_name(stem_of(path)) or next(
            (s for text, s in hinted.items() if text and f"/{path}".endswith(f"/{text}")), None
        )
        if split is not None:
            _read_list(index, path, split, read, by_list, problems)
    found = {
        image: by_folder.get(image) or by_list.get(image) or split_of_folder(folder_of(image))
        for image in images
    }
    return {image: split for image, split in found.items() if split is not None}


def _clean(text: str) -> str:
    parts = text.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _by_hints(images: Sequence[str], hints: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Returns the split of the images that are in hinted folders of one split only."""
    wanted = [(_clean(text), split) for split, texts in hints.items() for text in texts]
    found: dict[str, str] = {}
    splits_of: dict[str, set[str]] = {}
    for image in images:
        folder = folder_of(image)
        if folder not in splits_of:
            splits_of[folder] = {s for f, s in wanted if f and f"/{f}/" in f"/{folder}/"}
        if len(splits_of[folder]) == 1:
            found[image] = next(iter(splits_of[folder]))
    return found


def _read_list(
    index: PathIndex,
    path: str,
    split: str,
    read: ReadFile,
    found: dict[str, str],
    problems: list[Problem],
) -> None:
    for number, line in enumerate(text_lines(path, read(path)), start=1):
        name = line.strip()
        if not is_picture(name):
            continue  # it is a list of something else
        place = f"{path}:{number}"
        try:
            image = index.find_image(name, [folder_of(path)])
        except LookupError:
            image = None
        if image is None:
            problems.append(
                Problem(
                    place,
                    Reason.MISSING_IMAGE,
                    f"there is no image {name[:200]!r}, or several; the line was ignored",
                    num_left_out=0,
                )
            )
        elif found.setdefault(image, split) != split:
            raise InvalidData(
                place,
                Reason.AMBIGUOUS_LAYOUT,
                f"{image} is in a list of {found[image]} too; keep it in one list",
            )
