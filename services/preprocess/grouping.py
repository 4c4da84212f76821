"""Which images belong together, so that a split must not tear them apart."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detflow.v1 import version_pb2
from services.preprocess.duplicates import (
    Labels,
    bottlenecks,
    find_duplicates,
    first_of_each,
)
from services.preprocess.outlines import Outlines

_ALWAYS_WHOLE = 20
"""Images in a group of looks that is never cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """Groups of a dataset's images.

    Attributes:
        found: What belongs together.
        together: What the split keeps together; finer where a group of looks was too large.
        distances: For each image the most bits by which two neighbours of its group differ; None if
            the groups are not those of looks.
        stated: The groups are the user's, who says so by folders or names.
    """

    found: Labels
    together: Labels
    distances: NDArray[np.int64] | None = None
    stated: bool = False


def group_images(images: Outlines, recipe: version_pb2.Recipe, smallest_split: int) -> Grouping:
    """Groups images as a recipe asks for.

    Groups of looks grow by way of others: of thousands of frames of one camera each may look like
    the next. A group with more images than the smallest split would spoil it, so it is cut where
    its images differ most: first those apart that differ in 7 bits, then in 6, ... The frames that
    are nearest stay together, and so do images with equal hashes.

    Args:
        images: The images.
        recipe: How to group.
        smallest_split: Images of the smallest split.
    """
    match recipe.group_by:
        case version_pb2.GROUP_BY_FOLDER:
            return _stated(images, posixpath.dirname)
        case version_pb2.GROUP_BY_NAME_PREFIX:
            return _stated(images, lambda path: _prefix(path, recipe.group_separator))
    levels = find_duplicates(images.looks, images.contents)
    found = levels[-1]
    alone = recipe.group_by == version_pb2.GROUP_BY_NOTHING  # and the report says what that tears
    return Grouping(
        found=found,
        together=np.arange(len(images))
        if alone
        else _cut(levels, max(smallest_split, _ALWAYS_WHOLE)),
        distances=bottlenecks(levels, found),
    )


def _stated(images: Outlines, key: Callable[[str], str]) -> Grouping:
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(key(path), len(numbers)) for path in images.paths])
    labels = first_of_each(groups)
    return Grouping(found=labels, together=labels, stated=True)


def _prefix(path: str, separator: str) -> str:
    """Returns a file's name up to the last separator; the whole path if there is none."""
    prefix, found, _ = posixpath.basename(path).rpartition(separator)
    return prefix if found else f"/{path}"  # a prefix holds no slash: such a file is alone


def _cut(levels: NDArray[np.int64], largest: int) -> Labels:
    labels: Labels = levels[-1].copy()
    for level in levels[-2::-1]:
        oversized = np.bincount(labels, minlength=len(labels))[labels] > largest
        labels[oversized] = level[oversized]
    return labels
