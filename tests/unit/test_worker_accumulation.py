"""Steps in parts: what memory holds at once is less than a batch, what is learnt is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from detflow.store import ObjectStore
from services.trainer.worker.bundle import Bundle, fetch_bundle
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("accumulation")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 8, "val": 2, "test": 0})
    return fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)


def test_parts_of_a_batch_are_of_about_the_same_size_and_hold_their_own_boxes() -> None:
    import torch

    from services.trainer.worker.batches import split_batch

    batch = {
        "img": torch.arange(9)[:, None],
        "batch_idx": torch.tensor([0.0, 4.0, 4.0, 5.0, 8.0]),
        "cls": torch.arange(5)[:, None],
        "bboxes": torch.arange(20).reshape(5, 4),
    }
    parts = list(split_batch(batch, 8))
    assert [part["img"].flatten().tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert [part["batch_idx"].tolist() for part in parts] == [[0.0], [0.0, 0.0, 1.0, 4.0]]
    assert [part["cls"].flatten().tolist() for part in parts] == [[0], [1, 2, 3, 4]]
    assert [len(part["bboxes"]) for part in parts] == [1, 4]
    assert len(list(split_batch(batch, 9))) == 1


def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(
    bundle: Bundle, tmp_path: Path
) -> None:
    import torch

    from detflow.v1.common_pb2 import StoredObject
    from services.trainer.worker.loop import Trainer
    from services.trainer.worker.spec import Spec

    # The same four images twice: batch statistics and the loss's norm are those of a half.
    numbers = torch.Generator().manual_seed(0)
    # Many boxes: the loss is normalised by their scores, but by no less than 1.
    index = torch.arange(40) // 10
    boxes = 0.3 + 0.4 * torch.rand((40, 4), generator=numbers)
    batch = {
        "img": torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=numbers).repeat(
            2, 1, 1, 1
        ),
        "batch_idx": torch.cat((index, index + 4)),
        "cls": (torch.arange(40) % 3)[:, None].repeat(2, 1),
        "bboxes": boxes.repeat(2, 1),
    }

    def gradients(step_batch_size: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        spec = Spec(
            training="projects/p/versions/v/trainings/t1",
            attempt=1,
            model="yolov8n",
            batch_size=8,
            step_batch_size=step_batch_size,
            epochs=20,
            # One update takes more batches than this one: the gradients stay.
            hyperparameters={"image_size": 64, "nominal_batch_size": 64, "warmup_epochs": 0},
            manifest=StoredObject(),
            checkpoint=None,
            folder=tmp_path,
        )
        trainer = Trainer(spec, bundle)
        losses = trainer.step(batch, 1, 0)
        found = {
            name: parameter.grad.clone()
            for name, parameter in trainer.network.named_parameters()
            if parameter.grad is not None
        }
        return found, losses

    (whole, losses), (parts, part_losses) = gradients(8), gradients(4)
    assert whole and whole.keys() == parts.keys()
    assert part_losses == pytest.approx(losses, rel=1e-4)
    for name, gradient in whole.items():
        difference = float((gradient - parts[name]).norm() / (gradient.norm() + 1e-12))
        assert difference < 1e-3, name
