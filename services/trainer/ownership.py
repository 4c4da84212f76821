"""Who carries out which training: claims, leases and take-overs in Postgres."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from detflow.postgres import Connection
from detflow.v1.common_pb2 import StoredObject
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.domain import ATTEMPTING, State, Training
from services.trainer.store import COLUMNS, announce, from_row, update_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A training taken on by a trainer process, and the checkpoint its new attempt goes on from."""

    training: Training
    checkpoint: Checkpoint | None


async def claim_training(conn: Connection, owner: str, lease: datetime.timedelta) -> Claim | None:
    """Takes on the oldest queued training: QUEUED -> PROVISIONING, with owner and lease."""
    row = await conn.fetchrow(
        f"""
        update training set state = 'PROVISIONING', revision = revision + 1, attempt = attempt + 1,
          owner = $1, lease_expire_time = now() + $2,
          num_epochs_done = coalesce((select max(epoch) from checkpoint
            where training_id = training.id and not unreadable), 0)
        where state = 'QUEUED' and id = (
          select id from training where state = 'QUEUED' order by id limit 1 for update skip locked)
        returning {COLUMNS}
        """,
        owner,
        lease,
    )
    training = await announce(conn, row)
    if training is None:
        return None
    last = await conn.fetchrow(
        "select epoch, object from checkpoint where training_id = $1 and not unreadable"
        " order by epoch desc, attempt desc limit 1",
        training.id,
    )
    await conn.execute(
        "insert into attempt (training_id, attempt, owner, checkpoint_epoch)"
        " values ($1, $2, $3, $4)",
        training.id,
        training.attempt,
        owner,
        last["epoch"] if last else 0,
    )
    if last is None:
        return Claim(training=training, checkpoint=None)
    stored = StoredObject.FromString(last["object"])
    return Claim(training=training, checkpoint=Checkpoint(epoch=last["epoch"], object=stored))


async def renew_lease(
    conn: Connection, training_id: str, attempt: int, owner: str, lease: datetime.timedelta
) -> Training | None:
    """Extends the lease of an attempt; None if it is not this owner's to carry out any more."""
    row = await conn.fetchrow(
        f"""
        update training set lease_expire_time = now() + $4
        where id = $1 and attempt = $2 and owner = $3 and state = any($5)
        returning {COLUMNS}
        """,
        training_id,
        attempt,
        owner,
        lease,
        list(ATTEMPTING),
    )
    return from_row(row) if row else None


async def lock_expired(conn: Connection, owner: str, carried_out: Iterable[str]) -> Training | None:
    """Locks a training whose lease is over, except those that `owner` is known to carry out."""
    row = await conn.fetchrow(
        f"""
        select {COLUMNS} from training
        where owner is not null and lease_expire_time < now()
          and not (owner = $1 and id = any($2::text[]))
        order by lease_expire_time limit 1 for update skip locked
        """,
        owner,
        list(carried_out),
    )
    return from_row(row) if row else None


async def adopt_training(
    conn: Connection, training: Training, owner: str, lease: datetime.timedelta
) -> bool:
    """Gives an attempt whose worker is done to a new owner, who waits for the evaluations."""
    row = await conn.fetchrow(
        """
        update training set owner = $4, lease_expire_time = now() + $5
        where id = $1 and attempt = $2 and owner = $3 and state = 'EVALUATING'
        returning id
        """,
        training.id,
        training.attempt,
        training.owner,
        owner,
        lease,
    )
    return row is not None


async def release_training(conn: Connection, training_id: str, attempt: int) -> Training | None:
    """Queues a training whose owner shuts down; that counts as no crash."""
    training = await update_state(conn, training_id, State.QUEUED, attempt=attempt)
    if training is not None:
        await conn.execute(
            "update training set num_restarts = num_restarts - 1 where id = $1", training_id
        )
    return training


async def expire_lease(conn: Connection, training_id: str, attempt: int) -> None:
    """Ends the lease of an attempt at once, so that another process adopts it."""
    await conn.execute(
        "update training set lease_expire_time = '-infinity'"
        " where id = $1 and attempt = $2 and owner is not null",
        training_id,
        attempt,
    )
