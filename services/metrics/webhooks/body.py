"""What webhooks are told, as JSON; docs/how-to/webhooks.md shows it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from detflow.errors import from_status
from detflow.names import project_of
from detflow.v1 import training_pb2
from services.metrics.domain import Evaluation, TrainingState
from services.metrics.webhooks.domain import EventType


def body_of_training(
    event_type: EventType,
    happened: datetime,
    name: str,
    training: training_pb2.Training,
    evaluations: list[Evaluation],
) -> bytes:
    """Renders what a webhook is told of a training; see docs/how-to/webhooks.md."""
    return _render(
        event_type,
        happened,
        {
            "project": f"projects/{project_of(name)}",
            "version": name.rsplit("/trainings/", 1)[0],
            "training": name,
            "model": training.model,
            "state": TrainingState(training.state).name,
            "failure": _failure(training),
            "metrics": {e.split: _figures(e) for e in evaluations},
        },
    )


def body_of_test(time: datetime, webhook: str) -> bytes:
    """Renders a message of no consequence."""
    data = {"project": f"projects/{project_of(webhook)}", "webhook": webhook}
    return _render(EventType.TEST, time, data)


def _render(event_type: EventType, time: datetime, data: dict[str, Any]) -> bytes:
    timestamp = time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = {"type": event_type.text, "timestamp": timestamp, "data": data}
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def _failure(training: training_pb2.Training) -> dict[str, str] | None:
    if training.state != training_pb2.Training.FAILED:
        return None
    error = from_status(training.failure.status)
    return {"reason": error.reason, "message": error.message}


def _figures(evaluation: Evaluation) -> dict[str, float | None] | None:
    """Returns the figures of a split, each 0..1, None where there was nothing to measure."""
    if evaluation.measurement is None:
        return None
    coco, best = evaluation.measurement.coco, evaluation.measurement.best_f1
    return {
        "map50": coco.map50 if coco.map50 >= 0 else None,
        "map50_95": coco.map50_95 if coco.map50_95 >= 0 else None,
        "precision": best.precision if best else None,
        "recall": best.recall if best else None,
    }
