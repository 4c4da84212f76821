"""Training images: ultralytics' augmentations over a bundle, made ahead in their own thread."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import psutil
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import IterableSimpleNamespace

from services.trainer.worker.bundle import Image

_MAX_AHEAD = 4
_RAM_SHARE = 0.4
"""Share of the free memory the decoded images may take."""


class TrainDataset(YOLODataset):
    """ultralytics' data set with labels straight from the bundle.

    The library would decode every image once more to verify it, and drop an image for one label
    that it dislikes.

    Args:
        images: Images of the training split.
        class_names: Name by class index.
        args: The library's arguments: image size and augmentation.
        batch_size: Images per step.
    """

    def __init__(
        self,
        images: Sequence[Image],
        *,
        class_names: Sequence[str],
        args: IterableSimpleNamespace,
        batch_size: int,
    ) -> None:
        self._images = images
        self._decoded: dict[int, Any] = {}
        num_bytes = len(images) * args.imgsz**2 * 3
        self._keep: bool = num_bytes < _RAM_SHARE * psutil.virtual_memory().available
        super().__init__(
            img_path=str(images[0].path.parent),
            imgsz=args.imgsz,
            batch_size=batch_size,
            augment=True,
            hyp=args,
            cache="ram",  # mosaic draws from all images, not from those read last
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
        loaded = self._decoded.get(i) or super().load_image(i, *args, **kwargs)
        if self._keep:
            self._decoded[i] = loaded
        return loaded

    def check_cache_ram(self, safety_margin: float = 1.0) -> bool:
        """Says whether the images fit into memory, and tells the library."""
        if not self._keep:
            self.cache = None
        return self._keep

    def cache_images(self) -> None:
        """Does nothing: waiting until every image is decoded would delay the first step."""


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


class Prefetcher:
    """Makes the batches of all epochs in one thread, a few ahead of the training.

    OpenCV and torch release the interpreter while they compute, so a thread overlaps with the
    training step as a process would, without a second copy of the images and without pickling
    batches.

    Its attributes are those of a torch DataLoader that ultralytics looks at.

    Args:
        dataset: Where the images come from.
        batch_size: Images per batch.
        seed: Seed of the order of the images.
    """

    num_workers = 0

    def __init__(self, dataset: TrainDataset, *, batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.sampler = range(len(dataset))
        # Batch statistics of a single image at the coarsest feature map would be of one value.
        self.drop_last = len(dataset) > self.batch_size and len(dataset) % self.batch_size == 1
        self.wait_seconds = 0.0
        self._seed = seed
        self._queue: queue.Queue[dict[str, Any] | BaseException] = queue.Queue(_MAX_AHEAD)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def start(
        self, epochs: range, *, without_mosaic_from: int, args: IterableSimpleNamespace
    ) -> None:
        """Starts the thread.

        Args:
            epochs: Epochs to make, from 0.
            without_mosaic_from: First epoch without mosaic.
            args: The library's arguments.
        """
        self._thread = threading.Thread(
            target=self._run, args=(epochs, without_mosaic_from, args), name="images", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the batches of the next epoch and counts the time waited in `wait_seconds`."""
        self.wait_seconds = 0.0
        for _ in range(len(self)):
            began = time.perf_counter()
            batch = self._queue.get()
            self.wait_seconds += time.perf_counter() - began
            if isinstance(batch, BaseException):
                raise batch
            yield batch

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        while self._thread is not None and self._thread.is_alive():
            try:  # it may be waiting for room
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)

    def _run(self, epochs: range, without_mosaic_from: int, args: IterableSimpleNamespace) -> None:
        try:
            for epoch in epochs:
                if epoch == max(without_mosaic_from, epochs.start):
                    self.dataset.close_mosaic(hyp=copy(args))
                # An epoch's images depend on seed and epoch alone: the same after a resume.
                random.seed(f"{self._seed}/{epoch}")
                np.random.seed(random.getrandbits(32))
                order = np.random.permutation(len(self.dataset)).tolist()
                for step in range(len(self)):
                    chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
                    batch = self.dataset.collate_fn([self.dataset[index] for index in chosen])
                    if self._closing.is_set():
                        return
                    self._queue.put(batch)
        except BaseException as error:
            self._queue.put(error)
