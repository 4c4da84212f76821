"""Splitting a dataset into training, validation and test images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

NUM_SPLITS = 3


class TooFewImages(Exception):
    """There are fewer images than splits."""


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the images of each split, ascending."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


def sizes(num_images: int, shares: Sequence[int]) -> tuple[int, int, int]:
    """Divides images by shares: largest remainder, earlier splits first on a tie, none empty.

    Args:
        num_images: Images to divide.
        shares: Train, val and test in percent; they add up to 100.

    Returns:
        Images in train, val and test; they add up to `num_images`.

    Raises:
        TooFewImages: Fewer than three images.
    """
    if num_images < NUM_SPLITS:
        raise TooFewImages(num_images)
    counts = [num_images * share // 100 for share in shares]
    by_remainder = sorted(range(NUM_SPLITS), key=lambda i: -(num_images * shares[i] % 100))
    for i in by_remainder[: num_images - sum(counts)]:
        counts[i] += 1
    for i in range(NUM_SPLITS):
        if counts[i] == 0:
            counts[max(range(NUM_SPLITS), key=counts.__getitem__)] -= 1
            counts[i] = 1
    train, val, test = counts
    return train, val, test


def assign(keys: Sequence[str], shares: Sequence[int], seed: int) -> Split:
    """Deals images to splits at random, the same way for the same seed on any machine.

    The order is that of SHA-256(seed, key), so it depends on no random generator's implementation.

    Args:
        keys: One distinct string per image.
        shares: Train, val and test in percent.
        seed: Any whole number.

    Raises:
        TooFewImages: Fewer than three images.
    """
    num_train, num_val, _ = sizes(len(keys), shares)
    order = sorted(
        range(len(keys)), key=lambda i: (hashlib.sha256(f"{seed}:{keys[i]}".encode()).digest(), i)
    )
    return Split(
        train=tuple(sorted(order[:num_train])),
        val=tuple(sorted(order[num_train : num_train + num_val])),
        test=tuple(sorted(order[num_train + num_val :])),
    )
