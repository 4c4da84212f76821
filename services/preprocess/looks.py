"""How images look, in 63 bits: two images that look the same differ in few of them.

The bits are the signs of the lowest 63 frequencies of the image shrunk to 32 x 32 (a discrete
cosine transform, as in pHash: Zauner, "Implementation and Benchmarking of Perceptual Image Hash
Functions", 2010). Signs instead of a comparison with the median have two merits: a change of
brightness or contrast leaves them as they are, and the hash of the image flipped or turned follows
from the hash alone.

All arithmetic is on whole numbers, so that equal pixels give equal hashes on every machine.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NUM_BITS = 63
"""Bit 8 v + u - 1 belongs to frequency v down and u across, 0..7 each, without (0, 0)."""

_SIDE = 32
_FREQUENCIES = 8
_MIN_DEVIATION = 2  # of gray levels: an image with less shows nothing that could be recognised
_FRACTION = 16  # parts of a gray level that are kept
_BASIS_SCALE = 512
_MAX_SIDE = 1024


def perceptual_hash(gray: NDArray[np.uint8]) -> int | None:
    """Hashes the looks of an image.

    Args:
        gray: Shape (height, width), 0..255, upright; a reduced one will do.

    Returns:
        0 .. 2^63 - 1; None for an image without features, such as a black frame.
    """
    small = _shrink(gray)
    total, squares = int(small.sum()), int((small * small).sum())
    if small.size * squares - total * total < (small.size * _MIN_DEVIATION * _FRACTION) ** 2:
        return None
    basis = _basis()
    signs = (basis @ small @ basis.T).ravel()[1:] > 0
    return int.from_bytes(np.packbits(signs, bitorder="little").tobytes(), "little")


def orientations(hashes: NDArray[np.uint64]) -> list[NDArray[np.uint64]]:
    """Returns hashes as they are, then those of the images flipped and turned.

    A quarter turn to the left is left out: A turned left is B where B turned right is A.
    """
    transposed = _transpose(hashes)
    across, down = _odd(across=True), _odd(across=False)
    return [
        hashes,
        hashes ^ across,
        hashes ^ down,
        hashes ^ across ^ down,
        transposed,
        transposed ^ across,
        transposed ^ across ^ down,
    ]


def _shrink(gray: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Averages an image over 32 x 32 equal areas, in parts of a gray level."""
    step = max(gray.shape) // _MAX_SIDE + 1
    if step > 1:  # whole blocks first: the sums below take memory
        height, width = (max(1, side // step) for side in gray.shape)
        rows, columns = min(step, gray.shape[0]), min(step, gray.shape[1])
        blocks = gray[: height * rows, : width * columns].reshape(height, rows, width, columns)
        gray = (blocks.sum(axis=(1, 3), dtype=np.uint32) // (rows * columns)).astype(np.uint8)
    height, width = gray.shape
    sums = _divided(_divided(gray.astype(np.int64)).T).T
    small: NDArray[np.int64] = sums * _FRACTION // (height * width)
    return small


def _divided(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums rows over 32 equal parts, in 1/32 of a row; one on a border is shared."""
    length, width = values.shape
    none = np.zeros((1, width), np.int64)
    row, share = np.divmod(np.arange(_SIDE + 1) * length, _SIDE)
    before = np.concatenate([none, np.cumsum(values, axis=0)])[row] * _SIDE
    upto = before + np.concatenate([values, none])[row] * share[:, None]
    parts: NDArray[np.int64] = np.diff(upto, axis=0)
    return parts


@lru_cache(maxsize=1)
def _basis() -> NDArray[np.int64]:
    """Shape (8, 32): cosines of the lowest frequencies."""
    return np.array(
        [
            [
                round(_BASIS_SCALE * math.cos(math.pi * u * (2 * x + 1) / (2 * _SIDE)))
                for x in range(_SIDE)
            ]
            for u in range(_FREQUENCIES)
        ],
        np.int64,
    )


def _odd(*, across: bool) -> np.uint64:
    """Returns the bits of odd frequencies: those whose signs a flip changes."""
    mask = 0
    for bit in range(NUM_BITS):
        v, u = divmod(bit + 1, _FREQUENCIES)
        mask |= ((u if across else v) & 1) << bit
    return np.uint64(mask)


def _transpose(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Exchanges the frequencies down and across."""
    result = np.zeros_like(hashes)
    for bit in range(NUM_BITS):
        v, u = divmod(bit + 1, _FREQUENCIES)
        there = np.uint64(_FREQUENCIES * u + v - 1)
        result |= ((hashes >> np.uint64(bit)) & np.uint64(1)) << there
    return result
