"""One image predicted: decoded, prepared as the version's images were, asked about, drawn."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from detflow import images
from detflow.image_headers import Header
from detflow.images import Pixels
from detflow.resize import Placement, place_pixels
from detflow.v1 import inference_pb2, prediction_pb2
from services.metrics.prediction.onnx_model import OnnxModel, letterbox
from services.metrics.prediction.suppression import Found, suppress
from services.metrics.prediction.task import Task


def predict(model: OnnxModel, task: Task, data: bytes) -> prediction_pb2.Prediction:
    """Predicts an image.

    It is decoded as datasets are, then becomes what the version's recipe makes of images, so that
    the model sees what it has learnt from. Boxes are told in the upright image.

    Args:
        model: What finds things.
        task: What to do.
        data: The whole file.

    Raises:
        InvalidArgument: CORRUPT_IMAGE or UNSUPPORTED_IMAGE.
        ResourceExhausted: IMAGE_TOO_LARGE, said by its header.
    """
    started = time.perf_counter()
    header = images.header_of(data)
    images.check_size(header)
    width, height = header.upright_size
    placement = task.resize.place(width, height)
    upright = images.decode(data, header, _needed(header, placement, task.drawn_side_px))
    decoded = time.perf_counter()
    picture = place_pixels(upright, placement)
    if task.grayscale:
        picture = images.to_gray(picture)
    boxed = letterbox(picture, model.image_size_px, model.stride)
    prepared = time.perf_counter()
    predictions = model.run(boxed.pixels)
    answered = time.perf_counter()
    found = suppress(
        predictions,
        threshold=task.confidence_threshold,
        nms_iou=task.nms_iou,
        max_detections=task.max_detections,
    )
    boxes = _to_upright(boxed.to_picture(found.boxes), placement, width, height)
    result = prediction_pb2.Prediction(
        width_px=width,
        height_px=height,
        detections=_detections(found, boxes, model.class_names),
        latency=prediction_pb2.Prediction.Latency(
            decode_seconds=decoded - started,
            preprocess_seconds=prepared - decoded,
            inference_seconds=answered - prepared,
            postprocess_seconds=time.perf_counter() - answered,
        ),
        model=model.model,
        image_size_px=model.image_size_px,
        confidence_threshold=task.confidence_threshold,
    )
    if task.drawn_side_px:
        result.drawn_image = _drawn(upright, result, task.drawn_side_px)
    return result


def _needed(header: Header, placement: Placement, drawn_side: int) -> tuple[int, int]:
    """Returns width and height below which a JPEG may not be shrunk while it is decoded."""
    width, height = header.upright_size
    share = min(1.0, drawn_side / max(width, height))
    return (
        max(placement.width, round(width * share)),
        max(placement.height, round(height * share)),
    )


def _to_upright(
    boxes: NDArray[np.float64], placement: Placement, width: int, height: int
) -> NDArray[np.float64]:
    """Takes boxes from the picture of the recipe to the upright image, and clips them to it."""
    shift = np.tile((placement.left, placement.top), 2)
    scale = np.tile((width / placement.width, height / placement.height), 2)
    return np.asarray(((boxes - shift) * scale).clip(0, np.tile((width, height), 2)), np.float64)


def _detections(
    found: Found, boxes: NDArray[np.float64], class_names: list[str]
) -> list[inference_pb2.Detection]:
    return [
        inference_pb2.Detection(
            class_name=class_names[class_id],
            class_id=class_id,
            confidence=confidence,
            box=inference_pb2.PixelBox(x1=x1, y1=y1, x2=x2, y2=y2),
        )
        for class_id, confidence, (x1, y1, x2, y2) in zip(
            found.classes.tolist(), found.confidences.tolist(), boxes.tolist(), strict=True
        )
    ]


def _drawn(upright: Pixels, result: prediction_pb2.Prediction, side: int) -> bytes:
    """Draws the detections on the image, made so small that its longest side is `side`."""
    # Its fonts come with matplotlib: half a second that only pictures have to pay.
    from services.metrics.drawing import DrawnBox, draw

    share = min(1.0, side / max(result.width_px, result.height_px))
    width, height = (max(1, round(n * share)) for n in (result.width_px, result.height_px))
    picture = place_pixels(upright, Placement(width, height, width, height))
    across, down = width / result.width_px, height / result.height_px
    boxes = [
        DrawnBox(
            x1=one.box.x1 * across,
            y1=one.box.y1 * down,
            x2=one.box.x2 * across,
            y2=one.box.y2 * down,
            label=f"{one.class_name} {one.confidence:.2f}",
            class_id=one.class_id,
        )
        for one in result.detections
    ]
    return images.encode_jpeg(draw(picture, boxes))
