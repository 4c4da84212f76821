"""Checkpoints and weights in the object store."""

from __future__ import annotations

import errno
import io
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from detflow import faults
from detflow.errors import DataLoss, FailedPrecondition
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.worker.failures import is_out_of_memory
from services.trainer.worker.spec import Spec

_FORMATS = "detflow-checkpoint/"
FORMAT = f"{_FORMATS}2"
WEIGHTS_FORMAT = "detflow-weights/1"


class Checkpoints:
    """Writes the checkpoints of one attempt, in a thread, one at a time.

    A checkpoint becomes known by the record written after it is stored with its hash, so a torn
    one is never loaded. Old ones are the trainer's to delete: it alone knows which records count,
    and after a take-over the next attempt needs what this one's are about to replace.

    Args:
        store: The object store.
        spec: What the worker does.

    Attributes:
        cost_seconds: How long the last one took, from copying to its record; 0 before the first.
    """

    def __init__(self, store: ObjectStore, spec: Spec) -> None:
        self.cost_seconds = 0.0
        self._store = store
        self._spec = spec
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._saved_at = time.monotonic()

    @property
    def age_seconds(self) -> float:
        """Time since the last one was saved, or since the beginning."""
        return time.monotonic() - self._saved_at

    def save(self, epoch: int, state: dict[str, Any], report: Callable[[Checkpoint], None]) -> None:
        """Saves a checkpoint in the background, after the one before it.

        Args:
            epoch: Last finished epoch.
            state: What `load_checkpoint` shall return, with the `step` done in the epoch after it;
                its tensors are copied before this returns.
            report: Writes the record that tells of it, once it is stored.

        Raises:
            Exception: The checkpoint before this one could not be stored.
        """
        self.wait()
        self._saved_at = time.monotonic()
        snapshot = snapshot_of(epoch, state)
        copy_seconds = time.monotonic() - self._saved_at
        self._pending = self._thread.submit(self._store_one, epoch, snapshot, report, copy_seconds)

    def skip(self, report: Callable[[None], None]) -> None:
        """Reports that there is no checkpoint, after all that are still to be reported.

        Raises:
            Exception: The last checkpoint could not be stored.
        """
        before = self._pending
        if before is None or before.done():
            self.wait()
            report(None)
        else:
            self._pending = self._thread.submit(lambda: report(before.result()))

    def wait(self) -> None:
        """Waits until everything is stored and reported; raises what prevented that."""
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """Ends the thread after what it is writing."""
        self._thread.shutdown()

    def _store_one(
        self,
        epoch: int,
        state: dict[str, Any],
        report: Callable[[Checkpoint], None],
        copy_seconds: float,
    ) -> None:
        began = time.monotonic()
        step = state["step"]
        name = f"checkpoint-{epoch:06d}" + (f"-{step:06d}" if step else "")
        faults.point("checkpoint.before_store")
        stored = save_snapshot(self._store, self._spec.key(f"{name}.pt"), state)
        faults.point("checkpoint.after_store")
        report(Checkpoint(epoch=epoch, step=step, object=stored))
        faults.point("checkpoint.after_record")
        self.cost_seconds = copy_seconds + time.monotonic() - began


def snapshot_of(epoch: int, state: dict[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint holds; its tensors are copies on the CPU."""
    # In the order they have in memory: another one takes four times as long.
    snapshot: dict[str, Any] = copy_to_cpu(
        {"format": FORMAT, "epoch": epoch, **state}, torch.preserve_format
    )
    return snapshot


def save_snapshot(store: ObjectStore, key: str, snapshot: dict[str, Any]) -> StoredObject:
    """Stores a snapshot as a checkpoint, which appears as a whole or not at all."""
    return store.put(key, _to_bytes(snapshot))


def load_checkpoint(store: ObjectStore, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """Downloads and reads a checkpoint.

    Raises:
        DataLoss: It is gone, differs from its recorded hash or cannot be read.
        FailedPrecondition: CHECKPOINT_FORMAT, another release wrote it.
    """
    path = folder / "checkpoint.pt"
    store.download(checkpoint.object, path)
    try:
        # Only tensors and plain values: a checkpoint never runs code.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT and str(state["format"]).startswith(_FORMATS):
            raise _of_another_release(checkpoint, state["format"])
        position = state["epoch"], state["step"]
        if state["format"] != FORMAT or position != (checkpoint.epoch, checkpoint.step):
            raise ValueError(f"format {state['format']!r}, epoch and step {position}")
    except (
        pickle.UnpicklingError,
        RuntimeError,
        OSError,  # invalid argument: what torch makes of some torn files
        EOFError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise  # the checkpoint may be all right
        raise DataLoss(
            f"checkpoint {checkpoint.object.key} of epoch {checkpoint.epoch} cannot be read; "
            "resume from an earlier one or start a new training",
            reason="CHECKPOINT_UNREADABLE",
            metadata={"key": checkpoint.object.key},
        ) from error
    finally:
        path.unlink(missing_ok=True)
    return state


def _of_another_release(checkpoint: Checkpoint, found: str) -> FailedPrecondition:
    """Makes the error for a checkpoint that is all right, but not for this release."""
    return FailedPrecondition(
        f"checkpoint {checkpoint.object.key} of epoch {checkpoint.epoch} is of another release of "
        f"detflow ({found}, this one reads {FORMAT}); resume with the release that wrote it, or "
        "start a new training of the version, which may begin with the weights of a finished one",
        reason="CHECKPOINT_FORMAT",
        metadata={"key": checkpoint.object.key, "format": found},
    )


def save_weights(store: ObjectStore, spec: Spec, weights: dict[str, Any]) -> StoredObject:
    """Stores the best weights with all that is needed to use them; loads with `weights_only=True`.

    Args:
        store: The object store.
        spec: What the worker does.
        weights: model (id), class_names, image_size, epoch, state_dict (fp32): `networks.build`
            and `load_state_dict` make the network of them.
    """
    return store.put(
        spec.key("best.pt"), _to_bytes({"format": WEIGHTS_FORMAT, **copy_to_cpu(weights)})
    )


def _to_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.serialization.set_crc32_options(False)  # the SHA-256 beside it is the better check
    torch.save(state, buffer)
    return buffer.getvalue()


def copy_to_cpu(value: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
    """Copies tensors to the CPU, by default contiguous, in containers of any depth."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=memory_format)
    if isinstance(value, dict):
        return {key: copy_to_cpu(item, memory_format) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy_to_cpu(item, memory_format) for item in value]
    return value
