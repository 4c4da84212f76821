"""What a recipe would make of some images: small pictures before and after, with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.preprocess import images
from services.preprocess.bundle import (
    Transform,
    copy_boxes,
    make_copies,
    open_store,
    read_source,
)
from services.preprocess.domain import Image
from services.preprocess.resize import Resize, place_pixels

PICTURE_SIDE_PX = 320
"""Longest side of a picture."""

BEFORE = "original"


@dataclass(frozen=True, slots=True)
class PreviewJob:
    """One image to be shown; picklable, complete in itself."""

    store_url: str
    image: Image
    transform: Transform


@dataclass(frozen=True, slots=True)
class Picture:
    """A small picture of an image.

    Attributes:
        step: What was done.
        width: Width of the real image in pixels.
        height: Height of the real image in pixels.
        jpeg: The picture.
        boxes: Flat x1, y1, x2, y2 per box, pixels of the real image.
    """

    step: str
    width: int
    height: int
    jpeg: bytes
    boxes: tuple[float, ...]


def make_pictures(job: PreviewJob) -> tuple[Picture, ...]:
    """Makes the picture of an image as it was imported, then those of its copies.

    Runs in a process of the pool.

    Raises:
        DataLoss: The image is gone or differs from its recorded hash.
    """
    image = job.image
    data = read_source(open_store(job.store_url), image)
    header = images.check_header(image.path, data)
    upright = images.decode(image.path, data, header, (PICTURE_SIDE_PX, PICTURE_SIDE_PX))
    before = Picture(BEFORE, image.width, image.height, _shrunk(upright), image.boxes)
    copies = zip(
        make_copies(image, data, header, job.transform),
        copy_boxes(image, job.transform),
        strict=True,
    )
    return (
        before,
        *(
            Picture(copy.name, width, height, _shrunk(pixels), tuple(boxes.ravel().tolist()))
            for pixels, (copy, width, height, boxes) in copies
        ),
    )


def choose(splits: Sequence[Sequence[int]], num_samples: int) -> list[tuple[int, int]]:
    """Chooses images from all splits, spread evenly, most of them from the first.

    Args:
        splits: Positions of the images of each split.
        num_samples: How many are wanted.

    Returns:
        Index of the split and position of each, those of the first split first.
    """
    counts = [0] * len(splits)
    for number in range(num_samples):
        # One of each of the others for two of the first.
        wanted = (0, 1, 0, 2)[number % 4]
        for split in (wanted, *range(len(splits))):
            if counts[split] < len(splits[split]):
                counts[split] += 1
                break
    return [
        (split, positions[len(positions) * index // count])
        for split, (positions, count) in enumerate(zip(splits, counts, strict=True))
        for index in range(count)
    ]


def _shrunk(pixels: images.Pixels) -> bytes:
    height, width = pixels.shape[:2]
    placement = Resize(PICTURE_SIDE_PX).place(width, height)
    return images.encode_jpeg(place_pixels(pixels, placement))
