"""Series: what is void, and how they are thinned out."""

import math
from collections.abc import Mapping

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from services.metrics.series import Blocks, EpochRow, Series, epoch_series

NAMES = {1: ("lr",), 2: ("loss", "lr")}

Row = tuple[int, int, int, int, int, int]  # attempt, epoch, first step, steps of it, values, names


def blocks(*rows: Row, finished: Mapping[int, int] = {}) -> Blocks:
    columns = np.array(sorted(rows)).T
    names = ("attempts", "epochs", "first_steps", "nums_steps", "nums_values", "lists")
    arrays = {f"{name}_B": column for name, column in zip(names, columns, strict=True)}
    return Blocks(last_id=1, names=NAMES, first_finished=finished, **arrays)


def steps_of(found: Blocks, name: str, num_values: int) -> list[tuple[float, int, int, float]]:
    series = found.series(name, np.arange(num_values, dtype="<f8").tobytes())
    assert series.steps_N is not None and series.num_points == len(series.values_N)
    columns = (series.positions_N, series.epochs_N, series.steps_N, series.values_N)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_epochs_become_series_by_name_without_what_a_later_attempt_did_again() -> None:
    rows = [
        EpochRow(1, 1, ("loss", "lr"), [9.0, 0.1]),
        EpochRow(2, 1, ("loss", "lr"), [8.0, 0.2]),
        EpochRow(2, 2, ("lr", "more"), [0.3, 5.0]),
        EpochRow(3, 1, ("loss", "lr"), [7.0, 0.4]),
    ]
    found = {one.name: (one.epochs_N.tolist(), one.values_N.tolist()) for one in epoch_series(rows)}
    assert found == {
        "loss": ([1], [9.0]),
        "lr": ([1, 2], [0.1, 0.3]),
        "more": ([2], [5.0]),
    }
    assert [*found] == sorted(found)
    assert [one.name for one in epoch_series(rows, ["lr", "unknown"])] == ["lr"]


def test_attempt_that_goes_on_inside_an_epoch_voids_steps_from_there_on() -> None:
    found = blocks((1, 1, 1, 4, 4, 1), (1, 2, 1, 4, 3, 1), (2, 2, 2, 4, 3, 1))
    assert steps_of(found, "lr", 10) == [
        *((number / 4, 1, number, number - 1.0) for number in range(1, 5)),
        (1.25, 2, 1, 4.0),
        *((1 + number / 4, 2, number, number + 5.0) for number in range(2, 5)),
    ]


def test_places_compare_between_attempts_whose_epochs_have_unequally_many_steps() -> None:
    # The first of 6 steps, of which 4 are two thirds; the second goes on at the third of 3.
    found = blocks((1, 1, 1, 6, 6, 1), (2, 1, 3, 3, 1, 1))
    positions = [position for position, *_ in steps_of(found, "lr", 7)]
    assert positions == [1 / 6, 2 / 6, 3 / 6, 4 / 6, 1.0]


def test_attempt_that_only_measured_an_epoch_voids_the_steps_after_it() -> None:
    tail = (1, 2, 1, 4, 2, 1)
    found = blocks((1, 1, 1, 4, 4, 1), tail, finished={2: 1})
    assert [epoch for _, epoch, *_ in steps_of(found, "lr", 6)] == [1, 1, 1, 1]
    assert len(steps_of(blocks((1, 1, 1, 4, 4, 1), tail, finished={1: 1}), "lr", 6)) == 6


def test_series_that_some_blocks_lack_has_the_others() -> None:
    found = blocks((1, 1, 1, 4, 2, 1), (1, 1, 3, 4, 2, 2))
    assert found.column_names == ["loss", "lr"]
    assert [step for _, _, step, _ in steps_of(found, "loss", 2)] == [3, 4]
    assert [step for _, _, step, _ in steps_of(found, "lr", 4)] == [1, 2, 3, 4]


numbers = st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(
    values=st.lists(numbers, min_size=1, max_size=300),
    gaps=st.lists(st.integers(1, 20), min_size=300, max_size=300),
    max_points=st.integers(1, 40),
)
def test_thinned_series_keeps_its_ends_and_the_extremes_of_equal_stretches(
    values: list[float], gaps: list[int], max_points: int
) -> None:
    positions = np.cumsum(gaps[: len(values)]) / 8
    series = Series(
        name="x",
        epochs_N=np.arange(len(values)),
        positions_N=positions,
        values_N=np.array(values),
        num_points=len(values),
    )
    thin = series.thinned(max_points)
    assert len(thin.values_N) <= max_points and thin.num_points == len(values)
    kept = thin.epochs_N.tolist()
    assert kept == sorted(set(kept)) and kept[-1] == len(values) - 1
    assert np.array_equal(thin.values_N, np.array(values)[kept], equal_nan=True)
    assert np.array_equal(thin.positions_N, positions[kept])
    if len(values) <= max_points:
        assert len(kept) == len(values)
        return
    assert max_points == 1 or kept[0] == 0
    num_stretches = (max_points - 2) // 2
    stretches: dict[int, list[int]] = {}
    for number in range(len(values)) if num_stretches > 0 else ():
        share = (positions[number] - positions[0]) / (
            (positions[-1] - positions[0]) / num_stretches
        )
        stretches.setdefault(min(int(share), num_stretches - 1), []).append(number)
    for members in stretches.values():
        chosen = [values[number] for number in members if number in kept]
        real = [values[number] for number in members if not math.isnan(values[number])]
        assert any(math.isnan(value) for value in chosen) or real
        if real:
            told = [value for value in chosen if not math.isnan(value)]
            assert (min(told), max(told)) == (min(real), max(real))


def test_thinning_a_million_values_takes_a_moment_and_keeps_a_single_peak() -> None:
    values = np.zeros(1_000_000)
    values[654_321] = 7.0
    series = Series(
        name="x",
        epochs_N=np.ones(len(values), np.int64),
        steps_N=np.arange(len(values)),
        positions_N=np.arange(len(values)) / len(values),
        values_N=values,
        num_points=len(values),
    )
    thin = series.thinned(1000)
    assert thin.steps_N is not None
    assert thin.steps_N[thin.values_N == 7.0].tolist() == [654_321]
    assert 500 <= len(thin.values_N) <= 1000
