"""What a prediction takes through SDK and HTTP, against ONNX Runtime in a loop of one's own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
from google.protobuf import json_format

from detflow import images
from detflow.v1 import prediction_pb2
from services.metrics.prediction.onnx_model import OnnxModel, letterbox
from services.metrics.prediction.suppression import suppress
from tests.benchmarks.rig import Rig, running

MODEL, IMAGE_SIZE = "yolov8n", 640
WIDTH, HEIGHT = 1920, 1080
_NUM_PICTURES = 8


def run(quick: bool = False) -> dict[str, Any]:
    """Predicts 1080p JPEGs with a model of 640 pixels, all ways in turn, in one run.

    Args:
        quick: One round with a small model.

    Returns:
        Median milliseconds per image and images per second of each way; of the model's first
        prediction the seconds, with the export and with the file there already.
    """
    return asyncio.run(_run(1 if quick else 10, 128 if quick else IMAGE_SIZE))


async def _run(num_rounds: int, image_size: int) -> dict[str, Any]:
    async with running() as rig:
        with tempfile.TemporaryDirectory() as name:
            return await asyncio.to_thread(_measure, rig, Path(name), num_rounds, image_size)


def _measure(rig: Rig, folder: Path, num_rounds: int, image_size: int) -> dict[str, Any]:
    training = rig.client.trainings.start(
        rig.version,
        model=MODEL,
        epochs=1,
        batch_size=4,
        hyperparameters={"image_size": image_size},
    ).name
    for _ in rig.client.trainings.watch(training):
        pass
    paths = list(_pictures(folder))
    begin = time.perf_counter()
    list(rig.client.predictions.predict(training, paths[:1]))
    figures: dict[str, Any] = {"first_with_export_seconds": round(time.perf_counter() - begin, 1)}
    (export,) = rig.client.exports.list(training)
    model = OnnxModel(
        rig.client.exports.download(export.name, folder / "model.onnx"), os.cpu_count() or 1
    )
    todo = [*paths, paths[0]]  # the first is warm-up

    def by_sdk() -> Iterator[object]:
        yield from rig.client.predictions.predict(training, todo)

    def by_sdk_one_by_one() -> Iterator[object]:
        for path in todo:
            (found,) = rig.client.predictions.predict(training, [path])
            yield found

    def by_http() -> Iterator[object]:
        url = f"http://127.0.0.1:{rig.port}/v1/{training}:predict"
        headers = {"content-type": "image/jpeg", "authorization": f"Bearer {rig.token}"}
        with httpx.Client(headers=headers) as http:
            for path in todo:
                answer = http.post(url, content=path.read_bytes()).raise_for_status()
                yield json_format.ParseDict(answer.json(), prediction_pb2.Prediction())

    def by_hand() -> Iterator[object]:
        for path in todo:
            picture = cv2.imread(str(path))
            assert picture is not None
            boxed = letterbox(np.asarray(picture, np.uint8), model.image_size_px, model.stride)
            found = suppress(
                model.run(boxed.pixels), threshold=0.25, nms_iou=0.7, max_detections=300
            )
            yield boxed.to_picture(found.boxes)

    def network_only() -> Iterator[object]:
        picture = images.decode(data := paths[0].read_bytes(), images.header_of(data))
        pixels = letterbox(picture, model.image_size_px, model.stride).pixels
        for _ in todo:
            yield model.run(pixels)

    ways: dict[str, Callable[[], Iterator[object]]] = {
        "network only": network_only,
        "own loop": by_hand,
        "SDK, one stream": by_sdk,
        "SDK, a call per image": by_sdk_one_by_one,
        "HTTP, a request per image": by_http,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    around: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):  # in turn, so that whatever else the machine does meets all of them
        for name, way in ways.items():
            for seconds, inside in _time(way()):
                times[name].append(seconds)
                around[name].append(seconds - inside)
    for name, each in times.items():
        figures[name] = {
            "ms": round(1000 * statistics.median(each), 1),
            "images_per_second": round(1 / statistics.fmean(each), 1),
        }
        if name.endswith("per image"):
            outside = round(1000 * statistics.median(around[name]), 1)
            figures[name]["ms_outside_the_predicting_process"] = outside
    return figures


def _time(work: Iterator[object]) -> Iterator[tuple[float, float]]:
    """Yields the seconds from each result to the next, and those the predicting process took.

    The first result is warm-up.
    """
    with contextlib.closing(work) as results:  # type: ignore[type-var]
        next(results)
        before = time.perf_counter()
        for result in results:
            after = time.perf_counter()
            yield after - before, _inside(result)
            before = after


def _inside(result: object) -> float:
    if not isinstance(result, prediction_pb2.Prediction):
        return 0.0
    parts = result.latency
    return (
        parts.decode_seconds
        + parts.preprocess_seconds
        + parts.inference_seconds
        + parts.postprocess_seconds
    )


def _pictures(folder: Path) -> Iterator[Path]:
    rng = np.random.default_rng(0)
    for number in range(_NUM_PICTURES):
        coarse = rng.integers(0, 256, (HEIGHT // 24, WIDTH // 24, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        path = folder / f"{number}.jpg"
        path.write_bytes(images.encode_jpeg(np.asarray(picture, np.uint8)))
        yield path
