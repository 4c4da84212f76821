"""The gRPC servicer of the trainer: checks, calls, converts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct, Value

from detflow import channels, outbox
from detflow.errors import FailedPrecondition, NotFound, not_found
from detflow.names import new_id
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Connection, Database
from detflow.v1 import trainer_pb2, trainer_pb2_grpc, training_pb2, version_pb2, version_pb2_grpc
from detflow.v1.common_pb2 import Heartbeat
from detflow.watch import Beat, Change, Gauge, Snapshot, Watcher
from services.trainer import store
from services.trainer.domain import (
    FINAL,
    State,
    StopMode,
    Training,
    TrainingName,
    check_resumable,
    decide_stop,
)
from services.trainer.hyperparameter import Hyperparameter, Type
from services.trainer.hyperparameters import SCHEMA, resolve
from services.trainer.models import MODELS, Model, get_model

DEFAULT_BATCH_SIZE = 16
DEFAULT_EPOCHS = 200

_ANY_VERSION = "-"
_Version = version_pb2.Version


class TrainerService(trainer_pb2_grpc.TrainerServiceServicer):
    """Trainings and the model catalogue.

    Args:
        versions: Stub of the version service.
    """

    def __init__(
        self,
        db: Database,
        watcher: Watcher,
        versions: version_pb2_grpc.VersionServiceAsyncStub,
    ) -> None:
        self._db = db
        self._watcher = watcher
        self._versions = versions

    async def ListModels(
        self, request: trainer_pb2.ListModelsRequest, context: object
    ) -> trainer_pb2.ListModelsResponse:
        """Lists the catalogue."""
        return trainer_pb2.ListModelsResponse(models=[_model_message(model) for model in MODELS])

    async def GetHyperparameterSchema(
        self, request: trainer_pb2.GetHyperparameterSchemaRequest, context: object
    ) -> trainer_pb2.GetHyperparameterSchemaResponse:
        """Returns the schema that requests are checked against."""
        return trainer_pb2.GetHyperparameterSchemaResponse(
            hyperparameters=[_hyperparameter_message(entry) for entry in SCHEMA]
        )

    async def StartTraining(
        self, request: trainer_pb2.StartTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Queues a training of a version."""
        _, project, _, version = request.parent.split("/")
        async with self._db.connection() as conn:
            known = await store.get_by_request(conn, project, version, request.request_id)
        if known is not None:
            return store.to_message(known)
        asked = request.training
        model = get_model(asked.model)
        batch_size = asked.batch_size if asked.HasField("batch_size") else DEFAULT_BATCH_SIZE
        epochs = asked.epochs if asked.HasField("epochs") else DEFAULT_EPOCHS
        hyperparameters = resolve(
            _plain(asked.hyperparameters), model=model, batch_size=batch_size, epochs=epochs
        )
        source = await self._get_version(project, version)
        async with self._db.transaction() as conn:
            await store.lock_version(conn, version)
            known = await store.get_by_request(conn, project, version, request.request_id)
            if known is not None:
                return store.to_message(known)
            # What is known here is newer than the version's view of its trainings.
            await store.check_startable(conn, project, version)
            _check_ready(source)
            training = await store.insert_training(
                conn,
                training_id=new_id(),
                project=project,
                version=version,
                request_id=request.request_id,
                model=model.id,
                batch_size=batch_size,
                epochs=epochs,
                hyperparameters=hyperparameters,
                manifest=source.manifest,
            )
        return store.to_message(training)

    async def GetTraining(
        self, request: trainer_pb2.GetTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Reads one training."""
        async with self._db.connection() as conn:
            return store.to_message(await _find(conn, request.name))

    async def ListTrainings(
        self, request: trainer_pb2.ListTrainingsRequest, context: object
    ) -> trainer_pb2.ListTrainingsResponse:
        """Reads a page of trainings, newest first."""
        _, project, _, version = request.parent.split("/")
        query = f"ListTrainings {request.parent}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            trainings = await store.list_trainings(
                conn,
                project=project,
                version=None if version == _ANY_VERSION else version,
                before=str(key[0]) if key else None,
                limit=size + 1,
            )
        if not trainings and version != _ANY_VERSION:
            await self._get_version(project, version)  # none, or no such version?
        page = trainings[:size]
        more = len(trainings) > size
        return trainer_pb2.ListTrainingsResponse(
            trainings=[store.to_message(training) for training in page],
            next_page_token=encode_token(query, page[-1].id) if more else "",
        )

    async def StopTraining(
        self, request: trainer_pb2.StopTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Stops a training that waits, or has its owner stop it."""
        mode = _stop_mode(request.mode)
        async with self._db.transaction() as conn:
            training = await _find(conn, request.name, lock=True)
            stop = decide_stop(training, mode)
            if stop.state is not None:
                training = await store.stop_queued(conn, training.id, mode) or training
            elif stop.mode is not None:
                training = await store.update_stop_mode(conn, training.id, mode) or training
            return store.to_message(training)

    async def ResumeTraining(
        self, request: trainer_pb2.ResumeTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Queues a training again."""
        name = TrainingName.parse(request.name)
        async with self._db.transaction() as conn:
            await store.lock_version(conn, name.version)
            training = await _find(conn, request.name, lock=True)
            check_resumable(training)
            try:
                await store.check_startable(conn, name.project, name.version)
            except NotFound as error:
                raise FailedPrecondition(
                    f"the version of {training.name} is in the trash; undelete it first",
                    reason="VERSION_DELETED",
                ) from error
            resumed = await store.resume_training(conn, training.id)
            assert resumed is not None  # the row is locked, and so is its version
            return store.to_message(resumed)

    async def WatchTraining(
        self, request: trainer_pb2.WatchTrainingRequest, context: object
    ) -> AsyncIterator[trainer_pb2.WatchTrainingResponse]:
        """Streams a training until it has ended."""
        async with self._db.connection() as conn:
            current = await _find(conn, request.name)
        attempt = 0

        async def snapshot() -> Snapshot[Training]:
            async with self._db.transaction(isolation="repeatable_read") as conn:
                training = await _find(conn, request.name)
                seqs = await outbox.last_seqs(conn, [f"training.{training.id}"])
            return Snapshot(training, seqs)

        items = self._watcher.follow(
            subjects=[f"detflow.v1.training.{current.id}.*"],
            cursor=request.cursor,
            snapshot=snapshot,
            progress_subject=f"detflow.progress.training.{current.id}",
        )
        async with contextlib.aclosing(items):
            async for item in items:
                response = trainer_pb2.WatchTrainingResponse(cursor=item.cursor)
                if isinstance(item, Snapshot):
                    response.training.CopyFrom(store.to_message(item.value))
                elif isinstance(item, Change):
                    _fill(response, item)
                elif isinstance(item, Gauge):
                    response.progress.ParseFromString(item.payload)
                    if response.progress.attempt < attempt:
                        continue
                else:
                    response.heartbeat.CopyFrom(Heartbeat())
                if response.WhichOneof("what") is None:
                    continue
                yield response
                if response.HasField("training"):
                    attempt = max(attempt, response.training.attempt)
                if isinstance(item, Beat) or _is_final(response):
                    if await self._has_ended(current.id, response):
                        return

    async def _has_ended(
        self, training_id: str, response: trainer_pb2.WatchTrainingResponse
    ) -> bool:
        """Says whether nothing comes after this response.

        A final state in a replay may have been resumed from since. A watch that began with the
        cursor of the final state gets nothing but a heartbeat: by then everything older than it
        has been delivered.
        """
        async with self._db.connection() as conn:
            training = await store.get_training(conn, training_id)
            if training is None or training.state not in FINAL:
                return False
            if response.HasField("training"):
                return response.training.revision >= training.revision
            return await store.ended_before(conn, training_id, seconds=10)

    async def _get_version(self, project: str, version: str) -> _Version:
        """Asks the version service.

        Raises:
            NotFound: It does not exist, is in the trash or belongs to another project.
        """
        name = f"projects/{project}/versions/{version}"
        with channels.translate():
            found = await self._versions.GetVersion(version_pb2.GetVersionRequest(name=name))
        if found.HasField("delete_time"):
            raise store.version_not_found(project, version)
        return found


async def _find(conn: Connection, name: str, *, lock: bool = False) -> Training:
    """Reads a training by its name.

    Raises:
        NotFound: There is none, or its project or version is another.
    """
    training = await store.get_training(conn, TrainingName.parse(name).training, lock=lock)
    if training is None or training.name != name:
        raise not_found(name)
    return training


def _check_ready(version: _Version) -> None:
    """Checks that a version can be trained, as far as preprocessing goes.

    Raises:
        FailedPrecondition: VERSION_NOT_READY.
    """
    # A training state may lag behind: a live one has been ruled out in our own tables.
    if version.HasField("manifest") and version.state != _Version.COMPLETED:
        return
    state = _Version.State.Name(version.state)
    remedy = (
        "wait until it is READY"
        if version.state == _Version.PREPROCESSING
        else "create another version"
    )
    raise FailedPrecondition(
        f"{version.name} is {state} and cannot be trained; {remedy}",
        reason="VERSION_NOT_READY",
        metadata={"version": version.name, "state": state},
    )


def _stop_mode(mode: training_pb2.StopMode.ValueType) -> StopMode:
    if mode == training_pb2.STOP_MODE_UNSPECIFIED:
        return StopMode.PAUSE
    return StopMode(training_pb2.StopMode.Name(mode).removeprefix("STOP_MODE_"))


def _plain(values: Struct) -> Mapping[str, object]:
    """Returns a Struct as Python values; NaN and infinities stay what they are."""
    return {name: _plain_value(value) for name, value in values.fields.items()}


def _plain_value(value: Value) -> object:
    kind = value.WhichOneof("kind")
    if kind in ("number_value", "bool_value", "string_value"):
        return getattr(value, kind)
    return None if kind in (None, "null_value") else json_format.MessageToDict(value)


def _fill(response: trainer_pb2.WatchTrainingResponse, change: Change) -> None:
    """Puts a training's event into a response; `what` stays unset for those not shown."""
    match change.event.WhichOneof("what"):
        case "training":
            response.training.CopyFrom(change.event.training)
        case "epoch":
            response.epoch.CopyFrom(change.event.epoch)
        case "log":
            response.log.CopyFrom(change.event.log)


def _is_final(response: trainer_pb2.WatchTrainingResponse) -> bool:
    if not response.HasField("training"):
        return False
    return State(training_pb2.Training.State.Name(response.training.state)) in FINAL


def _model_message(model: Model) -> trainer_pb2.Model:
    return trainer_pb2.Model(
        name=f"models/{model.id}",
        display_name=model.display_name,
        family=model.family,
        input_size_px=model.input_size_px,
        num_parameters=model.num_parameters,
        licence=model.licence,
    )


def _hyperparameter_message(entry: Hyperparameter) -> trainer_pb2.Hyperparameter:
    message = trainer_pb2.Hyperparameter(
        name=entry.name,
        type=trainer_pb2.Hyperparameter.Type.Value(entry.type.name),
        minimum=entry.range.minimum if entry.range else None,
        maximum=entry.range.maximum if entry.range else None,
        multiple_of=entry.range.multiple_of if entry.type is Type.INTEGER and entry.range else 0,
        choices=entry.choices,
        families=entry.families,
        help_en=entry.help_en,
        help_ko=entry.help_ko,
    )
    for family in entry.families:
        if allowed := entry.family_ranges.get(family):
            message.family_ranges[family].CopyFrom(
                trainer_pb2.HyperparameterRange(
                    minimum=allowed.minimum,
                    maximum=allowed.maximum,
                    multiple_of=allowed.multiple_of,
                )
            )
    for family, default in entry.defaults().items():
        message.defaults[family].CopyFrom(_value(default))
    return message


def _value(value: float | bool | str) -> Value:
    if isinstance(value, bool):
        return Value(bool_value=value)
    return Value(string_value=value) if isinstance(value, str) else Value(number_value=value)
