"""Numbers of 16 bits where they are faster, and never where they cost accuracy."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Precision:
    """The numbers that a network computes with while it learns: bf16 or fp32.

    Args:
        device: Where it computes.
        amp: Whether bf16 may be used, where the device is faster with it.
    """

    def __init__(self, device: torch.device, *, amp: bool) -> None:
        self._device_type = device.type
        self._in_bf16 = amp and _bf16_pays(device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns what the network's forward pass shall run in."""
        if self._in_bf16:
            return torch.autocast(self._device_type, dtype=torch.bfloat16)
        return nullcontext()

    def restored(self, raw: Any) -> Any:
        """Returns outputs in fp32: the loss is too small a part to be worth the errors of bf16."""
        return to_float(raw) if self._in_bf16 else raw


def _bf16_pays(device: torch.device) -> bool:
    """Says whether the device multiplies bf16 matrices faster than fp32 ones.

    On CPUs only AMX does: with AVX512-BF16 alone the convolutions take longer than in fp32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def to_float(value: Any) -> Any:
    """Turns floating point tensors into fp32, in containers of any depth."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_float(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_float(item) for item in value]
    if isinstance(value, tuple):
        items = [to_float(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
