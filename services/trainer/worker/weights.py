"""Weights to begin with: read without trust, taken over where name and shape fit."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from detflow.errors import InvalidArgument
from detflow.settings import Settings
from detflow.store import ObjectStore
from services.trainer.worker.failures import is_out_of_memory
from services.trainer.worker.networks import Network
from services.trainer.worker.spec import Spec

_SUFFIXES = (".safetensors", ".pt")
_LEAST_SHARE = 0.1
"""Of a model's numbers. Less than that fits by chance, as between two scales of one model."""
_MAX_NAME_CHARACTERS = 200
_MAX_HEADER_BYTES = 100 << 20
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
# How others name the same tensors.
_RENAMINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.removeprefix("module."),  # trained by several processes
    lambda name: f"net.{name}",  # effdet's own
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadWeights:
    """What a weights file holds.

    Attributes:
        format: safetensors, or what a PyTorch file calls itself; "state dict" if it does not.
        model: Id of the model, empty if the file does not say.
        class_names: Name by class index, empty if the file does not say.
        state_dict: Tensors by name: on the CPU, dense, finite.
    """

    format: str
    model: str
    class_names: tuple[str, ...]
    state_dict: Mapping[str, torch.Tensor]


def read(path: Path) -> ReadWeights:
    """Reads a file of safetensors, or one of PyTorch's that loads without running code.

    The latter holds tensors by name: alone, or as `state_dict` or `model` beside plain values.

    Raises:
        InvalidArgument: UNSAFE_WEIGHTS: it is anything else.
    """
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES:
            found, tensors = _read_safetensors(path)
        elif head.startswith((_ZIP, _PICKLE)):
            found, tensors = _read_pytorch(path)
        else:
            raise ValueError("it is neither a file of safetensors nor one of PyTorch")
        _check(tensors)
    except Exception as error:  # whatever libraries make of a stranger's file
        is_of_machine = isinstance(error, OSError) and error.errno != errno.EINVAL
        if is_of_machine or is_out_of_memory(error):
            raise
        raise _unsafe(error) from error
    return ReadWeights(
        format=_text(found.get("format")),
        model=_text(found.get("model")),
        class_names=_class_names(found.get("class_names")),
        state_dict=tensors,
    )


def _read_safetensors(path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        about = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    try:
        names = json.loads(about.get("class_names", "[]"))
    except ValueError:
        names = []
    return about | {"class_names": names, "format": "safetensors"}, tensors


def _read_pytorch(path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError("it holds no tensors by name")
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), dict):
            return content, dict(content[name])
    return {"format": "state dict"}, content


def _check(tensors: Mapping[Any, Any]) -> None:
    """Checks that everything is a tensor that can be copied into a network.

    Raises:
        ValueError: Something is not.
    """
    if not tensors:
        raise ValueError("it holds no tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name!r:.100} is no tensor")
        is_dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_dense or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"tensor {name!r:.100} does not hold plain numbers")
        # Strides can make a giant of a few bytes.
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(f"tensor {name!r:.100} is larger than its data")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"tensor {name!r:.100} holds numbers that are not finite")


def _text(value: object) -> str:
    is_name = isinstance(value, str) and len(value) <= _MAX_NAME_CHARACTERS and value.isprintable()
    return str(value) if is_name else ""


def _class_names(value: object) -> tuple[str, ...]:
    names = tuple(map(_text, value)) if isinstance(value, list | tuple) else ()
    return names if all(names) else ()


def _unsafe(error: Exception) -> InvalidArgument:
    lines = str(error).splitlines() or [type(error).__name__]
    return InvalidArgument(
        f"the weights cannot be read safely: {lines[0][:200]}; give a file of safetensors, or save "
        "tensors alone: torch.save(model.state_dict(), file)",
        reason="UNSAFE_WEIGHTS",
    )


def find(spec: Spec, store: ObjectStore, settings: Settings) -> tuple[ReadWeights | None, str]:
    """Finds what a training begins with: what it was told, or what this machine has.

    Args:
        spec: What the worker does.
        store: The object store.
        settings: Its folder of pretrained weights, if it has one.

    Returns:
        The weights, if there are any, and where they are from, in words.

    Raises:
        InvalidArgument: UNSAFE_WEIGHTS.
        DataLoss: They are gone or differ from their recorded hash.
    """
    if spec.warm_start_weights is not None:
        path = spec.folder / "warm-start"
        store.download(spec.warm_start_weights, path)
        try:
            return read(path), "the weights it was given"
        finally:
            path.unlink()
    if settings.pretrained_dir:
        for suffix in _SUFFIXES:
            path = Path(settings.pretrained_dir, spec.model + suffix)
            if path.exists():
                return read(path), f"pretrained weights of this machine, {path.name}"
    return None, ""


@torch.no_grad()
def take_over(network: Network, found: ReadWeights, model: str) -> tuple[int, int]:
    """Copies the tensors whose name and shape fit; the others keep their new values.

    A head for other classes does not fit as a whole; the rest does.

    Args:
        network: Where they go.
        found: Where they come from.
        model: Id of the network's model, for the error.

    Returns:
        How many tensors were copied, of how many.

    Raises:
        InvalidArgument: WEIGHTS_DO_NOT_FIT.
    """
    own = network.state_dict()
    pairs = max((_pairs(own, found.state_dict, rename) for rename in _RENAMINGS), key=_num_numbers)
    share = _num_numbers(pairs) / sum(tensor.numel() for tensor in own.values())
    if share < _LEAST_SHARE:
        of = f" of {found.model}" if found.model else ""
        raise InvalidArgument(
            f"the weights{of} do not fit {model}: name and shape are right for {len(pairs)} of "
            f"{len(own)} tensors, {share:.0%} of its numbers; give weights of {model}, or none",
            reason="WEIGHTS_DO_NOT_FIT",
        )
    for target, source in pairs:
        target.copy_(source)
    return len(pairs), len(own)


def _pairs(
    own: Mapping[str, torch.Tensor],
    others: Mapping[str, torch.Tensor],
    rename: Callable[[str], str],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    renamed = ((rename(name), tensor) for name, tensor in others.items())
    return [
        (own[name], tensor)
        for name, tensor in renamed
        if name in own and own[name].shape == tensor.shape
    ]


def _num_numbers(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(target.numel() for target, _ in pairs)
