"""The splits that an archive brings along: which names mean train, val and test."""

from __future__ import annotations

import re

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
