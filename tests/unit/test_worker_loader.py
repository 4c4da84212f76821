"""What the loader says it spends its time with, and what the log makes of it."""

from __future__ import annotations

import importlib
import time
from typing import Any

import pytest

from detflow.store import ObjectStore
from services.trainer.worker.bundle import Bundle, fetch_bundle
from services.trainer.worker.diagnosis import diagnose
from services.trainer.worker.hyperparameters import Hyperparameters
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("loader")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 8, "val": 2, "test": 0})
    return fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)


def prefetcher(bundle: Bundle) -> Any:
    from services.trainer.worker.data import Prefetcher, TrainDataset

    dataset = TrainDataset(
        bundle.splits["train"],
        class_names=bundle.class_names,
        hyperparameters=Hyperparameters(image_size=64),
        batch_size=4,
    )
    return Prefetcher(dataset, batch_size=4, seed=0)


def slowed(method: Any, seconds: float) -> Any:
    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(seconds)  # the work that this test makes slow
        return method(*arguments, **more)

    return slow


def test_shares_are_those_of_the_epoch_whose_batches_are_taken(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    base: Any = importlib.import_module("ultralytics.data.base")
    monkeypatch.setattr(base, "imread", slowed(base.imread, 0.02))
    images = prefetcher(bundle)
    assert images.loader_shares == {}
    images.start(range(1, 3), without_mosaic_from=9)
    try:
        assert [len(batch["img"]) for batch in images] == [4, 4]
        first = images.loader_shares
        assert set(first) == {"read", "decode", "augment", "batch"}
        assert sum(first.values()) == pytest.approx(1)
        assert first["decode"] > 0.5
        for _ in images:
            pass
        assert images.loader_shares["decode"] == 0  # every image was decoded in the first epoch
    finally:
        images.close()


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("read", "DETFLOW_DATA_DIR"),
        ("decode", "--max-side"),
        ("augment", "mosaic"),
        ("batch", "DETFLOW_NUM_CPU_SLOTS"),
    ],
)
def test_much_waiting_is_explained_by_its_largest_part(part: str, remedy: str) -> None:
    shares = dict.fromkeys(("read", "decode", "augment", "batch"), 0.1) | {part: 0.7}
    (line,) = diagnose(0.42, shares)
    assert line.startswith("42% of the time waits for images, which take 70% of their time to ")
    assert part in line and remedy in line


def test_little_waiting_is_not_worth_a_word() -> None:
    assert diagnose(0.1, {"decode": 1.0}) == []
    assert diagnose(0.9, {}) == []
