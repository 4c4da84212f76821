"""Trainings in Postgres: a transition is one guarded statement, its event committed with it."""

from __future__ import annotations

from typing import TypeVar

import asyncpg
import orjson
from google.protobuf.message import Message

from detflow import outbox
from detflow.errors import AlreadyExists, FailedPrecondition, not_found
from detflow.names import last_segment
from detflow.postgres import Connection
from detflow.v1 import events_pb2
from detflow.v1.common_pb2 import Failure, StoredObject
from detflow.v1.training_pb2 import Preflight, WarmStart
from services.trainer import versions
from services.trainer.domain import (
    ATTEMPTING,
    FINAL,
    LIVE,
    RESUMABLE,
    Plan,
    State,
    StopMode,
    Training,
    TrainingName,
    after_crash,
    after_stop,
    sources_of,
    training_name,
)
from services.trainer.messages import to_message

M = TypeVar("M", bound=Message)

# Not `exists`: of that Postgres may make one scan of all attempts there are.
COLUMNS = """
  training.*, coalesce((select a.predictions is not null from attempt a
    where a.training_id = training.id and a.attempt = training.attempt), false)
    as predictions_written
"""


def from_row(row: asyncpg.Record) -> Training:
    """Returns the training in a row of COLUMNS."""
    return Training(
        id=row["id"],
        project=row["project"],
        version=row["version"],
        state=State(row["state"]),
        revision=row["revision"],
        model=row["model"],
        batch_size=row["batch_size"],
        epochs=row["epochs"],
        hyperparameters=orjson.loads(row["hyperparameters"]),
        manifest=StoredObject.FromString(row["manifest"]),
        priority=row["priority"],
        num_nodes=row["num_nodes"],
        num_devices_per_node=row["num_devices_per_node"],
        warm_start=_parsed(WarmStart, row["warm_start"]),
        warm_start_weights=_parsed(StoredObject, row["warm_start_weights"]),
        step_batch_size=row["step_batch_size"],
        preflight=_parsed(Preflight, row["preflight"]),
        attempt=row["attempt"],
        num_epochs_done=row["num_epochs_done"],
        num_restarts=row["num_restarts"],
        stop_mode=StopMode(row["stop_mode"]) if row["stop_mode"] else None,
        failure=_parsed(Failure, row["failure"]),
        weights=_parsed(StoredObject, row["weights"]),
        owner=row["owner"],
        predictions_written=row["predictions_written"],
        create_time=row["create_time"],
        start_time=row["start_time"],
        end_time=row["end_time"],
    )


def _parsed(kind: type[M], data: bytes | None) -> M | None:
    return None if data is None else kind.FromString(data)


def serialized(message: Message | None) -> bytes | None:
    """Returns a message as it is stored."""
    return None if message is None else message.SerializeToString()


async def announce(conn: Connection, row: asyncpg.Record | None) -> Training | None:
    """Appends the event of a transition that took place."""
    if row is None:
        return None
    training = from_row(row)
    await append_event(
        conn, training, "state_changed", events_pb2.Event(training=to_message(training))
    )
    return training


async def append_event(
    conn: Connection, training: Training, what: str, event: events_pb2.Event
) -> None:
    """Appends an event of a training to the outbox."""
    await outbox.append(
        conn,
        kind="training",
        resource_id=training.id,
        what=what,
        name=training.name,
        event=event,
    )


async def insert_training(
    conn: Connection,
    *,
    training_id: str,
    request_id: str,
    plan: Plan,
) -> Training:
    """Queues a new training. The caller holds the version's lock and has looked for the request id.

    Raises:
        NotFound: The version is in the trash.
        AlreadyExists: TRAINING_RUNS, another training of the version is live.
        FailedPrecondition: VERSION_NOT_READY, the version has its model.
    """
    row = await conn.fetchrow(
        f"""
        insert into training (id, project, version, request_id, state, model, batch_size, epochs,
                              hyperparameters, manifest, priority, num_nodes, num_devices_per_node,
                              step_batch_size, warm_start, warm_start_weights, warm_start_id)
        select $1, $2, $3, nullif($4, ''), 'QUEUED', $5, $6, $7, $8, $9, $10, $11, $12, $6, $13,
               $14, nullif($15, '')
        where not exists (select from deleted_version where version = $3 and deleted)
          and not exists (select from training where version = $3 and state = 'SUCCEEDED')
        on conflict do nothing
        returning {COLUMNS}
        """,
        training_id,
        plan.project,
        plan.version,
        request_id,
        plan.model,
        plan.batch_size,
        plan.epochs,
        orjson.dumps(dict(plan.hyperparameters)).decode(),
        plan.manifest.SerializeToString(),
        plan.priority,
        plan.num_nodes,
        plan.num_devices_per_node,
        serialized(plan.warm_start),
        serialized(plan.warm_start_weights),
        last_segment(plan.warm_start.weights) if plan.warm_start else "",
    )
    training = await announce(conn, row)
    if training is None:
        await check_startable(conn, plan.project, plan.version)
        raise AssertionError("a training could be neither inserted nor refused")
    return training


async def ended_before(conn: Connection, training_id: str, *, seconds: float) -> bool:
    """Says whether a training ended at least so long ago, by the database's clock."""
    ended: bool | None = await conn.fetchval(
        "select end_time < now() - make_interval(secs => $2) from training where id = $1",
        training_id,
        seconds,
    )
    return bool(ended)


async def check_startable(conn: Connection, project: str, version: str) -> None:
    """Checks that nothing known here keeps a version from being trained.

    Raises:
        NotFound: The version is in the trash.
        AlreadyExists: TRAINING_RUNS, another training of it is live.
        FailedPrecondition: VERSION_NOT_READY, the version has its model.
    """
    if await versions.is_deleted(conn, version):
        raise versions.version_not_found(project, version)
    other = await conn.fetchrow(
        "select id, state from training"
        " where version = $1 and (state = any($2) or state = 'SUCCEEDED')"
        " order by state = 'SUCCEEDED' limit 1",
        version,
        list(LIVE),
    )
    if other is None:
        return
    name = training_name(project, version, other["id"])
    if other["state"] == State.SUCCEEDED:
        raise FailedPrecondition(
            f"{name} has already trained this version; create another version to train again",
            reason="VERSION_NOT_READY",
            metadata={"training": name},
        )
    raise AlreadyExists(
        f"{name} of this version is {other['state']}; wait for it or stop it first",
        reason="TRAINING_RUNS",
        metadata={"training": name},
    )


async def get_training(
    conn: Connection, training_id: str, *, lock: bool = False
) -> Training | None:
    """Reads a training by its id; `lock` keeps it from changing until the transaction ends."""
    row = await conn.fetchrow(
        f"select {COLUMNS} from training where id = $1 {'for update' if lock else ''}", training_id
    )
    return from_row(row) if row else None


async def find_training(conn: Connection, name: str, *, lock: bool = False) -> Training:
    """Reads a training by its name.

    Raises:
        NotFound: There is none, or its project or version is another.
    """
    training = await get_training(conn, TrainingName.parse(name).training, lock=lock)
    if training is None or training.name != name:
        raise not_found(name)
    return training


async def get_by_request(
    conn: Connection, project: str, version: str, request_id: str
) -> Training | None:
    """Reads the training that a request id made before."""
    row = await conn.fetchrow(
        f"select {COLUMNS} from training where project = $1 and version = $2 and request_id = $3",
        project,
        version,
        request_id,
    )
    return from_row(row) if row else None


async def list_trainings(
    conn: Connection, *, project: str, version: str | None, before: str | None, limit: int
) -> list[Training]:
    """Reads trainings of a version or a whole project, newest first, older than `before`."""
    rows = await conn.fetch(
        f"""
        select {COLUMNS} from training
        where project = $1 and ($2::text is null or version = $2) and ($3::text is null or id < $3)
        order by id desc limit $4
        """,
        project,
        version,
        before,
        limit,
    )
    return [from_row(row) for row in rows]


async def update_state(
    conn: Connection,
    training_id: str,
    target: State,
    *,
    attempt: int,
    failure: Failure | None = None,
    weights: StoredObject | None = None,
    step_batch_size: int | None = None,
    crashed: bool = True,
) -> Training | None:
    """Moves a training to `target`, if the graph allows it and the attempt is the current one.

    Args:
        conn: Connection in a transaction.
        training_id: Id of the training.
        target: Where to.
        attempt: The attempt in which this happens.
        failure: Why.
        weights: Best weights.
        step_batch_size: Images that shall be in memory together from now on.
        crashed: A move to QUEUED counts as a restart after a crash.

    Returns:
        The training after the change; None if it is elsewhere or in another attempt.
    """
    row = await conn.fetchrow(
        f"""
        update training set state = $2, revision = revision + 1,
          num_restarts = num_restarts + case when $2 = 'QUEUED' and $10 then 1 else 0 end,
          step_batch_size = coalesce($9, step_batch_size),
          failure = case when $2 = 'SUCCEEDED' then null else coalesce($5, failure) end,
          weights = coalesce($6, weights),
          owner = case when $2 = any($7) then owner end,
          lease_expire_time = case when $2 = any($7) then lease_expire_time end,
          start_time = coalesce(start_time, case when $2 = 'RUNNING' then now() end),
          end_time = case when $2 = any($8) then now() end
        where id = $1 and state = any($3) and attempt = $4
        returning {COLUMNS}
        """,
        training_id,
        target,
        sources_of(target),
        attempt,
        serialized(failure),
        serialized(weights),
        list(ATTEMPTING),
        list(FINAL),
        step_batch_size,
        crashed,
    )
    training = await announce(conn, row)
    if training is not None and training.state not in ATTEMPTING:
        await conn.execute(
            "update attempt set end_time = now(), failure = $3"
            " where training_id = $1 and attempt = $2",
            training_id,
            attempt,
            serialized(failure),
        )
    return training


async def settle_crash(conn: Connection, training: Training, why: Failure) -> Training | None:
    """Moves on a locked training whose attempt died: a next one, a pending stop or FAILED."""
    target = after_crash(training.stop_mode, training.num_restarts)
    return await update_state(conn, training.id, target, attempt=training.attempt, failure=why)


async def stop_queued(conn: Connection, training_id: str, mode: StopMode) -> Training | None:
    """Stops a training that waits: QUEUED -> PAUSED | STOPPED."""
    row = await conn.fetchrow(
        f"""
        update training set state = $2, revision = revision + 1, stop_mode = $3, end_time = now()
        where id = $1 and state = 'QUEUED'
        returning {COLUMNS}
        """,
        training_id,
        after_stop(mode),
        mode,
    )
    return await announce(conn, row)


async def update_stop_mode(conn: Connection, training_id: str, mode: StopMode) -> Training | None:
    """Asks the owner of an attempt to stop it.

    The event tells watchers that a stop is under way. State and revision stay, so projections
    skip it.
    """
    row = await conn.fetchrow(
        f"update training set stop_mode = $2 where id = $1 and state = any($3) returning {COLUMNS}",
        training_id,
        mode,
        list(ATTEMPTING),
    )
    return await announce(conn, row)


async def update_preflight(conn: Connection, training_id: str, preflight: Preflight) -> None:
    """Keeps what was found before the first step, and tells watchers; no change of state."""
    row = await conn.fetchrow(
        f"update training set preflight = $2 where id = $1 returning {COLUMNS}",
        training_id,
        preflight.SerializeToString(),
    )
    await announce(conn, row)


async def resume_training(conn: Connection, training_id: str) -> Training | None:
    """Queues a training again: PAUSED | FAILED -> QUEUED.

    Not if its version is in the trash or has its model.

    Raises:
        asyncpg.UniqueViolationError: Of training_live: another training of the version is live.
    """
    row = await conn.fetchrow(
        f"""
        update training set state = 'QUEUED', revision = revision + 1, stop_mode = null,
          failure = null, num_restarts = 0, end_time = null
        where id = $1 and state = any($2)
          and not exists (select from deleted_version d
            where d.version = training.version and d.deleted)
          and not exists (select from training t
            where t.version = training.version and t.state = 'SUCCEEDED')
        returning {COLUMNS}
        """,
        training_id,
        list(RESUMABLE),
    )
    return await announce(conn, row)


async def list_live(conn: Connection, version: str) -> list[Training]:
    """Locks and reads the live trainings of a version."""
    rows = await conn.fetch(
        f"select {COLUMNS} from training where version = $1 and state = any($2) for update",
        version,
        list(LIVE),
    )
    return [from_row(row) for row in rows]
