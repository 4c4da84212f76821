"""Finding images that are the same or look the same, flipped and turned ones too.

Two images look the same if their perceptual hashes differ in at most `MAX_DISTANCE` bits. Measured
on blood-cell images that is every pair of a scene photographed twice and no other pair, and more
than 95 % of copies that were encoded again, shrunk to a third, brightened, blurred, turned or
cropped by 2 %.

Hashes are cut into four bands of at most 16 bits. Where two differ in at most 7 bits, some band
differs in at most one: so each hash looks up its own value and its 16 neighbours in a table of each
band (Norouzi et al., "Fast Search in Hamming Space with Multi-Index Hashing", 2012).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from services.preprocess.looks import orientations

MAX_DISTANCE = 7
"""Bits by which hashes of images that look the same may differ."""

Labels: TypeAlias = NDArray[np.int64]
"""One per image: the index of the first image of its group."""

_BAND_BITS = 16
_NUM_BANDS = 4
_MAX_CANDIDATES = 128
"""Compared with one hash in one entry of a table: the nearest in order. More share an entry only if
thousands of images look nearly the same, and then each is near to many others of them."""
_ROWS_AT_ONCE = 16_384
_EDGES_AT_ONCE = 1 << 20

_Edges: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]


def find_duplicates(looks: NDArray[np.int64], contents: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Groups images that are the same or look the same, directly or by way of others.

    Args:
        looks: Perceptual hash of each image, shape (n,); -1 where there is none.
        contents: Equal for images with the same bytes, shape (n,).

    Returns:
        Shape (MAX_DISTANCE + 1, n): row d has the `Labels` of groups whose neighbours differ in at
        most d bits.
    """
    known = np.flatnonzero(looks >= 0)
    distinct, inverse = np.unique(looks[known].astype(np.uint64), return_inverse=True)
    levels = np.tile(np.arange(len(distinct)), (MAX_DISTANCE + 1, 1))
    for left, right, distances in _gathered(_near_pairs(distinct)):
        for level in range(MAX_DISTANCE + 1):
            close = distances <= level
            _join(levels[level], left[close], right[close])
    found = np.tile(np.arange(len(looks)), (MAX_DISTANCE + 1, 1))
    for level in range(MAX_DISTANCE + 1):
        found[level, known] = known[first_of_each(levels[level, inverse])]
    order = np.argsort(contents, kind="stable")
    same = contents[order[1:]] == contents[order[:-1]]
    for level in range(MAX_DISTANCE + 1):
        _join(found[level], order[:-1][same], order[1:][same])
    return found


def first_of_each(groups: NDArray[np.int64]) -> Labels:
    """Labels images by the first one of their group, given any number of it."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    labels: Labels = first[inverse]
    return labels


def bottlenecks(levels: NDArray[np.int64], labels: Labels) -> NDArray[np.int64]:
    """Returns for each image the most bits by which two neighbours of its group differ.

    Args:
        levels: What `find_duplicates` returned.
        labels: Its last row.
    """
    widest = np.zeros(len(labels), np.int64)
    for level in levels[:-1]:
        apart = np.zeros(len(labels), bool)
        apart[labels[level != level[labels]]] = True
        widest += apart
    return widest[labels]


def _near_pairs(hashes: NDArray[np.uint64]) -> Iterator[_Edges]:
    """Yields pairs of different hashes that are near in some orientation, some more than once."""
    top = np.uint64(64 - _BAND_BITS)
    for band in range(_NUM_BANDS):
        turned = _rotated(hashes, band)
        order = np.argsort(turned)
        table = turned[order]
        starts = np.searchsorted(
            table >> top, np.arange((1 << _BAND_BITS) + 1, dtype=np.uint64)
        ).astype(np.int32)
        for queries in orientations(hashes):
            for begin in range(0, len(queries), _ROWS_AT_ONCE):
                some = _rotated(queries[begin : begin + _ROWS_AT_ONCE], band)
                for change in (0, *(1 << bit for bit in range(_BAND_BITS))):
                    asked = some ^ (np.uint64(change) << top)
                    entry = (asked >> top).astype(np.int64)
                    low, high = starts[entry], starts[entry + 1]
                    crowded = np.flatnonzero(high - low > _MAX_CANDIDATES)
                    if len(crowded):
                        place = np.searchsorted(table, asked[crowded]) - _MAX_CANDIDATES // 2
                        low[crowded] = np.clip(place, low[crowded], high[crowded] - _MAX_CANDIDATES)
                        high[crowded] = low[crowded] + _MAX_CANDIDATES
                    counts = high - low
                    rows = np.repeat(np.arange(len(some), dtype=np.int32), counts)
                    ends = np.cumsum(counts, dtype=np.int32)
                    columns = np.arange(len(rows), dtype=np.int32)
                    columns += np.repeat(low - ends + counts, counts)
                    distances = np.bitwise_count(some[rows] ^ table[columns])
                    near = np.flatnonzero(distances <= MAX_DISTANCE)
                    left, right = begin + rows[near], order[columns[near]]
                    apart = left != right
                    yield left[apart], right[apart], distances[near][apart]


def _rotated(hashes: NDArray[np.uint64], band: int) -> NDArray[np.uint64]:
    """Brings a band to the top; the rest follows."""
    shift = np.uint64(band * _BAND_BITS)
    return (hashes << shift) | (hashes >> (np.uint64(64) - shift)) if band else hashes


def _gathered(edges: Iterator[_Edges]) -> Iterator[_Edges]:
    """Puts small lots of edges together, so that few large ones are joined."""
    lots: list[_Edges] = []
    size = 0
    for lot in edges:
        lots.append(lot)
        size += len(lot[0])
        if size >= _EDGES_AT_ONCE:
            yield _concatenated(lots)
            lots, size = [], 0
    if lots:
        yield _concatenated(lots)


def _concatenated(lots: list[_Edges]) -> _Edges:
    left, right, distances = zip(*lots, strict=True)
    return np.concatenate(left), np.concatenate(right), np.concatenate(distances)


def _join(labels: Labels, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
    """Joins the groups of pairs of images, in place; each label stays the least index there is."""
    while len(left):
        a, b = labels[left], labels[right]
        apart = a != b
        left, right, a, b = left[apart], right[apart], a[apart], b[apart]
        np.minimum.at(labels, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(labels, labels[labels]):
            labels[:] = labels[labels]
