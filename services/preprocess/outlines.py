"""What a split has to know about a dataset's images: little enough for millions of them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.preprocess.domain import SPLITS

NO_SPLIT = -1
NO_HASH = -1


@dataclass(slots=True)
class Outlines:
    """Images in the order of their positions; added one by one, read as arrays.

    Attributes:
        paths: Paths in the archive.
    """

    paths: list[str] = field(default_factory=list)
    _size_bytes: array[int] = field(default_factory=lambda: array("q"))
    _contents: array[int] = field(default_factory=lambda: array("Q"))
    _looks: array[int] = field(default_factory=lambda: array("q"))
    _splits: array[int] = field(default_factory=lambda: array("b"))
    _classes: array[int] = field(default_factory=lambda: array("i"))
    _counts: array[int] = field(default_factory=lambda: array("i"))
    _ends: array[int] = field(default_factory=lambda: array("q"))

    def add(
        self,
        path: str,
        *,
        sha256: str,
        size_bytes: int = 0,
        class_ids: Sequence[int] = (),
        existing_split: str | None = None,
        perceptual_hash: int | None = None,
    ) -> None:
        """Adds the next image; the arguments are those of `domain.Image`."""
        self.paths.append(path)
        self._size_bytes.append(size_bytes)
        # The beginning will do: of a million images no two share it by chance (odds 1 in 10^7).
        self._contents.append(int(sha256[:16], 16))
        self._looks.append(NO_HASH if perceptual_hash is None else perceptual_hash)
        self._splits.append(SPLITS.index(existing_split) if existing_split else NO_SPLIT)
        for class_id, count in sorted(Counter(class_ids).items()):
            self._classes.append(class_id)
            self._counts.append(count)
        self._ends.append(len(self._classes))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def size_bytes(self) -> NDArray[np.int64]:
        """Sizes of the files."""
        return np.frombuffer(self._size_bytes, np.int64)

    @property
    def contents(self) -> NDArray[np.uint64]:
        """Equal where the bytes are equal."""
        return np.frombuffer(self._contents, np.uint64)

    @property
    def looks(self) -> NDArray[np.int64]:
        """Perceptual hashes; NO_HASH where there is none."""
        return np.frombuffer(self._looks, np.int64)

    @property
    def splits(self) -> NDArray[np.int8]:
        """Indices into SPLITS of the archive's own splits; NO_SPLIT where it has none."""
        return np.frombuffer(self._splits, np.int8)

    def class_counts(self, position: int) -> list[tuple[int, int]]:
        """Returns the classes of an image's boxes, ascending, and how many boxes each has."""
        begin = self._ends[position - 1] if position else 0
        end = self._ends[position]
        return [*zip(self._classes[begin:end], self._counts[begin:end], strict=True)]

    def num_boxes_by_class(
        self, positions: NDArray[np.int64] | Sequence[int], num_classes: int
    ) -> list[int]:
        """Counts the boxes of some images by class."""
        chosen = np.zeros(len(self), bool)
        chosen[np.asarray(positions, np.int64)] = True
        ends = np.frombuffer(self._ends, np.int64)
        rows = np.repeat(chosen, np.diff(ends, prepend=0))
        classes = np.frombuffer(self._classes, np.int32)[rows]
        counts = np.frombuffer(self._counts, np.int32)[rows]
        return [int(n) for n in np.bincount(classes, counts, num_classes)]
