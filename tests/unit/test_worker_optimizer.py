"""The worker's AdamW is torch's, to the last bit, without torch's compiler."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import pytest

NUMBERS: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.01, "fused": True}
SHAPES = ((8, 4, 3, 3), (6, 8, 1, 1), (1, 5, 1, 1), (5, 7), (3,), (4, 4, 3, 3))


def make_weights() -> list[Any]:
    import torch

    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in SHAPES]
    formats = [torch.channels_last if one.ndim == 4 else torch.preserve_format for one in tensors]
    return [
        torch.nn.Parameter(one.clone(memory_format=kind))
        for one, kind in zip(tensors, formats, strict=True)
    ]


def learn(optimizer: Any, weights: list[Any], steps: Iterable[int]) -> None:
    import torch

    for step in steps:
        torch.manual_seed(step)
        for weight in weights[step % 2 :]:  # in every second step the first one has no gradient
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        optimizer.zero_grad()
        assert all(weight.grad is None for weight in weights)


def test_adamw_ends_with_the_bits_of_torchs_and_goes_on_from_its_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from services.trainer.worker.optimizer import AdamW, restore_optimizer

    theirs, ours = make_weights(), make_weights()
    reference = torch.optim.AdamW(theirs, **NUMBERS)
    reference.step()  # without any gradient
    learn(reference, theirs, range(4))
    state = reference.state_dict()
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # to import it would fail now
    first = AdamW(ours, **NUMBERS)
    first.step()
    learn(first, ours, range(2))
    second = AdamW(ours, **NUMBERS)
    restore_optimizer(second, first.state_dict())
    learn(second, ours, range(2, 4))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert second.state_dict()["param_groups"] == state["param_groups"]
    for number, values in second.state_dict()["state"].items():
        assert values.keys() == state["state"][number].keys()
        for name, value in values.items():
            assert torch.equal(value, state["state"][number][name]), (number, name)
