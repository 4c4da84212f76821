"""What a training is and how its state may change: pure rules, no transport, no storage."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import google.rpc.code_pb2 as codes

from detflow.errors import DetflowError, FailedPrecondition
from detflow.v1.common_pb2 import Failure, StoredObject
from detflow.v1.training_pb2 import Preflight, WarmStart

MAX_RESTARTS = 3
"""New attempts after crashes before a training fails; a user's resume starts counting again."""

_ID = "[a-z0-9-]{1,63}"
_NAME = re.compile(f"projects/{_ID}/versions/{_ID}/trainings/{_ID}")
_RETRIED_CODES = frozenset({codes.RESOURCE_EXHAUSTED, codes.UNAVAILABLE, codes.ABORTED})

_CONCLUSIVE_CODES = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "DATA_LOSS"})
_PASSING_REASONS = frozenset({"DISK_FULL", "BAD_SETTING"})


class State(StrEnum):
    """State of a training; the names are those of detflow.v1.Training.State."""

    QUEUED = "QUEUED"
    PROVISIONING = "PROVISIONING"
    RUNNING = "RUNNING"
    EVALUATING = "EVALUATING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"
    PAUSED = "PAUSED"


class StopMode(StrEnum):
    """How a training is stopped; names as in detflow.v1.StopMode, without the prefix."""

    PAUSE = "PAUSE"
    FINISH = "FINISH"
    DISCARD = "DISCARD"


LIVE = frozenset({State.QUEUED, State.PROVISIONING, State.RUNNING, State.EVALUATING})
"""At most one training of a version is in one of these."""

ATTEMPTING = LIVE - {State.QUEUED}
"""An attempt is under way: it has an owner and a lease, and its records are accepted."""

FINAL = frozenset(State) - LIVE
"""A watch ends here; PAUSED and FAILED can be resumed, the other two never change."""

RESUMABLE = frozenset({State.PAUSED, State.FAILED})

TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PROVISIONING, State.FAILED, State.STOPPED, State.PAUSED}),
    State.PROVISIONING: frozenset(
        {State.RUNNING, State.QUEUED, State.FAILED, State.STOPPED, State.PAUSED}
    ),
    State.RUNNING: frozenset(
        {State.EVALUATING, State.QUEUED, State.FAILED, State.STOPPED, State.PAUSED}
    ),
    State.EVALUATING: frozenset(
        {State.SUCCEEDED, State.QUEUED, State.FAILED, State.STOPPED, State.PAUSED}
    ),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.STOPPED: frozenset(),
    State.PAUSED: frozenset({State.QUEUED}),
}


def sources_of(target: State) -> list[State]:
    """Returns the states from which `target` may be reached in one step."""
    return [state for state in State if target in TRANSITIONS[state]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a user wants trained, checked and complete.

    Attributes:
        project: Id of the project.
        version: Id of the version.
        model: Id of the model.
        batch_size: Images per update of the weights that are seen together.
        epochs: Passes over the training split.
        hyperparameters: Value in force by name.
        manifest: Manifest of the version's bundle.
        priority: Among the trainings that wait, higher goes first.
        num_nodes: Machines.
        num_devices_per_node: GPUs, or processes on CPUs, per machine.
        warm_start: Weights to begin with, as asked for.
        warm_start_weights: The object these were at the start.
    """

    project: str
    version: str
    model: str
    batch_size: int
    epochs: int
    hyperparameters: Mapping[str, float | bool | str]
    manifest: StoredObject
    priority: int = 0
    num_nodes: int = 1
    num_devices_per_node: int = 1
    warm_start: WarmStart | None = None
    warm_start_weights: StoredObject | None = None

    @property
    def num_devices(self) -> int:
        """Devices in all."""
        return self.num_nodes * self.num_devices_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Training(Plan):
    """One training as it is stored.

    Attributes:
        step_batch_size: Images that are in memory together; below `batch_size` after running out
            of memory.
        preflight: What was found before the first step.
        attempt: Number of the current or last attempt; 0 before the first.
        num_restarts: New attempts after crashes since the start or the last resume.
        owner: Trainer process that carries out the attempt; None unless one is under way.
        predictions_written: The current attempt's predictions are stored and announced.
    """

    id: str
    state: State
    revision: int
    step_batch_size: int
    preflight: Preflight | None
    attempt: int
    num_epochs_done: int
    num_restarts: int
    stop_mode: StopMode | None
    failure: Failure | None
    weights: StoredObject | None
    owner: str | None
    predictions_written: bool
    create_time: datetime.datetime
    start_time: datetime.datetime | None
    end_time: datetime.datetime | None

    @property
    def name(self) -> str:
        """Resource name."""
        return training_name(self.project, self.version, self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingName:
    """A parsed resource name of a training."""

    project: str
    version: str
    training: str

    @staticmethod
    def is_valid(name: str) -> bool:
        """Says whether a name can be one of a training."""
        return _NAME.fullmatch(name) is not None

    @classmethod
    def parse(cls, name: str) -> TrainingName:
        """Takes projects/{project}/versions/{version}/trainings/{training} apart."""
        _, project, _, version, _, training = name.split("/")
        return cls(project=project, version=version, training=training)


def training_name(project: str, version: str, training: str) -> str:
    """Returns the resource name of a training."""
    return f"projects/{project}/versions/{version}/trainings/{training}"


def is_retried(failure: Failure) -> bool:
    """Says whether another attempt can help: something ran out or was away for a while."""
    return failure.status.code in _RETRIED_CODES


def is_conclusive(error: DetflowError) -> bool:
    """Says whether a problem that was met while trying a training in the queue will stay.

    Its data, its settings and what it begins with do; memory, disks and machines may be others by
    the time its turn comes.
    """
    return error.code.name in _CONCLUSIVE_CODES and error.reason not in _PASSING_REASONS


def after_crash(stop_mode: StopMode | None, num_restarts: int) -> State:
    """Returns where a training goes whose attempt died of what another one can survive."""
    if stop_mode in (StopMode.PAUSE, StopMode.DISCARD):
        return after_stop(stop_mode)
    return State.QUEUED if num_restarts < MAX_RESTARTS else State.FAILED


def after_stop(mode: StopMode) -> State:
    """Returns where a stop ends."""
    return State.PAUSED if mode is StopMode.PAUSE else State.STOPPED


def after_evaluation(stop_mode: StopMode | None) -> State | None:
    """Returns where a measured training goes; None where an accepted stop decides instead."""
    if stop_mode is None:
        return State.SUCCEEDED
    return State.STOPPED if stop_mode is StopMode.FINISH else None


# A stop may only become more urgent: the user was promised at least what was asked for first.
_URGENCY = {None: 0, StopMode.FINISH: 1, StopMode.PAUSE: 2, StopMode.DISCARD: 3}


@dataclass(frozen=True, slots=True)
class Stop:
    """What a request to stop does: nothing, a new `mode` to carry out, or a `state` at once."""

    mode: StopMode | None = None
    state: State | None = None


def decide_stop(training: Training, mode: StopMode) -> Stop:
    """Decides what a request to stop does to a training.

    Raises:
        FailedPrecondition: TRAINING_NOT_LIVE, it has ended; STOP_IN_PROGRESS, a more urgent stop
            is being carried out.
    """
    if training.state in FINAL:
        if training.stop_mode is mode and training.state is after_stop(mode):
            return Stop()
        raise FailedPrecondition(
            f"{training.name} is {training.state} and cannot be stopped any more",
            reason="TRAINING_NOT_LIVE",
            metadata={"training": training.name, "state": training.state},
        )
    if training.stop_mode is mode and training.state is not State.QUEUED:
        return Stop()
    if _URGENCY[training.stop_mode] > _URGENCY[mode]:
        raise FailedPrecondition(
            f"{training.name} is being stopped ({training.stop_mode});"
            " only a more urgent mode can replace that",
            reason="STOP_IN_PROGRESS",
            metadata={"training": training.name, "stop_mode": str(training.stop_mode)},
        )
    if training.state is State.QUEUED:
        return Stop(mode, after_stop(mode))
    return Stop(mode)


def check_resumable(training: Training) -> None:
    """Checks that a training can go on.

    Raises:
        FailedPrecondition: TRAINING_NOT_RESUMABLE, it is neither PAUSED nor FAILED.
    """
    if training.state not in RESUMABLE:
        raise FailedPrecondition(
            f"{training.name} is {training.state}; only a PAUSED or FAILED training can be resumed",
            reason="TRAINING_NOT_RESUMABLE",
            metadata={"training": training.name, "state": training.state},
        )
