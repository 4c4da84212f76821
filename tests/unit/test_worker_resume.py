"""A training that was interrupted ends with the very bits of one that was not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.worker.bundle import Bundle, fetch_bundle
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

EPOCHS = 2
NUM_IMAGES, BATCH_SIZE, NUM_STEPS = 11, 3, 4

# What a training carries from one step to the next, beside weights and averages.
CASES: Mapping[str, Mapping[str, float | bool | str]] = {
    "moments": {"optimizer": "AdamW", "warmup_epochs": 0.8},
    # Three batches an update, four steps an epoch: gradients stay over its end.
    "gradients": {"optimizer": "SGD", "nominal_batch_size": 9, "warmup_epochs": 0.3},
    "dropout": {"optimizer": "NAdam", "dropout": 0.5, "multi_scale": 0.5},
    "auto": {"optimizer": "auto", "cos_lr": True, "freeze": 2},
}


class Killed(Exception):
    """Ends a training between two steps."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("resume")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": NUM_IMAGES, "val": 3, "test": 0})
    return fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)


def spec(folder: Path, hyperparameters: Mapping[str, Any], **more: Any) -> Spec:
    values = {"image_size": 64, "lr0": 0.01, "close_mosaic": 1, "seed": 5, **hyperparameters}
    return Spec(
        **{
            "training": "projects/p/versions/v/trainings/t1",
            "attempt": 1,
            "model": "yolov8n",
            "batch_size": BATCH_SIZE,
            "step_batch_size": BATCH_SIZE,
            "epochs": EPOCHS,
            "hyperparameters": values,
            "manifest": StoredObject(),
            "checkpoint": None,
            "folder": folder,
            **more,
        }
    )


class Run:
    """A training in this process."""

    def __init__(self, spec: Spec, bundle: Bundle) -> None:
        from services.trainer.worker.loop import Trainer

        self.trainer: Any = Trainer(spec, bundle)
        self._store = ObjectStore(f"file://{spec.folder / 'store'}")
        self._spec = spec
        self._num_left = self._num_not_saved = 0
        self._saves_before_measuring = False
        self._saved: Checkpoint | None = None

    def finish(self, after: Checkpoint | None = None) -> dict[str, Any]:
        """Trains to the end; returns the state then."""
        self._train(after)
        state: dict[str, Any] = self.trainer.state(EPOCHS)
        return state

    def until(
        self,
        num_steps: int,
        after: Checkpoint | None = None,
        lost: int = 1,
        before_measuring: bool = False,
    ) -> Checkpoint:
        """Trains for so many steps and some more, which the checkpoint knows nothing of."""
        self._num_left, self._num_not_saved = num_steps + lost, lost
        self._saves_before_measuring = before_measuring
        self._train(after)
        assert self._saved is not None
        return self._saved

    def restore(self, saved: Checkpoint) -> None:
        from services.trainer.worker.checkpoint import load_checkpoint

        self.trainer.restore(load_checkpoint(self._store, saved, self._spec.folder))

    def _train(self, after: Checkpoint | None) -> None:
        if after is not None:
            self.restore(after)
        first_epoch = after.epoch + 1 if after else 1
        self.trainer.start(first_epoch)
        try:
            for epoch in range(first_epoch, EPOCHS + 1):
                self.trainer.train_epoch(epoch, self._on_step)
                if self._num_left == self._num_not_saved and self._saves_before_measuring:
                    self._save(epoch - 1, self.trainer.num_steps)
                    break
                self.trainer.measure(epoch, lambda: None)
                if self._num_left == self._num_not_saved:
                    self._save(epoch, 0)
        except Killed:
            pass
        finally:
            self.trainer.close()

    def _on_step(self, step: Any) -> None:
        self._num_left -= 1
        if self._num_left == self._num_not_saved and step.number < self.trainer.num_steps:
            self._save(step.epoch - 1, step.number)
        if self._num_left == 0:
            raise Killed

    def _save(self, epoch: int, step: int) -> None:
        from services.trainer.worker.checkpoint import save_snapshot, snapshot_of

        snapshot = snapshot_of(epoch, self.trainer.state(epoch))
        stored = save_snapshot(self._store, f"{epoch}-{step}.pt", snapshot)
        self._saved = Checkpoint(epoch=epoch, step=step, object=stored)


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """Yields where two states differ, to the bit."""
    import torch

    if isinstance(first, torch.Tensor):
        if not torch.equal(first, second):
            yield where
    elif isinstance(first, dict):
        if first.keys() != second.keys():
            yield f"{where} keys"
        for key in first.keys() & second.keys():
            yield from differences(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            yield f"{where} length"
        for index, pair in enumerate(zip(first, second, strict=False)):
            yield from differences(*pair, f"{where}/{index}")
    elif first != second:
        yield f"{where}: {first} != {second}"


@pytest.mark.parametrize("case", CASES)
def test_interrupted_training_ends_with_the_same_bits(
    case: str, bundle: Bundle, tmp_path: Path
) -> None:
    def run() -> Run:
        return Run(spec(tmp_path, CASES[case]), bundle)

    # Within the first epoch, and then anywhere: its end too.
    first, second = random.randint(1, NUM_STEPS - 1), random.randint(1, NUM_STEPS)
    saved = run().until(second, run().until(first))
    found = differences(run().finish(), run().finish(saved))
    assert not list(found), f"interrupted after {first} and {second} more steps"


def test_gradients_that_wait_for_their_update_are_in_the_checkpoint(
    bundle: Bundle, tmp_path: Path
) -> None:
    state = Run(spec(tmp_path, CASES["gradients"]), bundle).finish()
    assert state["gradients"] and state["last_update"] < EPOCHS * NUM_STEPS - 1


def test_images_that_do_not_fit_into_memory_are_the_same_after_an_interruption(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import data

    monkeypatch.setattr(data, "_RAM_SHARE", 0.0)
    monkeypatch.setattr(data, "_MAX_RECENT", 3)

    def run() -> Run:
        return Run(spec(tmp_path, CASES["moments"]), bundle)

    saved = run().until(3)
    assert (saved.epoch, saved.step) == (0, 3)
    whole = run()
    assert not list(differences(whole.finish(), run().finish(saved)))
    assert whole.trainer.kept_bytes < 64 * 64 * 3 * NUM_IMAGES  # those of the validation alone
    assert not whole.trainer._images.dataset._decoded
    assert len(whole.trainer._images.dataset._passing) == 3 + BATCH_SIZE


def test_epoch_that_was_stopped_while_it_was_measured_is_measured_after_the_resume(
    bundle: Bundle, tmp_path: Path
) -> None:
    stopped = Run(spec(tmp_path, CASES["moments"]), bundle)
    saved = stopped.until(NUM_STEPS, before_measuring=True)
    assert (saved.epoch, saved.step) == (0, NUM_STEPS)
    told = Run(spec(tmp_path, CASES["moments"]), bundle)
    told.restore(saved)
    told.trainer.start(1)
    values = told.trainer.train_epoch(1, lambda step: None)
    told.trainer.close()
    assert {"data_wait_share", "images_per_second", "epoch_seconds"} <= values.keys()
    whole, resumed = (Run(spec(tmp_path, CASES["moments"]), bundle) for _ in range(2))
    assert not list(differences(whole.finish(), resumed.finish(saved)))


def test_losses_of_an_interrupted_epoch_are_the_mean_of_all_its_steps(
    bundle: Bundle, tmp_path: Path
) -> None:
    from services.trainer.worker.checkpoint import copy_to_cpu

    def epoch(state: dict[str, Any] | None) -> tuple[dict[str, float], dict[str, Any]]:
        run = Run(spec(tmp_path, CASES["moments"]), bundle)
        if state:
            run.trainer.restore(state)
        run.trainer.start(1)
        try:
            values: dict[str, float] = run.trainer.train_epoch(1, lambda step: None)
        finally:
            run.trainer.close()
        assert values["images_per_second"] * values["epoch_seconds"] == pytest.approx(NUM_IMAGES)
        losses = {name: value for name, value in values.items() if "loss" in name}
        return losses, run.trainer.state(1)

    begun = Run(spec(tmp_path, CASES["moments"]), bundle)
    begun.until(2, lost=0)
    # The order that tensors have in memory is not that of the network here.
    losses, state = epoch(copy_to_cpu(begun.trainer.state(0)))
    expected, expected_state = epoch(None)
    assert losses == expected
    assert not list(differences(expected_state, state))


def test_best_weights_are_kept_beside_those_of_an_epoch_under_way(
    bundle: Bundle, tmp_path: Path
) -> None:
    begun, resumed = (Run(spec(tmp_path, CASES["moments"]), bundle) for _ in range(2))
    saved = begun.until(NUM_STEPS + 1, lost=0)
    assert (saved.epoch, saved.step) == (1, 1)
    resumed.restore(saved)
    best, expected = resumed.trainer.weights(), begun.trainer.weights()
    assert best["epoch"] == 1
    assert not list(differences(best["state_dict"], expected["state_dict"]))
    assert list(differences(best["state_dict"], resumed.trainer.ema.network.state_dict()))


def test_efficientdet_resumes_to_the_bit_too(bundle: Bundle, tmp_path: Path) -> None:
    images = bundle.splits["train"][: 2 * BATCH_SIZE]
    few = Bundle(bundle.class_names, {**bundle.splits, "train": images})

    def run() -> Run:
        return Run(spec(tmp_path, {"image_size": 128}, model="efficientdet-d0"), few)

    assert not list(differences(run().finish(), run().finish(run().until(1))))
