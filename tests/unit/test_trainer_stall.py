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

    def step(self, number: int) -> None:
        self.watched.observe(TrainingProgress(stage="train", epoch=1, step=number))


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_provisioning_has_two_minutes_and_its_progress_counts(clock: Clock) -> None:
    clock.watched.observe_state(State.PROVISIONING, 0)
    assert clock.wait(120) == ""
    clock.watched.observe(TrainingProgress(stage="prepare data", percent=1))
    assert clock.wait(120) == ""
    assert clock.wait(1) == "STALLED"


def test_fast_steps_make_a_minute_of_silence_a_stall(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    for number in range(30):
        clock.wait(1)
        clock.step(number)
    assert clock.wait(60) == ""
    assert clock.wait(1) == "STALLED"


def test_slow_steps_are_given_twenty_times_their_own_pace(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    for number in range(3):
        assert clock.wait(50) == ""
        clock.step(number)
    assert clock.wait(1000) == ""
    assert clock.wait(1) == "STALLED"


def test_slow_provisioning_does_not_stretch_the_deadline_of_the_training(clock: Clock) -> None:
    clock.watched.observe_state(State.PROVISIONING, 0)
    clock.wait(100)
    clock.watched.observe(TrainingProgress(stage="prepare data"))
    clock.watched.observe_state(State.RUNNING, 0)
    assert clock.wait(60) == ""
    assert clock.wait(1) == "STALLED"


def test_repeated_report_is_no_progress_but_a_finished_epoch_is(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.step(1)
    assert clock.wait(59) == ""
    clock.step(1)
    clock.watched.observe_state(State.RUNNING, 1)
    assert clock.wait(60) == ""
    assert clock.wait(1) == "STALLED"


def test_trainer_that_stood_still_itself_blames_nobody(clock: Clock) -> None:
    clock.watched.observe_state(State.RUNNING, 0)
    clock.wait(10)
    clock.seconds += 500  # suspended
    assert clock.wait(61) == ""  # the first look notices the gap
    assert clock.wait(1) == "STALLED"
