"""YOLO models: ultralytics' network and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace
from ultralytics.utils.loss import v8DetectionLoss

from services.trainer.worker.networks import Network
from services.trainer.worker.spec import Value

_GAINS = ("box", "cls", "dfl")


_Library: Any = DetectionModel  # its types are too vague to build upon


class Yolo(_Library, Network):  # type: ignore[misc]
    """ultralytics' model; the names in its state dict are the library's.

    Args:
        description: File that describes the layers, e.g. yolov8n.yaml.
        num_classes: Classes it tells apart.
        gains: Gain of each loss, by ultralytics' names.
    """

    model: Any

    def __init__(self, description: str, num_classes: int, gains: Mapping[str, float]) -> None:
        super().__init__(description, nc=num_classes, verbose=False)
        self.args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), **gains})  # read by the loss
        self.stride = int(max(self.model[-1].stride))
        self._loss: Any = None

    def loss(
        self, targets: Mapping[str, torch.Tensor], raw: Any
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Computes box, class and distribution focal loss."""
        if self._loss is None:  # it keeps tensors on the device of its first use
            self._loss = v8DetectionLoss(self)
        losses, parts = self._loss(raw, targets)
        return losses.sum(), parts

    def layers(self) -> list[nn.Module]:
        """Returns the layers in the order of the model's description; the last is the head."""
        return list(self.model)

    def class_branch(self) -> list[nn.Module]:
        """Returns the class convolutions of the head, one stack per scale."""
        return list(self.model[-1].cv3)


def build(
    model: str, *, num_classes: int, image_size: int, hyperparameters: Mapping[str, Value]
) -> Yolo:
    """Builds a YOLO network; see `networks.build`."""
    gains = {name: float(hyperparameters[name]) for name in _GAINS if name in hyperparameters}
    return Yolo(f"{model}.yaml", num_classes, gains)
