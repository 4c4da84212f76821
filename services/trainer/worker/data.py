"""Training images: ultralytics' augmentations over a bundle, made ahead in their own thread."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace

from detflow.errors import InvalidArgument
from services.trainer.worker import memory
from services.trainer.worker.bundle import Image
from services.trainer.worker.distributed import Ranks
from services.trainer.worker.hyperparameters import Hyperparameters

_MAX_AHEAD = 4
_MAX_RECENT = 1000
_RAM_SHARE = 0.4
"""Share of the free memory the decoded images may take."""


class TrainDataset(YOLODataset):
    """ultralytics' data set with labels straight from the bundle.

    The library would decode every image once more to verify it, and drop an image for one label
    that it dislikes.

    Args:
        images: Images of the training split.
        class_names: Name by class index.
        hyperparameters: Image size and augmentation.
        batch_size: Images per step.
        num_sharing: Processes that share the memory and keep as many images.

    Attributes:
        kept_bytes: Memory that the decoded images will take.
        times: What making images takes time for.
    """

    def __init__(
        self,
        images: Sequence[Image],
        *,
        class_names: Sequence[str],
        hyperparameters: Hyperparameters,
        batch_size: int,
        num_sharing: int = 1,
    ) -> None:
        args = _library_arguments(hyperparameters)
        self._arguments = args
        self._images = images
        self._decoded: dict[int, Any] = {}
        self.times = Times()
        num_bytes = len(images) * args.imgsz**2 * 3
        self._keep: bool = num_bytes < _RAM_SHARE * memory.free_bytes() / num_sharing
        self.kept_bytes = num_bytes if self._keep else 0
        super().__init__(
            img_path=str(images[0].path.parent),
            imgsz=args.imgsz,
            batch_size=batch_size,
            augment=True,
            hyp=args,
            cache="ram",  # the library's own choice of what to keep depends on the past
            data={"names": dict(enumerate(class_names)), "channels": 3},
            task="detect",
        )

    def get_img_files(self, img_path: str | list[str]) -> list[str]:
        """Returns the files, in the order of the labels."""
        return [str(image.path) for image in self._images]

    def get_labels(self) -> list[dict[str, Any]]:
        """Returns labels as the library's transforms want them: boxes as centre and size, 0..1."""
        return [_label(image) for image in self._images]

    def load_image(self, i: int, *args: Any, **kwargs: Any) -> Any:
        """Returns an image as the library does, but decodes it once only: on first use."""
        if loaded := self._decoded.get(i):
            return loaded
        with self.times.measured("read"):
            self._images[i].path.read_bytes()  # for the system to keep: the library reads it again
        with self.times.measured("decode"):
            loaded = super().load_image(i, *args, **kwargs)
        self._decoded[i] = loaded
        return loaded

    def make_batch(self, indices: Sequence[int], recent: Sequence[int] = ()) -> dict[str, Any]:
        """Makes a batch.

        Args:
            indices: Its images.
            recent: The images of the batches before it that are still in memory, where there is no
                room for all; mosaics are made of these and of the batch's own.
        """
        if not self._keep:
            self.buffer = [*recent, *indices]
            for index in self._decoded.keys() - set(self.buffer):
                del self._decoded[index]
        with self.times.measured("augment"):
            images = [self[index] for index in indices]
        with self.times.measured("batch"):
            batch: dict[str, Any] = self.collate_fn(images)
        return batch

    def check_cache_ram(self, safety_margin: float = 1.0) -> bool:
        """Says yes: images are kept by `load_image`, and dropped by `make_batch`."""
        return True

    def cache_images(self) -> None:
        """Does nothing: waiting until every image is decoded would delay the first step."""

    def build_transforms(self, hyp: IterableSimpleNamespace) -> Any:
        """Returns the library's augmentations, with mosaics of images that are in memory."""
        transforms = super().build_transforms(hyp)
        transforms.transforms[0].transforms[0].buffer_enabled = not self._keep
        return transforms

    def leave_mosaic_out(self) -> None:
        """Makes images without mosaic from now on."""
        self.close_mosaic(hyp=copy(self._arguments))


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

    def shares(self) -> dict[str, float]:
        """Returns the share of each in the whole, 0..1; nothing before there was any."""
        total = sum(self._seconds.values())
        return {name: value / total for name, value in self._seconds.items()} if total else {}


def _library_arguments(hyperparameters: Hyperparameters) -> IterableSimpleNamespace:
    """Translates what concerns the images into the library's arguments."""
    return IterableSimpleNamespace(
        **vars(DEFAULT_CFG)
        | {
            "imgsz": hyperparameters.image_size,
            "mosaic": hyperparameters.mosaic,
            "fliplr": hyperparameters.flip_lr,
            "hsv_h": hyperparameters.hsv_h,
            "hsv_s": hyperparameters.hsv_s,
            "hsv_v": hyperparameters.hsv_v,
            "deterministic": False,  # it would warn of keeping images in memory
        }
    )


def _label(image: Image) -> dict[str, Any]:
    size = np.array([image.width, image.height], dtype=np.float64)
    corner, extent = image.boxes[:, :2] / size, image.boxes[:, 2:] / size
    return {
        "im_file": str(image.path),
        "shape": (image.height, image.width),
        "cls": image.classes[:, None].astype(np.float32),
        "bboxes": np.concatenate((corner + extent / 2, extent), axis=1).astype(np.float32),
        "segments": [],
        "keypoints": None,
        "normalized": True,
        "bbox_format": "xywh",
    }


@dataclass(frozen=True, slots=True)
class _Made:
    """A batch, and what this epoch's images have taken time for by then."""

    batch: dict[str, Any]
    shares: Mapping[str, float]


class Prefetcher:
    """Makes the batches of all epochs in one thread, a few ahead of the training.

    OpenCV and torch release the interpreter while they compute, so a thread overlaps with the
    training step as a process would, without a second copy of the images and without pickling
    batches.

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
        self._queue: queue.Queue[_Made | BaseException] = queue.Queue(_MAX_AHEAD)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self._batch_size)
        return full + (1 if rest and not self._drop_last else 0)

    def start(self, epochs: range, *, without_mosaic_from: int, first_step: int = 0) -> None:
        """Starts the thread.

        Args:
            epochs: Epochs to make, from 1.
            without_mosaic_from: First epoch without mosaic.
            first_step: First batch to make of the first epoch, from 0.
        """
        self._first_step = first_step
        self._thread = threading.Thread(
            target=self._run,
            args=(epochs, without_mosaic_from, first_step),
            name="images",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the batches of the next epoch and counts the time waited in `wait_seconds`."""
        self.wait_seconds = 0.0
        first_step, self._first_step = self._first_step, 0
        for _ in range(first_step, len(self)):
            began = time.perf_counter()
            made = self._queue.get()
            self.wait_seconds += time.perf_counter() - began
            if isinstance(made, BaseException):
                raise made
            self.loader_shares = made.shares
            yield made.batch

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        while self._thread is not None and self._thread.is_alive():
            try:  # it may be waiting for room
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _run(self, epochs: range, without_mosaic_from: int, first_step: int) -> None:
        try:
            for epoch in epochs:
                self.dataset.times = Times()
                if epoch == max(without_mosaic_from, epochs.start):
                    self.dataset.leave_mosaic_out()
                # Batches depend on seed, epoch and step alone: they are the same after a resume.
                order = [*range(len(self.dataset))]
                random.Random(f"{self._seed}/{epoch}").shuffle(order)
                for step in range(first_step if epoch == epochs.start else 0, len(self)):
                    begin = step * self._batch_size
                    chosen = self._ranks.take(order[begin : begin + self._batch_size])
                    # The ranks share an order, but each draws augmentations of its own.
                    rank = self._ranks.place.rank
                    random.seed(f"{self._seed}/{epoch}/{step}" + (f"/{rank}" if rank else ""))
                    np.random.seed(random.getrandbits(32))
                    batch = self.dataset.make_batch(chosen, order[self._oldest(begin) : begin])
                    if self._closing.is_set():
                        return
                    self._queue.put(_Made(batch, self.dataset.times.shares()))
        except BaseException as error:
            self._queue.put(error)

    def _oldest(self, begin: int) -> int:
        """Returns where the images begin that are still in memory when a batch begins."""
        return max(0, begin - min(8 * self._batch_size, _MAX_RECENT))


def _check_sizes(batch_size: int, num_ranks: int) -> None:
    if batch_size < num_ranks:
        raise InvalidArgument(
            f"a batch of {batch_size} images cannot be shared by {num_ranks} devices; raise "
            "batch_size, or train on fewer",
            reason="BATCH_TOO_SMALL",
        )
