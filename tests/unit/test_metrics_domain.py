"""The pure rules of the metrics service."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.metrics.domain import (
    Applied,
    Evaluation,
    Training,
    TrainingState,
    is_finished,
)


def training(state: TrainingState, attempt: int = 1) -> Training:
    return Training(
        id="t",
        project_id="p",
        name="projects/p/versions/v/trainings/t",
        state=state,
        revision=1,
        attempt=attempt,
        applied=Applied(),
    )


def evaluation(split: str, attempt: int = 1) -> Evaluation:
    return Evaluation(
        training="projects/p/versions/v/trainings/t",
        split=split,
        attempt=attempt,
        measurement=None,
        failure=b"x",
        create_time=datetime.now(UTC),
    )


@given(st.permutations(range(1, 9)), st.sets(st.integers(1, 8)), st.lists(st.integers(1, 8)))
def test_applied_is_what_has_no_hole_whatever_the_order(
    order: list[int], missing: set[int], again: list[int]
) -> None:
    applied = Applied()
    for seq in [*order, *again]:
        if seq not in missing:
            applied = applied.add(seq)
    there = set(range(1, 9)) - missing
    without_hole = next(n for n in range(10) if n + 1 not in there)
    assert applied.seq == without_hole
    assert applied.ahead == tuple(sorted(n for n in there if n > without_hole))
    assert applied.highest == max(there, default=0)


@pytest.mark.parametrize(
    ("state", "attempt", "measured", "expected"),
    [
        (TrainingState.RUNNING, 1, [], False),
        (TrainingState.EVALUATING, 1, ["val"], False),
        (TrainingState.EVALUATING, 1, ["val", "test"], True),
        (TrainingState.EVALUATING, 2, ["val", "test"], False),
        (TrainingState.QUEUED, 1, ["val", "test"], False),
        (TrainingState.SUCCEEDED, 1, ["val", "test"], True),
        (TrainingState.FAILED, 1, [], True),
        (TrainingState.STOPPED, 1, [], True),
        (TrainingState.PAUSED, 1, [], True),
    ],
)
def test_training_is_finished_when_measured_or_at_rest(
    state: TrainingState, attempt: int, measured: list[str], expected: bool
) -> None:
    found = is_finished(training(state, attempt), [evaluation(split) for split in measured])
    assert found is expected
