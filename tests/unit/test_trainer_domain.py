import itertools

import pytest
from google.rpc import code_pb2
from hypothesis import given
from hypothesis import strategies as st

from detflow.errors import (
    Aborted,
    DataLoss,
    DetflowError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from detflow.v1 import training_pb2
from detflow.v1.common_pb2 import Failure, StoredObject
from services.trainer.domain import (
    ATTEMPTING,
    FINAL,
    LIVE,
    MAX_RESTARTS,
    RESUMABLE,
    TRANSITIONS,
    State,
    StopMode,
    Training,
    TrainingName,
    after_crash,
    after_evaluation,
    check_resumable,
    decide_stop,
    is_conclusive,
    is_retried,
    sources_of,
)


def training(state: State, stop_mode: StopMode | None = None) -> Training:
    time = training_pb2.Training().create_time.ToDatetime()
    return Training(
        id="t",
        project="p",
        version="v",
        state=state,
        revision=1,
        model="yolov8n",
        batch_size=16,
        epochs=10,
        hyperparameters={},
        manifest=StoredObject(),
        step_batch_size=16,
        preflight=None,
        attempt=1,
        num_epochs_done=0,
        num_restarts=0,
        stop_mode=stop_mode,
        failure=None,
        weights=None,
        owner=None,
        predictions_written=False,
        create_time=time,
        start_time=None,
        end_time=None,
    )


def test_states_and_modes_have_the_names_of_the_contract() -> None:
    assert {f"{state}" for state in State} | {"STATE_UNSPECIFIED"} == set(
        training_pb2.Training.State.keys()
    )
    assert {f"STOP_MODE_{mode}" for mode in StopMode} | {"STOP_MODE_UNSPECIFIED"} == set(
        training_pb2.StopMode.keys()
    )


def test_ended_states_never_change_and_every_other_can_fail_stop_and_pause() -> None:
    assert not TRANSITIONS[State.SUCCEEDED] and not TRANSITIONS[State.STOPPED]
    for state in LIVE:
        assert {State.FAILED, State.STOPPED, State.PAUSED} <= TRANSITIONS[state]
    for state in RESUMABLE:
        assert TRANSITIONS[state] == {State.QUEUED}
    assert LIVE | FINAL == set(State) and not LIVE & FINAL


def test_sources_are_the_graph_backwards() -> None:
    for source, target in itertools.product(State, State):
        assert (source in sources_of(target)) == (target in TRANSITIONS[source])
    assert sources_of(State.SUCCEEDED) == [State.EVALUATING]


def test_crash_is_retried_three_times_then_fails() -> None:
    ends = [after_crash(None, number) for number in range(MAX_RESTARTS + 1)]
    assert ends == [State.QUEUED] * 3 + [State.FAILED]


def test_crash_under_a_stop_ends_as_the_user_asked() -> None:
    assert after_crash(StopMode.PAUSE, 0) is State.PAUSED
    assert after_crash(StopMode.DISCARD, 9) is State.STOPPED
    assert after_crash(StopMode.FINISH, 0) is State.QUEUED  # to be finished by another attempt


def test_measured_training_ends_unless_a_stop_was_accepted_before() -> None:
    assert after_evaluation(None) is State.SUCCEEDED
    assert after_evaluation(StopMode.FINISH) is State.STOPPED
    assert after_evaluation(StopMode.PAUSE) is None
    assert after_evaluation(StopMode.DISCARD) is None


@pytest.mark.parametrize(
    ("code", "retried"),
    [
        (code_pb2.RESOURCE_EXHAUSTED, True),
        (code_pb2.UNAVAILABLE, True),
        (code_pb2.ABORTED, True),
        (code_pb2.INVALID_ARGUMENT, False),
        (code_pb2.DATA_LOSS, False),
        (code_pb2.INTERNAL, False),
    ],
)
def test_only_what_another_attempt_can_help_is_retried(code: int, retried: bool) -> None:
    failure = Failure()
    failure.status.code = code
    assert is_retried(failure) is retried


@given(st.sampled_from(sorted(LIVE)), st.sampled_from([None, *StopMode]), st.sampled_from(StopMode))
def test_stop_only_becomes_more_urgent(
    state: State, before: StopMode | None, mode: StopMode
) -> None:
    order = [None, StopMode.FINISH, StopMode.PAUSE, StopMode.DISCARD]
    if order.index(mode) < order.index(before):
        with pytest.raises(FailedPrecondition) as caught:
            decide_stop(training(state, before), mode)
        assert caught.value.reason == "STOP_IN_PROGRESS"
        return
    stop = decide_stop(training(state, before), mode)
    if state is State.QUEUED:
        assert stop.state in TRANSITIONS[state]
    else:
        assert stop.state is None
        assert (stop.mode is None) == (before is mode)


@pytest.mark.parametrize("state", sorted(FINAL))
def test_stop_of_an_ended_training_is_rejected(state: State) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        decide_stop(training(state), StopMode.PAUSE)
    assert caught.value.reason == "TRAINING_NOT_LIVE"
    assert state in caught.value.message


def test_repeated_stop_whose_reply_was_lost_is_accepted() -> None:
    assert decide_stop(training(State.PAUSED, StopMode.PAUSE), StopMode.PAUSE).mode is None
    assert decide_stop(training(State.STOPPED, StopMode.DISCARD), StopMode.DISCARD).mode is None
    assert decide_stop(training(State.STOPPED, StopMode.FINISH), StopMode.FINISH).mode is None
    with pytest.raises(FailedPrecondition):
        decide_stop(training(State.STOPPED, StopMode.FINISH), StopMode.DISCARD)


@pytest.mark.parametrize("state", State)
def test_only_paused_and_failed_trainings_can_be_resumed(state: State) -> None:
    if state in RESUMABLE:
        check_resumable(training(state))
    else:
        with pytest.raises(FailedPrecondition, match=state):
            check_resumable(training(state))


def test_name_is_parsed_into_its_parts() -> None:
    one = training(State.RUNNING)
    assert one.name == "projects/p/versions/v/trainings/t"
    assert TrainingName.parse(one.name) == TrainingName(project="p", version="v", training="t")
    assert State.QUEUED not in ATTEMPTING


@pytest.mark.parametrize(
    ("problem", "stays"),
    [
        (FailedPrecondition("a box is outside", reason="BAD_LABELS"), True),
        (InvalidArgument("other shapes", reason="WEIGHTS_DO_NOT_FIT"), True),
        (DataLoss("an object is gone", reason="OBJECT_LOST"), True),
        (FailedPrecondition("no space left", reason="DISK_FULL"), False),
        (InvalidArgument("too little", reason="BAD_SETTING"), False),
        (ResourceExhausted("out of memory", reason="OUT_OF_MEMORY"), False),
        (Aborted("killed (signal 9)", reason="JOB_DIED"), False),
        (Unavailable("no answer", reason="STORE_UNAVAILABLE"), False),
        (Internal("unknown", reason="WORKER_FAILED"), False),
    ],
    ids=lambda value: getattr(value, "reason", None),
)
def test_only_what_stays_wrong_fails_a_training_that_waits(
    problem: DetflowError, stays: bool
) -> None:
    assert is_conclusive(problem) is stays
