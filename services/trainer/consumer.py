"""What the trainer does when a worker's record, an evaluation or a version's event arrives."""

from __future__ import annotations

from google.rpc import code_pb2

from detflow import telemetry
from detflow.consumer import Consumer
from detflow.errors import DataLoss, FailedPrecondition, InvalidArgument, failure
from detflow.events import EVENTS_STREAM, RECORDS_STREAM, Bus, Delivered
from detflow.names import last_segment
from detflow.postgres import Connection, Database
from detflow.v1 import events_pb2
from detflow.v1.common_pb2 import Failure, Split
from detflow.v1.metrics_pb2 import Evaluation
from detflow.v1.training_pb2 import StepMetrics
from detflow.v1.worker_pb2 import EpochRecord, WorkerFailed, WorkerRecord
from services.trainer import attempts, checkpoints, store, versions
from services.trainer.domain import (
    ATTEMPTING,
    State,
    StopMode,
    Training,
    after_evaluation,
    after_stop,
    is_retried,
)
from services.trainer.out_of_memory import is_out_of_memory, settle_out_of_memory

log = telemetry.get_logger(__name__)


def consumers(db: Database, bus: Bus) -> list[Consumer[WorkerRecord] | Consumer[events_pb2.Event]]:
    """Returns the consumers of the trainer service, to be run."""
    return [
        Consumer(
            bus,
            db,
            name=attempts.RECORDS_CONSUMER,
            stream=RECORDS_STREAM,
            subjects=["detflow.records.>"],
            decode=WorkerRecord.FromString,
            handle=on_record,
        ),
        Consumer(
            bus,
            db,
            name="trainer-evaluations",
            stream=EVENTS_STREAM,
            subjects=["detflow.v1.evaluation.*.completed"],
            decode=events_pb2.Event.FromString,
            handle=on_evaluation,
        ),
        Consumer(
            bus,
            db,
            name="trainer-versions",
            stream=EVENTS_STREAM,
            subjects=[f"detflow.v1.version.*.{w}" for w in ("deleted", "undeleted", "purged")],
            decode=events_pb2.Event.FromString,
            handle=on_version,
        ),
    ]


async def on_record(conn: Connection, delivered: Delivered[WorkerRecord]) -> None:
    """Applies a worker's record if its attempt is the one under way; each once and in order.

    Raises:
        TooEarly: A record before it has not been applied yet.
        InvalidArgument: BAD_RECORD, its subject or its parts name another attempt.
    """
    record = delivered.message
    training_id = last_segment(record.training)
    _check_record(record, delivered.subject)
    training = await store.get_training(conn, training_id, lock=True)
    if training is None or training.attempt != record.attempt or training.state not in ATTEMPTING:
        log.info(
            "record of a stale attempt dropped",
            training=record.training,
            attempt=record.attempt,
            seq=record.seq,
        )
        return
    if not await attempts.advance_attempt(conn, training.id, record.attempt, record.seq):
        return
    match record.WhichOneof("what"):
        case "started":
            await _reach(conn, training, State.RUNNING)
        case "epoch":
            training = await _reach(conn, training, State.RUNNING)
            await _on_epoch(conn, training, record.epoch)
        case "steps":
            training = await _reach(conn, training, State.RUNNING)
            await attempts.insert_steps(conn, training, record.steps)
        case "log":
            await attempts.insert_log(conn, training, record.log)
        case "evaluating":
            training = await _reach(conn, training, State.RUNNING)
            await store.update_state(
                conn,
                training.id,
                State.EVALUATING,
                attempt=training.attempt,
                weights=record.evaluating.weights,
            )
        case "finished":
            training = await _reach(conn, training, State.EVALUATING)
            if training.weights is None:  # the record of them was put aside
                raise FailedPrecondition(
                    f"{training.name} has predictions and no weights; its next attempt makes both",
                    reason="NO_WEIGHTS",
                )
            await attempts.update_predictions(conn, training, record.finished.predictions)
        case "preflight":
            await store.update_preflight(conn, training.id, record.preflight)
        case "failed":
            await _on_failed(conn, training, record.failed)


def _check_record(record: WorkerRecord, subject: str) -> None:
    epoch = record.epoch
    parts = {
        "started": record.attempt,
        "epoch": epoch.metrics.attempt if epoch.HasField("metrics") else record.attempt,
        "log": record.log.attempt,
        "evaluating": record.attempt,
        "finished": record.finished.predictions.attempt,
        "failed": record.attempt,
        "preflight": record.attempt,
        "steps": record.steps.attempt,
    }
    what = record.WhichOneof("what")
    expected = f"detflow.records.{last_segment(record.training)}.{record.attempt}"
    if what is None or subject != expected or parts[what] != record.attempt or record.seq < 1:
        raise InvalidArgument(
            f"record {record.seq} on {subject} is of {record.training}, attempt {record.attempt},"
            f" and holds {what}: these do not belong together",
            reason="BAD_RECORD",
        )
    if what == "steps":
        _check_steps(record.steps)


def _check_steps(steps: StepMetrics) -> None:
    lengths = {len(column.values) for column in steps.columns}
    num_names = len({column.name for column in steps.columns})
    last = steps.first_step - 1 + max(lengths, default=0)
    is_within = 1 <= steps.epoch and 1 <= steps.first_step <= last <= steps.num_steps
    if len(lengths) != 1 or num_names != len(steps.columns) or not is_within:
        raise InvalidArgument(
            f"steps {steps.first_step} to {last} of {steps.num_steps} in epoch {steps.epoch} come"
            f" with {len(steps.columns)} columns of {sorted(lengths)} values: this is no block",
            reason="BAD_RECORD",
        )


async def _reach(conn: Connection, training: Training, target: State) -> Training:
    """Moves a training forward to `target` through every state before it; further on it stays."""
    path = (State.PROVISIONING, State.RUNNING, State.EVALUATING)
    for state in path[path.index(training.state) + 1 : path.index(target) + 1]:
        moved = await store.update_state(conn, training.id, state, attempt=training.attempt)
        assert moved is not None  # the row is locked, and the graph allows it
        training = moved
    return training


async def _on_epoch(conn: Connection, training: Training, epoch: EpochRecord) -> None:
    """Keeps what an epoch left; without metrics it is not over, and this is a checkpoint in it."""
    if epoch.HasField("metrics"):
        await attempts.insert_epoch(conn, training, epoch.metrics)
    if epoch.HasField("checkpoint"):
        await checkpoints.insert_checkpoint(conn, training, epoch.checkpoint)


async def _on_failed(conn: Connection, training: Training, failed: WorkerFailed) -> None:
    why = failed.failure
    log.warning("worker failed", training=training.name, message=why.status.message)
    if is_out_of_memory(why):
        await settle_out_of_memory(conn, training, why)
        return
    unreadable = why.status.code == code_pb2.DATA_LOSS and (
        await checkpoints.update_unreadable_checkpoint(conn, training)
    )
    if is_retried(why) or unreadable:
        await store.settle_crash(conn, training, why)
    else:
        await _fail(conn, training, why)


async def _fail(conn: Connection, training: Training, why: Failure) -> None:
    """Fails a training, unless the user has stopped it: then it ends as was asked."""
    stopped = training.stop_mode in (StopMode.PAUSE, StopMode.DISCARD)
    target = after_stop(training.stop_mode) if training.stop_mode and stopped else State.FAILED
    await store.update_state(conn, training.id, target, attempt=training.attempt, failure=why)


async def on_evaluation(conn: Connection, delivered: Delivered[events_pb2.Event]) -> None:
    """Ends a training whose current attempt has been measured on both splits."""
    evaluation = delivered.message.evaluation
    training = await store.get_training(conn, delivered.resource_id, lock=True)
    if (
        training is None
        or training.attempt != evaluation.attempt
        or training.state is not State.EVALUATING
    ):
        log.info("evaluation of a stale attempt dropped", evaluation=evaluation.name)
        return
    if evaluation.state == Evaluation.FAILED:
        why = evaluation.failure if evaluation.HasField("failure") else _unexplained(evaluation)
        await _fail(conn, training, why)
        return
    both = await attempts.update_evaluated(
        conn,
        training,
        val=evaluation.split == Split.SPLIT_VAL,
        test=evaluation.split == Split.SPLIT_TEST,
    )
    target = after_evaluation(training.stop_mode)
    if both and target is not None:
        await store.update_state(conn, training.id, target, attempt=training.attempt)


def _unexplained(evaluation: Evaluation) -> Failure:
    return failure(
        DataLoss(f"{evaluation.name} failed without a reason", reason="EVALUATION_FAILED")
    )


async def on_version(conn: Connection, delivered: Delivered[events_pb2.Event]) -> None:
    """Stops the live training of a version in the trash, and lets none start until it is back.

    What a purged version leaves behind is the sweeper's to delete.
    """
    version = delivered.resource_id
    purged = delivered.what == "purged"
    deleted = purged or delivered.what == "deleted"
    await versions.lock_version(conn, version)
    is_news = await versions.update_deleted_version(
        conn, version, deleted=deleted, purged=purged, seq=delivered.seq
    )
    if not (is_news and deleted):
        return
    for training in await store.list_live(conn, version):
        log.info("training stopped with its version", training=training.name)
        if training.state is State.QUEUED:
            await store.stop_queued(conn, training.id, StopMode.DISCARD)
        else:
            await store.update_stop_mode(conn, training.id, StopMode.DISCARD)
