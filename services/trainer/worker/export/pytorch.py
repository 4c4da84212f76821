"""PyTorch exports: a zip of the tensors, twice, and how to build their network."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from services.trainer.worker import networks
from services.trainer.worker.export.weights import Predict, Weights, torch_predict

FORMAT = "detflow-pytorch/1"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same weights make the same file


def write(weights: Weights, about: dict[str, str], *, half: bool, folder: Path) -> Path:
    """Writes model.safetensors, model.pt and config.json into a zip and returns it.

    Args:
        weights: What is exported.
        about: What the file says about itself.
        half: Store floating point tensors as fp16.
        folder: Where to write.
    """
    # Copies: safetensors refuses tensors that share memory.
    tensors = {
        name: (value.half() if half and value.is_floating_point() else value).clone().contiguous()
        for name, value in weights.state_dict.items()
    }
    config: dict[str, Any] = {
        "format": FORMAT,
        **about,
        "class_names": list(weights.class_names),
        "image_size_px": int(about["image_size_px"]),
        "stride": int(about["stride"]),
        "build": weights.build_arguments(),
    }
    path = folder / "model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": FORMAT, **about})
    _sort_header(path)
    torch.save({**config, "state_dict": tensors}, folder / "model.pt")
    (folder / "config.json").write_text(
        json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8"
    )
    return pack(folder, ("config.json", "model.safetensors", "model.pt"))


def _sort_header(path: Path) -> None:
    """Sorts what a file of safetensors says about itself, which the library writes in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def pack(folder: Path, names: tuple[str, ...]) -> Path:
    """Puts files of a folder into a zip, uncompressed: weights do not get smaller."""
    path = folder / "model.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            with (folder / name).open("rb") as source, archive.open(entry, "w") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)
    return path


def predict_with(path: Path) -> Predict:
    """Loads an export as its users do."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
        tensors = safetensors.torch.load(archive.read("model.safetensors"))
    network = networks.build(**config["build"])
    network.load_state_dict(tensors)
    return torch_predict(network.eval())
