"""What went wrong, as a status whose code says whether another attempt can help."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nats.errors
import obstore.exceptions

from detflow.errors import (
    DetflowError,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    Unavailable,
)
from detflow.settings import Settings
from services.trainer.worker import memory
from services.trainer.worker.spec import Spec

_OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "can't allocate memory",
    "failed to allocate",
    "insufficient memory",
    "bad_alloc",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_ASSERT_TEXT = "device-side assert"
_DEVICE_TEXTS = (
    "cuda error",
    "cuda driver error",
    "cudnn_status_",
    "cudnn error",
    "cublas_status_",
    "ecc error",
)
_FULL_TEXTS = ("(os error 28)", "(os error 122)")
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT)


def explain(
    error: BaseException, spec: Spec | None = None, settings: Settings | None = None
) -> DetflowError:
    """Turns any exception into an error with a status code.

    RESOURCE_EXHAUSTED and UNAVAILABLE may pass; every other code means that another attempt ends
    the same way.

    Args:
        error: What was raised.
        spec: The attempt it was raised in; None for a job that is no training.
        settings: To say how much room there is where a disk is full.
    """
    for cause in _causes(error):
        if isinstance(cause, DetflowError):
            return cause
        if is_out_of_memory(cause):
            return out_of_memory(spec)
        if _is_native(cause) and (problem := _device_problem(str(cause))):
            return problem
        if _is_disk_full(cause):
            return disk_full(settings or Settings.load())
        if isinstance(cause, nats.errors.Error):
            return Unavailable("NATS is away", reason="NATS_UNAVAILABLE")
        if isinstance(cause, obstore.exceptions.BaseError | OSError):
            return Unavailable(
                f"storage failed: {_first_line(cause)}; "
                "check free space, the object store and its credentials",
                reason="STORE_UNAVAILABLE",
            )
    if memory.is_nearly_used_up():
        return out_of_memory(spec)
    return Internal(
        f"the worker failed with {type(error).__name__}; its log has the details",
        reason="WORKER_FAILED",
    )


def out_of_memory(spec: Spec | None) -> ResourceExhausted:
    """Returns the error for what does not fit into memory: less of it may."""
    if spec is None:
        return ResourceExhausted(
            "out of memory; ask for less, or give the trainer more", reason="OUT_OF_MEMORY"
        )
    batch = f"batch_size={spec.batch_size}"
    if spec.step_batch_size < spec.batch_size:
        batch += f" ({spec.step_batch_size} images per step)"
    return ResourceExhausted(
        f"out of memory with {batch} and "
        f"image_size={spec.hyperparameters.get('image_size', 640):g}; lower one of them",
        reason="OUT_OF_MEMORY",
        metadata={"field": "batch_size", "step_batch_size": str(spec.step_batch_size)},
    )


def free_bytes(settings: Settings) -> dict[str, int]:
    """Returns how much room there is on this machine's disks, by the setting that names them."""
    folders = {"DETFLOW_DATA_DIR": settings.data_dir}
    store = urlsplit(settings.store_url)
    if store.scheme == "file":
        folders["DETFLOW_STORE_URL"] = Path(store.path)
    return {name: shutil.disk_usage(path).free for name, path in folders.items() if path.exists()}


def disk_full(settings: Settings, needed: str = "") -> FailedPrecondition:
    """Returns the error for a disk without room: trying again at once would end the same way.

    Args:
        settings: Where the disks are.
        needed: What does not fit, if that is known.
    """
    free = free_bytes(settings)
    return FailedPrecondition(
        f"no space left on the disk{needed and f' for {needed}'}: "
        + ", ".join(f"{room / 2**20:.0f} MiB free at {name}" for name, room in free.items())
        + "; make room and resume the training: what it has stored is kept",
        reason="DISK_FULL",
        metadata={name.lower(): str(room) for name, room in free.items()},
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):
            for inner in seen.exceptions:
                yield from _causes(inner)
        seen = seen.__cause__


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether memory ran out, of whichever processor."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # if it is not imported, the error is none of its
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # OpenCV's and torch's CPU allocators have no class of their own.
    return _is_native(error) and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


def _is_native(error: BaseException) -> bool:
    """Says whether an error may come from the C++ of torch or OpenCV."""
    return isinstance(error, RuntimeError) or type(error).__module__ == "cv2"


def _device_problem(text: str) -> DetflowError | None:
    """Returns what is wrong with a GPU according to the message of an exception, if anything is."""
    lines = text.splitlines() or [""]
    if _ASSERT_TEXT in text.lower():
        return Internal(
            "the GPU refused a computation (device-side assert): the data or the program is wrong, "
            "and every attempt would end here; the log of the training says where it happened",
            reason="DEVICE_ASSERT",
        )
    if any(one in text.lower() for one in _DEVICE_TEXTS):
        return Unavailable(
            f"the GPU failed: {lines[0][:200]}; if that repeats, check it with nvidia-smi",
            reason="DEVICE_FAILED",
        )
    return None


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL_NUMBERS:
        return True
    # The object store's library keeps the number of the system's error in its text only.
    is_stores = isinstance(error, obstore.exceptions.BaseError)
    return is_stores and any(text in str(error).lower() for text in _FULL_TEXTS)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
