"""What attempts measured, to series: without what later attempts made void, and thinned out.

An attempt goes on from a checkpoint, so what older attempts measured from there on is void. Where
it went on tells its first epoch or its first steps; so series depend on what there is, never on the
order in which it came. Places are compared as *positions*, epochs finished as a float: the end of
step 3 of 4 in epoch 2 is 1.75. That holds between attempts whose epochs have unequally many steps.

Array shapes are named by suffix: B blocks, N values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EpochRow:
    """What an attempt measured in an epoch.

    Attributes:
        epoch: From 1.
        attempt: The attempt.
        names: Names, sorted.
        values: A value for each; may be NaN.
    """

    epoch: int
    attempt: int
    names: tuple[str, ...]
    values: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One metric over the epochs or over the steps, positions increasing.

    Attributes:
        name: Name such as val/box_loss.
        epochs_N: Epoch in which it was measured, from 1.
        steps_N: Step within the epoch, from 1; None of a series by epoch.
        positions_N: Epochs finished when it was measured.
        values_N: The values; may be NaN.
        num_points: Values there are; more than here if it is thinned out.
    """

    name: str
    epochs_N: Integers
    steps_N: Integers | None = None
    positions_N: Floats
    values_N: Floats
    num_points: int

    def thinned(self, max_points: int) -> Series:
        """Returns it with at most so many values, so that what is drawn of it looks the same.

        The first and the last one stay, and of equal stretches of positions the lowest and the
        highest. A stretch in which nothing is a number keeps one NaN.
        """
        if len(self.values_N) <= max_points:
            return self
        kept_N = _extremes(self.positions_N, self.values_N, max_points)
        return replace(
            self,
            epochs_N=self.epochs_N[kept_N],
            steps_N=None if self.steps_N is None else self.steps_N[kept_N],
            positions_N=self.positions_N[kept_N],
            values_N=self.values_N[kept_N],
        )


def epoch_series(rows: Sequence[EpochRow], names: Sequence[str] = ()) -> list[Series]:
    """Makes one series by epoch per name, sorted by name; only these names unless empty.

    Args:
        rows: Of one training, by epoch, then attempt; what is void as well.
        names: Names.
    """
    begins: dict[int, float] = {}
    for row in rows:
        begins[row.attempt] = min(begins.get(row.attempt, math.inf), row.epoch - 1)
    ends = _ends(begins)
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row.epoch > ends[row.attempt]:
            continue
        for name, value in zip(row.names, row.values, strict=True):
            epochs, values = found.setdefault(name, ([], []))
            epochs.append(row.epoch)
            values.append(value)
    return [
        Series(
            name=name,
            epochs_N=np.array(found[name][0], np.int64),
            positions_N=np.array(found[name][0], np.float64),
            values_N=np.array(found[name][1], np.float64),
            num_points=len(found[name][0]),
        )
        for name in sorted(found)
        if not names or name in names
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Where the blocks of steps of one training are, by attempt, epoch and first step.

    Attributes:
        last_id: Highest id of a block.
        names: Names of the columns, by the number of their list.
        first_finished: First epoch that an attempt has finished, by attempt.
        attempts_B: Attempt that measured a block.
        epochs_B: Its epoch.
        first_steps_B: Its first step within the epoch, from 1.
        nums_steps_B: Steps of its epoch.
        nums_values_B: Its steps.
        lists_B: Number of its list of names.
    """

    last_id: int
    names: Mapping[int, tuple[str, ...]]
    first_finished: Mapping[int, int]
    attempts_B: Integers
    epochs_B: Integers
    first_steps_B: Integers
    nums_steps_B: Integers
    nums_values_B: Integers
    lists_B: Integers
    _axes: dict[tuple[int, ...], Axis] = field(default_factory=dict, init=False)

    @property
    def column_names(self) -> list[str]:
        """The names that any block has, sorted."""
        return sorted({name for number in self._lists for name in self.names[number]})

    @property
    def _lists(self) -> Iterator[int]:
        return iter(np.unique(self.lists_B).tolist())

    def series(self, name: str, column: bytes) -> Series:
        """Makes the series of a name.

        Args:
            name: One of `column_names`.
            column: Its values in all blocks that have it, in their order: float64, little-endian.

        Raises:
            ValueError: These are not as many as the blocks say.
        """
        lists = tuple(number for number in self._lists if name in self.names[number])
        if lists not in self._axes:
            self._axes[lists] = self._axis(np.isin(self.lists_B, lists))
        axis = self._axes[lists]
        values_N = np.frombuffer(column, "<f8")
        if len(values_N) != len(axis.kept_N):
            raise ValueError(f"{len(axis.kept_N)} values of {name} expected, not {len(values_N)}")
        return Series(
            name=name,
            epochs_N=axis.epochs_N,
            steps_N=axis.steps_N,
            positions_N=axis.positions_N,
            values_N=values_N[axis.kept_N],
            num_points=len(axis.positions_N),
        )

    def _axis(self, chosen_B: npt.NDArray[np.bool_]) -> Axis:
        """Says where the steps of some blocks are, and which are not void."""
        epochs_B, nums_B = self.epochs_B[chosen_B], self.nums_values_B[chosen_B]
        before_B = np.cumsum(nums_B) - nums_B
        steps_N = np.arange(int(nums_B.sum()))
        steps_N += np.repeat(self.first_steps_B[chosen_B] - before_B, nums_B)
        positions_N = steps_N / np.repeat(self.nums_steps_B[chosen_B], nums_B)
        positions_N += np.repeat(epochs_B - 1, nums_B)
        ends = _ends(self._begins())
        ends_B = np.array([ends[attempt] for attempt in self.attempts_B[chosen_B].tolist()])
        kept_N = positions_N <= np.repeat(ends_B, nums_B)
        return Axis(
            kept_N=kept_N,
            epochs_N=np.repeat(epochs_B, nums_B)[kept_N],
            steps_N=steps_N[kept_N],
            positions_N=positions_N[kept_N],
        )

    def _begins(self) -> dict[int, float]:
        """Returns where each attempt went on.

        Its first steps tell. If all steps of an epoch were done before and it only measured that
        epoch, or if its first blocks are lost, then it went on at the end of that epoch at latest.
        """
        begins: dict[int, float] = {one: epoch for one, epoch in self.first_finished.items()}
        # Computed as positions are, so that what is equal is equal to the last bit.
        positions_B = (self.first_steps_B - 1) / self.nums_steps_B + (self.epochs_B - 1)
        for attempt in np.unique(self.attempts_B).tolist():
            first = float(positions_B[self.attempts_B == attempt].min())
            begins[attempt] = min(begins.get(attempt, math.inf), first)
        return begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Where the steps of some blocks are.

    Attributes:
        kept_N: Of all their steps: is not void.
        epochs_N: Epoch of each that is not.
        steps_N: Step within the epoch of each that is not.
        positions_N: Position of each that is not.
    """

    kept_N: npt.NDArray[np.bool_]
    epochs_N: Integers
    steps_N: Integers
    positions_N: Floats


def _ends(begins: Mapping[int, float]) -> dict[int, float]:
    """Returns by attempt the position after which what it measured is void.

    Args:
        begins: By attempt the position at which it went on.
    """
    ends, end = {}, math.inf
    for attempt in sorted(begins, reverse=True):
        ends[attempt] = end
        end = min(end, begins[attempt])
    return ends


def _extremes(positions_N: Floats, values_N: Floats, max_points: int) -> Integers:
    """Returns which values to keep, in order: see `Series.thinned`."""
    last = len(values_N) - 1
    num_stretches = (max_points - 2) // 2
    ends = np.array([0, last] if max_points > 1 else [last])
    if num_stretches < 1:
        return ends
    width = (positions_N[-1] - positions_N[0]) / num_stretches
    stretch_N = np.minimum((positions_N - positions_N[0]) / width, num_stretches - 1).astype(int)
    starts_S = np.flatnonzero(np.diff(stretch_N, prepend=-1))
    lengths_S = np.diff(starts_S, append=last + 1)
    chosen = [ends]
    # fmin and fmax give a NaN only where there is nothing else.
    for extreme in (np.fmin, np.fmax):
        extremes_N = np.repeat(extreme.reduceat(values_N, starts_S), lengths_S)
        where = np.flatnonzero((values_N == extremes_N) | np.isnan(extremes_N))
        is_first = np.diff(stretch_N[where], prepend=-1) > 0
        chosen.append(where[is_first])
    return np.unique(np.concatenate(chosen))
