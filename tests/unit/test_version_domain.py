"""Rules of the version projection, without any server."""

from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.version.domain import (
    GRAPH,
    LIVE,
    Bundle,
    FollowedTraining,
    IllegalTransition,
    PreprocessingEvent,
    PreprocessingState,
    State,
    StoredObject,
    TooEarly,
    TrainingEvent,
    TrainingState,
    Version,
    name_key,
    parse_version_name,
    project_preprocessing,
    project_training,
)
from services.version.holes import project_preprocessing_across, project_training_across

START = datetime(2024, 5, 1, tzinfo=UTC)
NOW = START + timedelta(days=1)
BUNDLE = Bundle(
    manifest=StoredObject(key="bundles/manifests/m.json", size_bytes=10, sha256="ab"),
    num_images=(1400, 400, 200),
)
NEW = Version(
    id="dv1",
    project_id="default",
    display_name="V_0",
    state=State.PREPROCESSING,
    dataset="projects/default/datasets/d1",
    class_names=("circle",),
    recipe=b"",
    create_time=START,
    update_time=START,
)
READY = replace(NEW, state=State.READY, bundle=BUNDLE)


def training(id_: str, revision: int, state: TrainingState, minute: int = 0) -> TrainingEvent:
    return TrainingEvent(
        training_id=id_,
        revision=revision,
        state=state,
        failure=b"why" if state is TrainingState.FAILED else None,
        time=START + timedelta(minutes=minute),
    )


@dataclass
class Projection:
    """What the consumer keeps: the version, how far each training is, and the states seen."""

    version: Version
    followed: dict[str, FollowedTraining] = field(default_factory=dict)
    history: list[State] = field(default_factory=list)

    def apply(self, event: PreprocessingEvent | TrainingEvent) -> None:
        before = self.version.state
        if isinstance(event, PreprocessingEvent):
            self.version = project_preprocessing(self.version, event) or self.version
        else:
            seen = self.followed.get(event.training_id)
            projected = project_training(self.version, seen, event, NOW)
            if projected is not None:
                self.version, self.followed[event.training_id] = projected
        if self.version.state is not before:
            assert self.version.state in GRAPH[before]
            self.history.append(self.version.state)


def test_preprocessing_success_makes_the_version_ready_with_its_bundle() -> None:
    after = project_preprocessing(
        NEW, PreprocessingEvent(revision=1, state=PreprocessingState.SUCCEEDED, bundle=BUNDLE)
    )
    assert after is not None
    assert (after.state, after.bundle) == (State.READY, BUNDLE)


@pytest.mark.parametrize("state", [PreprocessingState.FAILED, PreprocessingState.CANCELLED])
def test_preprocessing_without_result_fails_the_version(state: PreprocessingState) -> None:
    after = project_preprocessing(NEW, PreprocessingEvent(revision=1, state=state, failure=b"why"))
    assert after is not None
    assert (after.state, after.bundle, after.failure) == (State.FAILED, None, b"why")


def test_preprocessing_that_begins_is_counted_and_changes_nothing() -> None:
    after = project_preprocessing(
        NEW, PreprocessingEvent(revision=1, state=PreprocessingState.RUNNING)
    )
    assert after == replace(NEW, preprocessing_revision=1)


def test_success_without_manifest_is_refused() -> None:
    with pytest.raises(IllegalTransition, match="without a manifest"):
        project_preprocessing(
            NEW, PreprocessingEvent(revision=1, state=PreprocessingState.SUCCEEDED)
        )


def test_training_goes_through_to_completed() -> None:
    projection = Projection(READY)
    for revision, state in enumerate(
        (
            TrainingState.QUEUED,
            TrainingState.PROVISIONING,
            TrainingState.RUNNING,
            TrainingState.EVALUATING,
            TrainingState.SUCCEEDED,
        ),
        start=1,
    ):
        projection.apply(training("dt1", revision, state))
    assert projection.version.training_id == "dt1"
    assert projection.history == [
        State.QUEUED,
        State.PROVISIONING,
        State.TRAINING,
        State.EVALUATING,
        State.COMPLETED,
    ]


def test_crashed_attempt_takes_the_version_back_to_queued() -> None:
    projection = Projection(READY)
    states = (TrainingState.QUEUED, TrainingState.PROVISIONING, TrainingState.RUNNING)
    for revision, state in enumerate((*states, *states), start=1):
        projection.apply(training("dt1", revision, state))
    assert projection.version.state is State.TRAINING


def test_failure_is_kept_until_the_next_run() -> None:
    projection = Projection(READY)
    projection.apply(training("dt1", 1, TrainingState.QUEUED))
    projection.apply(training("dt1", 2, TrainingState.FAILED))
    assert projection.version.failure == b"why"
    projection.apply(training("dt2", 1, TrainingState.QUEUED, minute=1))
    assert projection.version.failure is None
    assert projection.version.training_id == "dt2"


def test_event_ahead_of_its_predecessor_is_too_early_and_a_repeated_one_does_nothing() -> None:
    projection = Projection(READY)
    with pytest.raises(TooEarly):
        projection.apply(training("dt1", 2, TrainingState.PROVISIONING))
    projection.apply(training("dt1", 1, TrainingState.QUEUED))
    projection.apply(training("dt1", 1, TrainingState.QUEUED))
    assert projection.history == [State.QUEUED]


def test_training_event_before_the_end_of_preprocessing_is_too_early() -> None:
    with pytest.raises(TooEarly):
        Projection(NEW).apply(training("dt1", 1, TrainingState.QUEUED))


def test_second_training_waits_for_the_end_of_the_first() -> None:
    projection = Projection(READY)
    projection.apply(training("dt1", 1, TrainingState.QUEUED, minute=1))
    second = training("dt2", 1, TrainingState.QUEUED, minute=9)
    with pytest.raises(TooEarly):
        projection.apply(second)
    projection.apply(training("dt1", 2, TrainingState.STOPPED, minute=8))
    projection.apply(second)
    assert projection.version.training_id == "dt2"


def test_late_events_of_an_earlier_training_change_nothing() -> None:
    projection = Projection(READY)
    projection.apply(training("dt2", 1, TrainingState.QUEUED, minute=9))
    before = projection.version
    projection.apply(training("dt1", 1, TrainingState.QUEUED, minute=1))
    projection.apply(training("dt1", 2, TrainingState.FAILED, minute=2))
    assert projection.version == before
    assert projection.followed["dt1"].revision == 2


def test_resumed_older_training_takes_the_version_over() -> None:
    projection = Projection(READY)
    projection.apply(training("dt1", 1, TrainingState.QUEUED, minute=1))
    projection.apply(training("dt1", 2, TrainingState.PAUSED, minute=2))
    projection.apply(training("dt2", 1, TrainingState.QUEUED, minute=3))
    projection.apply(training("dt2", 2, TrainingState.STOPPED, minute=4))
    projection.apply(training("dt1", 3, TrainingState.QUEUED, minute=5))
    assert (projection.version.state, projection.version.training_id) == (State.QUEUED, "dt1")


def test_training_begun_after_the_clock_was_set_back_is_followed() -> None:
    ahead = NOW + timedelta(hours=1)
    version = replace(READY, state=State.STOPPED, training_id="dt1", run_time=ahead)
    projected = project_training(version, None, training("dt2", 1, TrainingState.QUEUED), NOW)
    assert projected is not None
    assert projected[0].training_id == "dt2"


def test_completed_version_never_changes_its_state() -> None:
    projection = Projection(
        replace(READY, state=State.COMPLETED, training_id="dt1", run_time=START)
    )
    projection.apply(training("dt2", 1, TrainingState.QUEUED, minute=9))
    projection.apply(training("dt2", 2, TrainingState.FAILED, minute=9))
    assert projection.version.state is State.COMPLETED
    assert projection.version.training_id == "dt1"


def test_repeated_state_of_a_training_is_counted_and_changes_nothing() -> None:
    projection = Projection(READY)
    projection.apply(training("dt1", 1, TrainingState.QUEUED))
    projection.apply(training("dt1", 2, TrainingState.QUEUED))
    assert projection.history == [State.QUEUED]
    assert projection.followed["dt1"].revision == 2


@pytest.mark.parametrize(
    ("version", "events"),
    [
        (READY, [training("dt1", 1, TrainingState.RUNNING)]),
        (
            READY,
            [training("dt1", 1, TrainingState.QUEUED), training("dt1", 2, TrainingState.SUCCEEDED)],
        ),
        (replace(NEW, state=State.FAILED), [training("dt1", 1, TrainingState.QUEUED)]),
    ],
    ids=["begins running", "skips the work", "has no bundle"],
)
def test_step_outside_the_graph_is_refused(version: Version, events: list[TrainingEvent]) -> None:
    projection = Projection(version)
    with pytest.raises(IllegalTransition):
        for event in events:
            projection.apply(event)


def test_names_that_look_alike_have_one_key() -> None:
    assert name_key("\u1112\u1161\u11ab") == name_key(" 한 ")
    assert name_key("v_0") != name_key("V_0")


@pytest.mark.parametrize(
    "name", ["", "projects/p", "projects/p/versions/", "projects/p/versions/V_0"]
)
def test_malformed_version_name_is_recognised(name: str) -> None:
    assert parse_version_name(name) is None


_ENDS = (TrainingState.FAILED, TrainingState.STOPPED, TrainingState.PAUSED)
_WORK = (
    TrainingState.QUEUED,
    TrainingState.PROVISIONING,
    TrainingState.RUNNING,
    TrainingState.EVALUATING,
)


@st.composite
def legal_histories(draw: st.DrawFn) -> list[PreprocessingEvent | TrainingEvent]:
    """Draws what preprocess and trainer may really send about one version, in true order.

    Several trainings one after the other, each with crashes and new attempts, resumes of paused and
    failed ones in between, perhaps one that succeeds at the end.
    """
    events: list[PreprocessingEvent | TrainingEvent] = [
        PreprocessingEvent(revision=1, state=PreprocessingState.PENDING),
        PreprocessingEvent(revision=2, state=PreprocessingState.RUNNING),
        PreprocessingEvent(revision=3, state=PreprocessingState.SUCCEEDED, bundle=BUNDLE),
    ]
    revisions: dict[str, int] = {}
    resumable: list[str] = []

    def emit(id_: str, state: TrainingState) -> None:
        revisions[id_] = revisions.get(id_, 0) + 1
        events.append(training(id_, revisions[id_], state, minute=len(events)))

    for _ in range(draw(st.integers(0, 4))):
        new = f"dt{len(revisions)}"
        id_ = draw(st.sampled_from([new, *resumable]))
        for _ in range(draw(st.integers(0, 2))):  # crashed attempts
            for state in _WORK[: draw(st.integers(2, 4))]:
                emit(id_, state)
        last = draw(st.integers(1, 4))
        for state in _WORK[:last]:
            emit(id_, state)
        resumable = [other for other in resumable if other != id_]
        if last == 4 and draw(st.booleans()):
            emit(id_, TrainingState.SUCCEEDED)
            break
        end = draw(st.sampled_from(_ENDS))
        emit(id_, end)
        if end is not TrainingState.STOPPED:
            resumable.append(id_)
    return events


@given(st.data())
def test_shuffled_and_repeated_events_end_in_the_same_state(data: st.DataObject) -> None:
    history = data.draw(legal_histories())
    truth = Projection(NEW)
    for event in history:
        truth.apply(event)

    copies = data.draw(st.lists(st.sampled_from(history), max_size=5))
    waiting = deque(data.draw(st.permutations([*history, *copies])))
    projection = Projection(NEW)
    postponed = 0
    while waiting:
        event = waiting.popleft()
        try:
            projection.apply(event)
            postponed = 0
        except TooEarly:
            waiting.append(event)
            postponed += 1
            assert postponed <= len(waiting), "every event left waits for another"

    assert projection.version == truth.version
    assert projection.followed == truth.followed


@given(st.data())
def test_version_follows_the_last_event_whichever_before_it_were_lost(data: st.DataObject) -> None:
    history = data.draw(legal_histories().filter(bool))
    truth = Projection(NEW)
    for event in history:
        truth.apply(event)
    trained = [event for event in history if isinstance(event, TrainingEvent)]
    if not trained:
        return
    kept = data.draw(st.lists(st.sampled_from(trained[:-1]), unique_by=id)) if trained[1:] else []
    version, followed = READY, dict[str, FollowedTraining]()
    for event in [e for e in trained if any(e is one for one in kept)] + [trained[-1]]:
        across = project_training_across(version, followed.get(event.training_id), event, NOW)
        assert across is not None
        steps, followed[event.training_id] = across
        for step in steps:
            assert step.state in GRAPH[version.state]
            version = step
        assert project_training_across(version, followed[event.training_id], event, NOW) is None
    assert (version.state, version.training_id) == (truth.version.state, truth.version.training_id)
    assert version.failure == truth.version.failure


def test_bundle_is_found_though_the_event_before_was_lost() -> None:
    event = PreprocessingEvent(revision=3, state=PreprocessingState.SUCCEEDED, bundle=BUNDLE)
    ready = project_preprocessing_across(NEW, event)
    assert ready is not None
    assert (ready.state, ready.bundle, ready.preprocessing_revision) == (State.READY, BUNDLE, 3)
    assert project_preprocessing_across(ready, event) is None


def test_every_live_state_can_end_and_can_be_tried_again() -> None:
    for state in LIVE:
        assert {State.FAILED, State.STOPPED, State.PAUSED} <= GRAPH[state]
    assert all(State.QUEUED in GRAPH[s] for s in LIVE - {State.QUEUED})
