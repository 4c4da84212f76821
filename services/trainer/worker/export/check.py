"""Is the exported model the one that was trained? Its answers are compared with torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from detflow.errors import FailedPrecondition
from detflow.v1.export_pb2 import Export
from services.trainer.worker.evaluation import MIN_CONFIDENCE

CONFIDENT = 0.25
"""Below it a prediction is shown to nobody: rounding may change it more than the others."""

_NUM_LEAST = 100


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest differences an export may have.

    Attributes:
        box: As a share of the input's side, or of the box's own longest side if that is longer:
            a size is the exponential of what a network computes, and so are its errors.
        confidence: 0..1.
    """

    box: float
    confidence: float


TOLERANCES: Mapping[Export.Precision.ValueType, Tolerance] = {
    Export.FP32: Tolerance(box=0.0005, confidence=0.001),
    Export.FP16: Tolerance(box=0.01, confidence=0.02),
    Export.INT8: Tolerance(box=0.06, confidence=0.3),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """How far an exported model's answers are from the original's.

    Attributes:
        box_px: Largest difference of a box's corner coordinates, in pixels of the input.
        box: The same as a share: see `Tolerance`.
        confidence: Largest difference of a confidence.
    """

    box_px: float = 0.0
    box: float = 0.0
    confidence: float = 0.0

    def worst(self, other: Difference) -> Difference:
        """Returns the larger ones of both."""
        return Difference(
            max(self.box_px, other.box_px),
            max(self.box, other.box),
            max(self.confidence, other.confidence),
        )


def compare(
    reference: NDArray[np.float32],
    exported: NDArray[np.float32],
    precision: Export.Precision.ValueType,
    size: tuple[int, int],
) -> Difference:
    """Compares predictions anchor by anchor; of boxes only what is inside the picture counts.

    In FP32 every prediction counts that an evaluation would take (confidence at least 0.001), in
    FP16 and INT8 those that are confident (0.25); at least the 100 most confident.

    Args:
        reference: The original's predictions, shape (n, 4 + classes, anchors).
        exported: The exported model's.
        precision: FP32, FP16 or INT8.
        size: Height and width of the input, in pixels.

    Raises:
        FailedPrecondition: EXPORT_DIFFERS: other shapes, or something is not finite.
    """
    if reference.shape != exported.shape:
        raise _differs(f"answers {exported.shape} where {reference.shape} is expected")
    if not np.isfinite(exported).all():
        raise _differs("answers infinite values or NaN")
    best = reference[:, 4:].max(axis=1)
    least = MIN_CONFIDENCE if precision == Export.FP32 else CONFIDENT
    rank = max(0, best.size - _NUM_LEAST)
    least = min(least, float(np.partition(best, rank, axis=None)[rank]))
    images, anchors = np.nonzero(best >= least)
    first, second = reference[images, :, anchors], exported[images, :, anchors]
    apart = np.abs(_corners(first, size) - _corners(second, size)).max(axis=1)
    longest = np.maximum(first[:, 2:4].max(axis=1), max(size))
    return Difference(
        box_px=float(apart.max(initial=0.0)),
        box=float((apart / longest).max(initial=0.0)),
        confidence=float(np.abs(first[:, 4:] - second[:, 4:]).max(initial=0.0)),
    )


def compare_on(
    samples: NDArray[np.float32],
    original: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    exported: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    batch_size: int,
    precision: Export.Precision.ValueType,
) -> Difference:
    """Compares two models on pictures, `batch_size` at a time; the last ones are repeated."""
    worst = Difference()
    for start in range(0, len(samples), batch_size):
        batch = samples[np.arange(start, start + batch_size) % len(samples)]
        size = (batch.shape[2], batch.shape[3])
        worst = worst.worst(compare(original(batch), exported(batch), precision, size))
    return worst


def require(difference: Difference, precision: Export.Precision.ValueType) -> None:
    """Refuses an export that differs too much.

    Raises:
        FailedPrecondition: EXPORT_DIFFERS.
    """
    tolerance = TOLERANCES[precision]
    if difference.box > tolerance.box or difference.confidence > tolerance.confidence:
        raise _differs(
            f"differs too much: boxes by up to {difference.box_px:.3g} px, {difference.box:.2%} of "
            f"the longest side (allowed: {tolerance.box:.2%}), confidences by up to "
            f"{difference.confidence:.3g} (allowed: {tolerance.confidence:.3g})"
        )


def require_same_detections(
    expected: NDArray[np.float32], detections: NDArray[np.float32], image_size: int
) -> None:
    """Refuses an end-to-end model that chooses other boxes of its predictions than torch does.

    Args:
        expected: What torch chooses of the exported model's own predictions, shape (n, k, 6).
        detections: What the exported model chooses.
        image_size: Side of the input.

    Raises:
        FailedPrecondition: EXPORT_DIFFERS.
    """
    tolerance = TOLERANCES[Export.FP32]
    if expected.shape != detections.shape:
        raise _differs(f"answers {detections.shape} where {expected.shape} is expected")
    for first, second in zip(expected, detections, strict=True):
        confidence = float(np.abs(first[:, 4] - second[:, 4]).max())
        box = _farthest(first[first[:, 4] >= CONFIDENT], second)
        if confidence > tolerance.confidence or box > tolerance.box * image_size:
            raise _differs(
                f"keeps other boxes than it should: they differ by up to {box:.3g} px, "
                f"confidences by up to {confidence:.3g}"
            )


def _farthest(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """Returns how far the loneliest row is from the nearest of the others of its class, in px.

    Of equally confident boxes either may come first, so rows are not compared in order.
    """
    apart = np.abs(rows[:, None, :4] - others[None, :, :4]).max(axis=2)
    apart[rows[:, None, 5] != others[None, :, 5]] = np.inf
    return float(apart.min(axis=1).max(initial=0.0))


def _corners(rows: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Returns x1, y1, x2, y2, clipped to the picture as in an evaluation."""
    centre, half = rows[:, :2], rows[:, 2:4] / 2
    corners = np.concatenate((centre - half, centre + half), axis=1)
    height, width = size
    return np.clip(corners, 0, np.array((width, height, width, height), dtype=np.float32))


def _differs(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the exported model {what}, so it is not kept; choose a higher precision or another "
        "opset, or leave simplify and dynamic out",
        reason="EXPORT_DIFFERS",
    )
