"""Products of matrices in place of the library's 1 x 1 convolutions change nothing but the time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.quiet_library import quiet_library

__all__ = ["quiet_library"]
pytestmark = pytest.mark.usefixtures("quiet_library")

TARGETS = {
    "batch_idx": [0, 0, 1],
    "cls": [[0], [1], [2]],
    "bboxes": [[0.3, 0.4, 0.3, 0.5], [0.7, 0.6, 0.4, 0.3], [0.5, 0.5, 0.6, 0.6]],
}


def build(model: str) -> Any:
    import torch

    from services.trainer.worker import networks

    torch.manual_seed(0)
    network = networks.build(model, num_classes=3, image_size=64, hyperparameters={})
    return network.double().to(memory_format=torch.channels_last)


def learn(network: Any) -> dict[str, Any]:
    """Returns what a step leaves: loss, gradients, batch statistics."""
    import torch

    torch.manual_seed(1)
    pixels = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    targets = {name: torch.tensor(values).float() for name, values in TARGETS.items()}
    loss, _ = network.loss(targets, network(pixels))
    loss.backward()
    gradients = {name: one.grad for name, one in network.named_parameters() if one.requires_grad}
    return {"loss": loss} | gradients | dict(network.named_buffers())


@pytest.mark.parametrize("model", ["yolov8n", "yolov5n"])
@pytest.mark.parametrize("num_frozen", [0, 12])
def test_loss_and_gradients_are_those_of_the_librarys_layers(
    monkeypatch: pytest.MonkeyPatch, model: str, num_frozen: int
) -> None:
    import torch

    from services.trainer.worker import pointwise

    def made() -> Any:
        network = build(model).train()
        for layer in network.layers()[:num_frozen]:
            layer.requires_grad_(False).eval()
        return network

    ours = made()
    with monkeypatch.context() as patch:
        patch.setattr(pointwise, "replace", lambda network: None)
        theirs = made()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    expected = learn(theirs)
    if not num_frozen:
        join = torch.cat
        monkeypatch.setattr(torch, "cat", lambda maps, dim=0: join([*map(flat, maps)], dim))
    found = learn(ours)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-7, atol=1e-9), name


def flat(tensor: Any) -> Any:
    assert tensor.ndim < 4, "feature maps are copied together"
    return tensor


def test_layers_predict_as_the_librarys_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from services.trainer.worker import pointwise

    ours = build("yolov8n").eval()
    monkeypatch.setattr(pointwise, "replace", lambda network: None)
    pixels = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(ours(pixels)[0], build("yolov8n").eval()(pixels)[0])
