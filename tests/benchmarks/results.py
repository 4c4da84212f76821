"""How long lists of inference results and pictures of their images take."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from detflow.store import ObjectStore
from detflow.v1 import inference_pb2
from detflow.v1.analysis_pb2 import ERROR_KIND_BOTH, ERROR_KIND_MISSED
from detflow.v1.common_pb2 import StoredObject
from services.metrics.bundle_images import BundleImages
from services.metrics.domain import Evaluation
from services.metrics.evaluate import evaluate
from services.metrics.inference_service import InferenceService
from services.metrics.measured import Measured, MeasuredSplits
from services.metrics.pictures import Look, Pictures
from tests.metrics_fakes import Row, ground_truth, parquet

_TRAINING = "projects/p/versions/v/trainings/t"
_NUM_CLASSES = 80
_BOXES_PER_IMAGE = 7
_DETECTIONS_PER_IMAGE = 20
_SHARD_IMAGES = 256


class _Splits:
    """Stands for the measured splits: they are in memory after the first read."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    async def read(self, _training: str, _split: str) -> Measured:
        return self._measured


def run(quick: bool = False) -> dict[str, Any]:
    """Measures lists of a split of 5,000 images with 20 detections each, and 1080p pictures.

    Args:
        quick: 500 images only, to see that it works.

    Returns:
        Milliseconds, best of five: lists by query, to the serialized answer; pictures, the first
        of a shard and later ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_run(500 if quick else 5000, ObjectStore(Path(folder).as_uri())))


async def _run(num_images: int, objects: ObjectStore) -> dict[str, Any]:
    jpeg = _jpeg()
    measured = _measure(num_images, _put_bundle(objects, jpeg))
    pictures = Pictures(BundleImages(objects))
    service = InferenceService(cast(MeasuredSplits, _Splits(measured)), pictures)

    async def listed(**fields: Any) -> float:
        request = inference_pb2.ListInferenceResultsRequest(
            parent=_TRAINING, **{"confidence_threshold": 0.0} | fields
        )

        async def call() -> None:
            (await service.ListInferenceResults(request, None)).SerializeToString()

        return await _best(call)

    cell = inference_pb2.ListInferenceResultsRequest.ConfusionFilter(
        actual_class="class 1", predicted_class="class 2"
    )
    lists = {
        "worst 20": await listed(),
        "worst 200": await listed(page_size=200),
        "of a class": await listed(class_names=["class 1"]),
        "of two kinds of error": await listed(error_kinds=[ERROR_KIND_BOTH, ERROR_KIND_MISSED]),
        "of a cell of the confusion matrix": await listed(confusion=cell),
    }
    looks = {
        "as it is": Look(threshold=0.5),
        "320 px": Look(threshold=0.5, max_side_px=320),
        "320 px with boxes": Look(
            threshold=0.5, max_side_px=320, detections=True, ground_truths=True
        ),
        "1920 px with boxes": Look(threshold=0.5, detections=True, ground_truths=True),
    }
    begin = time.perf_counter()
    await pictures.get(measured, 0, looks["320 px"])
    first = time.perf_counter() - begin
    made = {}
    for name, look in looks.items():
        images = iter(range(1, 6))

        async def call(look: Look = look, images: Any = images) -> None:
            await pictures.get(measured, next(images), look)

        made[name] = await _best(call)
    return {
        "num_images": num_images,
        "num_detections": num_images * _DETECTIONS_PER_IMAGE,
        "list_milliseconds": lists,
        "picture_milliseconds": made,
        "first_picture_of_a_shard_milliseconds": round(1000 * first, 1),
        "shard_megabytes": round(_SHARD_IMAGES * len(jpeg) / 1e6),
    }


async def _best(call: Callable[[], Awaitable[None]]) -> float:
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        await call()
        best = min(best, time.perf_counter() - begin)
    return round(1000 * best, 1)


def _measure(num_images: int, manifest: StoredObject) -> Measured:
    """Measures jittered copies of boxes, a fifth of them of another class."""
    rng = np.random.default_rng(0)
    boxes: list[tuple[int, int, list[float], int]] = []
    rows: list[Row] = []
    for image in range(1, num_images + 1):
        corners, sizes = rng.random((_BOXES_PER_IMAGE, 2)) * 480, rng.uniform(20, 300, (7, 2))
        classes = rng.integers(0, _NUM_CLASSES, _BOXES_PER_IMAGE).tolist()
        for corner, size, index in zip(corners, sizes, classes, strict=True):
            boxes.append((image, index, [*corner.tolist(), *size.tolist()], 0))
        for number in range(_DETECTIONS_PER_IMAGE):
            n = number % _BOXES_PER_IMAGE
            start = corners[n] + rng.normal(0, 0.1, 2) * sizes[n]
            index = classes[n] if rng.random() > 0.2 else int(rng.integers(_NUM_CLASSES))
            (x1, y1), (x2, y2) = start.tolist(), (start + sizes[n]).tolist()
            rows.append((image, index, float(rng.random()), x1, y1, x2, y2))
    measurement, matches = evaluate(ground_truth(num_images, _NUM_CLASSES, boxes), parquet(rows))
    return Measured(
        evaluation=Evaluation(
            training=_TRAINING,
            split="val",
            attempt=1,
            measurement=measurement,
            failure=None,
            create_time=datetime.datetime.now(datetime.UTC),
        ),
        measurement=measurement,
        matches=matches,
        manifest=manifest,
    )


def _jpeg() -> bytes:
    """A 1080p picture that compresses as photographs do."""
    coarse = np.random.default_rng(0).integers(0, 255, (135, 240, 3), np.uint8)
    return cv2.imencode(".jpg", cv2.resize(coarse, (1920, 1080)))[1].tobytes()


def _put_bundle(objects: ObjectStore, jpeg: bytes) -> StoredObject:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(1, _SHARD_IMAGES + 1):
            member = tarfile.TarInfo(f"{number:08d}.jpg")
            member.size = len(jpeg)
            archive.addfile(member, io.BytesIO(jpeg))
    shard = objects.put("shard.tar", file.getvalue())
    entry = {
        "key": shard.key,
        "size_bytes": shard.size_bytes,
        "sha256": shard.sha256,
        "num_images": _SHARD_IMAGES,
    }
    return objects.put("m.json", json.dumps({"splits": {"val": {"shards": [entry]}}}).encode())
