"""Averaged weights: better and steadier than those of the last step."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import nn

from services.trainer.worker.evaluation import EvaluationSet, forward
from services.trainer.worker.networks import Network

_DECAY = 0.9999
_RAMP_UPDATES = 2000


class Ema:
    """Exponential moving average of all weights and batch statistics, ramped as ultralytics does.

    Args:
        network: What is averaged; its present weights are the first average.

    Attributes:
        network: A copy with the averaged weights, in evaluation mode.
        num_updates: How many weights were averaged.
    """

    def __init__(self, network: Network) -> None:
        self.network = deepcopy(network).eval().requires_grad_(False)
        self.num_updates = 0
        # Frozen layers keep the statistics they are trained beside.
        self._norms = [
            average
            for average, norm in zip(self.network.modules(), network.modules(), strict=True)
            if isinstance(average, nn.BatchNorm2d) and _learns(norm)
        ]
        source = network.state_dict()
        pairs = [
            (average, source[name])
            for name, average in self.network.state_dict().items()
            if average.dtype.is_floating_point
        ]
        self._averages = [average for average, _ in pairs]
        self._sources = [tensor for _, tensor in pairs]

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the network's weights of now."""
        self.num_updates += 1
        decay = _DECAY * (1 - math.exp(-self.num_updates / _RAMP_UPDATES))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)

    @torch.no_grad()
    def calibrate(
        self, images: EvaluationSet, device: torch.device, on_batch: Callable[[], None]
    ) -> None:
        """Replaces the averaged batch statistics by those that the averaged weights have.

        Args:
            images: Training images as they are measured; none leave the statistics as they are.
            device: Where the network is.
            on_batch: Called before every batch; raises to stop.
        """
        if not len(images):
            return
        momenta = [norm.momentum for norm in self._norms]
        for norm in self._norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        for batch in images:
            on_batch()
            forward(self.network, batch, device)
        for norm, momentum in zip(self._norms, momenta, strict=True):
            norm.momentum = momentum
        self.network.eval()


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
