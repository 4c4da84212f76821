"""What the metrics service knows, and its pure rules."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

SPLITS = ("val", "test")
"""Splits that are measured after a training, in the order they are shown."""


class TrainingState(enum.IntEnum):
    """State of a training as its service reports it; numbers as in detflow.v1.Training.State."""

    UNKNOWN = 0
    QUEUED = 1
    PROVISIONING = 2
    RUNNING = 3
    EVALUATING = 4
    SUCCEEDED = 5
    FAILED = 6
    STOPPED = 7
    PAUSED = 8

    @property
    def is_at_rest(self) -> bool:
        """Nothing more is measured unless the user queues the training again."""
        return self >= TrainingState.SUCCEEDED


class ErrorKind(enum.IntEnum):
    """What is wrong with a detection or a box; numbers as in detflow.v1.ErrorKind."""

    NONE = 0
    CLASS = 1
    LOCALIZATION = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5
    MISSED = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What metrics knows of a training, from its events.

    Attributes:
        id: Last segment of the name.
        project_id: Project it belongs to.
        name: projects/{project}/versions/{version}/trainings/{training}.
        state: State of the newest revision seen.
        revision: Newest revision seen; 0 before the first.
        attempt: Newest attempt seen in any event; 0 before the first.
        applied: Which of its events have been applied.
        message: Serialized detflow.v1.Training of that revision; empty if an earlier release heard
            of it.
    """

    id: str
    project_id: str
    name: str
    state: TrainingState
    revision: int
    attempt: int
    applied: Applied
    message: bytes = b""


@dataclass(frozen=True, slots=True)
class Applied:
    """The sequence numbers of a resource's events that have been applied, in any order of arrival.

    A snapshot may claim only what it surely contains: `seq`, below which nothing is missing.

    Attributes:
        seq: Every event up to this one has been applied.
        ahead: Events above `seq` applied already, sorted.
    """

    seq: int = 0
    ahead: tuple[int, ...] = ()

    @property
    def highest(self) -> int:
        """The highest event applied; below it some may be missing."""
        return self.ahead[-1] if self.ahead else self.seq

    def add(self, seq: int) -> Applied:
        """Returns what has been applied once event `seq` has."""
        if seq <= self.seq or seq in self.ahead:
            return self
        last, ahead = self.seq, sorted((*self.ahead, seq))
        while ahead and ahead[0] == last + 1:
            last = ahead.pop(0)
        return Applied(last, tuple(ahead))


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoSummary:
    """The twelve figures of the COCO detection challenge: 0..1, or -1 with nothing to measure.

    AP is averaged over IoU 0.50:0.05:0.95 unless said otherwise, over classes always; small is
    below 32x32 px, large above 96x96 px. https://cocodataset.org/#detection-eval
    """

    map50_95: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    ar_max1: float
    ar_max10: float
    ar_max100: float
    ar_small: float
    ar_medium: float
    ar_large: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """Precision, recall and F1, each 0..1, at one confidence threshold and IoU 0.5.

    Predictions of at least `confidence_threshold` count.
    """

    confidence_threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassFigures:
    """Figures of one class: AP and AR as in `CocoSummary`, 0..1, or -1 with nothing to measure.

    What has a default is unknown where an earlier release measured it.

    Attributes:
        class_name: Name of the class.
        ap50_95: AP averaged over IoU 0.50:0.05:0.95.
        ap50: AP at IoU 0.50.
        num_ground_truths: Ground-truth boxes; crowd regions are not counted.
        ap75: AP at IoU 0.75.
        ap_small: `ap50_95` of small objects.
        ap_medium: `ap50_95` of medium objects.
        ap_large: `ap50_95` of large objects.
        ar_max100: Average recall.
        num_predictions: Predicted boxes.
        best_f1: The class's own operating point with the best F1; None without ground truth.
    """

    class_name: str
    ap50_95: float
    ap50: float
    num_ground_truths: int
    ap75: float = -1.0
    ap_small: float = -1.0
    ap_medium: float = -1.0
    ap_large: float = -1.0
    ar_max100: float = -1.0
    num_predictions: int = 0
    best_f1: OperatingPoint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Everything measured on one split.

    Attributes:
        coco: The twelve COCO figures.
        best_f1: Operating point with the best F1; None without ground truth, when recall means
            nothing.
        classes: Figures of each class, in the order of the class list.
        num_images: Images measured.
        num_ground_truths: Ground-truth boxes; crowd regions are not counted.
        num_predictions: Predicted boxes.
    """

    coco: CocoSummary
    best_f1: OperatingPoint | None
    classes: tuple[ClassFigures, ...]
    num_images: int
    num_ground_truths: int
    num_predictions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How good a training's best weights are on one split, or why that could not be measured.

    Attributes:
        training: Resource name of the training.
        split: val or test.
        attempt: Attempt whose predictions were measured.
        measurement: The figures; None if it failed.
        failure: Serialized detflow.v1.Failure; None if it succeeded.
        create_time: When it was measured.
        ground_truth_sha256: Hash of the ground truth; "" if an earlier release measured it.
        manifest: Serialized detflow.v1.StoredObject of the bundle's manifest; None as before.
        matches: Serialized detflow.v1.StoredObject of the `Matches`; None as before, or if it
            failed.
    """

    training: str
    split: str
    attempt: int
    measurement: Measurement | None
    failure: bytes | None
    create_time: datetime
    ground_truth_sha256: str = ""
    manifest: bytes | None = None
    matches: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Predictions of one split that wait to be measured.

    Attributes:
        training: Resource name of the training.
        training_id: Its id.
        attempt: Attempt that made the predictions.
        split: val or test.
        manifest: Serialized detflow.v1.StoredObject of the bundle's manifest.
        predictions: Serialized detflow.v1.StoredObject of the predictions.
        traceparent: Trace the work belongs to.
        num_tries: How often it has been taken up, this time included.
        lease: Token of who works on it now.
    """

    training: str
    training_id: str
    attempt: int
    split: str
    manifest: bytes
    predictions: bytes
    traceparent: str
    num_tries: int
    lease: str

    @property
    def matches_key(self) -> str:
        """Where the matches of this attempt and split are stored."""
        return f"evaluations/{self.training_id}/{self.attempt}/{self.split}.npz"


def is_finished(training: Training, evaluations: Sequence[Evaluation]) -> bool:
    """Says whether nothing more will be measured of this training as things stand.

    That is so when both splits of its newest attempt are evaluated or the training is at rest
    without them; a training queued again will be measured again.
    """
    if training.state.is_at_rest:
        return True
    measured = {e.split for e in evaluations if e.attempt >= training.attempt}
    return training.state != TrainingState.QUEUED and measured.issuperset(SPLITS)
