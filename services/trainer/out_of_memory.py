"""What becomes of a training that ran out of memory: it goes on with fewer images at a time."""

from __future__ import annotations

from google.rpc import error_details_pb2

from detflow.errors import ResourceExhausted, failure
from detflow.postgres import Connection
from detflow.v1.common_pb2 import Failure
from detflow.v1.training_pb2 import LogLines
from services.trainer import attempts, store
from services.trainer.checkpoints import get_newest
from services.trainer.domain import State, StopMode, Training, after_stop

REASON = "OUT_OF_MEMORY"


def is_out_of_memory(why: Failure) -> bool:
    """Says whether a failure is that memory ran out."""
    info = error_details_pb2.ErrorInfo()
    return any(detail.Unpack(info) and info.reason == REASON for detail in why.status.details)


async def settle_out_of_memory(conn: Connection, training: Training, why: Failure) -> None:
    """Moves on a locked training whose attempt ran out of memory.

    It goes on from its last checkpoint with half as many images in memory at once; gradients are
    accumulated, so that an update of the weights still sees as many. That counts as no crash. With
    one image per device left it fails.
    """
    if training.stop_mode in (StopMode.PAUSE, StopMode.DISCARD):
        target = after_stop(training.stop_mode)
        await store.update_state(conn, training.id, target, attempt=training.attempt, failure=why)
        return
    before = training.step_batch_size
    if before <= training.num_devices:
        await _give_up(conn, training)
        return
    now = max(before // 2, training.num_devices)
    checkpoint = await get_newest(conn, training.id)
    epoch = checkpoint.epoch + 1 if checkpoint else 1
    accumulated = max(training.batch_size, int(training.hyperparameters["nominal_batch_size"]))
    line = (
        f"out of memory at {before} images per step: goes on from epoch {epoch} with {now}, "
        f"accumulated to {accumulated}"
    )
    await attempts.insert_log(conn, training, LogLines(attempt=training.attempt, lines=[line]))
    await store.update_state(
        conn,
        training.id,
        State.QUEUED,
        attempt=training.attempt,
        failure=why,
        step_batch_size=now,
        crashed=False,
    )


async def _give_up(conn: Connection, training: Training) -> None:
    each = "one image" if training.num_devices == 1 else "one image per device"
    size = training.hyperparameters["image_size"]
    problem = ResourceExhausted(
        f"out of memory even with {each} per step and image_size={size}; lower image_size, choose a"
        " smaller model or give the trainer more memory, and start another training",
        reason=REASON,
        metadata={"field": "hyperparameters.image_size"},
    )
    await store.update_state(
        conn, training.id, State.FAILED, attempt=training.attempt, failure=failure(problem)
    )
