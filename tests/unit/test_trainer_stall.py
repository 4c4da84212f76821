import pytest

from detflow.v1.training_pb2 import TrainingProgress
from services.trainer.domain import State
from services.trainer.stall import Patience, ProgressClock


class Clock:
    """A monotonic clock that a test moves, in steps as the trainer looks: once a second."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.watched = ProgressClock(Patience(), now=lambda: self.seconds)

    def wait(self, seconds: int) -> str:
        """Lets time pass; returns the reason if the worker counts as stalled meanwhile."""
        for _ in range(seconds):
            self.seconds += 1
            if stall := self.watched.stall():
                return stall.reason
        return ""

    def report(self, stage: str, step: int = 0) -> None:
        self.watched.observe(
            TrainingProgress(stage=stage, epoch=1, step=step, elapsed_seconds=self.seconds)
        )

    def train(self, steps: int, seconds: int = 1) -> None:
        """Makes steps that take so long each."""
        for number in range(steps):
            assert self.wait(seconds) == ""
            self.report("train", number + 1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_provisioning_has_two_minutes_and_its_progress_counts(clock: Clock) -> None:
    clock.watched.observe_state(State.PROVISIONING, 0)
    assert clock.wait(120) == ""
    clock.report("prepare data")
    assert clock.wait(120) == ""
    assert clock.wait(1) == "STALLED"


def test_step_that_is_tried_before_the_training_may_take_as_long_as_the_first(
    clock: Clock,
) -> None:
    clock.watched.observe_state(State.PROVISIONING, 0)
    clock.report("check", 2)
    assert clock.wait(900) == ""
    assert clock.wait(1) == "STALLED"


def test_first_step_may_take_long_as_nothing_is_known_of_the_pace(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    assert clock.wait(900) == ""
    assert clock.wait(1) == "STALLED"


def test_fast_steps_make_a_minute_of_silence_a_stall(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.train(30)
    assert clock.wait(60) == ""
    assert clock.wait(1) == "STALLED"


def test_slow_steps_are_given_twenty_times_their_own_pace(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.train(3, seconds=50)
    assert clock.wait(1000) == ""
    assert clock.wait(1) == "STALLED"


def test_silent_validation_may_take_three_times_the_training_before_it(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.train(200)
    clock.report("validate")
    assert clock.wait(3 * 199) == ""
    clock.report("train", 1)
    assert clock.wait(60) == ""  # its length says nothing about the steps
    assert clock.wait(1) == "STALLED"


def test_validation_that_reports_is_held_to_the_pace_of_the_steps(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.train(200)
    clock.report("validate")
    assert clock.wait(50) == ""
    clock.report("validate")
    assert clock.wait(60) == ""
    assert clock.wait(1) == "STALLED"


def test_repeated_report_is_no_progress_but_a_finished_epoch_is(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.train(2)
    last = TrainingProgress(stage="train", epoch=1, step=2, elapsed_seconds=clock.seconds)
    assert clock.wait(59) == ""
    clock.watched.observe(last)
    clock.watched.observe_state(State.RUNNING, 1)
    assert clock.wait(60) == ""
    clock.watched.observe(last)
    assert clock.wait(1) == "STALLED"


def test_trainer_that_stood_still_itself_blames_nobody(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.train(2)
    clock.seconds += 500  # suspended
    assert clock.wait(61) == ""  # the first look notices the gap
    assert clock.wait(1) == "STALLED"
