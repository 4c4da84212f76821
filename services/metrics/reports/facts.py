"""What the page of a training says, as plain values: the template only lays them out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp

from detflow.v1.metrics_pb2 import CocoSummary, Evaluation
from detflow.v1.training_pb2 import Training
from services.metrics.reports.content import SplitContent, TrainingContent
from services.metrics.reports.texts import error_kind, error_remedy, figure_meaning, state, text
from services.metrics.series import Series

_SHORT = {
    "map50_95": "mAP50-95",
    "map50": "mAP50",
    "map75": "mAP75",
    "map_small": "mAP small",
    "map_medium": "mAP medium",
    "map_large": "mAP large",
    "ar_max1": "AR 1",
    "ar_max10": "AR 10",
    "ar_max100": "AR 100",
    "ar_small": "AR small",
    "ar_medium": "AR medium",
    "ar_large": "AR large",
}
_FEW_IMAGES = 50
_FEW_BOXES = 10
_MAX_NAMES = 8
_MAX_ROWS = 200
_SPLITS_DIFFER = 0.05
_CONFIDENCES_OFF = 0.1


def training_facts(content: TrainingContent, language: str) -> dict[str, Any]:
    """Returns what the template of a training shows, by name."""
    main = content.main_split
    facts: dict[str, Any] = {
        "training": content.training,
        "state": state(content.training.state, language),
        "version": content.version,
        "notices": list(_notices(content, language)),
        "parameters": list(_parameters(content.training, language)),
        "hyperparameters": _hyperparameters(content.training),
        "splits": [_split(one, language) for one in content.splits],
        "figures": _figures(content, language),
        "has_series": any(len(one.values_N) for one in content.series),
        "pictures": content.pictures,
        "main": None,
    }
    if main is not None:
        facts["main"] = _split(main, language) | {
            "tiles": _tiles(main, language),
            "verdict": _verdict(main, language),
            "cautions": list(_cautions(content, main, language)),
            "errors": _errors(main, language),
            "classes": _classes(main),
            "num_more_classes": max(0, len(main.evaluation.classes) - _MAX_ROWS),
        }
    return facts


def split_name(evaluation: Evaluation, language: str) -> str:
    """Names the split of an evaluation for a reader."""
    return text(evaluation.name.rsplit("/", 1)[-1], language)


def value_text(value: Any) -> str:
    """Renders the value of a hyper-parameter."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _split(content: SplitContent, language: str) -> dict[str, Any]:
    evaluation = content.evaluation
    return {
        "name": split_name(evaluation, language),
        "title": text(f"{evaluation.name.rsplit('/', 1)[-1]}_split", language),
        "evaluation": evaluation,
        "is_measured": evaluation.state == Evaluation.State.SUCCEEDED,
        "has_best": evaluation.HasField("best_f1"),
        "measured_at": _time(evaluation.create_time),
        "sha256": evaluation.ground_truth_sha256[:16],
        "threshold": f"{evaluation.best_f1.confidence_threshold:.2f}",
    }


def _notices(content: TrainingContent, language: str) -> Iterator[str]:
    """Yields what is missing, and why."""
    training = content.training
    if training.state == Training.State.FAILED and training.HasField("failure"):
        reason = training.failure.status.message
        yield text("training_failed", language).format(reason=reason)
    if not content.splits:
        yield text("not_evaluated", language)
    for one in content.splits:
        name = split_name(one.evaluation, language)
        if one.evaluation.state != Evaluation.State.SUCCEEDED:
            reason = one.evaluation.failure.status.message
            yield text("evaluation_failed", language).format(split=name, reason=reason)
        elif one.analysis is None:
            yield text("figures_only", language).format(split=name)
    if not training.model:
        yield text("settings_unknown", language)
    if not content.splits and not any(len(one.values_N) for one in content.series):
        yield text("nothing_yet", language)


def _parameters(training: Training, language: str) -> Iterator[tuple[str, str]]:
    def named(key: str) -> str:
        return text(key, language)

    yield named("project"), training.name.split("/")[1]
    if not training.model:
        return
    yield named("model"), training.model
    yield named("batch_size"), f"{training.batch_size}"
    done = named("epochs_value").format(done=training.num_epochs_done, all=training.epochs)
    yield named("epochs"), done
    if training.HasField("warm_start"):
        yield named("warm_start"), training.warm_start.training or training.warm_start.weights
    if training.attempt > 1:
        yield named("attempts"), f"{training.attempt}"
    if training.HasField("start_time"):
        yield named("began"), _time(training.start_time)
    if training.HasField("start_time") and training.HasField("end_time"):
        yield named("ended"), _time(training.end_time)
        yield named("took"), _duration(training)


def _hyperparameters(training: Training) -> list[tuple[str, str]]:
    values = MessageToDict(training.hyperparameters)
    return [(name, value_text(values[name])) for name in sorted(values)]


def _tiles(main: SplitContent, language: str) -> list[tuple[str, str, str]]:
    """Returns name, value and meaning of the figures that are read first."""
    coco, best = main.evaluation.coco, main.evaluation.best_f1
    tiles = [("mAP50-95", coco.map50_95, "map50_95"), ("mAP50", coco.map50, "map50")]
    if main.evaluation.HasField("best_f1"):
        tiles += [
            (text("precision", language), best.precision, "precision"),
            (text("recall", language), best.recall, "recall"),
        ]
    return [
        (name, f"{100 * value:.1f}" if value >= 0 else "–", figure_meaning(key, language))
        for name, value, key in tiles
    ]


def _verdict(main: SplitContent, language: str) -> str:
    evaluation = main.evaluation
    split = split_name(evaluation, language)
    if not evaluation.num_ground_truths:
        return text("no_ground_truth", language).format(split=split)
    if not evaluation.HasField("best_f1") or not evaluation.best_f1.recall:
        return text("nothing_found", language).format(
            images=f"{evaluation.num_images:,}",
            split=split,
            boxes=f"{evaluation.num_ground_truths:,}",
        )
    best = evaluation.best_f1
    return text("verdict", language).format(
        images=f"{evaluation.num_images:,}",
        split=split,
        threshold=f"{best.confidence_threshold:.2f}",
        recall=round(100 * best.recall),
        precision=round(100 * best.precision),
    )


def _cautions(content: TrainingContent, main: SplitContent, language: str) -> Iterator[str]:
    """Yields what a reader should know before believing the figures."""
    evaluation = main.evaluation
    split = split_name(evaluation, language)
    if evaluation.num_images < _FEW_IMAGES:
        yield text("few_images", language).format(images=evaluation.num_images, split=split)
    few = [c.class_name for c in evaluation.classes if 0 < c.num_ground_truths < _FEW_BOXES]
    none = [c.class_name for c in evaluation.classes if not c.num_ground_truths]
    if few:
        names = _join(few, language)
        yield text("few_boxes", language).format(limit=_FEW_BOXES, split=split, names=names)
    if none and evaluation.num_ground_truths:
        yield text("no_boxes", language).format(split=split, names=_join(none, language))
    figures = [one.coco.map50_95 for one in _measured(content)]
    if len(figures) == 2 and min(figures) >= 0:
        distance = max(figures) - min(figures)
        if distance > _SPLITS_DIFFER:
            yield text("splits_differ", language).format(points=f"{100 * distance:.1f}")
    if main.curves and main.curves.calibration.expected_error > _CONFIDENCES_OFF:
        points = f"{100 * main.curves.calibration.expected_error:.0f}"
        yield text("confidences_off", language).format(points=points)
    if _is_still_rising(content.series):
        yield text("still_rising", language)


def _is_still_rising(series: Sequence[Series]) -> bool:
    for one in series:
        if one.name == "val/map50_95" and len(one.values_N) >= 3:
            values = [value if math.isfinite(value) else -1.0 for value in one.values_N]
            return values[-1] > max(values[:-1])
    return False


def _figures(content: TrainingContent, language: str) -> list[dict[str, Any]]:
    """Returns a row for each figure: name, meaning, and its value in each measured split."""
    measured = _measured(content)
    rows = [
        {
            "name": _SHORT[field.name],
            "meaning": figure_meaning(field.name, language),
            "values": [getattr(one.coco, field.name) for one in measured],
            "is_best": False,
        }
        for field in CocoSummary.DESCRIPTOR.fields
    ]
    for key in ("precision", "recall", "f1", "threshold"):
        name = "confidence_threshold" if key == "threshold" else key
        rows.append(
            {
                "name": text(key, language),
                "meaning": figure_meaning(key, language),
                "values": [
                    getattr(one.best_f1, name) if one.HasField("best_f1") else -1.0
                    for one in measured
                ],
                "is_best": True,
            }
        )
    return rows if measured else []


def _measured(content: TrainingContent) -> list[Evaluation]:
    return [
        one.evaluation
        for one in content.splits
        if one.evaluation.state == Evaluation.State.SUCCEEDED
    ]


def _errors(main: SplitContent, language: str) -> list[dict[str, Any]]:
    impacts = main.analysis.errors if main.analysis else ()
    return [
        {
            "name": error_kind(one.kind, language),
            "remedy": error_remedy(one.kind, language),
            "count": one.count,
            "gain": one.map50_gain,
        }
        for one in sorted(impacts, key=lambda one: -one.map50_gain)
    ]


def _classes(main: SplitContent) -> list[dict[str, Any]]:
    return [
        {"figures": one, "has_best": one.HasField("best_f1")}
        for one in main.evaluation.classes[:_MAX_ROWS]
    ]


def _join(names: Sequence[str], language: str) -> str:
    shown = ", ".join(names[:_MAX_NAMES])
    if len(names) <= _MAX_NAMES:
        return shown
    return f"{shown} {text('and_more', language).format(num=len(names) - _MAX_NAMES)}"


def _time(moment: Timestamp) -> str:
    when: datetime = moment.ToDatetime()
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _duration(training: Training) -> str:
    seconds = round(training.end_time.seconds - training.start_time.seconds)
    minutes, rest = divmod(max(seconds, 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
