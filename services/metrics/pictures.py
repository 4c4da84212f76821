"""Pictures of a bundle's images: as they are, smaller, or with boxes drawn on them."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import cv2
import numpy as np

from detflow import images
from detflow.boxes import as_boxes
from detflow.resize import Resize, place_boxes, place_pixels
from services.metrics import results
from services.metrics.bundle_images import BundleImages
from services.metrics.drawing import DrawnBox, Style, draw
from services.metrics.kept import Kept
from services.metrics.matches import Matches
from services.metrics.measured import Measured

MAX_DRAWN_DETECTIONS = 300
"""Of an image, the most confident; more would hide it."""

_MAX_KEPT_BYTES = 64 << 20
_MAX_READ_AT_ONCE = 8
_MAX_MADE_AT_ONCE = 2  # each may take some hundred megabytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a picture shows.

    Attributes:
        threshold: Detections of at least this confidence.
        max_side_px: Longest side; 0 means as it is.
        detections: Draw them.
        ground_truths: Draw them.
        png: PNG instead of JPEG.
    """

    threshold: float
    max_side_px: int = 0
    detections: bool = False
    ground_truths: bool = False
    png: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture.

    Attributes:
        file_name: Name to save it under.
        content_type: image/jpeg or image/png.
        data: The file.
        etag: Changes with the data.
    """

    file_name: str
    content_type: str
    data: bytes
    etag: str


class Pictures:
    """Makes pictures, two at a time, and keeps those made last, within 64 MiB.

    Args:
        bundle_images: Where the images come from.
    """

    def __init__(self, bundle_images: BundleImages) -> None:
        self._images = bundle_images
        self._kept: Kept[tuple[object, ...], Picture] = Kept(_MAX_KEPT_BYTES, lambda p: len(p.data))
        self._threads = ThreadPoolExecutor(_MAX_READ_AT_ONCE, "pictures")
        self._making = threading.BoundedSemaphore(_MAX_MADE_AT_ONCE)

    async def get(self, measured: Measured, image: int, look: Look) -> Picture:
        """Makes a picture, or takes one that is kept.

        Args:
            measured: The split.
            image: Position of the image.
            look: What it shows.

        Raises:
            DataLoss: The image is gone or damaged.
            Unavailable: The object store is away.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._get, measured, image, look)

    def _get(self, measured: Measured, image: int, look: Look) -> Picture:
        key = (measured.evaluation.matches, measured.evaluation.manifest, image, look)
        return self._kept.get(key, lambda: self._make(measured, image, look))

    def _make(self, measured: Measured, image: int, look: Look) -> Picture:
        split, image_id = measured.evaluation.split, int(measured.matches.id_I[image])
        jpeg = self._images.read(measured.manifest, split, image_id)
        with self._making:
            data = render(jpeg, measured.matches, image, look)
        kind = "png" if look.png else "jpeg"
        stem = PurePosixPath(measured.matches.paths[image]).stem
        return Picture(
            file_name=f"{split}-{image_id}-{stem}.{'png' if look.png else 'jpg'}",
            content_type=f"image/{kind}",
            data=data,
            etag=hashlib.sha256(data).hexdigest()[:32],
        )


def render(jpeg: bytes, matches: Matches, image: int, look: Look) -> bytes:
    """Renders an image.

    Args:
        jpeg: The image as it is in the bundle; returned as it is where nothing changes it.
        matches: What became of every detection and every box.
        image: Position of the image.
        look: What is wanted.
    """
    header = images.header_of(jpeg)
    placement = Resize(look.max_side_px).place(header.width, header.height)
    target = (placement.width, placement.height)
    is_drawn = look.detections or look.ground_truths
    if target == (header.width, header.height) and not is_drawn and not look.png:
        return jpeg
    pixels = place_pixels(images.decode(jpeg, header, target), placement)
    if is_drawn:
        boxes = [*boxes_of(results.at_threshold(matches, look.threshold), image, look)]
        corners = as_boxes([value for box in boxes for value in (box.x1, box.y1, box.x2, box.y2)])
        placed = place_boxes(corners, header.width, header.height, placement).tolist()
        pixels = draw(
            pixels,
            [
                replace(box, x1=x1, y1=y1, x2=x2, y2=y2)
                for (x1, y1, x2, y2), box in zip(placed, boxes, strict=True)
            ],
        )
    if look.png:
        return cv2.imencode(".png", pixels)[1].tobytes()
    return images.encode_jpeg(np.ascontiguousarray(pixels))


def boxes_of(outcomes: results.Outcomes, image: int, look: Look) -> Iterator[DrawnBox]:
    """Yields what is to be drawn on an image, in its own pixels.

    Where both are drawn, a box that was found needs no name: the detection on it has one.
    """
    matches = outcomes.matches
    if look.ground_truths:
        truths = outcomes.truths(image)
        for m in range(truths.start, truths.stop):
            class_id = int(matches.class_M[m])
            is_lost = look.detections and bool(outcomes.lost_M[m])
            is_named = is_lost or not look.detections or bool(matches.crowd_M[m])
            x1, y1, x2, y2 = matches.box_M4[m].tolist()
            label = matches.class_names[class_id] if is_named else ""
            style = Style.MISSED if is_lost else Style.TRUTH
            yield DrawnBox(x1, y1, x2, y2, label, class_id, style)
    if look.detections:
        detections = outcomes.detections(image)
        stop = min(detections.stop, detections.start + MAX_DRAWN_DETECTIONS)
        for n in range(detections.start, stop):
            class_id = int(matches.class_N[n])
            x1, y1, x2, y2 = matches.box_N4[n].tolist()
            label = f"{matches.class_names[class_id]} {matches.confidence_N[n]:.2f}"
            style = Style.WRONG if outcomes.wrong_N[n] else Style.FOUND
            yield DrawnBox(x1, y1, x2, y2, label, class_id, style)
