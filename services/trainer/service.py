"""The gRPC servicer of the trainer: checks, calls, converts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Sequence

from detflow import channels, outbox
from detflow.errors import (
    FailedPrecondition,
    NotFound,
    bad_field,
)
from detflow.masks import check_mask
from detflow.names import new_id
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Connection, Database
from detflow.projects import Projects
from detflow.sharing import SharedRead
from detflow.v1 import trainer_pb2, trainer_pb2_grpc, training_pb2, version_pb2, version_pb2_grpc
from detflow.v1.common_pb2 import Heartbeat
from detflow.watch import Beat, Change, Gauge, Snapshot, Watcher
from services.trainer import queue, retention, store, versions
from services.trainer.catalogue import hyperparameter_message, model_message
from services.trainer.domain import (
    FINAL,
    Plan,
    State,
    StopMode,
    Training,
    TrainingName,
    check_resumable,
    decide_stop,
)
from services.trainer.executors import Executor
from services.trainer.hyperparameters import SCHEMA
from services.trainer.messages import plan_message, to_message
from services.trainer.models import MODELS
from services.trainer.quota import RunningQuotas
from services.trainer.retention import Ages
from services.trainer.start import check_devices, check_ready, make_plan
from services.trainer.trials import Trials
from services.trainer.warm_start import check_still_there, find_model, find_weights

_MAX_AGE_SECONDS = 100 * 365 * 86400
_ANY_VERSION = _ANY_PROJECT = "-"
_Version = version_pb2.Version


class TrainerService(trainer_pb2_grpc.TrainerServiceServicer):
    """Trainings and the model catalogue.

    Args:
        versions: Stub of the version service.
        projects: The projects there are.
        executor: Its slots decide what can be started.
        quotas: How many trainings of a project may be under way.
        ages: How long what old trainings keep is kept.
        trials: Tries what is not to be started.
    """

    def __init__(
        self,
        *,
        db: Database,
        watcher: Watcher,
        versions: version_pb2_grpc.VersionServiceAsyncStub,
        projects: Projects,
        executor: Executor,
        quotas: RunningQuotas,
        ages: Ages,
        trials: Trials,
    ) -> None:
        self._db = db
        self._watcher = watcher
        self._versions = versions
        self._projects = projects
        self._executor = executor
        self._quotas = quotas
        self._ages = ages
        self._trials = trials
        # Many watch one training, and each change is news to all of them at once.
        self._found = SharedRead(self._find)
        self._snapshots = SharedRead(self._snapshot)
        self._places = SharedRead(self._place)

    async def ListModels(
        self, request: trainer_pb2.ListModelsRequest, context: object
    ) -> trainer_pb2.ListModelsResponse:
        """Lists the catalogue."""
        return trainer_pb2.ListModelsResponse(models=[model_message(model) for model in MODELS])

    async def GetHyperparameterSchema(
        self, request: trainer_pb2.GetHyperparameterSchemaRequest, context: object
    ) -> trainer_pb2.GetHyperparameterSchemaResponse:
        """Returns the schema that requests are checked against."""
        return trainer_pb2.GetHyperparameterSchemaResponse(
            hyperparameters=[hyperparameter_message(entry) for entry in SCHEMA]
        )

    async def StartTraining(
        self, request: trainer_pb2.StartTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Queues a training of a version, or only tries it."""
        _, project, _, version = request.parent.split("/")
        if request.validate_only:
            return await self._try_training(request)
        async with self._db.connection() as conn:
            known = await store.get_by_request(conn, project, version, request.request_id)
            if known is not None:
                return await self._shown(conn, known)
        plan = await self._plan(request.training, project, version)
        source = await self._get_version(project, version)
        await self._quotas.keep(project)
        async with self._db.transaction() as conn:
            await versions.lock_version(conn, version)
            known = await store.get_by_request(conn, project, version, request.request_id)
            if known is not None:
                return await self._shown(conn, known)
            training = await store.insert_training(
                conn,
                training_id=new_id(),
                request_id=request.request_id,
                plan=await _complete(conn, plan, source),
            )
            return await self._shown(conn, training)

    async def _try_training(
        self, request: trainer_pb2.StartTrainingRequest
    ) -> training_pb2.Training:
        """Checks a training as a start does, and tries it; nothing is queued."""
        _, project, _, version = request.parent.split("/")
        plan = await self._plan(request.training, project, version)
        source = await self._get_version(project, version)
        async with self._db.transaction() as conn:
            plan = await _complete(conn, plan, source)
        message = plan_message(plan)
        message.preflight.CopyFrom(await self._trials.run(plan))
        return message

    async def _plan(self, asked: training_pb2.Training, project: str, version: str) -> Plan:
        """Checks and completes what a user asks for; the model may be that of a warm start."""
        if not asked.model and asked.HasField("warm_start"):
            async with self._db.connection() as conn:
                asked.model = await find_model(conn, project, asked.warm_start)
        return make_plan(asked, project=project, version=version, slots=self._executor.slots)

    async def GetTraining(
        self, request: trainer_pb2.GetTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Reads one training."""
        async with self._db.connection() as conn:
            return await self._shown(conn, await store.find_training(conn, request.name))

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
            messages = await self._all_shown(conn, trainings[:size])
        if not trainings:  # or is there no such parent?
            if version == _ANY_VERSION:
                await self._projects.check(f"projects/{project}")
            else:
                await self._get_version(project, version)
        more = len(trainings) > size
        return trainer_pb2.ListTrainingsResponse(
            trainings=messages,
            next_page_token=encode_token(query, trainings[size - 1].id) if more else "",
        )

    async def UpdateTraining(
        self, request: trainer_pb2.UpdateTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Gives a training that waits another priority."""
        name = request.training.name
        if not TrainingName.is_valid(name):
            problem = f"must be the name of a training, not {name!r}"
            raise bad_field("training.name", "BAD_RESOURCE_NAME", problem)
        check_mask(request.update_mask, "priority")
        async with self._db.transaction() as conn:
            training = await store.find_training(conn, name, lock=True)
            if training.state is not State.QUEUED:
                raise FailedPrecondition(
                    f"{name} is {training.state}; only a training that waits has a priority",
                    reason="TRAINING_NOT_QUEUED",
                    metadata={"training": name, "state": training.state},
                )
            if training.priority != request.training.priority:
                changed = await queue.update_priority(conn, training.id, request.training.priority)
                assert changed is not None  # the row is locked
                training = changed
            return await self._shown(conn, training)

    async def StopTraining(
        self, request: trainer_pb2.StopTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Stops a training that waits, or has its owner stop it."""
        mode = _stop_mode(request.mode)
        async with self._db.transaction() as conn:
            training = await store.find_training(conn, request.name, lock=True)
            stop = decide_stop(training, mode)
            if stop.state is not None:
                training = await store.stop_queued(conn, training.id, mode) or training
            elif stop.mode is not None:
                training = await store.update_stop_mode(conn, training.id, mode) or training
            return await self._shown(conn, training)

    async def ResumeTraining(
        self, request: trainer_pb2.ResumeTrainingRequest, context: object
    ) -> training_pb2.Training:
        """Queues a training again."""
        name = TrainingName.parse(request.name)
        async with self._db.transaction() as conn:
            await versions.lock_version(conn, name.version)
            training = await store.find_training(conn, request.name, lock=True)
            check_resumable(training)
            check_devices(training, self._executor.slots)
            try:
                await store.check_startable(conn, name.project, name.version)
            except NotFound as error:
                raise FailedPrecondition(
                    f"the version of {training.name} is in the trash; undelete it first",
                    reason="VERSION_DELETED",
                ) from error
            await check_still_there(conn, training)
            resumed = await store.resume_training(conn, training.id)
            assert resumed is not None  # the row is locked, and so is its version
            return await self._shown(conn, resumed)

    async def WatchTraining(
        self, request: trainer_pb2.WatchTrainingRequest, context: object
    ) -> AsyncIterator[trainer_pb2.WatchTrainingResponse]:
        """Streams a training until it has ended."""
        current = await self._found.get(request.name)
        attempt = 0
        items = self._watcher.follow(
            subjects=[f"detflow.v1.training.{current.id}.*"],
            cursor=request.cursor,
            snapshot=lambda: self._snapshots.get(request.name),
            progress_subject=f"detflow.progress.training.{current.id}",
        )
        async with contextlib.aclosing(items):
            async for item in items:
                response = trainer_pb2.WatchTrainingResponse(cursor=item.cursor)
                if isinstance(item, Snapshot):
                    response.training.CopyFrom(item.value)
                elif isinstance(item, Change):
                    _fill(response, item)
                    if response.training.state == training_pb2.Training.QUEUED:
                        # Events don't have it: it changes without them.
                        place = await self._places.get(current.id)
                        response.training.queue_position = place.position if place else 0
                        response.training.wait_reason = _wait_reason(place)
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
                    if await self._has_ended(current.name, response):
                        return

    async def PurgeArtifacts(
        self, request: trainer_pb2.PurgeArtifactsRequest, context: object
    ) -> trainer_pb2.PurgeArtifactsResponse:
        """Deletes old checkpoints and exports, or says which those are."""
        project = request.parent.split("/")[1]
        ages = self._ages
        if request.HasField("min_age"):
            if request.min_age.seconds > _MAX_AGE_SECONDS:
                raise bad_field("min_age", "OUT_OF_RANGE", "must be at most 100 years")
            age = request.min_age.ToTimedelta()
            ages = Ages(checkpoints=age, exports=age)
        if project != _ANY_PROJECT:
            await self._projects.check(request.parent)
        async with self._db.connection() as conn:
            transaction = conn.transaction()
            await transaction.start()
            try:
                purged = await retention.purge(
                    conn, ages, None if project == _ANY_PROJECT else project
                )
            except BaseException:
                await transaction.rollback()
                raise
            # What it would do is what it does, but for the end.
            await (transaction.rollback() if request.validate_only else transaction.commit())
        return trainer_pb2.PurgeArtifactsResponse(
            artifacts=[
                trainer_pb2.PurgedArtifacts(
                    kind=trainer_pb2.PurgedArtifacts.Kind.Value(one.kind),
                    project=f"projects/{one.project}",
                    num=one.num,
                    size_bytes=one.size_bytes,
                )
                for one in purged
            ]
        )

    async def _find(self, name: str) -> Training:
        async with self._db.connection() as conn:
            return await store.find_training(conn, name)

    async def _snapshot(self, name: str) -> Snapshot[training_pb2.Training]:
        """Reads a training, and which of its events that includes."""
        async with self._db.transaction(isolation="repeatable_read") as conn:
            training = await store.find_training(conn, name)
            seqs = await outbox.last_seqs(conn, [f"training.{training.id}"])
            return Snapshot(await self._shown(conn, training), seqs)

    async def _shown(self, conn: Connection, training: Training) -> training_pb2.Training:
        """Returns a training as the API shows it, with its place in the queue."""
        (message,) = await self._all_shown(conn, [training])
        return message

    async def _all_shown(
        self, conn: Connection, trainings: Sequence[Training]
    ) -> list[training_pb2.Training]:
        waiting: dict[str, queue.Waiting] = {}
        if ids := [training.id for training in trainings if training.state is State.QUEUED]:
            waiting = await queue.list_waiting(conn, self._executor.slots, ids)
        return [
            to_message(
                training,
                queue_position=place.position if place else 0,
                wait_reason=_wait_reason(place),
            )
            for training in trainings
            for place in [waiting.get(training.id)]
        ]

    async def _place(self, training_id: str) -> queue.Waiting | None:
        """Returns the place of a training in the queue; None if it does not wait any more."""
        async with self._db.connection() as conn:
            waiting = await queue.list_waiting(conn, self._executor.slots, [training_id])
        return waiting.get(training_id)

    async def _has_ended(self, name: str, response: trainer_pb2.WatchTrainingResponse) -> bool:
        """Says whether nothing comes after this response.

        A final state in a replay may have been resumed from since. A watch that began with the
        cursor of the final state gets nothing but a heartbeat: by then everything older than it
        has been delivered.
        """
        training = await self._found.get(name)
        if training.state not in FINAL:
            return False
        if response.HasField("training"):
            return response.training.revision >= training.revision
        async with self._db.connection() as conn:
            return await store.ended_before(conn, training.id, seconds=10)

    async def _get_version(self, project: str, version: str) -> _Version:
        """Asks the version service.

        Raises:
            NotFound: It does not exist, is in the trash or belongs to another project.
        """
        name = f"projects/{project}/versions/{version}"
        with channels.translate():
            found = await self._versions.GetVersion(version_pb2.GetVersionRequest(name=name))
        if found.HasField("delete_time"):
            raise versions.version_not_found(project, version)
        return found


async def _complete(conn: Connection, plan: Plan, source: _Version) -> Plan:
    """Checks that a plan can be carried out now, and adds what it builds on.

    Raises:
        NotFound: The version, or what it shall begin with, is not there.
        AlreadyExists: TRAINING_RUNS, another training of the version is live.
        FailedPrecondition: VERSION_NOT_READY or NO_WEIGHTS.
    """
    # What is known here is newer than the version's view of its trainings.
    await store.check_startable(conn, plan.project, plan.version)
    check_ready(source)
    found = plan.warm_start and await find_weights(conn, plan.project, plan.warm_start)
    return dataclasses.replace(plan, manifest=source.manifest, warm_start_weights=found)


def _wait_reason(place: queue.Waiting | None) -> training_pb2.Training.WaitReason.ValueType:
    """Returns what a training at a place in the queue waits for; without one it does not."""
    if place is None:
        return training_pb2.Training.WAIT_REASON_UNSPECIFIED
    return training_pb2.Training.QUOTA if place.held else training_pb2.Training.SLOT


def _stop_mode(mode: training_pb2.StopMode.ValueType) -> StopMode:
    if mode == training_pb2.STOP_MODE_UNSPECIFIED:
        return StopMode.PAUSE
    return StopMode(training_pb2.StopMode.Name(mode).removeprefix("STOP_MODE_"))


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
