"""One attempt from the bundle to the predictions, in the order it happens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from google.protobuf.timestamp_pb2 import Timestamp

from detflow.settings import Settings
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.training_pb2 import EpochMetrics, Predictions, TrainingProgress
from detflow.v1.worker_pb2 import (
    Checkpoint,
    EpochRecord,
    WorkerEvaluating,
    WorkerFinished,
    WorkerRecord,
    WorkerStarted,
)
from services.trainer.worker import memory, preflight, weights
from services.trainer.worker.bundle import Bundle, fetch_bundle
from services.trainer.worker.checkpoint import Checkpoints, load_checkpoint, save_weights
from services.trainer.worker.diagnosis import diagnose
from services.trainer.worker.distributed import Ranks
from services.trainer.worker.failures import explain
from services.trainer.worker.loop import Step, Trainer
from services.trainer.worker.orders import Orders
from services.trainer.worker.predict import predict
from services.trainer.worker.progress import Progress
from services.trainer.worker.records import Spool
from services.trainer.worker.spec import Spec
from services.trainer.worker.steps import StepBlocks

CHECKPOINT_SECONDS = 300.0
"""Time without a checkpoint after which one is saved, inside an epoch too."""
_CHECKPOINT_SHARE = 0.005
"""Of the time, for checkpoints: the ends of epochs that come sooner are not saved."""
_STOP_SECONDS = 2.0
"""A checkpoint that takes longer than this is not begun when the worker shall end within five."""
_NUM_DIAGNOSED = 3
"""Epochs of an attempt after which the log says what they waited for."""


def run(
    spec: Spec,
    settings: Settings,
    orders: Orders,
    records: Spool,
    report: Callable[[TrainingProgress], None],
) -> None:
    """Trains, predicts and stores everything; the last record is WorkerFinished.

    Raises:
        DetflowError: What was given cannot be trained.
        Fenced: Another attempt has taken over.
        Stopped: The worker shall stop now.
    """
    store = ObjectStore(settings.store_url)
    progress = Progress(spec, report)
    progress.prepare(0, 0)
    bundle = fetch_bundle(
        store,
        spec.manifest,
        settings.data_dir / "bundles",
        check=orders.check,
        on_progress=progress.prepare,
    )
    records.log(
        f"attempt {spec.attempt}: {spec.model}, {spec.epochs} epochs, batch size {spec.batch_size}",
        ", ".join(f"{len(images)} {name} images" for name, images in bundle.splits.items()),
    )
    orders.check()
    checkpoint = spec.checkpoint and load_checkpoint(store, spec.checkpoint, spec.folder)
    ranks = Ranks(spec.place, orders.check)
    trainer = Trainer(spec, bundle, ranks)
    if checkpoint is None:
        _begin(trainer, spec, store, settings, records)
    if spec.preflight and checkpoint is None:
        _try_out(trainer, bundle, spec, store, settings, orders, records, progress)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        step = f" and {spec.steps_done} steps" if spec.steps_done else ""
        records.log(f"goes on after epoch {spec.epochs_done}{step}")
    try:
        with ranks.meeting(trainer.network):
            _train(trainer, ranks, spec, store, orders, records, progress)
    finally:
        trainer.close()
    _evaluate(trainer, bundle, spec, store, orders, records, progress)


def follow(spec: Spec, settings: Settings) -> None:
    """Trains along with rank 0, until that has seen enough.

    Raises:
        DetflowError: What was given cannot be trained; rank 0 is told.
        RankLost: Another rank has ended.
    """
    ranks = Ranks(spec.place)
    with ranks.explaining(lambda error: explain(error, spec, settings)):
        store = ObjectStore(settings.store_url)
        cache = settings.data_dir / "bundles"
        bundle = fetch_bundle(store, spec.manifest, cache, check=lambda: None)
        trainer = Trainer(spec, bundle, ranks)
        if spec.checkpoint:
            trainer.restore(load_checkpoint(store, spec.checkpoint, spec.folder))
        try:
            with ranks.meeting(trainer.network):
                trainer.start(spec.epochs_done + 1)
                for epoch in range(spec.epochs_done + 1, spec.epochs + 1):
                    trainer.train_epoch(epoch, lambda step: None)
                    if not ranks.agree(True):
                        break
        finally:
            trainer.close()


def _begin(
    trainer: Trainer, spec: Spec, store: ObjectStore, settings: Settings, records: Spool
) -> None:
    found, origin = weights.find(spec, store, settings)
    if found is None:
        records.log("begins with random weights: none were given, and this machine has none")
        return
    num_taken, num_all = trainer.begin_with(found)
    records.log(f"begins with {origin}: took over {num_taken} of {num_all} tensors")


def _try_out(
    trainer: Trainer,
    bundle: Bundle,
    spec: Spec,
    store: ObjectStore,
    settings: Settings,
    orders: Orders,
    records: Spool,
    progress: Progress,
) -> None:
    def on_check(name: str, num_done: int) -> None:
        progress.check(num_done, len(preflight.CHECKS))
        orders.check()

    found = preflight.try_out(trainer, bundle, spec, store, settings, on_check)
    records.write(WorkerRecord(preflight=found))
    seconds = sum(check.seconds for check in found.checks)
    records.log(
        f"tried everything in {seconds:.1f} s: a step takes about {found.step_seconds:.2g} s, "
        f"the training {found.total_seconds / 60:.0f} min and "
        f"{found.memory_bytes / 2**20:.0f} MiB of memory"
    )


def _train(
    trainer: Trainer,
    ranks: Ranks,
    spec: Spec,
    store: ObjectStore,
    orders: Orders,
    records: Spool,
    progress: Progress,
) -> None:
    first_epoch = spec.epochs_done + 1
    orders.check()
    progress.begin(trainer.device_name, trainer.num_steps)
    records.write(
        WorkerRecord(started=WorkerStarted(first_epoch=first_epoch, device=trainer.device_name))
    )
    devices = f"{ranks.num_ranks} devices, this one is " if ranks.num_ranks > 1 else ""
    records.log(f"trains on {devices}{trainer.device_name}")

    checkpoints = Checkpoints(store, spec)
    blocks = StepBlocks(records, spec.attempt, trainer.num_steps)

    def on_step(step: Step) -> bool:
        memory_bytes = memory.used_bytes(trainer.device)
        blocks.add(step, memory_bytes)
        progress.step(
            epoch=step.epoch,
            step=step.number,
            losses=step.losses,
            learning_rate=step.learning_rate,
            data_wait_share=step.data_wait_share,
            loader_shares=step.loader_shares,
            memory_bytes=memory_bytes,
        )
        if saves_at_stop():
            return True
        orders.check()
        return step.number < trainer.num_steps and checkpoints.age_seconds >= CHECKPOINT_SECONDS

    def saves_at_stop() -> bool:
        """Says whether what was learnt since the last checkpoint is to be saved now."""
        return orders.stop and not orders.fenced and checkpoints.cost_seconds <= _STOP_SECONDS

    def save_within(num_done: int) -> None:
        blocks.flush()
        checkpoints.save(num_done, trainer.state(num_done), partial(_report_within, records))
        orders.check()

    def on_batch(num_done: int) -> None:
        progress.validate()
        if saves_at_stop():
            save_within(num_done)
        orders.check()

    def is_due() -> bool:
        pause = checkpoints.cost_seconds / _CHECKPOINT_SHARE
        return checkpoints.age_seconds >= min(pause, CHECKPOINT_SECONDS)

    try:
        trainer.start(first_epoch)
        for epoch in range(first_epoch, spec.epochs + 1):
            values = trainer.train_epoch(epoch, on_step, partial(save_within, epoch - 1))
            values["memory_bytes"] = blocks.end_epoch() or memory.used_bytes(trainer.device)
            if epoch < first_epoch + _NUM_DIAGNOSED and "data_wait_share" in values:
                for line in diagnose(values["data_wait_share"], trainer.loader_shares):
                    records.log(line)
            began = time.monotonic()
            values |= trainer.measure(epoch, partial(on_batch, epoch - 1))
            values["epoch_seconds"] = values.get("epoch_seconds", 0.0) + time.monotonic() - began
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            metrics = EpochMetrics(
                attempt=spec.attempt, epoch=epoch, values=values, measure_time=_now()
            )
            why = ""
            if orders.finish:
                why = ", as asked"
            elif trainer.has_stalled(epoch):
                why = f": best was epoch {trainer.best_epoch}"
            report = partial(_report_epoch, records, metrics)
            if why or epoch == spec.epochs or is_due():
                checkpoints.save(epoch, trainer.state(epoch), report)
            else:
                checkpoints.skip(report)
            if why:
                records.log(f"stops after epoch {epoch}{why}")
            if not ranks.agree(not why):
                break
        checkpoints.wait()
    finally:
        blocks.flush()
        checkpoints.close()


def _report_within(records: Spool, checkpoint: Checkpoint) -> None:
    """Writes the record of a checkpoint inside an epoch."""
    records.write(WorkerRecord(epoch=EpochRecord(checkpoint=checkpoint)))


def _report_epoch(records: Spool, metrics: EpochMetrics, checkpoint: Checkpoint | None) -> None:
    """Writes the record of an epoch, once its checkpoint is stored if it has one."""
    values = metrics.values
    records.log(
        f"epoch {metrics.epoch}: "
        + ", ".join(f"{name} {values[name]:.4g}" for name in sorted(values))
    )
    records.write(WorkerRecord(epoch=EpochRecord(metrics=metrics, checkpoint=checkpoint)))


def _evaluate(
    trainer: Trainer,
    bundle: Bundle,
    spec: Spec,
    store: ObjectStore,
    orders: Orders,
    records: Spool,
    progress: Progress,
) -> None:
    orders.check()
    network = trainer.best_network()
    best = save_weights(store, spec, trainer.weights())
    records.write(WorkerRecord(evaluating=WorkerEvaluating(weights=best)))
    records.log(f"predicts with the weights of epoch {trainer.best_epoch}")
    splits = {name: trainer.evaluation_set(bundle.splits[name]) for name in ("val", "test")}
    num_batches, done = sum(map(len, splits.values())), 0

    def on_batch() -> None:
        nonlocal done
        done += 1
        progress.predict(done, num_batches)
        orders.check()

    stored: dict[str, StoredObject] = {}
    progress.predict(0, num_batches)
    for name, images in splits.items():
        content = predict(network, images, trainer.device, on_batch)
        stored[name] = store.put(spec.key(f"predictions-{name}.parquet"), content)
    orders.check()
    records.write(
        WorkerRecord(
            finished=WorkerFinished(
                predictions=Predictions(attempt=spec.attempt, manifest=spec.manifest, **stored)
            )
        )
    )


def _now() -> Timestamp:
    now = Timestamp()
    now.GetCurrentTime()
    return now
