"""Checkpoints that were torn or changed are never gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from detflow.errors import DataLoss, FailedPrecondition, failure
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

KEY = "trainings/t1/1/checkpoint-000003.pt"
TAIL_BYTES = 4096


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore(f"file://{tmp_path / 'store'}")


def spec(folder: Path) -> Spec:
    return Spec(
        training="projects/p/versions/v/trainings/t1",
        attempt=1,
        model="yolov8n",
        batch_size=4,
        step_batch_size=4,
        epochs=4,
        hyperparameters={},
        manifest=StoredObject(),
        checkpoint=None,
        folder=folder,
    )


def save(store: ObjectStore) -> StoredObject:
    import torch

    from services.trainer.worker.checkpoint import save_snapshot, snapshot_of

    state = {"model": {"weight": torch.arange(3000.0)}, "ema_updates": 7, "step": 0}
    return save_snapshot(store, KEY, snapshot_of(3, state))


def load(store: ObjectStore, stored: StoredObject, folder: Path) -> dict[str, Any]:
    from services.trainer.worker.checkpoint import load_checkpoint

    return load_checkpoint(store, Checkpoint(epoch=3, object=stored), folder)


def test_checkpoint_torn_at_any_byte_of_its_end_is_refused(
    store: ObjectStore, tmp_path: Path
) -> None:
    stored = save(store)
    content = store.get(stored)
    assert len(content) > TAIL_BYTES
    assert load(store, stored, tmp_path)["ema_updates"] == 7
    for missing in range(1, TAIL_BYTES + 1):
        store.put(KEY, content[:-missing])
        with pytest.raises(DataLoss) as caught:
            load(store, stored, tmp_path)
        assert caught.value.reason == "OBJECT_LOST"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_checkpoint_with_any_byte_of_its_end_changed_is_refused(
    store: ObjectStore, tmp_path: Path
) -> None:
    stored = save(store)
    content = bytearray(store.get(stored))
    for place in range(len(content) - TAIL_BYTES, len(content), 16):
        content[place] ^= 1
        store.put(KEY, bytes(content))
        with pytest.raises(DataLoss):
            load(store, stored, tmp_path)
        content[place] ^= 1


def test_checkpoints_are_not_deleted_by_the_worker_that_may_have_lost_its_say(
    store: ObjectStore, tmp_path: Path
) -> None:
    import torch

    from services.trainer.worker.checkpoint import Checkpoints

    told: list[Checkpoint] = []
    checkpoints = Checkpoints(store, spec(tmp_path))
    for epoch in range(1, 5):
        checkpoints.save(epoch, {"step": 0, "weight": torch.full((2,), float(epoch))}, told.append)
    checkpoints.close()
    assert [one.epoch for one in told] == [1, 2, 3, 4]
    for checkpoint in told:  # whichever was recorded last before another attempt took over
        assert store.get(checkpoint.object)


def test_checkpoint_of_another_release_is_refused_with_what_to_do(
    store: ObjectStore, tmp_path: Path
) -> None:
    import torch

    from services.trainer.domain import is_retried

    # As the first release wrote them: another format has other contents.
    torch.save({"format": "detflow-checkpoint/1", "epoch": 3, "train_args": {}}, tmp_path / "old")
    stored = store.put(KEY, tmp_path / "old")
    with pytest.raises(FailedPrecondition, match="start a new training of the version") as caught:
        load(store, stored, tmp_path)
    assert caught.value.reason == "CHECKPOINT_FORMAT"
    assert "detflow-checkpoint/1" in caught.value.message and KEY in caught.value.message
    # It ends the attempt for good, instead of being given up for an older one.
    assert not is_retried(failure(caught.value))


@pytest.mark.parametrize("size", [0, 1, 1000, -1, -100])
def test_torn_content_that_was_recorded_as_it_is_cannot_be_read_either(
    store: ObjectStore, tmp_path: Path, size: int
) -> None:
    content = store.get(save(store))
    stored = store.put(KEY, content[:size] if size else b"")
    with pytest.raises(DataLoss) as caught:
        load(store, stored, tmp_path)
    assert caught.value.reason == "CHECKPOINT_UNREADABLE"


def test_checkpoint_is_not_given_up_for_want_of_memory(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def run_out(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    stored = save(store)
    monkeypatch.setattr(torch, "load", run_out)
    with pytest.raises(RuntimeError, match="allocate"):
        load(store, stored, tmp_path)
    monkeypatch.undo()
    assert load(store, stored, tmp_path)["epoch"] == 3
