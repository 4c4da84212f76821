"""The trained network that is exported, and what is told about it in every format."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from detflow.errors import DataLoss
from detflow.store import ObjectStore
from detflow.v1.common_pb2 import StoredObject
from services.trainer.export_domain import stride_of
from services.trainer.models import get_model
from services.trainer.worker import networks
from services.trainer.worker.checkpoint import WEIGHTS_FORMAT
from services.trainer.worker.networks import Network

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Takes RGB 0..1, shape (n, 3, h, w); returns predictions of shape (n, 4 + classes, anchors)."""

# Gains of the losses, which no export has.
_WITHOUT_GAINS = {"box": 1.0, "cls": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Best weights of a training with all that is needed to build their network.

    Attributes:
        model: Id of the model.
        class_names: Name by class index.
        image_size: Side of the square it was trained with, in pixels.
        hyperparameters: What shapes the network.
        state_dict: Tensors in fp32.
    """

    model: str
    class_names: tuple[str, ...]
    image_size: int
    hyperparameters: Mapping[str, Any]
    state_dict: Mapping[str, torch.Tensor]

    def build_arguments(self) -> dict[str, Any]:
        """Returns what `networks.build` is called with."""
        return {
            "model": self.model,
            "num_classes": len(self.class_names),
            "image_size": self.image_size,
            "hyperparameters": dict(self.hyperparameters),
        }

    def build(self) -> Network:
        """Builds the network, in evaluation mode."""
        network = networks.build(**self.build_arguments())
        network.load_state_dict(dict(self.state_dict))
        return network.eval()

    def describe(self, *, training: str, image_size: int, precision: str) -> dict[str, str]:
        """Returns what every exported file says about itself."""
        return {
            "model": self.model,
            "class_names": json.dumps(self.class_names, ensure_ascii=False),
            "image_size_px": str(image_size),
            "stride": str(stride_of(self.model)),
            "precision": precision,
            "licence": get_model(self.model).licence,
            "training": training,
        }


def load_weights(store: ObjectStore, stored: StoredObject, folder: Path) -> Weights:
    """Reads best weights.

    Raises:
        DataLoss: They are gone, differ from their recorded hash or cannot be read.
    """
    path = folder / "best.pt"
    store.download(stored, path)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != WEIGHTS_FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return Weights(
            model=content["model"],
            class_names=tuple(content["class_names"]),
            image_size=int(content["image_size"]),
            hyperparameters=_WITHOUT_GAINS | content.get("hyperparameters", {}),
            state_dict=content["state_dict"],
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise DataLoss(
            f"weights {stored.key} cannot be read; train again",
            reason="WEIGHTS_UNREADABLE",
            metadata={"key": stored.key},
        ) from error
    finally:
        path.unlink(missing_ok=True)


def torch_predict(network: Network) -> Predict:
    """Returns what asks a network itself."""

    def predict(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            predictions: torch.Tensor = network(torch.from_numpy(pixels))[0]
        return np.asarray(predictions.float().numpy(), dtype=np.float32)

    return predict
