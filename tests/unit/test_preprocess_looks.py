"""Perceptual hashes: what changes them, what does not, and how near ones are found."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from detflow.images import to_gray
from services.preprocess.duplicates import MAX_DISTANCE, bottlenecks, find_duplicates
from services.preprocess.images import verify
from services.preprocess.looks import NUM_BITS, orientations, perceptual_hash

_Pixels = NDArray[np.uint8]


def scene(seed: int, width: int = 320, height: int = 240) -> _Pixels:
    """A picture with something in it, BGR."""
    random = np.random.default_rng(seed)
    coarse = random.uniform(20, 230, size=(7, 9, 3)).astype(np.float32)
    clouds = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels: _Pixels = np.clip(clouds + random.normal(0, 6, clouds.shape), 0, 255).astype(np.uint8)
    return pixels


def looks(pixels: _Pixels, quality: int = 90) -> int:
    """The hash of a picture as the import finds it."""
    data = bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])
    found = perceptual_hash(verify("a.jpg", data)[1])
    assert found is not None
    return found


def shifted(pixels: _Pixels, by: int) -> _Pixels:
    """A brighter picture."""
    brighter: _Pixels = np.clip(pixels.astype(int) + by, 0, 255).astype(np.uint8)
    return brighter


def test_copies_are_found_and_other_images_are_not() -> None:
    changes: dict[str, Callable[[_Pixels], Any]] = {
        "half its size": lambda p: cv2.resize(p, (160, 120), interpolation=cv2.INTER_AREA),
        "square": lambda p: cv2.resize(p, (160, 160), interpolation=cv2.INTER_AREA),
        "brighter": lambda p: shifted(p, 25),
        "blurred": lambda p: cv2.GaussianBlur(p, (0, 0), 2),
        "gray": lambda p: to_gray(p),
        "flipped": lambda p: cv2.flip(p, 1),
        "upside down": lambda p: cv2.flip(p, 0),
        "turned right": lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE),
        "turned left": lambda p: cv2.rotate(p, cv2.ROTATE_90_COUNTERCLOCKWISE),
        "turned around": lambda p: cv2.rotate(p, cv2.ROTATE_180),
        "transposed": lambda p: cv2.transpose(p),
        "flipped and turned": lambda p: cv2.rotate(cv2.flip(p, 1), cv2.ROTATE_90_CLOCKWISE),
    }
    originals = [scene(seed) for seed in range(8)]
    hashes = np.array([looks(pixels) for pixels in originals])
    for name, change in changes.items():
        copies = np.array([looks(change(pixels), quality=70) for pixels in originals])
        both = np.concatenate([hashes, copies])
        groups = find_duplicates(both, np.arange(16, dtype=np.uint64))[-1]
        assert groups.tolist() == [*range(8), *range(8)], name


def test_images_without_features_have_no_hash() -> None:
    black = np.random.default_rng(0).integers(0, 4, size=(480, 640)).astype(np.uint8)
    assert perceptual_hash(black) is None
    assert perceptual_hash(np.zeros((1, 1), np.uint8)) is None
    # No hash is no likeness; the same bytes are.
    levels = find_duplicates(np.array([-1, -1, -1]), np.array([5, 6, 5], np.uint64))
    assert levels[-1].tolist() == [0, 1, 0]


@pytest.mark.parametrize("shape", [(3, 3), (1, 500), (33, 31), (5000, 2), (2500, 1100)])
def test_any_shape_has_a_hash_of_63_bits(shape: tuple[int, int]) -> None:
    gray = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    gray[: (shape[0] + 1) // 2, : (shape[1] + 1) // 2] = 0
    found = perceptual_hash(gray)
    assert found is not None
    assert 0 <= found < 1 << NUM_BITS


def test_a_hash_is_the_same_on_every_machine() -> None:
    # Recorded once: a change would silently change the groups of every dataset.
    rows, columns = np.mgrid[0:60, 0:80]
    gray = ((rows * 7 + columns * columns * 3 + rows * columns) % 251).astype(np.uint8)
    assert perceptual_hash(gray) == 0xB62330400000402


def test_every_pair_within_the_distance_is_found() -> None:
    random = np.random.default_rng(2)
    base = random.integers(0, 1 << NUM_BITS, 1000, dtype=np.uint64)
    turned = orientations(base)
    copies = base.copy()
    for index in range(len(base)):
        copies[index] = turned[index % len(turned)][index]
        for bit in random.choice(NUM_BITS, index % (MAX_DISTANCE + 1), replace=False):
            copies[index] ^= np.uint64(1) << np.uint64(bit)
    hashes = np.concatenate([base, copies]).astype(np.int64)
    levels = find_duplicates(hashes, np.arange(len(hashes), dtype=np.uint64))
    assert np.array_equal(levels[-1][1000:], np.arange(1000))
    # Nothing else is near: 1000 random hashes are too few for chance.
    assert np.array_equal(levels[-1][:1000], np.arange(1000))
    assert np.array_equal(
        bottlenecks(levels, levels[-1])[:1000], np.arange(1000) % (MAX_DISTANCE + 1)
    )


def test_crowds_of_images_that_look_alike_are_one_group() -> None:
    random = np.random.default_rng(3)
    hashes = np.full(300, random.integers(0, 1 << NUM_BITS), np.int64)
    for bit in random.integers(0, NUM_BITS, (3, 300)):
        hashes ^= np.int64(1) << bit
    levels = find_duplicates(hashes, np.arange(300, dtype=np.uint64))
    assert not levels[-1].any()
