"""Versions: what they are, the states they go through, and how other services' events move them.

Pure rules without input or output. `Version.state` is a projection: the preprocess and the trainer
service decide, and this service follows their events. Those may come twice, late, or out of order
between resources; the rules here end in the same state all the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum

AUTOMATIC_NAME = "V_{}"

METRICS = ("map50", "map50_95", "precision", "recall")
"""Figures of a version, by the names of detflow.v1.VersionMetrics."""

TRASH_TIME = timedelta(days=30)
"""How long a deleted version can be taken back, unless the settings say otherwise."""


class State(StrEnum):
    """State of a version; names as in detflow.v1.Version.State."""

    PREPROCESSING = "PREPROCESSING"
    READY = "READY"
    QUEUED = "QUEUED"
    PROVISIONING = "PROVISIONING"
    TRAINING = "TRAINING"
    EVALUATING = "EVALUATING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    PAUSED = "PAUSED"


_ENDS_OF_A_RUN = frozenset({State.FAILED, State.STOPPED, State.PAUSED})

GRAPH: Mapping[State, frozenset[State]] = {
    State.PREPROCESSING: frozenset({State.READY, State.FAILED}),
    State.READY: frozenset({State.QUEUED}),
    State.QUEUED: _ENDS_OF_A_RUN | {State.PROVISIONING},
    # Back to QUEUED: the worker crashed and the trainer starts the next attempt.
    State.PROVISIONING: _ENDS_OF_A_RUN | {State.TRAINING, State.QUEUED},
    State.TRAINING: _ENDS_OF_A_RUN | {State.EVALUATING, State.QUEUED},
    State.EVALUATING: _ENDS_OF_A_RUN | {State.COMPLETED, State.QUEUED},
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.STOPPED: frozenset({State.QUEUED}),
    State.PAUSED: frozenset({State.QUEUED}),
}
"""Which state may follow which."""

LIVE = frozenset({State.QUEUED, State.PROVISIONING, State.TRAINING, State.EVALUATING})
"""States of a version whose training is live."""


class PreprocessingState(StrEnum):
    """State of a preprocessing; names as in detflow.v1.Preprocessing.State."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class TrainingState(StrEnum):
    """State of a training; names as in detflow.v1.Training.State."""

    QUEUED = "QUEUED"
    PROVISIONING = "PROVISIONING"
    RUNNING = "RUNNING"
    EVALUATING = "EVALUATING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    PAUSED = "PAUSED"


_STATE_OF_PREPROCESSING = {
    PreprocessingState.PENDING: State.PREPROCESSING,
    PreprocessingState.RUNNING: State.PREPROCESSING,
    PreprocessingState.SUCCEEDED: State.READY,
    PreprocessingState.FAILED: State.FAILED,
    # Cancelled with the deletion of the version; if that is taken back, there still is no bundle.
    PreprocessingState.CANCELLED: State.FAILED,
}
_STATE_OF_TRAINING = {
    TrainingState.QUEUED: State.QUEUED,
    TrainingState.PROVISIONING: State.PROVISIONING,
    TrainingState.RUNNING: State.TRAINING,
    TrainingState.EVALUATING: State.EVALUATING,
    TrainingState.SUCCEEDED: State.COMPLETED,
    TrainingState.FAILED: State.FAILED,
    TrainingState.STOPPED: State.STOPPED,
    TrainingState.PAUSED: State.PAUSED,
}


class TooEarly(Exception):
    """An event came before one that it builds on; it must come again later."""


class IllegalTransition(Exception):
    """An event asks for a step that the state graph does not have: a defect of its sender."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object in the object store."""

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """What preprocessing made: the manifest, and the images in train, val and test."""

    manifest: StoredObject
    num_images: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What was measured of a training on the test split; each figure 0..1.

    Attributes:
        training_id: The training.
        map50: AP at IoU 0.5, mean over classes.
        map50_95: AP at IoU 0.5 to 0.95, mean over classes.
        precision: Precision at the threshold of the best F1.
        recall: Recall at the threshold of the best F1.
    """

    training_id: str
    map50: float
    map50_95: float
    precision: float
    recall: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Project:
    """A group of datasets and versions; `position` orders projects by age, 0 is no limit."""

    id: str
    display_name: str
    position: int
    create_time: datetime
    max_storage_bytes: int = 0
    max_running_trainings: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A dataset frozen with a split and a recipe.

    Attributes:
        id: Last segment of its name.
        project_id: Project it belongs to.
        display_name: Name shown to people, exactly as they typed it.
        state: Where it stands.
        dataset: Resource name of its dataset.
        class_names: Classes of the dataset.
        recipe: Serialized detflow.v1.Recipe, defaults resolved.
        bundle: Result of preprocessing, from READY on.
        training_id: Training whose state it follows, if any.
        run_time: When that training was queued, first or by a resume; it tells a later run from an
            earlier one.
        failure: Serialized detflow.v1.Failure, in state FAILED.
        labels: The user's own notes.
        dataset_sha256: Hash of the dataset's content when the version was made.
        parent_version: Name of the version it was made after, if the user said so.
        metrics: Figures of the newest training that succeeded.
        preprocessing_revision: Last revision of the preprocessing that was applied.
        revision: Increases by one with every change that a user can see.
        create_time: When it was created.
        update_time: When it last changed.
        delete_time: When it was moved to the trash, if it is there.
        purge_time: When it will be removed for good, if it is in the trash.
        request_sha256: Fingerprint of the request that created it.
    """

    id: str
    project_id: str
    display_name: str
    state: State
    dataset: str
    class_names: tuple[str, ...]
    recipe: bytes
    bundle: Bundle | None = None
    training_id: str | None = None
    run_time: datetime | None = None
    failure: bytes | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    dataset_sha256: str = ""
    parent_version: str | None = None
    metrics: Metrics | None = None
    preprocessing_revision: int = 0
    revision: int = 1
    create_time: datetime
    update_time: datetime
    delete_time: datetime | None = None
    purge_time: datetime | None = None
    request_sha256: bytes = b""

    @property
    def name(self) -> str:
        """Resource name."""
        return f"projects/{self.project_id}/versions/{self.id}"

    @property
    def etag(self) -> str:
        """Entity tag of this revision (AIP-154, quoted as in RFC 7232)."""
        return f'"{self.revision:x}"'


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessingEvent:
    """A preprocessing changed its state; `revision` counts its changes from 1."""

    revision: int
    state: PreprocessingState
    bundle: Bundle | None = None
    failure: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEvent:
    """A training changed its state.

    Attributes:
        training_id: The training.
        revision: Counts its changes from 1.
        state: Its new state.
        attempt: Its newest attempt.
        failure: Serialized detflow.v1.Failure, in state FAILED.
        time: When the change was committed, by the trainer's database; None if unknown.
    """

    training_id: str
    revision: int
    state: TrainingState
    attempt: int = 0
    failure: bytes | None = None
    time: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedTraining:
    """How far a training's events were applied."""

    training_id: str
    revision: int
    state: TrainingState
    attempt: int = 0

    @property
    def live(self) -> bool:
        """Whether it holds the version."""
        return _STATE_OF_TRAINING[self.state] in LIVE


def state_of_training(event: TrainingEvent) -> State:
    """Returns the state of a version whose training has come to where an event says."""
    return _STATE_OF_TRAINING[event.state]


def name_key(display_name: str) -> str:
    """Returns what must be unique among a project's names.

    Names are kept exactly as typed. Two that look alike because they differ only in how the
    characters are composed (Korean typed on a Mac and on Windows) or in spaces around them count as
    one.
    """
    return unicodedata.normalize("NFC", display_name).strip()


def parse_version_name(name: str) -> tuple[str, str] | None:
    """Splits projects/{project}/versions/{version} into its two ids; None if it is no such name."""
    match = re.fullmatch(r"projects/([a-z0-9-]{1,63})/versions/([a-z0-9-]{1,63})", name)
    return (match[1], match[2]) if match else None


def project_preprocessing(version: Version, event: PreprocessingEvent) -> Version | None:
    """Applies a change of the version's preprocessing.

    Returns:
        The version afterwards, or None if the event was applied before.

    Raises:
        TooEarly: The event before it has not come yet.
        IllegalTransition: Preprocessing ended before.
    """
    if not _is_next(version.preprocessing_revision, event.revision):
        return None
    after = replace(version, preprocessing_revision=event.revision)
    state = _STATE_OF_PREPROCESSING[event.state]
    if state == version.state:
        return after
    _check_edge(version, state)
    if state is State.READY and event.bundle is None:
        raise IllegalTransition(f"{version.name}: preprocessing succeeded without a manifest")
    return replace(
        after,
        state=state,
        bundle=event.bundle if state is State.READY else None,
        failure=event.failure if state is State.FAILED else None,
    )


def project_training(
    version: Version, followed: FollowedTraining | None, event: TrainingEvent, now: datetime
) -> tuple[Version, FollowedTraining] | None:
    """Applies a change of one of the version's trainings.

    Live trainings of a version follow one another, so their runs (from QUEUED to a state in which
    nothing runs) have an order. Events of one training are ordered by revision. Between trainings,
    a run that began before the one the version follows is history: it is counted and changes
    nothing. A run that began later waits for the end of the one before.

    Args:
        version: The version, as it is.
        followed: What was applied of this training; None if nothing was.
        event: What happened.
        now: Time by the database. A run that began after it shows that the clock was set back;
            times are no guide then, and the order of arrival decides.

    Returns:
        The version and the training afterwards, or None if the event was applied before.

    Raises:
        TooEarly: An event before it has not come yet.
        IllegalTransition: The training took a step that is not in the graph.
    """
    if not _is_next(followed.revision if followed else 0, event.revision):
        return None
    if version.state is State.PREPROCESSING:
        raise TooEarly  # it was READY when the training began: that event is still on its way
    seen = FollowedTraining(
        training_id=event.training_id,
        revision=event.revision,
        state=event.state,
        attempt=event.attempt,
    )
    current = version.training_id == event.training_id
    if event.state is TrainingState.QUEUED and (followed is None or not followed.live):
        if version.state is State.COMPLETED or (not current and is_history(version, event, now)):
            return version, seen
        if version.state in LIVE:
            raise TooEarly
        if version.bundle is None:
            raise IllegalTransition(f"{version.name} has no bundle to train on")
        _check_edge(version, State.QUEUED)
        started = replace(
            version,
            state=State.QUEUED,
            training_id=event.training_id,
            run_time=event.time,
            failure=None,
        )
        return started, seen
    if followed is None:
        raise IllegalTransition(f"training {event.training_id} begins with {event.state}")
    if not current or followed.state is event.state:
        return version, seen
    state = _STATE_OF_TRAINING[event.state]
    _check_edge(version, state)
    failure = event.failure if state is State.FAILED else None
    return replace(version, state=state, failure=failure), seen


def _is_next(applied: int, revision: int) -> bool:
    """Says whether a revision is the next one; False if it was applied already."""
    if revision > applied + 1:
        raise TooEarly
    return revision == applied + 1


def is_history(version: Version, event: TrainingEvent, now: datetime) -> bool:
    """Says whether an event is of a run before the one that the version follows."""
    if event.time is None or version.run_time is None:
        return False
    return event.time < version.run_time <= now


def _check_edge(version: Version, state: State) -> None:
    if state not in GRAPH[version.state]:
        raise IllegalTransition(f"{version.name}: {version.state} -> {state}")
