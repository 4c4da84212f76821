"""Dealing the images of a dataset to the splits of a version, and what that keeps together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from detflow.errors import FailedPrecondition
from detflow.v1 import common_pb2, preprocess_pb2, version_pb2
from services.preprocess.domain import SPLITS, Reason
from services.preprocess.grouping import Grouping, group_images
from services.preprocess.messages import num_copies
from services.preprocess.outlines import Outlines
from services.preprocess.split import (
    NUM_SPLITS,
    Split,
    TooFewGroups,
    TooFewImages,
    assign,
    assign_keeping,
    sizes,
)

_MAX_GROUPS = 100
_MAX_PATHS = 10
SPLIT_VALUES = (common_pb2.SPLIT_TRAIN, common_pb2.SPLIT_VAL, common_pb2.SPLIT_TEST)
"""In the order of SPLITS."""
_GROUP_NAMES = {
    version_pb2.GROUP_BY_FOLDER: "by folder",
    version_pb2.GROUP_BY_NAME_PREFIX: "by name",
}


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """Which image is in which split, and the leak report, which has no name yet."""

    split: Split
    report: preprocess_pb2.LeakReport

    def positions(self) -> dict[str, tuple[int, ...]]:
        """Returns the positions of the images of each split, ascending."""
        parts = (self.split.train, self.split.val, self.split.test)
        return dict(zip(SPLITS, parts, strict=True))


def plan_split(images: Outlines, recipe: version_pb2.Recipe, num_classes: int) -> SplitPlan:
    """Splits a dataset as a recipe asks for. Takes seconds for 100,000 images: run it in a thread.

    Args:
        images: All images of the dataset.
        recipe: Shares, seed and groups, defaults resolved.
        num_classes: Classes of the dataset.

    Raises:
        FailedPrecondition: TOO_FEW_IMAGES or TOO_FEW_GROUPS.
    """
    shares = (recipe.split.train, recipe.split.val, recipe.split.test)
    deal = assign_keeping if recipe.keep_existing_split else assign
    try:
        grouping = group_images(images, recipe, min(sizes(len(images), shares)))
        try:
            split = deal(images, shares, recipe.seed, grouping.together)
        except TooFewGroups:
            if grouping.stated:
                raise
            # All images look like one or two: a split that leaks, and says so, is better than none.
            split = deal(images, shares, recipe.seed)
    except TooFewImages as error:
        raise FailedPrecondition(
            f"the dataset has {len(images)} images; three splits need at least 3: add images",
            reason=Reason.TOO_FEW_IMAGES,
        ) from error
    except TooFewGroups as error:
        raise FailedPrecondition(
            f"grouped {_GROUP_NAMES[recipe.group_by]} the images are too few groups to fill every"
            " split; group them in another way, or not at all",
            reason=Reason.TOO_FEW_GROUPS,
        ) from error
    return SplitPlan(split, _report(images, recipe, split, grouping, num_classes))


def _report(
    images: Outlines,
    recipe: version_pb2.Recipe,
    split: Split,
    grouping: Grouping,
    num_classes: int,
) -> preprocess_pb2.LeakReport:
    parts = (split.train, split.val, split.test)
    side = np.zeros(len(images), np.int64)
    for number, positions in enumerate(parts):
        side[list(positions)] = number
    labels, counts = np.unique(grouping.found, return_counts=True)
    labels, counts = labels[counts > 1], counts[counts > 1]
    leaking = np.zeros(len(images), bool)
    leaking[grouping.found[side != side[grouping.found]]] = True

    report = preprocess_pb2.LeakReport(
        group_by=recipe.group_by,
        num_groups=len(labels),
        num_grouped_images=int(counts.sum()),
        num_leaking_groups=int(leaking.sum()),
        num_sources=_counts([len(positions) for positions in parts]),
        num_augmented_copies=len(split.train) * (num_copies(recipe, "train") - 1),
        num_boxes_by_class=[
            _counts(boxes)
            for boxes in zip(
                *(images.num_boxes_by_class(positions, num_classes) for positions in parts),
                strict=True,
            )
        ],
    )
    members = np.argsort(grouping.found, kind="stable")
    begins = np.searchsorted(grouping.found[members], labels)
    for i in np.lexsort((labels, -counts, ~leaking[labels]))[:_MAX_GROUPS]:
        label = labels[i]
        shown = members[begins[i] : begins[i] + min(int(counts[i]), _MAX_PATHS)]
        group = report.groups.add(
            num_images=int(counts[i]), paths=[images.paths[position] for position in shown]
        )
        if not leaking[label]:
            group.split = SPLIT_VALUES[side[label]]
        if grouping.distances is not None:
            group.max_distance = int(grouping.distances[label])
    return report


def _counts(numbers: list[int] | tuple[int, ...]) -> version_pb2.SplitCounts:
    assert len(numbers) == NUM_SPLITS
    train, val, test = numbers
    return version_pb2.SplitCounts(train=train, val=val, test=test)
