"""How trainings measured on the same images differ, and what of it is more than chance."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from google.protobuf.json_format import MessageToDict

from detflow.v1 import training_pb2
from services.metrics.bootstrap import FIGURES, Floats, ImageCounts, Resampled, Side, resample
from services.metrics.domain import Measurement
from services.metrics.matches import Matches
from services.metrics.measured import Measured

MAX_IMAGES = 50
"""Images on which trainings differ most that are told."""
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Delta:
    """A figure of one training less that of the first, with the interval of this difference.

    Figures are 0..1; where one has nothing to measure it is -1 and the rest is 0.
    """

    baseline: float
    value: float
    low: float
    high: float

    @property
    def delta(self) -> float:
        """The difference."""
        return 0.0 if min(self.baseline, self.value) < 0 else self.value - self.baseline

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0, by more than rounding."""
        return self.low > _ROUNDING or self.high < -_ROUNDING


@dataclass(frozen=True, slots=True)
class ImageDelta:
    """An image on which trainings differ.

    Attributes:
        image: Its position among the images.
        f1s: F1 of the image by training, each at its own threshold; 1 where there was nothing to
            find and nothing was found.
    """

    image: int
    f1s: tuple[float, ...]

    @property
    def difference(self) -> float:
        """The greatest difference between two trainings."""
        return max(self.f1s) - min(self.f1s)


@dataclass(frozen=True, slots=True)
class Compared:
    """What a comparison finds.

    Attributes:
        deltas: Of each training but the first: by name of the figure, in the order of `FIGURES`.
        class_deltas: Of each training but the first: AP50-95 by class, in the order of the list.
        images: Where they differ most, first; only where they do.
    """

    deltas: tuple[Mapping[str, Delta], ...]
    class_deltas: tuple[tuple[Delta, ...], ...]
    images: tuple[ImageDelta, ...]


def compare(
    splits: Sequence[Measured],
    *,
    num_resamples: int,
    confidence_level: float,
    seed: int,
    cancelled: threading.Event | None = None,
) -> Compared:
    """Compares trainings with the first of them.

    The intervals are percentiles of the differences in resamples (Efron and Tibshirani, chapter
    13). A class that no image of a resample shows is left out of its mAP, and the resample out of
    the interval of the class.

    Args:
        splits: The same split of each training, with the same ground truth.
        num_resamples: Draws of the bootstrap.
        confidence_level: What share of the draws an interval holds.
        seed: The same one gives the same draws.
        cancelled: Ends it soon once set; the result is then of no use.
    """
    sides = [Side(split.matches, split.threshold(None)) for split in splits]
    resamples = resample(sides, num_resamples=num_resamples, seed=seed, cancelled=cancelled)
    figures = [_figures(split.measurement) for split in splits]
    tails = ((1 - confidence_level) / 2, (1 + confidence_level) / 2)
    return Compared(
        deltas=tuple(
            {
                name: _delta(
                    figures[0][name],
                    figures[s][name],
                    resamples[s].figures[name] - resamples[0].figures[name],
                    tails,
                )
                for name in FIGURES
            }
            for s in range(1, len(splits))
        ),
        class_deltas=tuple(
            _class_deltas(splits[0], splits[s], resamples[0], resamples[s], tails)
            for s in range(1, len(splits))
        ),
        images=_most_different([side.counts for side in sides]),
    )


def _figures(measurement: Measurement) -> dict[str, float]:
    coco, best = measurement.coco, measurement.best_f1
    rates = (best.precision, best.recall, best.f1) if best else (-1.0, -1.0, -1.0)
    return dict(zip(FIGURES, (coco.map50_95, coco.map50, coco.map75, *rates), strict=True))


def _class_deltas(
    first: Measured,
    other: Measured,
    first_draws: Resampled,
    other_draws: Resampled,
    tails: tuple[float, float],
) -> tuple[Delta, ...]:
    pairs = zip(first.measurement.classes, other.measurement.classes, strict=True)
    return tuple(
        _delta(
            before.ap50_95, after.ap50_95, other_draws.ap_RK[:, k] - first_draws.ap_RK[:, k], tails
        )
        for k, (before, after) in enumerate(pairs)
    )


def _delta(
    baseline: float,
    value: float,
    difference_R: Floats | npt.NDArray[np.float32],
    tails: tuple[float, float],
) -> Delta:
    measured = difference_R[~np.isnan(difference_R)]
    if min(baseline, value) < 0 or not measured.size:
        return Delta(baseline, value, 0.0, 0.0)
    low, high = np.quantile(measured.astype(np.float64), tails)
    return Delta(baseline, value, float(low), float(high))


def _most_different(counts: Sequence[ImageCounts]) -> tuple[ImageDelta, ...]:
    f1_SI = np.stack([one.f1() for one in counts])
    difference_I = np.ptp(f1_SI, axis=0)
    order_I = np.argsort(-difference_I, kind="stable")[:MAX_IMAGES]
    return tuple(
        ImageDelta(int(image), tuple(f1_SI[:, image].tolist()))
        for image in order_I
        if difference_I[image] > 0
    )


def difference(first: Matches, other: Matches) -> str:
    """Says what is not the same in the ground truths of two splits."""
    if first.class_names != other.class_names:
        return "their classes are not the same"
    num_common = len(set(first.paths) & set(other.paths))
    if num_common < max(len(first.paths), len(other.paths)):
        return (
            f"they hold {len(first.paths)} and {len(other.paths)} images,"
            f" of which {num_common} are in both"
        )
    if not np.array_equal(first.size_I2, other.size_I2):
        return "their images have other sizes"
    return "their boxes are not the same"


def differing_parameters(
    trainings: Sequence[training_pb2.Training],
) -> list[tuple[str, list[str]]]:
    """Lists the parameters that are not the same in all trainings, and their values in each.

    The model, batch size, epochs, version, warm start and devices come first, then the
    hyper-parameters by name. A value is "" where a training has none.
    """
    parameters = [_parameters(training) for training in trainings]
    known: dict[str, None] = {}
    for one in parameters:
        known |= dict.fromkeys(one)
    rows = [(name, [one.get(name, "") for one in parameters]) for name in known]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _parameters(training: training_pb2.Training) -> dict[str, str]:
    fixed: dict[str, str] = {
        "model": training.model,
        "batch_size": f"{training.batch_size}" if training.HasField("batch_size") else "",
        "epochs": f"{training.epochs}" if training.HasField("epochs") else "",
        "version": training.name.split("/trainings/")[0],
        "warm_start": training.warm_start.training or training.warm_start.weights,
        "num_nodes": f"{training.resources.num_nodes or 1}",
        "num_devices_per_node": f"{training.resources.num_devices_per_node or 1}",
    }
    given = MessageToDict(training.hyperparameters)
    return fixed | {name: _text(given[name]) for name in sorted(given)}


def _text(value: object) -> str:
    """Renders a value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)
