"""When a preprocessing or a training changes its state or was measured, the version follows."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from detflow import events, telemetry
from detflow.consumer import Consumer, list_dead
from detflow.errors import Cancelled, NotFound, failure
from detflow.events import Bus, Delivered
from detflow.postgres import Connection, Database
from detflow.v1 import common_pb2, events_pb2, metrics_pb2, preprocess_pb2, training_pb2
from services.version import domain, holes, store, trainings
from services.version.service import announce

log = telemetry.get_logger(__name__)

NAME = "version-projection"
SUBJECTS = (
    "detflow.v1.preprocessing.*.state_changed",
    "detflow.v1.training.*.state_changed",
    "detflow.v1.evaluation.*.completed",
)


def projection(bus: Bus, db: Database) -> Consumer[events_pb2.Event]:
    """Makes the consumer that keeps `Version.state` and `Version.metrics`."""
    return Consumer(
        bus,
        db,
        name=NAME,
        stream=events.EVENTS_STREAM,
        subjects=SUBJECTS,
        decode=events_pb2.Event.FromString,
        handle=project,
    )


async def project(conn: Connection, delivered: Delivered[events_pb2.Event]) -> None:
    """Applies one event, in the transaction that notes it as received.

    Raises:
        events.TooEarly: It came before one that it builds on.
        domain.IllegalTransition: It is no step of the state graph.
    """
    event = delivered.message
    what = event.WhichOneof("what")
    subject = {
        "preprocessing": event.preprocessing.version,
        "training": event.training.name,
        "evaluation": event.evaluation.name,
    }[what or ""]
    project_id, version_id = _version_of(subject)
    try:
        version = await store.get_version(conn, project_id, version_id, lock=True)
    except NotFound:
        log.info("event of an unknown version ignored", subject=delivered.subject, name=subject)
        return
    try:
        if what == "preprocessing":
            await _project_preprocessing(conn, version, event.preprocessing, delivered)
        elif what == "evaluation":
            await _project_evaluation(conn, version, event.evaluation)
        else:
            time = delivered.carrier.get("ce-time")
            await _project_training(
                conn,
                version,
                event.training,
                datetime.fromisoformat(time) if time else None,
                delivered,
            )
    except domain.TooEarly as error:
        raise events.TooEarly(delivered.subject) from error


async def _has_hole(
    conn: Connection, version: domain.Version, delivered: Delivered[events_pb2.Event]
) -> bool:
    """Says whether an event that this one may build on was put aside and will not come."""
    resources = {delivered.resource, f"preprocessing.{version.id}"}
    if version.training_id is not None:
        resources.add(f"training.{version.training_id}")
    dead = [id_ for resource in resources for id_ in await list_dead(conn, NAME, resource)]
    return any(id_ != delivered.event_id for id_ in dead)


async def _project_preprocessing(
    conn: Connection,
    version: domain.Version,
    preprocessing: preprocess_pb2.Preprocessing,
    delivered: Delivered[events_pb2.Event],
) -> None:
    event = preprocessing_from_proto(preprocessing)
    try:
        after = domain.project_preprocessing(version, event)
    except domain.TooEarly:
        if not await _has_hole(conn, version, delivered):
            raise
        after = holes.project_preprocessing_across(version, event)
    if after is None:
        return
    if after.state is version.state:
        await store.update_preprocessing_revision(conn, version.id, after.preprocessing_revision)
        return
    await _move(conn, version, after)


async def _project_training(
    conn: Connection,
    version: domain.Version,
    training: training_pb2.Training,
    time: datetime | None,
    delivered: Delivered[events_pb2.Event],
) -> None:
    event = training_from_proto(training, time)
    followed = await trainings.get_followed_training(conn, event.training_id)
    now = await store.get_time(conn)
    try:
        projected = domain.project_training(version, followed, event, now)
    except (domain.TooEarly, domain.IllegalTransition):
        if not await _has_hole(conn, version, delivered):
            raise
        across = holes.project_training_across(version, followed, event, now)
        if across is None:
            return
        steps, seen = across
        for step in steps[:-1]:
            version = await _move(conn, version, step)
        projected = (steps[-1] if steps else version), seen
    if projected is None:
        return
    after, followed = projected
    await trainings.update_followed_training(conn, version.id, followed)
    if followed.state is domain.TrainingState.SUCCEEDED:
        after = replace(after, metrics=await trainings.get_newest_metrics(conn, version.id))
    if (after.state, after.metrics) != (version.state, version.metrics):
        await _move(conn, version, after)


async def _project_evaluation(
    conn: Connection, version: domain.Version, evaluation: metrics_pb2.Evaluation
) -> None:
    metrics = metrics_from_proto(evaluation)
    if metrics is None:
        return
    await trainings.insert_evaluation(conn, version.id, evaluation.attempt, metrics)
    after = replace(version, metrics=await trainings.get_newest_metrics(conn, version.id))
    if after.metrics != version.metrics:
        await _move(conn, version, after)


async def _move(conn: Connection, before: domain.Version, after: domain.Version) -> domain.Version:
    moved = await store.update_state(conn, before, after)
    await announce(conn, moved, "updated" if after.state is before.state else "state_changed")
    log.info(
        "version moved",
        version=moved.name,
        before=before.state,
        state=moved.state,
        revision=moved.revision,
    )
    return moved


def preprocessing_from_proto(message: preprocess_pb2.Preprocessing) -> domain.PreprocessingEvent:
    """Converts the event of a preprocessing."""
    state = domain.PreprocessingState(preprocess_pb2.Preprocessing.State.Name(message.state))
    bundle = None
    if message.HasField("manifest"):
        counts = message.num_images
        bundle = domain.Bundle(
            manifest=domain.StoredObject(
                key=message.manifest.key,
                size_bytes=message.manifest.size_bytes,
                sha256=message.manifest.sha256,
            ),
            num_images=(counts.train, counts.val, counts.test),
        )
    why = message.failure if message.HasField("failure") else None
    if why is None and state is domain.PreprocessingState.CANCELLED:
        why = failure(
            Cancelled(
                "preprocessing was cancelled because the version was deleted; create it again",
                reason="PREPROCESSING_CANCELLED",
            )
        )
    return domain.PreprocessingEvent(
        revision=message.revision,
        state=state,
        bundle=bundle,
        failure=why.SerializeToString() if why is not None else None,
    )


def training_from_proto(
    message: training_pb2.Training, time: datetime | None
) -> domain.TrainingEvent:
    """Converts the event of a training that was committed at `time`."""
    return domain.TrainingEvent(
        training_id=message.name.split("/")[5],
        revision=message.revision,
        state=domain.TrainingState(training_pb2.Training.State.Name(message.state)),
        attempt=message.attempt,
        failure=message.failure.SerializeToString() if message.HasField("failure") else None,
        time=time,
    )


def metrics_from_proto(evaluation: metrics_pb2.Evaluation) -> domain.Metrics | None:
    """Converts an evaluation; None if it says nothing of the test split."""
    coco, best_f1 = evaluation.coco, evaluation.best_f1
    is_measured = evaluation.state == metrics_pb2.Evaluation.SUCCEEDED and coco.map50_95 >= 0
    if evaluation.split != common_pb2.SPLIT_TEST or not is_measured:
        return None
    return domain.Metrics(
        training_id=evaluation.name.split("/")[5],
        map50=coco.map50,
        map50_95=coco.map50_95,
        precision=best_f1.precision,
        recall=best_f1.recall,
    )


def _version_of(name: str) -> tuple[str, str]:
    """Returns the project and version ids of a version's name or of one below it."""
    _, project_id, _, version_id, *_ = name.split("/")
    return project_id, version_id
