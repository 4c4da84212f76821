"""Training images: a bundle's, decoded once and augmented anew, made ahead by other threads."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from detflow.errors import DataLoss, InvalidArgument
from services.trainer.worker import memory
from services.trainer.worker.augment import Draw, Picture, Pixels, paint
from services.trainer.worker.bundle import Image
from services.trainer.worker.distributed import Ranks
from services.trainer.worker.hyperparameters import Hyperparameters

_MAX_AHEAD = 4
_MAX_THREADS = 8
_MAX_RECENT = 1000
_RAM_SHARE = 0.4
"""Share of the free memory the decoded images may take."""


class Times:
    """Seconds by what they went into: read, decode, augment or batch."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(("read", "decode", "augment", "batch"), 0.0)
        self._inner_seconds = 0.0

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Counts the time of a block, without that of the blocks measured within it."""
        outer, self._inner_seconds = self._inner_seconds, 0.0
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self._seconds[name] += seconds - self._inner_seconds
            self._inner_seconds = outer + seconds

    def add(self, other: Times) -> None:
        """Adds what was measured elsewhere."""
        for name, seconds in other._seconds.items():
            self._seconds[name] += seconds

    def shares(self) -> dict[str, float]:
        """Returns the share of each in the whole, 0..1; nothing before there was any."""
        total = sum(self._seconds.values())
        return {name: value / total for name, value in self._seconds.items()} if total else {}


class TrainDataset:
    """The images of a training split, from which batches are made; by several threads at once.

    Args:
        images: Images of the training split.
        hyperparameters: Image size, augmentation and seed.
        batch_size: Images per step.
        num_sharing: Processes that share the memory and keep as many images.

    Attributes:
        kept_bytes: Memory that the decoded images will take.
    """

    def __init__(
        self,
        images: Sequence[Image],
        *,
        hyperparameters: Hyperparameters,
        batch_size: int,
        num_sharing: int = 1,
    ) -> None:
        self._hyperparameters = hyperparameters
        self._images = images
        self._corners = [_corners(image) for image in images]
        self.num_recent = min(8 * batch_size, _MAX_RECENT)
        sides = [_decoded_size(image, hyperparameters.image_size) for image in images]
        sizes = [3 * width * height for width, height in sides]
        room = int(_RAM_SHARE * memory.free_bytes() / num_sharing)
        self._keeps_all = sum(sizes) < room
        # Where there is no room for all, those of the last batches are kept, and of the others as
        # many as there is room for.
        self._num_passing = self.num_recent + batch_size
        self._room = sum(sizes) if self._keeps_all else room - self._num_passing * max(sizes)
        self.kept_bytes = max(0, self._room)
        self._decoded: dict[int, Pixels] = {}
        self._passing: dict[int, Pixels] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def make_batch(
        self,
        indices: Sequence[int],
        *,
        epoch: int = 0,
        mosaic: bool = True,
        recent: Sequence[int] = (),
        times: Times | None = None,
    ) -> dict[str, torch.Tensor]:
        """Makes a batch.

        Args:
            indices: Its images.
            epoch: With the seed and the image it decides what is drawn.
            mosaic: Whether there may be mosaics.
            recent: The images of the batches before it. Where there is no room for all, mosaics
                are made of these, which are still in memory, and of the batch's own.
            times: Told what it takes time for.

        Returns:
            img, RGB, shape (n, 3, s, s), uint8, with channels last in memory; and of all boxes
            batch_idx (its image), shape (m,), cls, shape (m, 1), and bboxes, centre and size in
            0..1, shape (m, 4), float32.
        """
        times = times or Times()
        side = self._hyperparameters.image_size
        with times.measured("batch"):
            shape = len(indices), side, side, 3
            squares = torch.empty(shape, dtype=torch.uint8, pin_memory=_uses_gpu())
        candidates = range(len(self)) if self._keeps_all else [*recent, *indices]
        found = []
        for index, square in zip(indices, squares.numpy(), strict=True):
            with times.measured("augment"):
                numbers = random.Random(f"{self._hyperparameters.seed}/{epoch}/{index}")
                draw = Draw.by(numbers, self._hyperparameters, mosaic=mosaic)
                others = numbers.choices(candidates, k=3) if draw.meeting else []
                pictures = [self._picture(one, times) for one in (index, *others)]
                found.append(paint(pictures, draw, square))
        with times.measured("batch"):
            classes = np.concatenate([labels.classes for labels in found])
            boxes = np.concatenate([labels.boxes for labels in found])
            rows = np.repeat(np.arange(len(found)), [len(labels.classes) for labels in found])
            return {
                "img": squares.permute(0, 3, 1, 2),
                "batch_idx": torch.from_numpy(rows).float(),
                "cls": torch.from_numpy(classes[:, None]).float(),
                "bboxes": torch.from_numpy(boxes).float(),
            }

    def _picture(self, index: int, times: Times) -> Picture:
        return Picture(
            self.load_image(index, times), self._corners[index], self._images[index].classes
        )

    def load_image(self, index: int, times: Times) -> Pixels:
        """Returns an image, at most of the size that is trained with; decoded only if need be."""
        pixels = self._decoded.get(index)
        if pixels is None:
            pixels = self._passing.get(index)
        if pixels is None:
            with times.measured("read"):
                content = self._images[index].path.read_bytes()
            with times.measured("decode"):
                pixels = _decode(self._images[index], content, self._hyperparameters.image_size)
            self._keep(index, pixels)
        return pixels

    def _keep(self, index: int, pixels: Pixels) -> None:
        with self._lock:
            if index in self._decoded:
                return  # another thread was faster
            if self._room >= pixels.nbytes:
                self._decoded[index] = pixels
                self._room -= pixels.nbytes
                return
            self._passing[index] = pixels
            while len(self._passing) > self._num_passing:
                del self._passing[next(iter(self._passing))]  # the oldest


def _uses_gpu() -> bool:
    """Says whether this process computes on a GPU: only then was CUDA set up."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _corners(image: Image) -> NDArray[np.float64]:
    """Returns x1, y1, x2, y2 of the boxes as shares of the image's sides, shape (n, 4)."""
    corners = np.concatenate((image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:]), axis=1)
    return np.asarray(corners / ((image.width, image.height) * 2), dtype=np.float64)


def _decoded_size(image: Image, side: int) -> tuple[int, int]:
    """Returns width and height as it is kept: no larger than it is, no larger than needed."""
    scale = min(1.0, side / max(image.width, image.height))
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _decode(image: Image, content: bytes, side: int) -> Pixels:
    try:
        pixels = simplejpeg.decode_jpeg(content, "RGB")
    except ValueError as error:
        raise DataLoss(
            f"bundle image {image.path.name} cannot be decoded ({error}); create the version again",
            reason="BUNDLE_CORRUPT",
        ) from error
    size = _decoded_size(image, side)
    if pixels.shape[1::-1] != size:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(pixels, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class _Made:
    batch: dict[str, torch.Tensor]
    times: Times


class Prefetcher:
    """Makes the batches of all epochs in threads, a few ahead of the training.

    OpenCV, the JPEG decoder and torch release the interpreter while they compute, so threads
    overlap with the training step and with each other as processes would, without a second copy of
    the images and without moving batches between processes.

    Args:
        dataset: Where the images come from.
        batch_size: Images per batch.
        seed: Seed of the order of the images.
        ranks: The processes that share each batch; by default all of it is this one's.

    Attributes:
        dataset: Where the images come from.
        wait_seconds: Time waited for the batches of this epoch.
        loader_shares: What making them took time for, by name: shares of that time.
    """

    def __init__(
        self, dataset: TrainDataset, *, batch_size: int, seed: int, ranks: Ranks | None = None
    ) -> None:
        self.dataset = dataset
        self._ranks = ranks or Ranks()
        self._batch_size = min(batch_size, len(dataset))
        _check_sizes(self._batch_size, self._ranks.num_ranks)
        # Batch statistics of a single image at the coarsest feature map would be of one value.
        rest = len(dataset) % self._batch_size
        self._drop_last = len(dataset) > self._batch_size and 0 < rest < 2 * self._ranks.num_ranks
        self.wait_seconds = 0.0
        self.loader_shares: Mapping[str, float] = {}
        self._seed = seed
        self._first_step = 0
        self._pool = ThreadPoolExecutor(self._num_threads(), "images")
        self._jobs: Iterator[Callable[[], _Made]] = iter(())
        self._ahead: deque[Future[_Made]] = deque()

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self._batch_size)
        return full + (1 if rest and not self._drop_last else 0)

    def start(self, epochs: range, *, without_mosaic_from: int, first_step: int = 0) -> None:
        """Starts the threads.

        Args:
            epochs: Epochs to make, from 1.
            without_mosaic_from: First epoch without mosaic.
            first_step: First batch to make of the first epoch, from 0.
        """
        cv2.setNumThreads(1)
        self._first_step = first_step
        self._jobs = self._plan(epochs, without_mosaic_from, first_step)
        for _ in range(max(_MAX_AHEAD, self._num_threads() + 1)):
            self._begin_one()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the batches of the next epoch and counts the time waited in `wait_seconds`."""
        self.wait_seconds, times = 0.0, Times()
        first_step, self._first_step = self._first_step, 0
        for _ in range(first_step, len(self)):
            began = time.perf_counter()
            made = self._ahead.popleft().result()
            self.wait_seconds += time.perf_counter() - began
            self._begin_one()
            times.add(made.times)
            self.loader_shares = times.shares()
            yield made.batch

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _num_threads(self) -> int:
        """Returns how many threads make images: the step on a CPU is never faster than one."""
        if not _uses_gpu():
            return 1
        num_cores = (os.cpu_count() or 1) // self._ranks.place.num_per_node
        return max(1, min(num_cores - 1, _MAX_THREADS))  # one core is left to the step

    def _begin_one(self) -> None:
        """Has the next batch made, if there is one."""
        job = next(self._jobs, None)
        if job is not None:
            self._ahead.append(self._pool.submit(job))

    def _plan(
        self, epochs: range, without_mosaic_from: int, first_step: int
    ) -> Iterator[Callable[[], _Made]]:
        """Yields what makes each batch.

        Batches depend on seed, epoch and step alone: they are the same after a resume.
        """
        for epoch in epochs:
            order = [*range(len(self.dataset))]
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            for step in range(first_step if epoch == epochs.start else 0, len(self)):
                begin = step * self._batch_size
                yield partial(
                    self._make,
                    self._ranks.take(order[begin : begin + self._batch_size]),
                    epoch=epoch,
                    mosaic=epoch < without_mosaic_from,
                    recent=order[max(0, begin - self.dataset.num_recent) : begin],
                )

    def _make(self, indices: Sequence[int], **how: Any) -> _Made:
        """Makes a batch, in a thread of the pool."""
        times = Times()
        return _Made(self.dataset.make_batch(indices, **how, times=times), times)


def _check_sizes(batch_size: int, num_ranks: int) -> None:
    if batch_size < num_ranks:
        raise InvalidArgument(
            f"a batch of {batch_size} images cannot be shared by {num_ranks} devices; raise "
            "batch_size, or train on fewer",
            reason="BATCH_TOO_SMALL",
        )
