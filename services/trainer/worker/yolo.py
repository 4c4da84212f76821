"""YOLO models: ultralytics' network and loss."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace
from ultralytics.utils.loss import v8DetectionLoss

from services.trainer.worker import pointwise
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
        dropout: Share of the feature maps' channels that are left out before the head in training.
    """

    model: Any

    def __init__(
        self, description: str, num_classes: int, gains: Mapping[str, float], dropout: float
    ) -> None:
        super().__init__(description, nc=num_classes, verbose=False)
        pointwise.replace(self)
        self.args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), **gains})  # read by the loss
        self.stride = int(max(self.model[-1].stride))
        self._loss: Any = None
        if dropout:
            self.model[-1].register_forward_pre_hook(partial(_drop_out, dropout))

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
    dropout = float(hyperparameters.get("dropout", 0.0))
    return Yolo(f"{model}.yaml", num_classes, gains, dropout)


def _drop_out(share: float, head: nn.Module, inputs: tuple[list[torch.Tensor]]) -> Any:
    """Leaves channels out of the feature maps that enter the head, in training."""
    if not head.training:
        return None
    (features,) = inputs
    return ([functional.dropout2d(feature, share) for feature in features],)
