"""What becomes of a batch on its way into the network: parts that fit into memory, and scale."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

from services.trainer.worker.hyperparameters import Hyperparameters


def split_batch(batch: Mapping[str, Any], max_images: int) -> Iterator[dict[str, Any]]:
    """Yields a batch in parts of about the same number of images, at most `max_images` each.

    Parts of the same size, because the batch statistics of a single image are worth little.
    """
    num_images = len(batch["img"])
    num_parts = -(-num_images // max_images)
    edges = [num_images * part // num_parts for part in range(num_parts + 1)]
    for first, end in pairwise(edges):
        chosen = (batch["batch_idx"] >= first) & (batch["batch_idx"] < end)
        yield {
            "img": batch["img"][first:end],
            "batch_idx": batch["batch_idx"][chosen] - first,
            "cls": batch["cls"][chosen],
            "bboxes": batch["bboxes"][chosen],
        }


def to_pixels(images: torch.Tensor, device: torch.device, side: int) -> torch.Tensor:
    """Returns images as a network sees them.

    Args:
        images: RGB, squares, shape (n, 3, s, s), uint8.
        device: Where the network is.
        side: Pixels.

    Returns:
        RGB in 0..1, shape (n, 3, side, side), float32, channels last.
    """
    pixels = images.to(device, non_blocking=True)
    pixels = pixels.contiguous(memory_format=torch.channels_last).float().div_(255)
    if side == pixels.shape[2]:
        return pixels
    return functional.interpolate(pixels, size=(side, side), mode="bilinear")


class Sides:
    """The side of the images of each step, in pixels: with multi_scale it changes.

    Args:
        hyperparameters: Their image_size, multi_scale and seed.
        stride: Sides are multiples of it.

    Attributes:
        largest: The largest side there may be.
    """

    def __init__(self, hyperparameters: Hyperparameters, stride: int) -> None:
        self._hyperparameters = hyperparameters
        self._stride = stride
        self.largest = self._scaled(1 + hyperparameters.multi_scale)

    def of_step(self, epoch: int, index: int) -> int:
        """Returns the side at a step, which depends on nothing but the seed and the step."""
        change = self._hyperparameters.multi_scale
        numbers = random.Random(f"{self._hyperparameters.seed}/{epoch}/{index}/side")
        return self._scaled(numbers.uniform(1 - change, 1 + change))

    def _scaled(self, factor: float) -> int:
        image_size, stride = self._hyperparameters.image_size, self._stride
        # Coarsest features of a single pixel would have no statistics in a batch of one.
        least = min(2 * stride, image_size)
        return max(least, round(image_size * factor / stride) * stride)
