"""A dataset as a zip in one of the formats, made while it is sent.

Nothing is stored for it: at any time a few images are in memory. The same dataset in the same
format gives the same bytes: entries come in a fixed order, uncompressed (images are compressed
already), and without times.
"""

from __future__ import annotations

import asyncio
import functools
import io
import zipfile
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import IO, Any, Protocol

from detflow.errors import FailedPrecondition
from detflow.postgres import Database
from detflow.store import ObjectStore
from detflow.tasks import cancel_all
from services.preprocess import packing
from services.preprocess import store as sql
from services.preprocess.bundle import read_source
from services.preprocess.domain import SPLITS, Dataset, DatasetState, Image, Reason
from services.preprocess.formats import Format
from services.preprocess.packing import Place

CHUNK_BYTES = 1 << 20
_WORTH_SENDING = 128 << 10
_IMAGES_AT_ONCE = 200
_READ_AHEAD = 8
_READ_AHEAD_BYTES = 64 << 20
_NO_TIME = (1980, 1, 1, 0, 0, 0)


class _Pipe(io.RawIOBase):
    """Where zipfile writes to; what is there is taken out to be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.waiting += view
        return view.nbytes

    def take(self) -> bytes:
        """Returns what was written since."""
        taken = bytes(self.waiting)
        self.waiting.clear()
        return taken


class Images(Protocol):
    """The images of a dataset, wherever they are."""

    async def describe(self) -> list[tuple[str, str | None, int, int]]:
        """Returns path, existing split, width and height of each, in the order of positions."""

    async def page(self, positions: Sequence[int]) -> list[Image]:
        """Returns some of them by ascending position."""

    def read(self, image: Image) -> bytes:
        """Returns the original bytes of one; called in threads."""


class StoredImages:
    """The images of a dataset in the database and the object store."""

    def __init__(self, db: Database, store: ObjectStore, dataset: Dataset) -> None:
        self._db = db
        self._store = store
        self._dataset = dataset

    async def describe(self) -> list[tuple[str, str | None, int, int]]:
        """Reads path, existing split, width and height of each."""
        async with self._db.connection() as conn:
            return await sql.list_image_places(conn, self._dataset.id)

    async def page(self, positions: Sequence[int]) -> list[Image]:
        """Reads some images.

        Raises:
            FailedPrecondition: The dataset was deleted.
        """
        async with self._db.connection() as conn:
            images = await sql.list_images(conn, self._dataset.id, positions)
        if len(images) < len(positions):
            raise _not_ready(self._dataset, "was deleted while it was downloaded")
        return images

    def read(self, image: Image) -> bytes:
        """Reads the bytes of an image.

        Raises:
            DataLoss: It is gone or differs from what was imported.
        """
        return read_source(self._store, image)


def open_download(
    db: Database, store: ObjectStore, dataset: Dataset, wanted: Format | None
) -> Packer:
    """Prepares the download of a dataset.

    Args:
        db: Database of the service.
        store: Object store.
        dataset: The dataset.
        wanted: Format of the archive; None means the one it was imported in.

    Raises:
        FailedPrecondition: DATASET_NOT_READY.
    """
    if dataset.state is not DatasetState.READY or dataset.format is None:
        raise _not_ready(dataset, f"is {dataset.state}, not READY; there is nothing to download")
    images = StoredImages(db, store, dataset)
    return Packer(images, dataset.class_names, wanted or Format(dataset.format))


class Packer:
    """Packs the images of a dataset with their labels."""

    def __init__(self, images: Images, class_names: Sequence[str], wanted: Format) -> None:
        self._source = images
        self._class_names = class_names
        self._wanted = wanted
        self._pipe = _Pipe()
        self._zip = zipfile.ZipFile(self._pipe, "w", zipfile.ZIP_STORED)
        self._places: list[Place] = []
        self._sizes: list[tuple[int, int]] = []

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yields the archive in pieces of at most CHUNK_BYTES.

        Raises:
            DataLoss: An image is gone or differs from what was imported.
        """
        described = await self._source.describe()
        self._sizes = [(width, height) for _, _, width, height in described]
        self._places = await asyncio.to_thread(
            packing.find_places, [(path, split) for path, split, _, _ in described]
        )
        names = self._class_names
        match self._wanted:
            case Format.YOLO:
                splits = {place.split for place in self._places if place.split}
                self._add("data.yaml", packing.render_data_yaml(names, splits))
                labels = self._label_files(_yolo_labels)
                folder = "images/{split}"
            case Format.VOC:
                self._add("classes.txt", "".join(f"{name}\n" for name in names).encode())
                self._add_image_sets()
                labels = self._label_files(functools.partial(_voc_labels, names))
                folder = "JPEGImages/"
            case Format.COCO:
                labels = self._coco_files()
                folder = "images/{split}"
        for part in (labels, self._images(folder)):
            async with aclosing(part):
                async for _ in part:
                    if len(self._pipe.waiting) >= _WORTH_SENDING:
                        for chunk in _divide(self._pipe.take()):
                            yield chunk
        self._zip.close()
        for chunk in _divide(self._pipe.take()):
            yield chunk

    def _add_image_sets(self) -> None:
        for split in SPLITS:
            stems = [place.stem for place in self._places if place.split == split]
            if stems:
                self._add(
                    f"ImageSets/Main/{split}.txt", "".join(f"{stem}\n" for stem in stems).encode()
                )

    async def _label_files(
        self, render: Callable[[Place, Image], tuple[str, bytes]]
    ) -> AsyncGenerator[None, None]:
        """Adds a file for each image."""

        def add(positions: Sequence[int], images: list[Image]) -> None:
            for position, image in zip(positions, images, strict=True):
                self._add(*render(self._places[position], image))

        async with aclosing(self._pages(range(len(self._places)))) as pages:
            async for positions, images in pages:
                await asyncio.to_thread(add, positions, images)
                yield

    async def _coco_files(self) -> AsyncGenerator[None, None]:
        """Adds a file for each split, and one for the images of none."""
        for split in (*SPLITS, None):
            positions = [i for i, place in enumerate(self._places) if place.split == split]
            if positions:
                name = f"instances_{split}.json" if split else "instances.json"
                with self._zip.open(_entry(f"annotations/{name}"), "w", force_zip64=True) as file:
                    async with aclosing(self._coco_file(file, positions)) as written:
                        async for _ in written:
                            yield

    async def _coco_file(
        self, file: IO[bytes], positions: Sequence[int]
    ) -> AsyncGenerator[None, None]:
        num_written = 0

        def add_images(page: Sequence[int]) -> None:
            for i in page:
                file.write(b"" if i == positions[0] else b",\n")
                name = self._places[i].name
                file.write(packing.render_coco_image(i + 1, name, *self._sizes[i]))

        def add_annotations(page: Sequence[int], images: list[Image]) -> int:
            lines: list[bytes] = []
            for i, image in zip(page, images, strict=True):
                first_id = num_written + len(lines) + 1
                lines += packing.render_coco_annotations(image, i + 1, first_id)
            file.write(b",\n" if num_written and lines else b"")
            file.write(b",\n".join(lines))
            return len(lines)

        file.write(b'{"images":[\n')
        for start in range(0, len(positions), _IMAGES_AT_ONCE):
            await asyncio.to_thread(add_images, positions[start : start + _IMAGES_AT_ONCE])
            yield
        file.write(b'\n],"annotations":[\n')
        async with aclosing(self._pages(positions)) as pages:
            async for page, images in pages:
                num_written += await asyncio.to_thread(add_annotations, page, images)
                yield
        categories = packing.render_coco_categories(self._class_names)
        file.write(b'\n],"categories":' + categories + b"}\n")

    async def _pages(
        self, positions: Sequence[int]
    ) -> AsyncGenerator[tuple[Sequence[int], list[Image]], None]:
        """Reads images, some at a time."""
        for start in range(0, len(positions), _IMAGES_AT_ONCE):
            page = positions[start : start + _IMAGES_AT_ONCE]
            images = await self._source.page(page)
            yield page, images

    async def _images(self, folder: str) -> AsyncGenerator[None, None]:
        """Adds all images, a few of which are read ahead; yields after each."""
        reading: deque[tuple[str, int, asyncio.Task[bytes]]] = deque()

        async def add_next() -> None:
            name, _, task = reading[0]
            data = await task
            reading.popleft()
            await asyncio.to_thread(self._add, name, data)

        try:
            async with aclosing(self._pages(range(len(self._places)))) as pages:
                async for positions, images in pages:
                    for position, image in zip(positions, images, strict=True):
                        while reading and (
                            len(reading) == _READ_AHEAD
                            or sum(size for _, size, _ in reading) > _READ_AHEAD_BYTES
                        ):
                            await add_next()
                            yield
                        place = self._places[position]
                        name = folder.format(split=place.folder) + place.name
                        read = asyncio.to_thread(self._source.read, image)
                        reading.append((name, image.size_bytes, asyncio.create_task(read)))
            while reading:
                await add_next()
                yield
        finally:
            await cancel_all([task for _, _, task in reading])

    def _add(self, name: str, data: bytes) -> None:
        self._zip.writestr(_entry(name), data)


def _yolo_labels(place: Place, image: Image) -> tuple[str, bytes]:
    return f"labels/{place.folder}{place.stem}.txt", packing.render_yolo(image)


def _voc_labels(names: Sequence[str], place: Place, image: Image) -> tuple[str, bytes]:
    return f"Annotations/{place.stem}.xml", packing.render_voc(image, place.name, names)


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _NO_TIME)
    info.create_system = 3  # Unix, whatever this machine is
    info.external_attr = 0o644 << 16
    return info


def _not_ready(dataset: Dataset, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{dataset.name} {what}",
        reason=Reason.DATASET_NOT_READY,
        metadata={"dataset": dataset.name},
    )


def _divide(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
