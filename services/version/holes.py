"""What becomes of a version when an event that later ones build on was put aside.

Pure rules, as in `domain`. An event carries the whole state of its resource, so nothing is lost but
the steps in between: they are made up for, and a version's history stays a path of its graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from services.version.domain import (
    GRAPH,
    LIVE,
    FollowedTraining,
    IllegalTransition,
    PreprocessingEvent,
    State,
    TrainingEvent,
    Version,
    is_history,
    project_preprocessing,
    state_of_training,
)


def project_preprocessing_across(version: Version, event: PreprocessingEvent) -> Version | None:
    """Applies a change of the version's preprocessing, whichever before it are missing.

    Returns:
        The version afterwards, or None if this event or a later one was applied before.

    Raises:
        IllegalTransition: Preprocessing ended before.
    """
    known = max(version.preprocessing_revision, event.revision - 1)
    return project_preprocessing(replace(version, preprocessing_revision=known), event)


def project_training_across(
    version: Version, followed: FollowedTraining | None, event: TrainingEvent, now: datetime
) -> tuple[Sequence[Version], FollowedTraining] | None:
    """Applies a change of one of the version's trainings, whichever before it are missing.

    Arguments as of `domain.project_training`.

    Returns:
        The version after each step on its way, and the training; None if this event or a later one
        was applied before.

    Raises:
        IllegalTransition: The version has nothing to train on.
    """
    if followed is not None and event.revision <= followed.revision:
        return None
    seen = FollowedTraining(
        training_id=event.training_id,
        revision=event.revision,
        state=event.state,
        attempt=event.attempt,
    )
    current = version.training_id == event.training_id
    if version.state is State.COMPLETED or (not current and is_history(version, event, now)):
        return (), seen
    if version.bundle is None:
        raise IllegalTransition(f"{version.name} has no bundle to train on")
    state = state_of_training(event)
    # A training that takes the version over begins in the queue.
    way = [] if current else _shortest_way(version.state, State.QUEUED)
    begun = State.QUEUED if way else version.state
    if begun is not state:
        way += _shortest_way(begun, state)
    steps = [version]
    for step in way:
        before = steps[-1]
        if step is State.QUEUED and (not current or before.state not in LIVE):
            before = replace(before, training_id=event.training_id, run_time=event.time)
        steps.append(replace(before, state=step, failure=None))
    if len(steps) > 1 and state is State.FAILED:
        steps[-1] = replace(steps[-1], failure=event.failure)
    return steps[1:], seen


def _shortest_way(source: State, target: State) -> list[State]:
    """Returns the states after `source` up to `target`: at least one step."""
    ways = deque([[source]])
    while ways:
        way = ways.popleft()
        # From the back: an end that nobody knows is PAUSED rather than a failure without a reason.
        for state in reversed(State):
            if state in GRAPH[way[-1]]:
                if state is target:
                    return [*way[1:], state]
                if state not in way:
                    ways.append([*way, state])
    raise IllegalTransition(f"there is no way from {source} to {target}")
