"""Everything a training does, tried once on its real data before the first step.

Nothing of the model, the optimizer or the random numbers is different afterwards: a training ends
with the same weights whether this was done or not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import simplejpeg
import torch

from detflow.errors import DetflowError, FailedPrecondition, Violation
from detflow.names import new_id
from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import Progress
from detflow.v1.training_pb2 import Preflight
from detflow.v1.worker_pb2 import Checkpoint, JobMessage, WorkerSpec
from services.trainer.worker import library, memory, weights
from services.trainer.worker.bundle import Bundle, Image, fetch_bundle
from services.trainer.worker.checkpoint import load_checkpoint, save_snapshot, snapshot_of
from services.trainer.worker.failures import disk_full, explain, free_bytes, out_of_memory
from services.trainer.worker.loop import Trainer
from services.trainer.worker.spec import Spec, parse_spec

CHECKS = ("labels", "images", "train_step", "validation", "checkpoint", "memory", "disk")

_DECODE_SECONDS = 0.4
"""Time to decode images in; all of them if that is enough, else as many as it lasts for."""
_QUICK_SECONDS = 0.5
"""A step shorter than this is done twice: the first one also sets things up."""
_RESERVE_BYTES = 128 << 20
"""Main memory for what is not tried: images made ahead, predictions, threads."""
_EDGE_PX = 1.0
_NUM_CHECKPOINTS = 3
"""In the object store at once: the last two and the one that is being written."""

T = TypeVar("T")


def run(message: WorkerSpec, settings: Settings, emit: Callable[[JobMessage], None]) -> None:
    """Tries a training that is not to be started; the job's entry.

    Raises:
        DetflowError: What would go wrong, with the remedy.
    """
    library.silence()
    library.load_nms()
    memory.set_limit(settings.worker_memory_bytes)
    spec = parse_spec(message, Path.cwd())
    store = ObjectStore(settings.store_url)

    def on_check(name: str, number: int) -> None:
        progress = Progress(stage=name, num_done=number, num_total=len(CHECKS))
        progress.percent = 100 * number / len(CHECKS)
        emit(JobMessage(progress=progress))

    try:
        bundle = fetch_bundle(
            store, spec.manifest, settings.data_dir / "bundles", check=lambda: None
        )
        trainer = Trainer(spec, bundle)
        begun = _begin(trainer, spec, store, settings)
        found = try_out(trainer, bundle, spec, store, settings, on_check)
    except DetflowError:
        raise
    except Exception as error:
        raise explain(error, spec, settings) from error
    if begun is not None:
        found.checks.insert(0, begun)
    emit(JobMessage(preflight=found))


def _begin(
    trainer: Trainer, spec: Spec, store: ObjectStore, settings: Settings
) -> Preflight.Check | None:
    """Takes over the weights that the training is to begin with, if there are any.

    Raises:
        InvalidArgument: UNSAFE_WEIGHTS or WEIGHTS_DO_NOT_FIT.
        DataLoss: They are gone or differ from their recorded hash.
    """
    (found, origin), load_seconds = _timed(lambda: weights.find(spec, store, settings))
    if found is None:
        return None
    (num_taken, num_all), seconds = _timed(lambda: trainer.begin_with(found))
    return Preflight.Check(
        name="weights",
        detail=f"{origin}: {num_taken} of {num_all} tensors fit",
        seconds=load_seconds + seconds,
    )


def try_out(
    trainer: Trainer,
    bundle: Bundle,
    spec: Spec,
    store: ObjectStore,
    settings: Settings,
    on_check: Callable[[str, int], None],
) -> Preflight:
    """Tries everything.

    Args:
        trainer: Made for the specification, not started; is afterwards as it was.
        bundle: What it is to learn from.
        spec: What is to be trained.
        store: The object store.
        settings: Where the disks are.
        on_check: Told the name of each check and how many are done before it; may raise to stop.

    Returns:
        What was found, and what the training is expected to take.

    Raises:
        DetflowError: What would go wrong: BAD_LABELS, BAD_IMAGES, LOSS_NOT_FINITE, OUT_OF_MEMORY,
            DISK_FULL.
        Exception: What the training itself would raise; `failures.explain` knows it.
    """
    checks = _Checks(on_check)
    checks.do("labels", lambda: _check_labels(bundle))
    num_bundle_bytes, _ = checks.do("images", lambda: _check_images(bundle))
    with _unchanged(trainer):
        step_seconds, _ = checks.do("train_step", lambda: _try_step(trainer, bundle, spec))
        image_seconds, _ = checks.do("validation", lambda: _try_validation(trainer, bundle, spec))
        checkpoint_bytes, _ = checks.do("checkpoint", lambda: _try_checkpoint(trainer, spec, store))
    memory_bytes, _ = checks.do("memory", lambda: _check_memory(trainer, spec, checkpoint_bytes))
    disk_bytes, _ = checks.do("disk", lambda: _check_disk(checkpoint_bytes, settings))
    num_val, num_test = len(bundle.splits["val"]), len(bundle.splits["test"])
    epoch_seconds = trainer.num_steps * step_seconds + num_val * image_seconds
    return Preflight(
        checks=checks.done,
        device=trainer.device_name,
        memory_bytes=memory_bytes,
        disk_bytes=num_bundle_bytes + disk_bytes,
        step_seconds=step_seconds,
        total_seconds=spec.epochs * epoch_seconds + (num_val + num_test) * image_seconds,
    )


class _Checks:
    """The checks done so far."""

    def __init__(self, on_check: Callable[[str, int], None]) -> None:
        self.done: list[Preflight.Check] = []
        self._on_check = on_check

    def do(self, name: str, check: Callable[[], tuple[T, str]]) -> tuple[T, str]:
        """Does a check, which returns what the others need to know and a detail for a person."""
        self._on_check(name, len(self.done))
        began = time.perf_counter()
        found, detail = check()
        seconds = time.perf_counter() - began
        self.done.append(Preflight.Check(name=name, detail=detail, seconds=seconds))
        return found, detail


def _check_labels(bundle: Bundle) -> tuple[None, str]:
    num_boxes, num_classes = 0, len(bundle.class_names)
    violations: list[Violation] = []
    for split, images in bundle.splits.items():
        for image in images:
            num_boxes += len(image.boxes)
            for index, problem in _bad_boxes(image, num_classes):
                field = f"{split}/{image.path.name}, box {index + 1}"
                violations.append(Violation(field, "BAD_BOX", problem))
    if violations:
        raise _unusable("BAD_LABELS", "labels", violations)
    num_images = sum(map(len, bundle.splits.values()))
    return None, f"{num_boxes} boxes in {num_images} images are inside, with an area and a class"


def _bad_boxes(image: Image, num_classes: int) -> Iterator[tuple[int, str]]:
    """Yields index and problem of each box that cannot be learnt from."""
    x, y, width, height = image.boxes.T
    with np.errstate(invalid="ignore"):  # comparisons with NaN are false, as they shall be
        inside = (
            (np.minimum(x, y) >= -_EDGE_PX)
            & (x + width <= image.width + _EDGE_PX)
            & (y + height <= image.height + _EDGE_PX)
        )
        good = {
            "has a number that is not finite": np.isfinite(image.boxes).all(axis=1),
            "has no area": (width > 0) & (height > 0),
            f"is not inside the image of {image.width}x{image.height} px": inside,
            f"has a class that is none of the {num_classes}": (image.classes >= 0)
            & (image.classes < num_classes),
        }
    for index in np.flatnonzero(~np.all(list(good.values()), axis=0)):
        what = next(problem for problem, holds in good.items() if not holds[index])
        box = ", ".join(f"{value:g}" for value in image.boxes[index])
        yield int(index), f"box [{box}] of class {image.classes[index]} {what}"


def _check_images(bundle: Bundle) -> tuple[int, str]:
    images = [(split, image) for split, all_ in bundle.splits.items() for image in all_]
    violations: list[Violation] = []
    num_bytes = num_decoded = 0
    deadline = time.perf_counter() + _DECODE_SECONDS
    # Far apart first: what the time is enough for is a sample of all.
    order = np.random.default_rng(0).permutation(len(images))
    for split, image in (images[index] for index in order):
        decode = time.perf_counter() < deadline
        num_decoded += decode
        try:
            num_bytes += _check_image(image, decode=decode)
        except (OSError, ValueError) as error:
            field = f"{split}/{image.path.name}"
            violations.append(Violation(field, "CORRUPT_IMAGE", f"{field}: {error}"))
    if violations:
        raise _unusable("BAD_IMAGES", "images", violations)
    return num_bytes, (
        f"size and end of all {len(images)} images are right, {num_decoded} of them were decoded"
    )


def _check_image(image: Image, *, decode: bool) -> int:
    """Checks an image against its label; returns the size of the file in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not what the label says.
    """
    content = image.path.read_bytes()
    height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    if (width, height) != (image.width, image.height):
        raise ValueError(f"has {width}x{height} px, its labels say {image.width}x{image.height}")
    if not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise ValueError("is cut off")
    if decode:
        simplejpeg.decode_jpeg(content, "BGR", strict=True)
    return len(content)


def _unusable(reason: str, what: str, violations: Sequence[Violation]) -> FailedPrecondition:
    return FailedPrecondition(
        f"{len(violations)} {what} cannot be trained with, the first in {violations[0].field}: "
        f"{violations[0].description}; correct the data set and create the version again",
        reason=reason,
        violations=violations,
    )


def _try_step(trainer: Trainer, bundle: Bundle, spec: Spec) -> tuple[float, str]:
    """Learns from the images with the most boxes; returns the seconds a step takes."""
    # Of several devices one is tried, with its part of a batch.
    images = _fullest(bundle.splits["train"], -(-spec.batch_size // spec.place.num_ranks))
    batch, load_seconds = _timed(lambda: trainer.make_batch(images))
    num_boxes = len(batch["cls"])
    losses, seconds = _timed(lambda: trainer.step(batch, 1, 0, update=True))
    if seconds < _QUICK_SECONDS:
        batch, load_seconds = _timed(lambda: trainer.make_batch(images))
        _, seconds = _timed(lambda: trainer.step(batch, 1, 0, update=True))
    told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    # Images are made beside the step, so the slower one sets the pace.
    return max(seconds, load_seconds), f"{len(images)} images, {num_boxes} boxes: {told}"


def _try_validation(trainer: Trainer, bundle: Bundle, spec: Spec) -> tuple[float, str]:
    """Measures the images with the most boxes; returns the seconds an image takes."""
    images = _fullest(bundle.splits["val"], 2 * spec.step_batch_size)
    values, seconds = _timed(lambda: trainer.validate(trainer.evaluation_set(images)))
    told = ", ".join(f"{name} {values[name]:.4g}" for name in sorted(values) if "loss" in name)
    return seconds / len(images), f"{len(images)} images: {told}"


def _try_checkpoint(trainer: Trainer, spec: Spec, store: ObjectStore) -> tuple[int, str]:
    """Writes a checkpoint, reads it back and deletes it; returns its size in bytes."""
    key = f"preflight/{new_id()}.pt"
    try:
        stored = save_snapshot(store, key, snapshot_of(0, trainer.state(0)))
        load_checkpoint(store, Checkpoint(epoch=0, object=stored), spec.folder)
    finally:
        store.delete(key)
    size_bytes = stored.size_bytes
    return size_bytes, f"{size_bytes / 2**20:.1f} MiB written, read back and deleted"


def _check_memory(trainer: Trainer, spec: Spec, checkpoint_bytes: int) -> tuple[int, str]:
    """Compares what the training needs in all with what there is; returns the former in bytes."""
    peak = memory.peak_bytes(trainer.device)
    if trainer.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(trainer.device)
        return (
            peak,
            f"{peak / 2**20:.0f} MiB of the GPU's {total / 2**20:.0f}, {free / 2**20:.0f} free",
        )
    kept, free = trainer.kept_bytes, memory.free_bytes()
    # While one checkpoint is written the next may be copied.
    if kept + 2 * checkpoint_bytes + _RESERVE_BYTES > free:
        raise out_of_memory(spec)
    return peak + kept, (
        f"{peak / 2**20:.0f} MiB at most so far, {kept / 2**20:.0f} MiB of images to come; "
        f"{free / 2**20:.0f} MiB are free"
    )


def _check_disk(checkpoint_bytes: int, settings: Settings) -> tuple[int, str]:
    """Compares what the checkpoints need with what there is; returns the former in bytes."""
    needed, free = _NUM_CHECKPOINTS * checkpoint_bytes, free_bytes(settings)
    if any(room < needed for room in free.values()):
        raise disk_full(settings, f"{_NUM_CHECKPOINTS} checkpoints of {checkpoint_bytes >> 20} MiB")
    rooms = ", ".join(f"{room / 2**20:.0f} MiB free at {name}" for name, room in free.items())
    return needed, f"{needed / 2**20:.0f} MiB for checkpoints; {rooms}"


def _fullest(images: Sequence[Image], number: int) -> list[Image]:
    """Returns the images with the most boxes, those with the most first."""
    return sorted(images, key=lambda image: (-len(image.boxes), image.id))[:number]


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    done = work()
    return done, time.perf_counter() - began


@contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """Puts back what a step changes: weights, averages, optimizer and random numbers.

    Not after an error: then nothing is trained, and on a GPU that has failed it would hide why.
    """
    before = snapshot_of(0, trainer.state(0))
    numbers, more_numbers = random.getstate(), np.random.get_state()
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
    trainer.restore(before)
    trainer.optimizer.zero_grad()
    random.setstate(numbers)
    np.random.set_state(more_numbers)
