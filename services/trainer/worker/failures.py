"""What went wrong, as a status whose code says whether another attempt can help."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import nats.errors
import obstore.exceptions

from detflow.errors import DetflowError, Internal, ResourceExhausted, Unavailable
from services.trainer.worker.spec import Spec

_OUT_OF_MEMORY_TEXTS = (
    "out of memory",
    "defaultcpuallocator: can't allocate memory",
    "failed to allocate",
    "insufficient memory",
    "cublas_status_alloc_failed",
)


def explain(error: BaseException, spec: Spec) -> DetflowError:
    """Turns any exception into an error with a status code.

    RESOURCE_EXHAUSTED and UNAVAILABLE may pass; every other code means that another attempt ends
    the same way.
    """
    for cause in _causes(error):
        if isinstance(cause, DetflowError):
            return cause
        if _is_out_of_memory(cause):
            return ResourceExhausted(
                f"out of memory with batch_size={spec.batch_size} and "
                f"image_size={spec.hyperparameters.get('image_size', 640):g}; lower one of them",
                reason="OUT_OF_MEMORY",
                metadata={"field": "batch_size"},
            )
        if isinstance(cause, nats.errors.Error):
            return Unavailable("NATS is away", reason="NATS_UNAVAILABLE")
        if isinstance(cause, obstore.exceptions.BaseError | OSError):
            return Unavailable(
                f"storage failed: {_first_line(cause)}; "
                "check free space, the object store and its credentials",
                reason="STORE_UNAVAILABLE",
            )
    return Internal(
        f"the worker failed with {type(error).__name__}; its log has the details",
        reason="WORKER_FAILED",
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):
            for inner in seen.exceptions:
                yield from _causes(inner)
        seen = seen.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # if it is not imported, the error is none of its
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # OpenCV's and torch's CPU allocators have no class of their own.
    is_native = isinstance(error, RuntimeError) or type(error).__module__ == "cv2"
    return is_native and any(text in str(error).lower() for text in _OUT_OF_MEMORY_TEXTS)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
