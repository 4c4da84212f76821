"""Images without augmentation: loss and mAP after each epoch, and the predictions at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.utils.metrics import ap_per_class

from detflow.errors import DataLoss
from services.trainer.worker.augment import PADDING_GREY
from services.trainer.worker.bundle import Image
from services.trainer.worker.networks import Network

MIN_CONFIDENCE = 0.001
MAX_DETECTIONS = 300
NMS_IOU = 0.7
_MAX_CANDIDATES = (1_000, 5_000, 30_000)
"""How many of the best candidates NMS is tried with, until it keeps enough."""
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_MAX_KEPT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Batch:
    """Images scaled to one size and padded to a common shape.

    Attributes:
        images: The images.
        pixels: RGB, shape (n, 3, h, w), uint8.
        scales: Model pixels per image pixel, shape (n,).
        offsets: Left and top padding in model pixels, shape (n, 2).
    """

    images: tuple[Image, ...]
    pixels: torch.Tensor
    scales: NDArray[np.float64]
    offsets: NDArray[np.float64]

    def targets(self) -> dict[str, torch.Tensor]:
        """Returns the labels as `Network.loss` wants them: centre and size, 0..1 of `pixels`."""
        height, width = self.pixels.shape[2:]
        rows = []
        for index, image in enumerate(self.images):
            boxes = image.boxes * self.scales[index]
            boxes[:, :2] += self.offsets[index] + boxes[:, 2:] / 2
            boxes /= (width, height, width, height)
            head = np.full((len(boxes), 1), index)
            rows.append(np.concatenate((head, image.classes[:, None], boxes), axis=1))
        table = torch.from_numpy(np.concatenate(rows)).float()
        return {"batch_idx": table[:, 0], "cls": table[:, 1:2], "bboxes": table[:, 2:]}


class EvaluationSet:
    """The images of a split, ordered by shape so that batches need little padding.

    Args:
        images: The images.
        image_size: Longest side the model sees, in pixels.
        batch_size: Images per batch.
        stride: Sides of a batch are multiples of it.

    Attributes:
        kept_bytes: Memory that the decoded images will take.
    """

    def __init__(
        self, images: Sequence[Image], *, image_size: int, batch_size: int, stride: int
    ) -> None:
        self._images = sorted(images, key=lambda image: image.height / image.width)
        self._image_size = image_size
        self._batch_size = batch_size
        self._stride = stride
        num_bytes = len(images) * image_size**2 * 3
        self._keep = num_bytes <= _MAX_KEPT_BYTES
        self.kept_bytes = num_bytes if self._keep else 0
        self._kept: dict[int, Batch] = {}

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            batch = self._kept.get(index) or self._make(index)
            if self._keep:
                self._kept[index] = batch
            yield batch

    def _make(self, index: int) -> Batch:
        images = self._images[index * self._batch_size : (index + 1) * self._batch_size]
        pictures = [_read(image, self._image_size) for image in images]
        height, width = (
            -(-max(pixels.shape[axis] for pixels in pictures) // self._stride) * self._stride
            for axis in (0, 1)
        )
        padded = np.full((len(images), height, width, 3), PADDING_GREY, dtype=np.uint8)
        offsets = np.zeros((len(images), 2))
        for row, pixels in enumerate(pictures):
            top, left = (height - pixels.shape[0]) // 2, (width - pixels.shape[1]) // 2
            padded[row, top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            offsets[row] = left, top
        return Batch(
            images=tuple(images),
            pixels=torch.from_numpy(padded).permute(0, 3, 1, 2),
            scales=np.array(
                [self._image_size / max(image.width, image.height) for image in images]
            ),
            offsets=offsets,
        )


def _read(image: Image, image_size: int) -> NDArray[np.uint8]:
    """Decodes an image and scales it."""
    pixels = cv2.imread(str(image.path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise DataLoss(
            f"bundle image {image.path.name} cannot be decoded; create the version again",
            reason="BUNDLE_CORRUPT",
        )
    return scaled(pixels, image_size)


def scaled(pixels: NDArray[Any], image_size: int) -> NDArray[np.uint8]:
    """Scales a picture so that its longest side is `image_size`, as in training.

    Args:
        pixels: BGR, shape (h, w, 3), uint8.
        image_size: Pixels.

    Returns:
        RGB.
    """
    height, width = pixels.shape[:2]
    scale = image_size / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    if size != (width, height):
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(pixels[..., ::-1], dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Detections:
    """What a model finds in one image, by descending confidence.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the bundle's image, inside it, shape (n, 4), float32.
        confidences: MIN_CONFIDENCE..1, shape (n,), float32.
        classes: Class indices, shape (n,), int64.
    """

    boxes: NDArray[np.float32]
    confidences: NDArray[np.float32]
    classes: NDArray[np.int64]


def forward(network: Network, batch: Batch, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Runs a network in evaluation mode.

    Returns:
        Predictions of shape (n, 4 + classes, anchors): centre and size in model pixels, then a
        confidence per class; and the raw outputs that the loss takes.
    """
    pixels = batch.pixels.to(device, non_blocking=True).float() / 255
    predictions, raw = network(pixels.contiguous(memory_format=torch.channels_last))
    return predictions, raw


def select(predictions: torch.Tensor, batch: Batch) -> list[Detections]:
    """Reduces raw predictions to detections: threshold, NMS per class, pixels of the image."""
    found = []
    for row, image in enumerate(batch.images):
        boxes, confidences, classes = _suppress(predictions[row])
        offset = np.tile(batch.offsets[row], 2)
        boxes = (boxes - offset) / batch.scales[row]
        boxes[:, 0::2] = boxes[:, 0::2].clip(0, image.width)
        boxes[:, 1::2] = boxes[:, 1::2].clip(0, image.height)
        found.append(Detections(boxes.astype(np.float32), confidences, classes))
    return found


def _suppress(
    prediction: torch.Tensor,
) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.int64]]:
    scores = prediction[4:]
    classes, anchors = torch.nonzero(scores >= MIN_CONFIDENCE, as_tuple=True)
    confidences = scores[classes, anchors]
    confidences, best = confidences.topk(min(len(confidences), _MAX_CANDIDATES[-1]))
    classes, anchors = classes[best], anchors[best]
    centre, size = prediction[:2, anchors].T, prediction[2:4, anchors].T
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=1)
    # Boxes of different classes are moved apart, so that one NMS treats each class alone.
    apart = classes[:, None].to(boxes.dtype) * (boxes.abs().max() + 1 if len(boxes) else 0) * 2
    moved = boxes + apart
    for number in _MAX_CANDIDATES:
        # A candidate is suppressed by better ones alone, so the best mostly tell all there is.
        kept = torch.ops.torchvision.nms(moved[:number], confidences[:number], NMS_IOU)
        if len(kept) >= MAX_DETECTIONS or len(confidences) <= number:
            break
    kept = kept[:MAX_DETECTIONS]
    return (
        boxes[kept].double().cpu().numpy(),
        confidences[kept].float().cpu().numpy(),
        classes[kept].cpu().numpy(),
    )


class Score:
    """mAP, precision and recall by ultralytics' formulas: to choose the best epoch."""

    def __init__(self) -> None:
        self._correct: list[NDArray[np.bool_]] = []
        self._found: list[Detections] = []
        self._truth: list[NDArray[np.int64]] = []

    def add(self, image: Image, found: Detections) -> None:
        """Adds the detections in one image."""
        self._correct.append(_match(image, found))
        self._found.append(found)
        self._truth.append(image.classes)

    def values(self) -> dict[str, float]:
        """Returns val/map50, val/map50_95, val/precision and val/recall (at the best mean F1)."""
        truth = np.concatenate(self._truth)
        confidences = np.concatenate([found.confidences for found in self._found])
        names = ("val/precision", "val/recall", "val/map50", "val/map50_95")
        if not len(truth) or not len(confidences):
            return dict.fromkeys(names, 0.0)
        classes = np.concatenate([found.classes for found in self._found])
        _, _, precision, recall, _, ap, *_ = ap_per_class(
            np.concatenate(self._correct), confidences, classes, truth
        )
        means = precision.mean(), recall.mean(), ap[:, 0].mean(), ap.mean()
        return dict(zip(names, map(float, means), strict=True))


def _match(image: Image, found: Detections) -> NDArray[np.bool_]:
    """Says which detections are correct at each of the ten IoU thresholds, shape (n, 10)."""
    correct = np.zeros((len(found.classes), len(_IOU_THRESHOLDS)), dtype=np.bool_)
    if not len(image.classes) or not len(found.classes):
        return correct
    truth = np.concatenate((image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:]), axis=1)
    overlap = _iou(truth, found.boxes) * (image.classes[:, None] == found.classes)
    thresholds = np.arange(len(_IOU_THRESHOLDS))
    free = np.ones((len(truth), len(thresholds)), dtype=np.bool_)
    for index in np.flatnonzero(overlap.max(axis=0) >= _IOU_THRESHOLDS[0]):
        available = np.where(free, overlap[:, index, None], 0.0)
        best = available.argmax(axis=0)
        correct[index] = available[best, thresholds] >= _IOU_THRESHOLDS
        free[best, thresholds] &= ~correct[index]
    return correct


def _iou(first: NDArray[np.float64], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Computes IoU of all pairs of x1, y1, x2, y2 boxes: shape (len(first), len(second))."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    extent = (np.minimum(first[:, None, 2:], second[None, :, 2:]) - corner).clip(0)
    both = extent.prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return np.asarray(both / (areas[0][:, None] + areas[1] - both + 1e-9), dtype=np.float64)
