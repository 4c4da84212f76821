"""What notebooks show of an answer: a picture, the main facts and a table."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from detflow.client.recipes import describe_recipe
from detflow.errors import InvalidArgument
from detflow.v1 import (
    common_pb2,
    inference_pb2,
    metrics_pb2,
    prediction_pb2,
    training_pb2,
    version_pb2,
)

Showable: TypeAlias = (
    prediction_pb2.Prediction
    | inference_pb2.InferenceResult
    | metrics_pb2.Evaluation
    | training_pb2.Training
    | version_pb2.Version
)
"""What can be shown."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An answer as a notebook draws it, and as text elsewhere.

    Attributes:
        title: What it is.
        facts: Short texts by name.
        header: Names of the columns.
        rows: Cells by row.
        jpeg: A picture of it; empty if there is none.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    jpeg: bytes = b""

    def _repr_html_(self) -> str:
        parts = [f"<strong>{html.escape(self.title)}</strong>"]
        if self.jpeg:
            data = base64.b64encode(self.jpeg).decode()
            alt = html.escape(self.title, quote=True)
            parts.append(f'<br><img alt="{alt}" src="data:image/jpeg;base64,{data}">')
        parts.append(_table([], [*self.facts.items()]))
        parts.append(_table(self.header, self.rows))
        return "".join(parts)

    def __repr__(self) -> str:
        facts = [f"{name}: {value}" for name, value in self.facts.items()]
        rows = ["  ".join(row) for row in (self.header, *self.rows) if self.rows]
        return "\n".join([self.title, *facts, *rows])


def shown(message: Showable, jpeg: bytes = b"") -> Shown:
    """Makes what is shown of an answer.

    Args:
        message: The answer.
        jpeg: Its picture, where it does not bring one.

    Raises:
        InvalidArgument: NOT_SHOWABLE.
    """
    match message:
        case prediction_pb2.Prediction():
            return _prediction(message)
        case inference_pb2.InferenceResult():
            return _result(message, jpeg)
        case metrics_pb2.Evaluation():
            return _evaluation(message)
        case training_pb2.Training():
            return _training(message)
        case version_pb2.Version():
            return _version(message)
    raise InvalidArgument(
        f"a {type(message).__name__} is nothing that is drawn: give a Prediction, an"
        " InferenceResult, an Evaluation, a Training or a Version",
        reason="NOT_SHOWABLE",
    )


def _prediction(message: prediction_pb2.Prediction) -> Shown:
    if message.HasField("failure"):
        return Shown(title=message.file_name, facts={"failure": message.failure.status.message})
    return Shown(
        title=message.file_name,
        facts={
            "size": f"{message.width_px} x {message.height_px} px",
            "detections": f"{len(message.detections)} of at least"
            f" {message.confidence_threshold:.3g}",
        },
        header=("class", "confidence", "box (x1, y1, x2, y2)"),
        rows=[
            (one.class_name, f"{one.confidence:.3f}", _corners(one.box))
            for one in message.detections
        ],
        jpeg=message.drawn_image,
    )


def _result(message: inference_pb2.InferenceResult, jpeg: bytes) -> Shown:
    name = inference_pb2.Detection.Match.Name
    return Shown(
        title=message.image_path,
        facts={
            "right": f"{message.num_true_positives}",
            "wrong": f"{message.num_false_positives}",
            "not found": f"{message.num_false_negatives}",
        },
        header=("class", "confidence", "match", "box (x1, y1, x2, y2)"),
        rows=[
            (one.class_name, f"{one.confidence:.3f}", name(one.match), _corners(one.box))
            for one in message.detections
        ],
        jpeg=jpeg,
    )


def _evaluation(message: metrics_pb2.Evaluation) -> Shown:
    facts: dict[str, str] = {"images": f"{message.num_images}"}
    if message.HasField("failure"):
        facts["failure"] = message.failure.status.message
    else:
        facts["mAP50-95"] = _figure(message.coco.map50_95)
        facts["mAP50"] = _figure(message.coco.map50)
    if message.HasField("best_f1"):
        best = message.best_f1
        facts["best F1"] = f"{best.f1:.3f} at confidence {best.confidence_threshold:.3f}"
    return Shown(
        title=f"Evaluation on {common_pb2.Split.Name(message.split)[6:].lower()}",
        facts=facts,
        header=("class", "AP50-95", "AP50", "boxes"),
        rows=[
            (one.class_name, _figure(one.ap50_95), _figure(one.ap50), f"{one.num_ground_truths}")
            for one in message.classes
        ],
    )


def _training(message: training_pb2.Training) -> Shown:
    facts = {
        "state": training_pb2.Training.State.Name(message.state),
        "model": message.model,
        "epochs": f"{message.num_epochs_done} of {message.epochs}",
        "batch size": f"{message.batch_size}",
    }
    if message.HasField("failure"):
        facts["failure"] = message.failure.status.message
    return Shown(title=message.name, facts=facts)


def _version(message: version_pb2.Version) -> Shown:
    images = message.num_images
    facts = {
        "state": version_pb2.Version.State.Name(message.state),
        "images": f"{images.train} train, {images.val} val, {images.test} test",
        "classes": ", ".join(message.class_names),
        "recipe": ", ".join(describe_recipe(message.recipe)) or "images as they are",
    }
    if message.HasField("metrics"):
        facts["mAP50"] = _figure(message.metrics.map50)
    if message.HasField("failure"):
        facts["failure"] = message.failure.status.message
    return Shown(title=message.display_name, facts=facts)


def _corners(box: inference_pb2.PixelBox) -> str:
    return f"{box.x1:.0f}, {box.y1:.0f}, {box.x2:.0f}, {box.y2:.0f}"


def _figure(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [_row("th", header)] if header else []
    lines += [_row("td", row) for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def _row(tag: str, row: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
