"""What a recipe would make of a dataset: exact counts, and small pictures before and after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from detflow import images
from detflow.names import last_segment, project_of
from detflow.postgres import Database
from detflow.recipes import resolve_recipe
from detflow.resize import Resize, place_pixels
from detflow.v1.preprocess_pb2 import PreviewVersionRequest, PreviewVersionResponse
from detflow.v1.version_pb2 import Recipe, SplitCounts
from services.preprocess import store as sql
from services.preprocess.bundle import (
    Transform,
    copy_boxes,
    make_copies,
    open_store,
    read_source,
)
from services.preprocess.domain import SPLITS, Image
from services.preprocess.images import check_header, decode
from services.preprocess.leaks import SPLIT_VALUES, plan_split
from services.preprocess.messages import num_copies, transform_of
from services.preprocess.pool import WorkerPool
from services.preprocess.report_store import list_outlines

PICTURE_SIDE_PX = 320
"""Longest side of a picture."""

BEFORE = "original"

_MAX_BYTES = 3 << 20
"""Of all pictures together, so that the answer is one message."""

_Message = PreviewVersionResponse


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
    header = check_header(image.path, data)
    upright = decode(image.path, data, header, (PICTURE_SIDE_PX, PICTURE_SIDE_PX))
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


async def preview(
    db: Database, pool: WorkerPool, store_url: str, request: PreviewVersionRequest
) -> PreviewVersionResponse:
    """Shows what a version would be, and makes nothing.

    Args:
        db: Database of the service.
        pool: Processes that decode images.
        store_url: Object store.
        request: Dataset and recipe.

    Raises:
        NotFound: There is no such dataset.
        FailedPrecondition: DATASET_NOT_READY, TOO_FEW_IMAGES or TOO_FEW_GROUPS.
    """
    recipe = resolve_recipe(request.recipe)
    async with db.transaction() as conn:
        dataset = await sql.get_ready_dataset(
            conn, project_of(request.dataset), last_segment(request.dataset)
        )
        outlines = await list_outlines(conn, dataset.id)
    plan = await asyncio.to_thread(plan_split, outlines, recipe, len(dataset.class_names))
    splits = [plan.positions()[name] for name in SPLITS]
    train, val, test = (
        len(positions) * num_copies(recipe, name)
        for name, positions in zip(SPLITS, splits, strict=True)
    )
    response = PreviewVersionResponse(
        num_images=SplitCounts(train=train, val=val, test=test), leak_report=plan.report
    )
    chosen = choose(splits, request.num_samples)
    positions = [position for _, position in chosen]
    async with db.connection() as conn:
        listed = await sql.list_images(conn, dataset.id, positions)
    found = dict(zip(sorted(positions), listed, strict=True))
    samples = await _samples(pool, store_url, recipe, [(s, found[p]) for s, p in chosen])
    room = _MAX_BYTES
    for sample in samples:
        room -= sample.ByteSize()
        if room >= 0:
            response.samples.append(sample)
    return response


async def _samples(
    pool: WorkerPool, store_url: str, recipe: Recipe, chosen: Sequence[tuple[int, Image]]
) -> list[_Message.Sample]:
    """Has the pictures of some images made; in the order of the images."""

    async def jobs() -> AsyncIterator[PreviewJob]:
        for split, image in chosen:
            yield PreviewJob(store_url, image, transform_of(recipe, SPLITS[split]))

    made: dict[str, tuple[Picture, ...]] = {}
    async with aclosing(pool.map(make_pictures, jobs())) as results:
        async for job, pictures in results:
            made[job.image.path] = pictures
    samples = []
    for split, image in chosen:
        before, *after = (_message(picture, image) for picture in made[image.path])
        samples.append(
            _Message.Sample(path=image.path, split=SPLIT_VALUES[split], before=before, after=after)
        )
    return samples


def _message(picture: Picture, image: Image) -> _Message.Picture:
    return _Message.Picture(
        step=picture.step,
        width_px=picture.width,
        height_px=picture.height,
        jpeg=picture.jpeg,
        boxes=picture.boxes,
        class_ids=image.class_ids,
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
