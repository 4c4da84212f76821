"""Splitting a dataset into training, validation and test images.

Every class gets its share of each split, as well as whole images allow: images are dealt one after
the other, those of the rarest class first, each to the split that lacks its boxes most (after
Sechidis et al., "On the Stratification of Multi-label Data", 2011). Images of one group go to one
split. The number of images is exact, unless groups make that impossible.

The result is the same on every machine: all arithmetic is on whole numbers, and chance is SHA-256
of the seed and the paths.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.preprocess.duplicates import Labels
from services.preprocess.outlines import NO_SPLIT, Outlines

NUM_SPLITS = 3
_WHOLE = 1 << 30


class TooFewImages(Exception):
    """There are fewer images than splits."""


class TooFewGroups(Exception):
    """There are fewer groups than splits that need one."""


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the images of each split, ascending."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Images that stay together.

    Attributes:
        positions: The images.
        features: What is to be shared out: (feature, amount), in parts of `_WHOLE` of all there is.
        order: Sorts groups in the order in which they are dealt.
    """

    positions: tuple[int, ...]
    features: tuple[tuple[int, int], ...]
    order: tuple[int, int, bytes]


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
    counts = _apportion(num_images, shares)
    for i in range(NUM_SPLITS):
        if counts[i] == 0:
            counts[max(range(NUM_SPLITS), key=counts.__getitem__)] -= 1
            counts[i] = 1
    train, val, test = counts
    return train, val, test


def assign(
    images: Outlines, shares: Sequence[int], seed: int, groups: Labels | None = None
) -> Split:
    """Deals all images to splits.

    Args:
        images: The images; their own splits do not count.
        shares: Train, val and test in percent.
        seed: Any whole number.
        groups: Images with the same label stay together; None if each is by itself.

    Raises:
        TooFewImages: Fewer than three images.
        TooFewGroups: Fewer than three groups.
    """
    dealer = _Dealer(images, seed, groups)
    dealer.deal(range(len(images)), sizes(len(images), shares))
    return dealer.split()


def assign_keeping(
    images: Outlines, shares: Sequence[int], seed: int, groups: Labels | None = None
) -> Split:
    """Keeps the splits that images have and deals out the others.

    - An image without a split joins the other images of its group: the split that has most of them.
    - What is left is dealt out by the shares, and stratified; splits that have none get at least
      one image.
    - Where nothing is left for a split that has none, it gets its share of all images out of the
      largest one.

    Raises:
        TooFewImages: Fewer than three images.
        TooFewGroups: The largest split has too few groups to fill the empty ones.
    """
    ideal = sizes(len(images), shares)
    labels = np.arange(len(images)) if groups is None else groups
    splits = images.splits.astype(np.int64)
    if np.all(splits == NO_SPLIT):
        return assign(images, shares, seed, groups)
    votes = np.zeros((NUM_SPLITS, len(images)), np.int64)
    kept = splits != NO_SPLIT
    np.add.at(votes, (splits[kept], labels[kept]), 1)
    joining = ~kept & (votes.sum(0)[labels] > 0)
    splits[joining] = votes.argmax(0)[labels[joining]]

    rest = np.flatnonzero(splits == NO_SPLIT)
    dealt = _apportion(len(rest), shares)
    fixed = [np.flatnonzero(splits == split) for split in range(NUM_SPLITS)]
    donor = max(range(NUM_SPLITS), key=lambda split: len(fixed[split]))
    wanted = [0] * NUM_SPLITS
    empty = [split for split in range(NUM_SPLITS) if not len(fixed[split])]
    served = empty[: len(np.unique(labels[rest]))]
    for split in served:
        if not dealt[split]:
            dealt[max(range(NUM_SPLITS), key=lambda i: (dealt[i], i not in served))] -= 1
            dealt[split] = 1
    for split in empty[len(served) :]:
        wanted[split] = ideal[split]

    dealer = _Dealer(images, seed, groups)
    for split in range(NUM_SPLITS):
        if split != donor or not any(wanted):
            dealer.put(fixed[split], split)
    if any(wanted):
        # At least one stays; where that leaves too few, the last of the empty splits gets less.
        spare = len(fixed[donor]) - 1
        for split in range(NUM_SPLITS):
            wanted[split] = min(wanted[split], spare - sum(map(bool, wanted[split + 1 :])))
            spare -= wanted[split]
        wanted[donor] = len(fixed[donor]) - sum(wanted)
        dealer.deal(fixed[donor], wanted)
    dealer.deal(rest, dealt)
    return dealer.split()


class _Dealer:
    """Puts groups of images into splits, and knows what each split lacks."""

    def __init__(self, images: Outlines, seed: int, labels: Labels | None) -> None:
        self._images = images
        self._seed = seed
        self._labels = np.arange(len(images)) if labels is None else labels
        self._totals = self._count_features()
        self._num_in = [0] * NUM_SPLITS
        self._held = [[0] * len(self._totals) for _ in range(NUM_SPLITS)]
        self._groups_in: list[list[_Group]] = [[] for _ in range(NUM_SPLITS)]

    def split(self) -> Split:
        """Returns what is in each split."""
        train, val, test = (
            tuple(sorted(position for group in groups for position in group.positions))
            for groups in self._groups_in
        )
        return Split(train, val, test)

    def put(self, positions: Sequence[int] | np.ndarray, split: int) -> None:
        """Puts images into a split, whatever it lacks."""
        for group in self._groups_of(positions):
            self._add(group, split)

    def deal(self, positions: Sequence[int] | np.ndarray, rooms: Sequence[int]) -> None:
        """Deals images to splits.

        Args:
            positions: The images.
            rooms: How many each split is to get; they add up to the number of images.

        Raises:
            TooFewGroups: A split that is to get some would stay empty.
        """
        groups = sorted(self._groups_of(positions), key=lambda group: group.order)
        room = [*rooms]
        final = [n + more for n, more in zip(self._num_in, rooms, strict=True)]
        goals = [n * _WHOLE // max(1, sum(final)) for n in final]
        # An error of one box weighs the more, the smaller the split.
        weights = [16 * _WHOLE // max(1, goal) for goal in goals]
        empty = {i for i in range(NUM_SPLITS) if room[i] and not self._num_in[i]}
        if len(groups) < len(empty):
            raise TooFewGroups(len(groups))
        for number, group in enumerate(groups):
            size = len(group.positions)
            fitting = [i for i in range(NUM_SPLITS) if room[i] >= size]
            if len(groups) - number <= len(empty):
                fitting = sorted(empty)
            elif not fitting:
                widest = max(room)
                fitting = [i for i in range(NUM_SPLITS) if room[i] == widest]
            chosen = fitting[0]
            if len(fitting) > 1:
                chosen = min(fitting, key=lambda i: self._harm(group, i, goals[i]) * weights[i])
            self._add(group, chosen)
            room[chosen] -= size
            empty.discard(chosen)
        self._even_out(groups, room)

    def _harm(self, group: _Group, split: int, goal: int) -> int:
        """Says by how much the squared distance from a split's goal grows with a group."""
        held = self._held[split]
        return sum(
            amount * (amount - 2 * (goal - held[feature])) for feature, amount in group.features
        )

    def _even_out(self, dealt: Sequence[_Group], room: list[int]) -> None:
        """Moves or exchanges groups that were dealt while that brings the numbers nearer.

        Args:
            dealt: Those groups.
            room: Images that each split lacks; negative where it has too many.
        """
        movable = {group.positions[0] for group in dealt}
        while any(room):
            by_size = [
                {len(group.positions): group for group in groups if group.positions[0] in movable}
                for groups in self._groups_in
            ]
            best, gain = None, 0
            for over, under in itertools.permutations(range(NUM_SPLITS), 2):
                if room[over] >= 0 or room[under] <= 0:
                    continue
                exchange = [0, *by_size[under]]
                for given in by_size[over]:
                    for taken in exchange[len(self._groups_in[over]) < 2 :]:
                        net = given - taken
                        before = abs(room[over]) + abs(room[under])
                        gained = before - abs(room[over] + net) - abs(room[under] - net)
                        if gained > gain:
                            best, gain = (over, under, given, taken), gained
            if best is None:
                return
            over, under, given, taken = best
            self._move(by_size[over][given], over, under)
            if taken:
                self._move(by_size[under][taken], under, over)
            room[over] += given - taken
            room[under] -= given - taken

    def _move(self, group: _Group, origin: int, target: int) -> None:
        self._groups_in[origin].remove(group)
        self._num_in[origin] -= len(group.positions)
        for feature, amount in group.features:
            self._held[origin][feature] -= amount
        self._add(group, target)

    def _add(self, group: _Group, split: int) -> None:
        self._groups_in[split].append(group)
        self._num_in[split] += len(group.positions)
        for feature, amount in group.features:
            self._held[split][feature] += amount

    def _groups_of(self, positions: Sequence[int] | np.ndarray) -> list[_Group]:
        members: dict[int, list[int]] = {}
        for position in np.asarray(positions, np.int64).tolist():
            members.setdefault(int(self._labels[position]), []).append(position)
        return [self._group(images) for images in members.values()]

    def _group(self, positions: list[int]) -> _Group:
        found: dict[int, int] = {}
        for position in positions:
            for feature, count in self._features(position):
                found[feature] = found.get(feature, 0) + count
        key = f"{self._seed}:{self._images.paths[positions[0]]}"
        return _Group(
            positions=tuple(positions),
            features=tuple(
                (feature, count * _WHOLE // self._totals[feature])
                for feature, count in found.items()
            ),
            order=(
                -len(positions),
                min((self._totals[feature] for feature in found if feature % 2), default=0),
                hashlib.sha256(key.encode()).digest(),
            ),
        )

    def _features(self, position: int) -> list[tuple[int, int]]:
        """Counts what is to be shared out of an image.

        That is: itself (feature 0), background (1), boxes of class c (2 c + 2) and the image with
        class c (2 c + 3).
        """
        found = [(0, 1)]
        classes = self._images.class_counts(position)
        if not classes:
            found.append((1, 1))
        for class_id, count in classes:
            found.append((2 * class_id + 2, count))
            found.append((2 * class_id + 3, 1))
        return found

    def _count_features(self) -> list[int]:
        totals = [0, 0]
        for position in range(len(self._images)):
            for feature, count in self._features(position):
                if feature >= len(totals):
                    totals.extend([0] * (feature - len(totals) + 1))
                totals[feature] += count
        return totals


def _apportion(num_images: int, shares: Sequence[int]) -> list[int]:
    """Divides images by shares in percent: largest remainder, earlier splits first on a tie."""
    counts = [num_images * share // 100 for share in shares]
    by_remainder = sorted(range(NUM_SPLITS), key=lambda i: -(num_images * shares[i] % 100))
    for i in by_remainder[: num_images - sum(counts)]:
        counts[i] += 1
    return counts
