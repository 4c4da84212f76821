"""What the loader says it spends its time with, and what the log makes of it."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from detflow.errors import DataLoss
from detflow.store import ObjectStore
from services.trainer.worker.bundle import Bundle, Image, fetch_bundle
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


def prefetcher(bundle: Bundle, ranks: Any = None) -> Any:
    from services.trainer.worker.data import Prefetcher, TrainDataset

    dataset = TrainDataset(
        bundle.splits["train"],
        hyperparameters=Hyperparameters(image_size=64),
        batch_size=4,
    )
    return Prefetcher(dataset, batch_size=4, seed=0, ranks=ranks)


def made(images: Any, epochs: int = 3) -> list[dict[str, Any]]:
    """Returns the batches of some epochs, the last without mosaic."""
    images.start(range(1, epochs + 1), without_mosaic_from=epochs)
    try:
        return [batch for _ in range(epochs) for batch in images]
    finally:
        images.close()


def assert_equal(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    import torch

    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def slowed(method: Any, seconds: float) -> Any:
    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(seconds)  # the work that this test makes slow
        return method(*arguments, **more)

    return slow


def test_shares_are_those_of_the_epoch_whose_batches_are_taken(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import data

    monkeypatch.setattr(data, "_decode", slowed(data._decode, 0.02))
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


@pytest.mark.parametrize("has_room", [True, False])
def test_batches_are_the_same_whoever_makes_them(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    from services.trainer.worker import data

    if not has_room:
        monkeypatch.setattr(data, "_RAM_SHARE", 0.0)
        monkeypatch.setattr(data, "_MAX_RECENT", 2)
    expected = made(prefetcher(bundle))
    assert not any(
        (batch["img"] == other["img"]).all() for batch, other in combinations(expected, 2)
    )
    assert_equal(expected, made(prefetcher(bundle)))
    monkeypatch.setattr(data.Prefetcher, "_num_threads", lambda self: 3)
    assert_equal(expected, made(prefetcher(bundle)))


def test_ranks_make_the_images_of_one_device(bundle: Bundle) -> None:
    import torch

    from services.trainer.worker.distributed import Ranks
    from services.trainer.worker.spec import Place

    places = (Place(rank=rank, num_per_node=2) for rank in range(2))
    parts = [made(prefetcher(bundle, Ranks(place))) for place in places]
    for whole, *shared in zip(made(prefetcher(bundle)), *parts, strict=True):
        together = torch.stack([part["img"] for part in shared], dim=1)
        assert torch.equal(whole["img"], together.flatten(0, 1))


def test_each_image_is_decoded_once_where_there_is_room(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.trainer.worker import data

    decoded: list[int] = []
    decode = data._decode

    def note(image: Image, *more: Any) -> Any:
        decoded.append(image.id)
        return decode(image, *more)

    monkeypatch.setattr(data, "_decode", note)
    images = prefetcher(bundle)
    made(images)
    assert sorted(decoded) == [image.id for image in bundle.splits["train"]]
    assert images.dataset.kept_bytes == sum(one.nbytes for one in images.dataset._decoded.values())


def test_image_that_cannot_be_decoded_ends_the_training_and_is_named(
    bundle: Bundle, tmp_path: Path
) -> None:
    damaged = tmp_path / "00000004.jpg"
    damaged.write_bytes(b"\xff\xd8 no image")
    images = [replace(bundle.splits["train"][0], path=damaged), *bundle.splits["train"][1:]]
    broken = Bundle(bundle.class_names, {**bundle.splits, "train": tuple(images)})
    with pytest.raises(DataLoss, match=r"00000004\.jpg.*create the version again"):
        made(prefetcher(broken))


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
