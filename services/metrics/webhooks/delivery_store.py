"""Deliveries of webhooks in Postgres: SQL beside its function; every time is the database's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

import asyncpg

from detflow.names import new_id
from detflow.postgres import Connection
from services.metrics.webhooks.domain import (
    Answer,
    Delivery,
    DeliveryState,
    Due,
    EventType,
    Message,
)

_KEPT_DAYS = 30


async def insert_deliveries(
    conn: Connection,
    webhook_ids: Sequence[str],
    *,
    event_type: EventType,
    training_id: str,
    revision: int,
    body: bytes,
) -> int:
    """Queues a message for each webhook that has none of this revision of a training yet.

    Returns:
        How many were queued.
    """
    rows = await conn.fetch(
        """
        insert into webhook_delivery (id, webhook_id, event_type, training_id, revision, body)
        select id, webhook_id, $3, $4, $5, $6
        from unnest($1::text[], $2::text[]) as w (id, webhook_id)
        on conflict (webhook_id, training_id, revision) do nothing
        returning id
        """,
        [new_id() for _ in webhook_ids],
        webhook_ids,
        event_type,
        training_id,
        revision,
        body,
    )
    return len(rows)


async def claim_due(
    conn: Connection, *, lease: str, lease_seconds: float, busy: Collection[str], limit: int
) -> list[Due]:
    """Takes on the longest due delivery of each of at most `limit` webhooks, the longest due first.

    Args:
        conn: Connection in a transaction.
        lease: Token of the caller.
        lease_seconds: After which somebody else may send them.
        busy: Ids of webhooks to pass over.
        limit: Most to take on.
    """
    rows = await conn.fetch(
        """
        with chosen as (
          select one.id from webhook w cross join lateral (
            select d.id, d.next_try_time from webhook_delivery d
            where d.webhook_id = w.id and d.state = 'PENDING' and d.next_try_time <= now()
            order by d.next_try_time limit 1 for update skip locked) one
          where not w.disabled and w.id <> all($3::text[])
          order by one.next_try_time limit $4
        )
        update webhook_delivery d
        set lease = $1, num_tries = num_tries + 1, last_try_time = now(),
          next_try_time = now() + make_interval(secs => $2)
        from chosen, webhook w where d.id = chosen.id and w.id = d.webhook_id
        returning d.id, d.webhook_id, d.body, d.num_tries, w.project_id, w.url, now() as time,
          array(select s.key from webhook_secret s where s.webhook_id = w.id
                and (s.end_time is null or s.end_time > now()) order by s.position desc) as keys
        """,
        lease,
        lease_seconds,
        list(busy),
        limit,
    )
    return [
        Due(
            webhook=f"projects/{row['project_id']}/webhooks/{row['webhook_id']}",
            webhook_id=row["webhook_id"],
            message=Message(
                id=row["id"], url=row["url"], body=row["body"], keys=row["keys"], time=row["time"]
            ),
            num_tries=row["num_tries"],
            lease=lease,
        )
        for row in rows
    ]


async def seconds_to_next(conn: Connection, busy: Collection[str]) -> float | None:
    """Says when the next delivery is due, of a webhook that is not busy; None if there is none."""
    seconds: float | None = await conn.fetchval(
        """
        select extract(epoch from min(one.next_try_time) - now())::float8
        from webhook w cross join lateral (
          select next_try_time from webhook_delivery
          where webhook_id = w.id and state = 'PENDING' order by next_try_time limit 1) one
        where not w.disabled and w.id <> all($1::text[])
        """,
        list(busy),
    )
    return seconds


async def update_tried(conn: Connection, due: Due, answer: Answer, pause: float | None) -> bool:
    """Records how a try went, if it was still this process's to make.

    Args:
        conn: Connection.
        due: What was tried.
        answer: How it went.
        pause: Seconds to the next try; None if there is none.
    """
    state = DeliveryState.PENDING
    if pause is None:
        state = DeliveryState.DELIVERED if answer.is_taken else DeliveryState.FAILED
    return bool(
        await conn.fetchval(
            """
            update webhook_delivery set state = $3, http_status = $4, error = $5, lease = '',
              next_try_time = now() + make_interval(secs => $6::float8)
            where id = $1 and lease = $2 returning true
            """,
            due.message.id,
            due.lease,
            state,
            answer.status,
            answer.error,
            pause,
        )
    )


async def give_back(conn: Connection, due: Due) -> None:
    """Lets somebody else send a delivery at once; whether it was sent is not known."""
    await conn.execute(
        "update webhook_delivery set lease = '', next_try_time = now()"
        " where id = $1 and lease = $2",
        due.message.id,
        due.lease,
    )


async def insert_test(
    conn: Connection, webhook_id: str, message: Message, answer: Answer
) -> Delivery | None:
    """Records a test that was made; None if the webhook was deleted meanwhile."""
    row = await conn.fetchrow(
        """
        insert into webhook_delivery (id, webhook_id, event_type, revision, body, state, num_tries,
          http_status, error, create_time, last_try_time, next_try_time)
        select $1, id, $3, 0, $4, $5, 1, $6, $7, $8, $8, null from webhook
        where id = $2 for key share
        returning *, '' as training
        """,
        message.id,
        webhook_id,
        EventType.TEST,
        message.body,
        DeliveryState.DELIVERED if answer.is_taken else DeliveryState.FAILED,
        answer.status,
        answer.error,
        message.time,
    )
    return _delivery(row) if row else None


async def list_deliveries(
    conn: Connection, webhook_id: str, *, before: str | None, limit: int
) -> list[Delivery]:
    """Reads deliveries of a webhook, newest first, older than `before`."""
    rows = await conn.fetch(
        """
        select d.*, coalesce(t.name, '') as training
        from webhook_delivery d left join training t on t.id = d.training_id
        where d.webhook_id = $1 and ($2::text is null or d.id < $2)
        order by d.id desc limit $3
        """,
        webhook_id,
        before,
        limit,
    )
    return [_delivery(row) for row in rows]


async def delete_old(conn: Connection) -> None:
    """Forgets deliveries after 30 days, those too that wait for a webhook to be enabled."""
    await conn.execute(
        "delete from webhook_delivery where create_time < now() - make_interval(days => $1)",
        _KEPT_DAYS,
    )


async def get_time(conn: Connection) -> datetime:
    """Reads the database's clock."""
    time: datetime = await conn.fetchval("select now()")
    return time


def _delivery(row: asyncpg.Record) -> Delivery:
    return Delivery(
        id=row["id"],
        event_type=EventType(row["event_type"]),
        training=row["training"],
        state=DeliveryState(row["state"]),
        num_tries=row["num_tries"],
        http_status=row["http_status"],
        error=row["error"],
        create_time=row["create_time"],
        last_try_time=row["last_try_time"],
        next_try_time=row["next_try_time"],
    )
