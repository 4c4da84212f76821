"""What the metrics service lives on, made by a test: events, bundles and predictions."""

import hashlib
import io
import json
import uuid
from collections.abc import Mapping
from typing import Any

import pyarrow
import pyarrow.parquet

from detflow.events import Bus, Header
from detflow.store import ObjectStore
from detflow.v1 import events_pb2, training_pb2
from detflow.v1.common_pb2 import StoredObject

Row = tuple[int, int, float, float, float, float, float]  # image, class, confidence, x1 y1 x2 y2


def parquet(rows: list[Row]) -> bytes:
    """Predictions as a worker writes them: by image, most confident first."""
    rows = sorted(rows, key=lambda row: (row[0], -row[2]))
    names = ("image_id", "class_id", "confidence", "x1", "y1", "x2", "y2")
    kinds = [pyarrow.int32()] * 2 + [pyarrow.float32()] * 5
    table = pyarrow.table(
        {name: pyarrow.array([row[i] for row in rows], kinds[i]) for i, name in enumerate(names)}
    )
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def ground_truth(
    num_images: int, num_classes: int, boxes: list[tuple[int, int, list[float], int]]
) -> dict[str, Any]:
    """COCO dictionary of boxes (image id, class index, [x, y, w, h], is crowd)."""
    return {
        "images": [
            {"id": i + 1, "width": 640, "height": 480, "file_name": f"{i + 1:08d}.jpg"}
            for i in range(num_images)
        ],
        "annotations": [
            {
                "id": n + 1,
                "image_id": image,
                "category_id": index + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": crowd,
            }
            for n, (image, index, box, crowd) in enumerate(boxes)
        ],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)],
    }


def put_bundle(store: ObjectStore, truths: Mapping[str, dict[str, Any]]) -> StoredObject:
    """Stores the part of a bundle that metrics reads; returns its manifest."""

    def put(folder: str, content: dict[str, Any]) -> StoredObject:
        data = json.dumps(content).encode()
        return store.put(f"bundles/{folder}/{hashlib.sha256(data).hexdigest()}.json", data)

    splits = {}
    for split, truth in truths.items():
        obj = put("ground-truth", truth)
        splits[split] = {
            "ground_truth": {"key": obj.key, "size_bytes": obj.size_bytes, "sha256": obj.sha256}
        }
    return put("manifests", {"format": "detflow-bundle/1", "splits": splits})


class FakeTraining:
    """Publishes the events of one training as the trainer's relay does."""

    def __init__(self, bus: Bus, training_id: str, project: str = "p") -> None:
        self._bus = bus
        self._seq = 0
        self._revision = 0
        self.id = training_id
        self.name = f"projects/{project}/versions/v1/trainings/{training_id}"
        self.attempt = 1

    async def publish(
        self, what: str, event: events_pb2.Event, *, seq: int = 0, event_id: str = ""
    ) -> None:
        """Publishes an event; by default with the next sequence number and a new id."""
        if not seq:
            self._seq += 1
        headers = {
            Header.EVENT_ID: event_id or str(uuid.uuid4()),
            Header.SEQ: str(seq or self._seq),
            Header.NAME: self.name,
        }
        subject = f"detflow.v1.training.{self.id}.{what}"
        await self._bus.publish_durable(subject, event.SerializeToString(), headers)

    async def state(self, state: "training_pb2.Training.State.ValueType") -> None:
        """Reports the next state."""
        self._revision += 1
        training = training_pb2.Training(
            name=self.name, state=state, revision=self._revision, attempt=self.attempt
        )
        await self.publish("state_changed", events_pb2.Event(training=training))

    async def run(self) -> None:
        """Goes through the states up to RUNNING."""
        for state in (
            training_pb2.Training.QUEUED,
            training_pb2.Training.PROVISIONING,
            training_pb2.Training.RUNNING,
        ):
            await self.state(state)

    async def epoch(self, epoch: int, **values: float) -> None:
        """Reports an epoch; `val__map50=1` becomes val/map50."""
        metrics = training_pb2.EpochMetrics(
            attempt=self.attempt,
            epoch=epoch,
            values={name.replace("__", "/"): value for name, value in values.items()},
        )
        await self.publish("epoch_completed", events_pb2.Event(epoch=metrics))

    async def steps(
        self, epoch: int, first_step: int, *, num_steps: int = 10, **columns: list[float]
    ) -> None:
        """Reports steps; `train__box_loss=[3, 2]` becomes train/box_loss of two steps."""
        block = training_pb2.StepMetrics(
            attempt=self.attempt,
            epoch=epoch,
            first_step=first_step,
            num_steps=num_steps,
            columns=[
                training_pb2.StepMetrics.Column(name=name.replace("__", "/"), values=values)
                for name, values in columns.items()
            ],
        )
        await self.publish("steps_completed", events_pb2.Event(steps=block))

    async def log(self, *lines: str) -> None:
        """Reports log lines."""
        lines_message = training_pb2.LogLines(attempt=self.attempt, lines=lines)
        await self.publish("logged", events_pb2.Event(log=lines_message))

    async def predictions(
        self, manifest: StoredObject, val: StoredObject, test: StoredObject
    ) -> None:
        """Hands over what is to be measured."""
        await self.state(training_pb2.Training.EVALUATING)
        predictions = training_pb2.Predictions(
            attempt=self.attempt, manifest=manifest, val=val, test=test
        )
        await self.publish("predictions_written", events_pb2.Event(predictions=predictions))
