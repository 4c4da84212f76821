"""Rows of the table of detections: what became of each, and the boxes that were not found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from services.metrics import thresholds
from services.metrics.domain import ErrorKind
from services.metrics.inputs import Booleans
from services.metrics.matches import Matches

DETECTION_COLUMNS = (
    *("image", "image_id", "what", "class", "confidence", "x1", "y1", "x2", "y2"),
    *("match", "error", "iou", "ground_truth_class"),
)
_BLOCK = 4096


def detection_rows(
    matches: Matches, threshold: float
) -> Iterator[tuple[str | int | float | None, ...]]:
    """Yields the detections of each image, most confident first, then its boxes not found."""
    kept = np.flatnonzero(thresholds.kept_N(matches, threshold))
    lost = np.flatnonzero(thresholds.false_negatives_M(matches, threshold))
    is_wrong_N = thresholds.false_positives_N(matches, threshold)
    is_missed_M = thresholds.missed_M(matches, threshold)
    images = np.concatenate([matches.image_N[kept], matches.image_M[lost]])
    order = np.argsort(images, kind="stable")
    for start in range(0, len(order), _BLOCK):
        for position in order[start : start + _BLOCK].tolist():
            if position < len(kept):
                yield _detection(matches, int(kept[position]), is_wrong_N)
            else:
                m = int(lost[position - len(kept)])
                yield _lost(matches, m, is_missed=bool(is_missed_M[m]))


def _detection(
    matches: Matches, n: int, is_wrong_N: Booleans
) -> tuple[str | int | float | None, ...]:
    image, about = int(matches.image_N[n]), int(matches.overlap_N[n])
    match, error = "ignored", ""
    if matches.truth_N[n] >= 0:
        match = "true_positive"
    elif is_wrong_N[n]:
        match, error = "false_positive", ErrorKind(int(matches.error_N[n])).name.lower()
    return (
        matches.paths[image],
        int(matches.id_I[image]),
        "detection",
        matches.class_names[matches.class_N[n]],
        round(float(matches.confidence_N[n]), 6),
        *(round(edge, 3) for edge in matches.box_N4[n].tolist()),
        match,
        error,
        round(float(matches.iou_N[n]), 4) if about >= 0 else None,
        matches.class_names[matches.class_M[about]] if about >= 0 else "",
    )


def _lost(matches: Matches, m: int, *, is_missed: bool) -> tuple[str | int | float | None, ...]:
    image = int(matches.image_M[m])
    class_name = matches.class_names[matches.class_M[m]]
    return (
        matches.paths[image],
        int(matches.id_I[image]),
        "ground_truth",
        class_name,
        None,
        *(round(edge, 3) for edge in matches.box_M4[m].tolist()),
        "false_negative",
        "missed" if is_missed else "",
        None,
        class_name,
    )
