"""What the training loop asks of a network, and where each family's networks come from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from detflow.errors import InvalidArgument
from services.trainer.models import MODELS
from services.trainer.worker.spec import Value

_MODEL_IDS = tuple(model.id for model in MODELS)


class Network(nn.Module):
    """A detector of any family; its state dict and `build`'s arguments are all of it.

    Called with RGB pixels in 0..1, shape (n, 3, h, w), it answers

    - in training mode: raw outputs, whatever its `loss` takes;
    - in evaluation mode: predictions of shape (n, 4 + classes, anchors) - centre x, centre y,
      width and height in pixels of the input, then a probability per class - and the raw outputs.

    Attributes:
        stride: The sides of the input are multiples of this.
        num_calibration_images: Training images whose batch statistics are taken before the averaged
            weights are measured; 0 if the averaged statistics are good enough.
    """

    stride: int
    num_calibration_images = 0

    def loss(
        self, targets: Mapping[str, torch.Tensor], raw: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss.

        Args:
            targets: batch_idx of shape (m,): the image of each box; cls (m, 1); bboxes (m, 4):
                centre x, centre y, width, height in 0..1 of the input. More is ignored.
            raw: What the network answered.

        Returns:
            The sum to differentiate, times the number of images, so that accumulated batches add
            up as one; and its parts by name, detached, each with its gain and per image.
        """
        raise NotImplementedError

    def layers(self) -> list[nn.Module]:
        """Returns the layers from the input on, which `freeze` counts."""
        raise NotImplementedError

    def class_branch(self) -> list[nn.Module]:
        """Returns the part of the head that only classes depend on, if it is apart."""
        return []


def build(
    model: str, *, num_classes: int, image_size: int, hyperparameters: Mapping[str, Value]
) -> Network:
    """Builds a network with new weights, drawn from torch's random numbers.

    Args:
        model: Id of one of the catalogue.
        num_classes: Classes it tells apart.
        image_size: Side of the square it is trained with, in pixels.
        hyperparameters: Values by name; a family takes what concerns it.

    Raises:
        InvalidArgument: UNKNOWN_MODEL, or OUT_OF_RANGE for an image size it cannot take.
    """
    if model not in _MODEL_IDS:
        raise InvalidArgument(
            f"this worker cannot train {model!r}; it trains {', '.join(_MODEL_IDS)}",
            reason="UNKNOWN_MODEL",
        )
    network: Network = _family(model).build(
        model, num_classes=num_classes, image_size=image_size, hyperparameters=hyperparameters
    )
    if image_size % network.stride:
        raise InvalidArgument(
            f"image_size is {image_size}; for {model} it must be a multiple of {network.stride}",
            reason="OUT_OF_RANGE",
        )
    return network


def _family(model: str) -> Any:
    """Imports what builds a model: each family's library takes its time."""
    name = "yolo" if model.startswith("yolo") else "efficientdet"
    return importlib.import_module(f"services.trainer.worker.{name}")
