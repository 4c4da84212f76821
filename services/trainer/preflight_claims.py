"""Who tries which of the trainings that wait, in Postgres: claims, leases, results."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from detflow.postgres import Connection
from detflow.v1.common_pb2 import Failure
from detflow.v1.training_pb2 import LogLines, Preflight
from services.trainer import attempts, store
from services.trainer.domain import State, Training
from services.trainer.queue import UNDER_WAY, WITH_UNDER_WAY

MAX_TRIES = 3
"""In one stay in the queue; what has come to no result by then is left to the first attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A training that is tried while it waits.

    Attributes:
        training: As it was when it was claimed; at another revision it has moved on.
        owner: Id of the claim.
    """

    training: Training
    owner: str


async def claim_preflight(
    conn: Connection, owner: str, lease: datetime.timedelta, waited: datetime.timedelta
) -> Claim | None:
    """Takes on the next in the queue that was not tried yet and that nobody tries now.

    Args:
        conn: Connection in a transaction.
        owner: Id of the claim, used once.
        lease: How long it holds unless it is renewed.
        waited: Age from which on a training is tried: a free slot would have taken it by then.
    """
    row = await conn.fetchrow(
        f"""
        insert into queued_preflight as claim (training_id, revision, owner, lease_expire_time)
        select id, revision, $1::text, now() + $2::interval from (
          select t.id, t.revision
          from training t {WITH_UNDER_WAY}
          left join queued_preflight c on c.training_id = t.id and c.revision = t.revision
          where t.state = 'QUEUED' and t.preflight is null and t.create_time <= now() - $3::interval
            and (c.training_id is null or c.lease_expire_time < now() and c.num_tries < $4)
            and not exists (select from checkpoint where training_id = t.id and not unreadable)
          order by t.priority desc, {UNDER_WAY}, t.id limit 1) as next
        on conflict (training_id) do update
          set revision = excluded.revision, owner = excluded.owner,
            lease_expire_time = excluded.lease_expire_time,
            num_tries = case when claim.revision = excluded.revision
              then claim.num_tries + 1 else 1 end
          where claim.revision < excluded.revision or claim.lease_expire_time < now()
        returning training_id, revision
        """,
        owner,
        lease,
        waited,
        MAX_TRIES,
    )
    if row is None:
        return None
    training = await store.get_training(conn, row["training_id"])
    if training is None or training.revision != row["revision"]:
        return None  # it has moved on since, and the claim with it
    return Claim(training=training, owner=owner)


async def renew_lease(conn: Connection, claim: Claim, lease: datetime.timedelta) -> bool:
    """Extends a claim; False if another has it or the training does not wait any more."""
    renewed = await conn.fetchval(
        """
        update queued_preflight c set lease_expire_time = now() + $4
        from training t
        where c.training_id = $1 and c.revision = $2 and c.owner = $3
          and t.id = c.training_id and t.revision = c.revision and t.state = 'QUEUED'
        returning true
        """,
        *_key(claim),
        lease,
    )
    return bool(renewed)


async def delete_claim(conn: Connection, claim: Claim) -> bool:
    """Ends a claim; False if another has it."""
    deleted = await conn.fetchval(
        "delete from queued_preflight where training_id = $1 and revision = $2 and owner = $3"
        " returning true",
        *_key(claim),
    )
    return bool(deleted)


async def settle_passed(conn: Connection, claim: Claim, found: Preflight) -> Training | None:
    """Keeps what was found and tells watchers; None if the training has moved on."""
    if not await delete_claim(conn, claim):
        return None
    row = await conn.fetchrow(
        f"update training set preflight = $3 where id = $1 and revision = $2 and state = 'QUEUED'"
        f" returning {store.COLUMNS}",
        claim.training.id,
        claim.training.revision,
        store.serialized(found),
    )
    return await store.announce(conn, row)


async def settle_failed(conn: Connection, claim: Claim, why: Failure) -> Training | None:
    """Fails the training: QUEUED -> FAILED; None if it has moved on."""
    if not await delete_claim(conn, claim):
        return None
    row = await conn.fetchrow(
        f"update training set state = $3, revision = revision + 1, failure = $4, end_time = now()"
        f" where id = $1 and revision = $2 and state = 'QUEUED' returning {store.COLUMNS}",
        claim.training.id,
        claim.training.revision,
        State.FAILED,
        store.serialized(why),
    )
    return await store.announce(conn, row)


async def put_off(conn: Connection, claim: Claim, pause: datetime.timedelta, why: str) -> None:
    """Leaves a training that could not be tried now for later, and tells watchers why."""
    later = await conn.fetchval(
        "update queued_preflight set lease_expire_time = now() + $4"
        " where training_id = $1 and revision = $2 and owner = $3 returning true",
        *_key(claim),
        pause,
    )
    if later:
        lines = LogLines(attempt=claim.training.attempt, lines=[why])
        await attempts.insert_log(conn, claim.training, lines)


def _key(claim: Claim) -> tuple[str, int, str]:
    return claim.training.id, claim.training.revision, claim.owner
