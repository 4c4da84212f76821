"""EfficientDet in the worker: the same network and losses as effdet's, and what it adds."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.models import MODELS
from services.trainer.worker.bundle import fetch_bundle
from services.trainer.worker.spec import Spec
from tests.quiet_library import quiet_library
from tests.shapes_bundle import write_bundle

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

SIZE, NUM_CLASSES = 128, 5
GAINS: Mapping[str, float] = {"box": 50.0, "cls": 1.0}


@pytest.fixture(scope="module")
def network(quiet_library: None) -> Any:
    return build()


def build(model: str = "efficientdet-d0", num_classes: int = NUM_CLASSES) -> Any:
    import torch

    from services.trainer.worker import efficientdet

    torch.manual_seed(0)
    return efficientdet.build(
        model, num_classes=num_classes, image_size=SIZE, hyperparameters=GAINS
    )


def theirs(network: Any) -> Any:
    """Returns effdet's own network with the same weights."""
    import effdet

    other = effdet.EfficientDet(network._config, pretrained_backbone=False)
    other.load_state_dict(network.net.state_dict())
    return other.double().train(network.training)


def with_sums(network: Any) -> Any:
    """Returns a network like this one, but with BiFPNs that add levels without weights."""
    from copy import deepcopy

    from services.trainer.worker.efficientdet import EfficientDet

    config = deepcopy(network._config)
    config._set_flag("readonly", False)
    config.fpn_name = "bifpn_sum"
    return EfficientDet(config, box_gain=1.0, cls_gain=1.0, dropout=0.0)


def targets(*rows: tuple[int, int, float, float, float, float]) -> dict[str, Any]:
    """Makes targets of rows of image, class, centre x, centre y, width and height in 0..1."""
    import torch

    table = torch.tensor(rows).reshape(-1, 6)
    return {"batch_idx": table[:, 0], "cls": table[:, 1:2], "bboxes": table[:, 2:]}


def random_targets(num_images: int, each: int) -> dict[str, Any]:
    """Boxes large enough for one anchor to be the best of all."""
    import torch

    size = torch.rand(num_images * each, 2) * 0.4 + 0.3
    centre = size / 2 + torch.rand_like(size) * (1 - size)
    number = torch.arange(len(size))
    labels = torch.randint(NUM_CLASSES, (len(size), 1)).float()
    bboxes = torch.cat((centre, size), dim=1)
    return {"batch_idx": (number // each).float(), "cls": labels, "bboxes": bboxes}


def raw_of(num_images: int, network: Any) -> Any:
    """Makes random answers of a network."""
    import torch

    from services.trainer.worker.efficientdet import Raw

    anchors = network._anchors_of(torch.empty(1, 3, SIZE, SIZE))
    logits = torch.randn(num_images, len(anchors), NUM_CLASSES) - 3
    codes = torch.randn(num_images, len(anchors), 4) * 0.3
    return Raw(logits.requires_grad_(), codes.requires_grad_(), anchors, (SIZE, SIZE))


def levels(rows: Any) -> list[Any]:
    """Cuts (n, a, k) into effdet's maps of each level, (n, 9 k, h, w)."""
    found, start = [], 0
    for level in range(3, 8):
        side = SIZE >> level
        part = rows[:, start : start + side * side * 9]
        found.append(part.reshape(len(rows), side, side, -1).permute(0, 3, 1, 2))
        start += side * side * 9
    return found


@pytest.mark.parametrize("fusion", ["weighted", "sum"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_network_answers_what_effdets_answers(fusion: str, mode: str) -> None:
    import torch

    network = build()
    if fusion == "sum":  # as D6 and D7 do
        network = with_sums(network)
    network.double().train(mode == "train")
    reference = theirs(network)
    pixels = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        logits, codes = reference((pixels - network._mean) / network._std)
        answer = network(pixels.contiguous(memory_format=torch.channels_last))
    raw = answer if mode == "train" else answer[1]
    for ours, maps in ((levels(raw.logits), logits), (levels(raw.codes), codes)):
        for one, other in zip(ours, maps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_gradients_are_those_of_effdets_network() -> None:
    import torch

    network = build().double().train()
    reference = theirs(network)
    pixels = torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    raw = network(pixels.contiguous(memory_format=torch.channels_last))
    (raw.logits.square().sum() + raw.codes.sum()).backward()
    logits, codes = reference((pixels - network._mean) / network._std)
    total: Any = sum(x.square().sum() for x in logits) + sum(x.sum() for x in codes)
    total.backward()
    expected = dict(reference.named_parameters())
    for name, parameter in network.net.named_parameters():
        difference = (parameter.grad - expected[name].grad).norm()
        assert difference <= 1e-4 * expected[name].grad.norm() + 1e-6, name


def test_labels_and_losses_are_those_of_effdet(network: Any) -> None:
    import torch
    from effdet.anchors import AnchorLabeler, Anchors
    from effdet.loss import DetectionLoss

    torch.manual_seed(1)
    given, raw = random_targets(6, 4), raw_of(6, network)
    total, parts = network.loss(given, raw)
    config = network._config
    anchors = Anchors.from_config(config)
    low = given["bboxes"][:, [1, 0]] - given["bboxes"][:, [3, 2]] / 2
    boxes = torch.cat((low, low + given["bboxes"][:, [3, 2]]), dim=1) * SIZE
    labels = AnchorLabeler(anchors, NUM_CLASSES).batch_label_anchors(
        boxes.reshape(6, 4, 4), given["cls"].reshape(6, 4) + 1
    )
    loss, cls_loss, box_loss = DetectionLoss(config)(levels(raw.logits), levels(raw.codes), *labels)
    torch.testing.assert_close(parts["cls_loss"], cls_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts["box_loss"], 50 * box_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, 6 * loss, rtol=1e-4, atol=1e-4)


def test_anchor_favoured_by_two_boxes_goes_to_the_first() -> None:
    import torch

    from services.trainer.worker.efficientdet_loss import label

    anchors = torch.tensor([[64.0, 64.0, 32.0, 32.0], [16.0, 16.0, 32.0, 32.0]])
    tiny = targets((0, 3, 0.5, 0.5, 0.05, 0.05), (0, 4, 0.5, 0.5, 0.1, 0.1))
    found = label(tiny, anchors, num_images=1, height=128, width=128)
    assert (found.anchors.tolist(), found.classes.tolist()) == ([0], [3])


def test_labelled_codes_decode_to_the_boxes_of_a_wide_image(network: Any) -> None:
    import torch

    from services.trainer.worker.efficientdet import Raw, _decode
    from services.trainer.worker.efficientdet_loss import label

    anchors = network._anchors_of(torch.empty(1, 3, 128, 256))
    assert len(anchors) == sum(9 * (128 >> level) * (256 >> level) for level in range(3, 8))
    given = targets((0, 1, 0.3, 0.6, 0.2, 0.5), (1, 2, 0.8, 0.4, 0.3, 0.4))
    found = label(given, anchors, num_images=2, height=128, width=256)
    codes = torch.zeros(2, len(anchors), 4)
    codes[found.images, found.anchors] = found.codes
    raw = Raw(torch.zeros(2, len(anchors), NUM_CLASSES), codes, anchors, (128, 256))
    boxes = _decode(raw)[found.images, :4, found.anchors]
    expected = given["bboxes"][found.images] * torch.tensor([256.0, 128.0, 256.0, 128.0])
    assert set(found.images.tolist()) == {0, 1}
    torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [(0, 1, 0.5, 0.5, 0.0, 0.0)],
        [(0, 1, 0.5, 0.5, 0.3, 0.0), (1, 2, 0.5, 0.5, 1e-9, 0.9)],
        [(0, 1, float("nan"), 0.5, 0.2, 0.2), (0, 1, 0.5, 0.5, float("inf"), 0.2)],
        [(0, 1, 7.0, -3.0, 0.2, 0.2), (1, 0, 0.5, 0.5, 1.0, 1.0)],
    ],
    ids=["none", "point", "line", "not finite", "outside"],
)
def test_odd_boxes_give_a_finite_loss(
    rows: list[tuple[int, int, float, float, float, float]], network: Any
) -> None:
    raw = raw_of(2, network)
    total, _ = network.loss(targets(*rows), raw)
    total.backward()
    assert total.isfinite() and total < 1e4
    assert raw.logits.grad.isfinite().all()
    if not rows:
        assert raw.codes.grad is None or not raw.codes.grad.any()


def test_loss_stays_finite_at_extreme_answers(network: Any) -> None:
    import torch

    raw = raw_of(2, network)
    with torch.no_grad():
        raw.logits.copy_(torch.linspace(-1e4, 1e4, raw.logits.numel()).reshape(raw.logits.shape))
        raw.codes.fill_(1e4)
    total, _ = network.loss(random_targets(2, 2), raw)
    total.backward()
    assert total.isfinite()
    assert raw.logits.grad.isfinite().all() and raw.codes.grad.isfinite().all()


def test_loss_counts_images_so_that_parts_of_a_batch_add_up(network: Any) -> None:
    import torch

    from services.trainer.worker.efficientdet import Raw

    once = random_targets(1, 3)
    twice = {name: torch.cat((value, value)) for name, value in once.items()}
    twice["batch_idx"][3:] = 1
    raw = raw_of(1, network)
    double = Raw(raw.logits.expand(2, -1, -1), raw.codes.expand(2, -1, -1), raw.anchors, raw.size)
    alone, together = network.loss(once, raw)[0].item(), network.loss(twice, double)[0].item()
    # Not exactly twice as much: one is added to the number of positive anchors.
    assert together == pytest.approx(2 * alone, rel=0.1)


def test_gains_weigh_the_losses() -> None:
    from services.trainer.worker import efficientdet

    other = efficientdet.build(
        "efficientdet-d0",
        num_classes=NUM_CLASSES,
        image_size=SIZE,
        hyperparameters={"box": 5.0, "cls": 3.0},
    )
    given, raw = random_targets(2, 2), raw_of(2, other)
    _, parts = build().loss(given, raw)
    _, weighed = other.loss(given, raw)
    assert weighed["box_loss"] == pytest.approx(parts["box_loss"] / 10)
    assert weighed["cls_loss"] == pytest.approx(parts["cls_loss"] * 3)


def test_sixteen_bits_train_too(network: Any) -> None:
    import torch

    from services.trainer.worker.precision import to_float

    network.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = network(torch.rand(2, 3, SIZE, SIZE))
    assert raw.logits.dtype == torch.bfloat16
    total, _ = network.loss(random_targets(2, 2), to_float(raw))
    total.backward()
    assert total.isfinite()
    network.zero_grad()


def test_dropout_leaves_features_out_in_training_only() -> None:
    import torch

    from services.trainer.worker import efficientdet

    network = efficientdet.build(
        "efficientdet-d0",
        num_classes=NUM_CLASSES,
        image_size=SIZE,
        hyperparameters={"dropout": 0.9},
    )
    pixels = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        first, second = network(pixels), network(pixels)
        assert not torch.equal(first.logits, second.logits)
        network.eval()
        assert torch.equal(network(pixels)[0], network(pixels)[0])


def test_building_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it asks the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    network = build(num_classes=80)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == next(m.num_parameters for m in MODELS if m.id == "efficientdet-d0")


def test_layers_hold_every_weight_once_in_the_order_of_the_data(network: Any) -> None:
    layers = network.layers()
    assert len(layers) == 10
    names = {parameter: name for name, parameter in network.named_parameters()}
    order = [names[parameter] for layer in layers for parameter in layer.parameters()]
    assert sorted(order) == sorted(names.values())
    assert order[0] == "net.backbone.conv_stem.weight"
    parts = [names[next(layer.parameters())].split(".")[1] for layer in layers]
    assert parts == ["backbone"] * 8 + ["fpn", "class_net"]


def trainer(folder: Path, **more: Any) -> Any:
    """Returns the loop with EfficientDet on a few images."""
    from services.trainer.worker.loop import Trainer

    store = ObjectStore(f"file://{folder / 'store'}")
    manifest = write_bundle(store, {"train": 9, "val": 2, "test": 0})
    bundle = fetch_bundle(store, manifest, folder / "bundles", check=lambda: None)
    hyperparameters = {"image_size": SIZE, "mosaic": 0.0, "lr0": 0.01, **more}
    spec = Spec(
        training="projects/p/versions/v/trainings/t1",
        attempt=1,
        model="efficientdet-d0",
        batch_size=2,
        step_batch_size=2,
        epochs=2,
        hyperparameters=hyperparameters,
        manifest=StoredObject(),
        checkpoint=None,
        folder=folder,
    )
    return Trainer(spec, bundle)


def test_measured_network_has_the_batch_statistics_of_its_own_weights(tmp_path: Path) -> None:
    import torch

    loop = trainer(tmp_path)
    loop.start(1)
    try:
        loop.train_epoch(1, lambda step: None)
    finally:
        loop.close()
    num_batches = 0

    def on_batch() -> None:
        nonlocal num_batches
        num_batches += 1

    loop.measure(1, on_batch)
    assert num_batches == 2 + 1  # two full ones to calibrate, one to validate
    average = loop.ema.network
    norm = average.net.backbone.bn1
    with torch.no_grad():
        means = []
        for batch in loop._calibration:
            pixels = (batch.pixels.float() / 255 - average._mean) / average._std
            means.append(average.net.backbone.conv_stem(pixels).mean(dim=(0, 2, 3)))
    # Thousands of pixels are added up in another order.
    expected = torch.stack(means).mean(dim=0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-4)
    assert norm.momentum == loop.network.net.backbone.bn1.momentum
    assert not any(module.training for module in average.modules())
    assert not torch.equal(norm.running_mean, loop.network.net.backbone.bn1.running_mean)


def test_frozen_layers_keep_weights_and_statistics(tmp_path: Path) -> None:
    import torch

    loop = trainer(tmp_path, freeze=9.0)
    before = {name: value.clone() for name, value in loop.network.state_dict().items()}
    loop.start(1)
    try:
        loop.train_epoch(1, lambda step: None)
    finally:
        loop.close()
    changed = {
        name.split(".")[1]
        for name, value in loop.network.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"class_net", "box_net"}
