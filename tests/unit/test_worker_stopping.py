"""Whatever ends a training, the weights it leaves are those of its best epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import WorkerRecord
from services.trainer.worker.bundle import Bundle, fetch_bundle
from services.trainer.worker.orders import Fenced, Orders, Stopped
from services.trainer.worker.progress import Progress
from services.trainer.worker.records import Spool
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")


@dataclass(frozen=True)
class Shared:
    """A bundle in a store."""

    store: ObjectStore
    bundle: Bundle


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("stopping")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 4, "val": 2, "test": 0})
    bundle = fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)
    return Shared(store, bundle)


class Training:
    """A training in this process whose mAP after each epoch the test chooses."""

    def __init__(
        self, shared: Shared, folder: Path, patience: int, *fitness: float, batch_size: int = 4
    ) -> None:
        self.store = shared.store
        self._shared = shared
        self.spec = Spec(
            training="projects/p/versions/v/trainings/t1",
            attempt=1,
            model="yolov8n",
            batch_size=batch_size,
            step_batch_size=batch_size,
            epochs=5,
            hyperparameters={"image_size": 64, "patience": patience},
            manifest=StoredObject(),
            checkpoint=None,
            folder=folder,
        )
        self.trainer = self._make_trainer()
        self.averages: list[Mapping[str, Any]] = []
        self.records: list[WorkerRecord] = []
        self.orders = Orders()
        self._fitness = iter(fitness)
        self.trainer.validate = self._validate

    def _make_trainer(self) -> Any:
        from services.trainer.worker.loop import Trainer

        return Trainer(self.spec, self._shared.bundle)

    def _validate(self, images: Any, on_batch: Any) -> dict[str, float]:
        from services.trainer.worker.checkpoint import copy_to_cpu

        on_batch()
        self.averages.append(copy_to_cpu(self.trainer.ema.network.state_dict()))
        value = next(self._fitness)
        return {"val/map50": value, "val/map50_95": value}

    def run(self) -> None:
        from services.trainer.worker import training
        from services.trainer.worker.distributed import Ranks

        spool = Spool(self.spec.training, 1)
        spool.write = self._write(spool.write)  # type: ignore[method-assign]
        progress = Progress(self.spec, lambda said: None)
        try:
            training._train(
                self.trainer,
                Ranks(),
                self.spec,
                self._shared.store,
                self.orders,
                spool,
                progress,
            )
        finally:
            self.trainer.close()

    def _write(self, write: Any) -> Any:
        def keep(record: WorkerRecord) -> Any:
            self.records.append(record)
            return write(record)

        return keep

    @property
    def epochs(self) -> list[int]:
        told = [one.epoch for one in self.records if one.HasField("epoch")]
        return [one.metrics.epoch for one in told if one.HasField("metrics")]

    @property
    def log(self) -> str:
        return "\n".join(line for one in self.records for line in one.log.lines)


def same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    import torch

    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def test_patience_ends_a_training_and_the_best_epoch_is_kept(
    shared: Shared, tmp_path: Path
) -> None:
    training = Training(shared, tmp_path, 2, 0.2, 0.5, 0.4, 0.5)
    training.run()
    assert training.epochs == [1, 2, 3, 4]  # equal is not better
    assert "stops after epoch 4: best was epoch 2" in training.log
    assert training.trainer.weights()["epoch"] == 2
    assert same(training.trainer.weights()["state_dict"], training.averages[1])
    assert not same(training.averages[1], training.averages[3])
    assert same(training.trainer.best_network().state_dict(), training.averages[1])


def test_patience_of_zero_never_ends_a_training(shared: Shared, tmp_path: Path) -> None:
    training = Training(shared, tmp_path, 0, 0.5, *[0.1] * 4)
    training.run()
    assert training.epochs == [1, 2, 3, 4, 5]
    assert training.trainer.weights()["epoch"] == 1


def test_finish_ends_after_the_epoch_and_keeps_the_best_not_the_last(
    shared: Shared, tmp_path: Path
) -> None:
    training = Training(shared, tmp_path, 100, 0.5, 0.4, 0.3)
    validate = training.trainer.validate

    def ask_in_epoch_two(images: Any, on_batch: Any) -> dict[str, float]:
        training.orders.finish = len(training.averages) == 1
        return dict(validate(images, on_batch))

    training.trainer.validate = ask_in_epoch_two
    training.run()
    assert training.epochs == [1, 2]
    assert "stops after epoch 2, as asked" in training.log
    assert same(training.trainer.weights()["state_dict"], training.averages[0])


def places(training: Training) -> list[tuple[int, int, bool]]:
    """Returns epoch and step of every stored checkpoint, and whether an epoch ended there."""
    told = [one.epoch for one in training.records if one.HasField("epoch")]
    for epoch in told:
        if epoch.HasField("checkpoint"):
            training.store.get(epoch.checkpoint.object)
    return [
        (one.checkpoint.epoch, one.checkpoint.step, one.HasField("metrics"))
        for one in told
        if one.HasField("checkpoint")
    ]


def test_checkpoints_take_a_small_share_of_the_time_however_short_the_epochs(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker.checkpoint import Checkpoints

    costs, ages = iter([0.0, 0.05, 0.05, 0.05]), iter([1.0, 9.0, 10.0, 1.0])  # but of the last
    cost = property(lambda self: next(costs), lambda self, value: None)
    monkeypatch.setattr(Checkpoints, "cost_seconds", cost, raising=False)
    monkeypatch.setattr(Checkpoints, "age_seconds", property(lambda self: next(ages)))
    training = Training(shared, tmp_path, 100, *[0.5] * 5)
    training.run()
    assert training.epochs == [1, 2, 3, 4, 5]
    assert places(training) == [(1, 0, True), (3, 0, True), (5, 0, True)]


def test_stop_while_an_epoch_is_measured_saves_what_it_learnt(
    shared: Shared, tmp_path: Path
) -> None:
    training = Training(shared, tmp_path, 100, 0.5, 0.4, 0.3)
    validate = training.trainer.validate

    def stop_in_epoch_three(images: Any, on_batch: Any) -> dict[str, float]:
        training.orders.stop = len(training.averages) == 2
        return dict(validate(images, on_batch))

    training.trainer.validate = stop_in_epoch_three
    with pytest.raises(Stopped):
        training.run()
    assert training.epochs == [1, 2]
    assert places(training)[-1] == (2, training.trainer.num_steps, False)


def test_stop_between_two_steps_saves_what_was_learnt(shared: Shared, tmp_path: Path) -> None:
    training = Training(shared, tmp_path, 100, 0.5, batch_size=2)
    step = training.trainer.step

    def stop_in_epoch_two(batch: Any, epoch: int, index: int) -> dict[str, float]:
        training.orders.stop = (epoch, index) == (2, 0)
        return dict(step(batch, epoch, index))

    training.trainer.step = stop_in_epoch_two
    with pytest.raises(Stopped):
        training.run()
    assert training.epochs == [1]
    assert places(training) == [(1, 0, True), (1, 1, False)]


def test_attempt_that_lost_its_say_saves_nothing_more(shared: Shared, tmp_path: Path) -> None:
    training = Training(shared, tmp_path, 100, 0.5)
    step = training.trainer.step

    def lose(batch: Any, epoch: int, index: int) -> dict[str, float]:
        training.orders.stop = training.orders.fenced = True
        return dict(step(batch, epoch, index))

    training.trainer.step = lose
    with pytest.raises(Fenced):
        training.run()
    assert not places(training)


def test_every_step_is_told_once_before_what_has_learnt_from_it(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import training as module

    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    training = Training(shared, tmp_path, 100, *[0.5] * 5, batch_size=1)
    step = training.trainer.step

    def stop_in_epoch_two(batch: Any, epoch: int, index: int) -> dict[str, float]:
        monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 300.0 if index > 1 else 0.0)
        training.orders.stop = (epoch, index) == (2, 3)
        return dict(step(batch, epoch, index))

    training.trainer.step = stop_in_epoch_two
    with pytest.raises(Stopped):
        training.run()
    told: list[tuple[int, int]] = []
    for record in training.records:
        if record.HasField("steps"):
            block = record.steps
            numbers = range(block.first_step, block.first_step + len(block.columns[0].values))
            told += [(block.epoch, number) for number in numbers]
        elif record.HasField("epoch"):
            saved = record.epoch.checkpoint
            last = (saved.epoch + 1, saved.step) if saved.step else (saved.epoch, 4)
            assert told[-1] >= last
    assert told == [(epoch, number) for epoch in (1, 2) for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("epoch", [1, 2])
def test_best_epoch_and_patience_survive_a_resume(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    from services.trainer.worker import training as module
    from services.trainer.worker.checkpoint import load_checkpoint

    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)  # after every epoch
    first = Training(shared, tmp_path, 3, 0.5, 0.4, 0.3, 0.2, 0.1)
    first.run()
    assert first.epochs == [1, 2, 3, 4]
    second = Training(shared, tmp_path, 3)
    states = [one.epoch.checkpoint for one in first.records if one.HasField("epoch")]
    second.trainer.restore(load_checkpoint(shared.store, states[-epoch], tmp_path))
    assert second.trainer.best_epoch == 1
    assert same(second.trainer.weights()["state_dict"], first.averages[0])
    assert [second.trainer.has_stalled(number) for number in (3, 4)] == [False, True]


def test_long_epoch_is_saved_within_and_told_without_metrics(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import training as module
    from services.trainer.worker.checkpoint import load_checkpoint

    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", 0.0)
    training = Training(shared, tmp_path, 100, *[0.5] * 5, batch_size=2)
    training.run()
    told = [one.epoch for one in training.records if one.HasField("epoch")]
    places = [(one.checkpoint.epoch, one.checkpoint.step) for one in told]
    assert places == [place for epoch in range(5) for place in ((epoch, 1), (epoch + 1, 0))]
    assert [one.HasField("metrics") for one in told] == [False, True] * 5
    within = told[-2].checkpoint
    state = load_checkpoint(shared.store, within, tmp_path)
    assert (state["epoch"], state["step"]) == (4, 1)
