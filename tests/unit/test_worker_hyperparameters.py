"""Every hyper-parameter has its effect in the worker, and none that nobody asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detflow.errors import FailedPrecondition, InvalidArgument
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.hyperparameters import SCHEMA
from services.trainer.worker.bundle import Bundle, fetch_bundle
from services.trainer.worker.hyperparameters import Hyperparameters
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

NUM_IMAGES, BATCH_SIZE = 8, 4
PLAIN = {"mosaic": 0, "flip_lr": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "warmup_epochs": 0}
SIZES = {"yolov8n": 64, "efficientdet-d0": 128}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("hyperparameters")
    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": NUM_IMAGES, "val": 2, "test": 0})
    return fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)


@pytest.fixture
def make(bundle: Bundle, tmp_path: Path) -> Callable[..., Any]:
    """Makes trainers with plain images, but for what they are told."""

    def make(model: str = "yolov8n", epochs: int = 2, **hyperparameters: float | bool | str) -> Any:
        from services.trainer.worker.loop import Trainer

        spec = Spec(
            training="projects/p/versions/v/trainings/t1",
            attempt=1,
            model=model,
            batch_size=BATCH_SIZE,
            step_batch_size=BATCH_SIZE,
            epochs=epochs,
            hyperparameters={"image_size": SIZES[model], **PLAIN, **hyperparameters},
            manifest=StoredObject(),
            checkpoint=None,
            folder=tmp_path,
        )
        return Trainer(spec, bundle)

    return make


def train(trainer: Any, epochs: int = 1) -> list[dict[str, float]]:
    trainer.start(1)
    try:
        return [trainer.train_epoch(epoch, lambda step: None) for epoch in range(1, epochs + 1)]
    finally:
        trainer.close()


def batches(trainer: Any) -> list[dict[str, Any]]:
    """Returns the batches of the first epoch."""
    trainer.start(1)
    try:
        return list(trainer._images)
    finally:
        trainer.close()


def copied(network: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def differ(first: Mapping[str, Any], second: Mapping[str, Any]) -> set[str]:
    return {name for name, value in first.items() if not bool((value == second[name]).all())}


def share_learnt(network: Any, before: Mapping[str, Any]) -> float:
    """Returns how many of the tensors that may learn did: not those where no box was expected."""
    names = {name for name, one in network.named_parameters() if one.requires_grad}
    return len(names & differ(before, network.state_dict())) / len(names)


@contextmanager
def watched(module: Any) -> Iterator[list[tuple[Any, Any]]]:
    """Notes what enters a module and what comes out."""
    seen: list[tuple[Any, Any]] = []
    hook = module.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
    yield seen
    hook.remove()


def test_worker_knows_every_hyperparameter_of_the_schema_and_its_default() -> None:
    known = Hyperparameters()
    for entry in SCHEMA:
        assert getattr(known, entry.name) == entry.default, entry.name
    everything = {entry.name: entry.default for entry in SCHEMA}
    assert Hyperparameters.read(everything) == known


def test_whole_numbers_come_as_doubles_and_unknown_names_are_refused() -> None:
    read = Hyperparameters.read({"freeze": 2.0, "lr0": 1, "cos_lr": True})
    assert (read.freeze, read.lr0, read.cos_lr) == (2, 1.0, True)
    assert isinstance(read.freeze, int) and isinstance(read.lr0, float)
    with pytest.raises(InvalidArgument, match="'learning_rate'") as caught:
        Hyperparameters.read({"learning_rate": 0.1})
    assert caught.value.reason == "UNKNOWN_HYPERPARAMETER"


def test_image_size_is_the_side_of_what_the_network_learns_from(make: Callable[..., Any]) -> None:
    trainer = make(image_size=96)
    with watched(trainer.network) as seen:
        train(trainer)
    assert [tuple(pixels.shape) for pixels, _ in seen] == [(BATCH_SIZE, 3, 96, 96)] * 2


@pytest.mark.parametrize(("model", "size"), [("yolov8n", 72), ("efficientdet-d0", 192)])
def test_image_size_the_network_cannot_halve_so_often_is_refused(
    make: Callable[..., Any], model: str, size: int
) -> None:
    with pytest.raises(InvalidArgument, match="multiple of") as caught:
        make(model, image_size=size)
    assert caught.value.reason == "OUT_OF_RANGE"


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("SGD", "SGD", {"momentum": 0.7, "nesterov": True}),
        ("Adam", "Adam", {"betas": (0.7, 0.999)}),
        ("AdamW", "AdamW", {"betas": (0.7, 0.999)}),
        ("NAdam", "NAdam", {"betas": (0.7, 0.999)}),
        ("RAdam", "RAdam", {"betas": (0.7, 0.999)}),
        ("RMSProp", "RMSprop", {"momentum": 0.7}),
        ("auto", "AdamW", {"betas": (0.9, 0.999)}),
    ],
)
def test_optimizer_is_the_one_asked_for_and_moves_every_weight(
    make: Callable[..., Any], name: str, kind: str, numbers: dict[str, Any]
) -> None:
    trainer = make(optimizer=name, lr0=0.01, momentum=0.7, weight_decay=0.001)
    assert type(trainer.optimizer).__name__ == kind
    for group in trainer.optimizer.param_groups:
        assert {key: group[key] for key in numbers} == numbers
        assert group["weight_decay"] == (0.001 if group["kind"] == "weight" else 0.0)
        # auto ignores lr0: 0.01 over four more than the classes there are.
        assert group["initial_lr"] == (round(0.01 / 7, 6) if name == "auto" else 0.01)
        for parameter in group["params"]:
            assert (group["kind"] == "weight") == (parameter.ndim > 1)
    before = copied(trainer.network)
    train(trainer)
    assert share_learnt(trainer.network, before) > 0.9


def test_unknown_optimizer_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"'Lion'.*RMSProp"):
        make(optimizer="Lion")


def test_auto_takes_musgd_for_many_updates(make: Callable[..., Any]) -> None:
    trainer = make(epochs=20_000, optimizer="auto", lr0=0.5)
    groups = trainer.optimizer.param_groups
    assert type(trainer.optimizer).__name__ == "MuSGD"
    assert {group["kind"] for group in groups} == {"muon", "norm", "bias"}
    assert {group["initial_lr"] for group in groups} == {0.01, 0.03}
    boosted = {id(one) for group in groups for one in group["params"] if group["lr"] > 0.02}
    head = trainer.network.class_branch()
    assert boosted == {id(one) for branch in head for one in branch.parameters()}


@pytest.mark.parametrize("cos_lr", [False, True])
def test_learning_rate_falls_to_its_share_along_a_line_or_a_cosine(cos_lr: bool) -> None:
    import torch

    from services.trainer.worker.optimizer import Choice, Schedule

    weight = torch.nn.Parameter(torch.zeros(1))
    group = {"params": [weight], "lr": 0.1, "initial_lr": 0.1, "kind": "weight"}
    optimizer = torch.optim.SGD([group], lr=0.1)
    values = Hyperparameters(cos_lr=cos_lr, lrf=0.2, warmup_epochs=0)
    schedule = Schedule(values, Choice("SGD", 0.1, 0.9), epochs=4, num_steps=3, accumulate=1)
    rates = []
    for epoch in range(1, 5):
        schedule.apply(optimizer, epoch, 2)
        rates.append(optimizer.param_groups[0]["lr"])
    middle = [0.0882843, 0.06, 0.0317157] if cos_lr else [0.08, 0.06, 0.04]
    assert rates == pytest.approx([0.1, *middle], rel=1e-5)


def test_warm_up_raises_rate_momentum_and_batches_per_update_step_by_step() -> None:
    import torch

    from services.trainer.worker.optimizer import Choice, Schedule

    numbers = {"lr": 0.01, "initial_lr": 0.01}
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "kind": kind, **numbers}
        for kind in ("weight", "bias")
    ]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    values = Hyperparameters(lrf=1.0, warmup_epochs=1)
    schedule = Schedule(values, Choice("SGD", 0.01, 0.9), epochs=3, num_steps=4, accumulate=5)
    seen = []
    for epoch, step in ((1, 0), (1, 2), (2, 0), (3, 3)):
        schedule.apply(optimizer, epoch, step)
        weights, biases = optimizer.param_groups
        numbers_now = weights["lr"], biases["lr"], weights["momentum"]
        seen.append((*numbers_now, schedule.accumulate(epoch, step)))
    assert seen == [
        pytest.approx(expected)
        for expected in (
            (0.0, 0.1, 0.8, 1),
            (0.005, 0.055, 0.85, 3),
            (0.01, 0.01, 0.9, 5),
            (0.01, 0.01, 0.9, 5),
        )
    ]


@pytest.mark.parametrize(("nominal", "updates"), [(0, 4), (4, 4), (8, 2), (12, 1)])
def test_batches_are_accumulated_up_to_the_nominal_batch_size(
    make: Callable[..., Any], nominal: int, updates: int
) -> None:
    trainer = make(nominal_batch_size=nominal)
    train(trainer, epochs=2)
    assert trainer.ema.num_updates == updates


@pytest.mark.parametrize("model", SIZES)
def test_dropout_leaves_features_out_in_training_alone(
    make: Callable[..., Any], model: str
) -> None:
    import torch

    plain, dropping = make(model), make(model, dropout=0.8)
    assert not differ(plain.network.state_dict(), dropping.network.state_dict())
    pixels = torch.rand((2, 3, SIZES[model], SIZES[model]))
    targets = {
        "batch_idx": torch.tensor([0.0, 1.0]),
        "cls": torch.tensor([[0.0], [1.0]]),
        "bboxes": torch.full((2, 4), 0.5),
    }

    def losses(trainer: Any) -> list[float]:
        trainer.network.train()
        found = (trainer.network.loss(targets, trainer.network(pixels))[0] for _ in range(2))
        return [float(loss) for loss in found]

    with torch.no_grad():
        predictions = [one.network.eval()(pixels)[0] for one in (plain, dropping)]
        assert torch.equal(*predictions)
        averages = [one.ema.network(pixels)[0] for one in (plain, dropping)]
        assert torch.equal(*averages)
        first, second = losses(dropping)
        assert first != second
        first, second = losses(plain)
        assert first == second


def test_multi_scale_changes_the_side_of_each_step_by_seed_and_step(
    make: Callable[..., Any],
) -> None:
    def sides(epochs: int = 6, **hyperparameters: Any) -> list[int]:
        trainer = make(epochs=epochs, image_size=128, multi_scale=0.5, **hyperparameters)
        with watched(trainer.network) as seen:
            train(trainer, epochs)
        assert all(pixels.shape[2] == pixels.shape[3] for pixels, _ in seen)
        return [pixels.shape[3] for pixels, _ in seen]

    first = sides()
    assert set(first) <= {64, 96, 128, 160, 192} and len(set(first)) > 2
    assert sides(epochs=2) == first[:4]
    assert sides(seed=1) != first


def test_step_that_is_tried_has_the_largest_side(make: Callable[..., Any], bundle: Bundle) -> None:
    trainer = make(image_size=128, multi_scale=0.5)
    with watched(trainer.network) as seen:
        trainer.step(trainer.make_batch(bundle.splits["train"][:4]), 1, 0, update=True)
    assert [pixels.shape[3] for pixels, _ in seen] == [192]


@pytest.mark.parametrize(("model", "num_frozen"), [("yolov8n", 3), ("efficientdet-d0", 2)])
def test_frozen_layers_keep_weights_and_statistics_and_the_others_learn(
    make: Callable[..., Any], model: str, num_frozen: int
) -> None:
    trainer = make(model, freeze=num_frozen, lr0=0.01)
    layers = trainer.network.layers()
    frozen = {id(tensor) for layer in layers[:num_frozen] for tensor in tensors_of(layer)}
    names = {name for name, tensor in named_tensors(trainer.network) if id(tensor) in frozen}
    assert any("running_mean" in name for name in names)
    before = copied(trainer.network)
    train(trainer)
    trainer.measure(1, lambda: None)
    for network in (trainer.network, trainer.ema.network):
        assert not differ(before, network.state_dict()) & names
    assert share_learnt(trainer.network, before) > 0.9
    statistics = {name for name in before if name.endswith("running_var")} - names
    assert statistics <= differ(before, trainer.network.state_dict())


def named_tensors(network: Any) -> Iterator[tuple[str, Any]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def tensors_of(layer: Any) -> Iterator[Any]:
    yield from layer.parameters()
    yield from layer.buffers()


def test_freezing_everything_is_refused(make: Callable[..., Any]) -> None:
    make(freeze=22)  # all but the head
    with pytest.raises(InvalidArgument, match=r"freeze=23.*lower it"):
        make(freeze=23)


@pytest.mark.parametrize(
    ("model", "names"), [("yolov8n", ("box", "cls", "dfl")), ("efficientdet-d0", ("box", "cls"))]
)
def test_gains_scale_their_own_loss(
    make: Callable[..., Any], bundle: Bundle, model: str, names: tuple[str, ...]
) -> None:
    def losses(**gains: float) -> dict[str, float]:
        trainer = make(model, **gains)
        found: dict[str, float] = trainer.step(trainer.make_batch(bundle.splits["train"][:4]), 1, 0)
        return found

    def seeded(**gains: float) -> dict[str, float]:
        random.seed(0)
        np.random.seed(0)
        return losses(**gains)

    ones = dict.fromkeys(names, 1.0)
    before = seeded(**ones)
    assert set(before) == {f"{name}_loss" for name in names}
    for name in names:
        after = seeded(**ones | {name: 3.0})
        expected = before | {f"{name}_loss": 3 * before[f"{name}_loss"]}
        assert after == pytest.approx(expected, rel=1e-5)


def test_flip_mirrors_images_and_boxes(make: Callable[..., Any]) -> None:
    import torch

    for plain, flipped in zip(batches(make()), batches(make(flip_lr=1)), strict=True):
        assert torch.equal(plain["img"].flip(-1), flipped["img"])
        assert not torch.equal(plain["img"], flipped["img"])
        mirrored = plain["bboxes"].clone()
        mirrored[:, 0] = 1 - mirrored[:, 0]
        assert torch.allclose(mirrored, flipped["bboxes"], atol=1e-6)


@pytest.mark.parametrize("name", ["hsv_h", "hsv_s", "hsv_v"])
def test_hsv_changes_colours_and_not_boxes(make: Callable[..., Any], name: str) -> None:
    import torch

    plain, coloured = batches(make())[0], batches(make(**{name: 0.9}))[0]
    assert not torch.equal(plain["img"], coloured["img"])
    assert torch.equal(plain["bboxes"], coloured["bboxes"])


@pytest.mark.parametrize(
    ("mosaic", "close_mosaic", "num_loaded"),
    [(0, 0, 2), (1, 0, 8), (1, 1, 5), (1, 2, 2), (1, 9, 2)],
)
def test_mosaics_are_made_of_four_images_until_they_are_closed(
    make: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    mosaic: float,
    close_mosaic: int,
    num_loaded: int,
) -> None:
    trainer = make(mosaic=mosaic, close_mosaic=close_mosaic)
    dataset = trainer._images.dataset
    loaded: list[int] = []
    load = dataset.load_image

    def count(index: int, *more: Any) -> Any:
        loaded.append(index)
        return load(index, *more)

    monkeypatch.setattr(dataset, "load_image", count)
    trainer.start(1)
    for _ in range(2):
        for _ in trainer._images:
            pass
    trainer.close()
    assert len(loaded) == num_loaded * NUM_IMAGES


def test_seed_decides_weights_order_and_augmentations(make: Callable[..., Any]) -> None:
    import torch

    def made(seed: int) -> tuple[dict[str, Any], Any]:
        trainer = make(seed=seed, hsv_v=0.9)
        return copied(trainer.network), batches(trainer)[0]["img"]

    (weights, images), again, other = made(3), made(3), made(4)
    assert not differ(weights, again[0]) and torch.equal(images, again[1])
    assert differ(weights, other[0]) and not torch.equal(images, other[1])


@pytest.mark.parametrize("amp", [True, False])
def test_amp_computes_in_bf16_where_that_pays(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, amp: bool
) -> None:
    import torch

    from services.trainer.worker import precision

    monkeypatch.setattr(precision, "_bf16_pays", lambda device: True)
    trainer = make(amp=amp)
    with watched(trainer.network.layers()[1]) as seen:
        train(trainer)
    assert {out.dtype for _, out in seen} == {torch.bfloat16 if amp else torch.float32}
    assert {one.dtype for one in trainer.network.parameters()} == {torch.float32}


def test_device_is_the_one_asked_for(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from services.trainer.worker.distributed import Ranks

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make(device="auto").device_name == make(device="cpu").device_name == "cpu"
    with pytest.raises(FailedPrecondition, match="set device=auto") as caught:
        make(device="cuda")
    assert caught.value.reason == "NO_GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    chosen = [str(Ranks().choose_device(one)) for one in ("auto", "cpu", "cuda")]
    assert chosen == ["cuda:0", "cpu", "cuda:0"]
