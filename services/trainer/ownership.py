"""Who carries out which training: claims, leases and take-overs in Postgres."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

from detflow.postgres import Connection
from detflow.v1.worker_pb2 import Checkpoint
from services.trainer.checkpoints import get_newest
from services.trainer.domain import ATTEMPTING, State, Training
from services.trainer.queue import NUM_DEVICES, UNDER_WAY, WITH_UNDER_WAY, WITHIN_QUOTA, Room
from services.trainer.quota import lock_quotas
from services.trainer.store import COLUMNS, announce, from_row, update_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A training taken on by a trainer process, and the checkpoint its new attempt goes on from."""

    training: Training
    checkpoint: Checkpoint | None


async def claim_training(
    conn: Connection, owner: str, lease: datetime.timedelta, room: Room
) -> Claim | None:
    """Takes on the training whose turn it is: QUEUED -> PROVISIONING, with owner and lease.

    Nobody overtakes: if the first of those that fit into `room` at all does not fit into what is
    free of it, nothing is claimed, so that one with many devices gets its turn too. Only those are
    passed over whose project has used up its quota.
    """
    await lock_quotas(conn)
    row = await conn.fetchrow(
        f"""
        update training set state = 'PROVISIONING', revision = revision + 1, attempt = attempt + 1,
          owner = $1, lease_expire_time = now() + $2,
          num_epochs_done = coalesce((select max(epoch) from checkpoint
            where training_id = training.id and not unreadable), 0)
        where state = 'QUEUED' and id = (
          select id from (
            select t.id, {NUM_DEVICES} as num_devices from training t {WITH_UNDER_WAY}
            where t.state = 'QUEUED' and t.device = any($3)
              and t.num_nodes <= $4 and {NUM_DEVICES} <= $5 and {WITHIN_QUOTA}
            order by t.priority desc, {UNDER_WAY}, t.id limit 1
            for update of t skip locked) as first
          where num_devices <= $6)
        returning {COLUMNS}
        """,
        owner,
        lease,
        list(room.devices),
        room.num_nodes,
        room.num_slots,
        room.num_free,
    )
    training = await announce(conn, row)
    if training is None:
        return None
    checkpoint = await get_newest(conn, training.id)
    await conn.execute(
        "insert into attempt (training_id, attempt, owner, checkpoint_epoch, checkpoint_step)"
        " values ($1, $2, $3, $4, $5)",
        training.id,
        training.attempt,
        owner,
        checkpoint.epoch if checkpoint else 0,
        checkpoint.step if checkpoint else 0,
    )
    return Claim(training=training, checkpoint=checkpoint)


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
    return await update_state(conn, training_id, State.QUEUED, attempt=attempt, crashed=False)


async def expire_lease(conn: Connection, training_id: str, attempt: int) -> None:
    """Ends the lease of an attempt at once, so that another process adopts it."""
    await conn.execute(
        "update training set lease_expire_time = '-infinity'"
        " where id = $1 and attempt = $2 and owner is not null",
        training_id,
        attempt,
    )
