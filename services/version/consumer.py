"""When a preprocessing or a training changes its state, the version follows."""

from __future__ import annotations

from datetime import datetime

from detflow import events, telemetry
from detflow.consumer import Consumer
from detflow.errors import Cancelled, NotFound, failure
from detflow.events import Bus, Delivered
from detflow.postgres import Connection, Database
from detflow.v1 import events_pb2, preprocess_pb2, training_pb2
from services.version import domain, store
from services.version.service import announce

log = telemetry.get_logger(__name__)

NAME = "version-projection"
SUBJECTS = (
    "detflow.v1.preprocessing.*.state_changed",
    "detflow.v1.training.*.state_changed",
)


def projection(bus: Bus, db: Database) -> Consumer[events_pb2.Event]:
    """Makes the consumer that keeps `Version.state`."""
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
    subject = event.preprocessing.version if what == "preprocessing" else event.training.name
    project_id, version_id = _version_of(subject)
    try:
        version = await store.get_version(conn, project_id, version_id, lock=True)
    except NotFound:
        log.info("event of an unknown version ignored", subject=delivered.subject, name=subject)
        return
    try:
        if what == "preprocessing":
            await _project_preprocessing(conn, version, event.preprocessing)
        else:
            time = delivered.carrier.get("ce-time")
            await _project_training(
                conn, version, event.training, datetime.fromisoformat(time) if time else None
            )
    except domain.TooEarly as error:
        raise events.TooEarly(delivered.subject) from error


async def _project_preprocessing(
    conn: Connection, version: domain.Version, preprocessing: preprocess_pb2.Preprocessing
) -> None:
    after = domain.project_preprocessing(version, preprocessing_from_proto(preprocessing))
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
) -> None:
    event = training_from_proto(training, time)
    followed = await store.get_followed_training(conn, event.training_id)
    projected = domain.project_training(version, followed, event, await store.get_time(conn))
    if projected is None:
        return
    after, followed = projected
    await store.update_followed_training(conn, version.id, followed)
    if after.state is not version.state:
        await _move(conn, version, after)


async def _move(conn: Connection, before: domain.Version, after: domain.Version) -> None:
    moved = await store.update_state(conn, before, after)
    await announce(conn, moved, "state_changed")
    log.info(
        "version moved",
        version=moved.name,
        before=before.state,
        state=moved.state,
        revision=moved.revision,
    )


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
        failure=message.failure.SerializeToString() if message.HasField("failure") else None,
        time=time,
    )


def _version_of(name: str) -> tuple[str, str]:
    """Returns the project and version ids of a version's or a training's name."""
    _, project_id, _, version_id, *_ = name.split("/")
    return project_id, version_id
