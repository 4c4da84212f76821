"""What a report is made from: all of it, so that a process without connections can make it."""

from __future__ import annotations

from dataclasses import dataclass, field

from detflow.v1.analysis_pb2 import EvaluationAnalysis, EvaluationCurves
from detflow.v1.comparison_pb2 import Comparison
from detflow.v1.metrics_pb2 import Evaluation
from detflow.v1.training_pb2 import Training
from services.metrics.matches import Matches
from services.metrics.series import Series

MAX_CHART_CLASSES = 30
"""Classes that a chart shows; the tables have all of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitContent:
    """One split that was evaluated.

    Attributes:
        evaluation: Its figures, or why there are none.
        curves: Curves behind the figures; None if only the figures are there.
        analysis: What the threshold with the best F1 makes of it; None as before.
        matches: What became of every detection and every box; None as before.
    """

    evaluation: Evaluation
    curves: EvaluationCurves | None = None
    analysis: EvaluationAnalysis | None = None
    matches: Matches | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An image with its boxes drawn.

    Attributes:
        path: Path that it had in its dataset.
        jpeg: The picture.
        num_true_positives: Detections that are right.
        num_false_positives: Detections that are not.
        num_false_negatives: Ground-truth boxes not found.
    """

    path: str
    jpeg: bytes = field(repr=False)
    num_true_positives: int
    num_false_positives: int
    num_false_negatives: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingContent:
    """Everything that a report of a training shows.

    Attributes:
        training: The training; its name alone if an earlier release heard of it.
        version: Display name of the version; its id where that is not known.
        series: Series by epoch.
        splits: Evaluations: validation, then test.
        pictures: Images with the most errors, worst first, of the split that counts.
    """

    training: Training
    version: str
    series: tuple[Series, ...] = ()
    splits: tuple[SplitContent, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def main_split(self) -> SplitContent | None:
        """The measured split that a reader should believe: test, else validation."""
        measured = [
            one for one in self.splits if one.evaluation.state == Evaluation.State.SUCCEEDED
        ]
        return measured[-1] if measured else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PicturePair:
    """An image on which trainings differ, as each of them sees it.

    Attributes:
        path: Path that it had in its dataset.
        f1s: F1 of the image in each training, 0..1.
        jpegs: Picture with the boxes of each training; empty if there are none.
    """

    path: str
    f1s: tuple[float, ...]
    jpegs: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonContent:
    """Everything that a report of a comparison shows.

    Attributes:
        comparison: The comparison; its first training is the baseline.
        versions: Display name of each training's version, or its id.
        pairs: Images on which the trainings differ most.
    """

    comparison: Comparison
    versions: tuple[str, ...]
    pairs: tuple[PicturePair, ...] = ()
