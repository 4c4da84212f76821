"""Webhooks and their secrets in Postgres: SQL beside its function."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from detflow.errors import ResourceExhausted, not_found
from detflow.names import last_segment, project_of
from detflow.postgres import Connection
from services.metrics.webhooks.domain import EventType, Webhook

MAX_WEBHOOKS = 20
"""Webhooks of one project: each is sent every event of it."""

_OVERLAP_HOURS = 24  # how long a secret goes on signing beside the one that took its place
_MAX_OLD_SECRETS = 4  # so that the header stays short, however often somebody rotates
_REPEAT_HOURS = 24


async def insert_webhook(
    conn: Connection,
    *,
    webhook_id: str,
    project_id: str,
    display_name: str,
    url: str,
    event_types: Sequence[EventType],
    disabled: bool,
    request_id: str | None,
    request_sha256: bytes,
    key: bytes,
) -> Webhook | None:
    """Adds a webhook with its first secret; None if the request id has made one before.

    Raises:
        ResourceExhausted: TOO_MANY_WEBHOOKS: the project has as many as it may.
    """
    row = await conn.fetchrow(
        """
        insert into webhook (id, project_id, display_name, url, event_types, disabled, request_id,
          request_sha256)
        values ($1, $2, $3, $4, $5, $6, $7, $8)
        on conflict (project_id, request_id) do nothing
        returning *
        """,
        webhook_id,
        project_id,
        display_name,
        url,
        list(event_types),
        disabled,
        request_id,
        request_sha256,
    )
    if row is None:
        return None
    # Counted after it was added, one creation at a time: of two, the second is one too many.
    await conn.execute(
        "select pg_advisory_xact_lock(hashtextextended('webhooks ' || $1, 0))", project_id
    )
    number = await conn.fetchval("select count(*) from webhook where project_id = $1", project_id)
    if number > MAX_WEBHOOKS:
        raise ResourceExhausted(
            f"projects/{project_id} has {MAX_WEBHOOKS} webhooks already; delete one it does not"
            " need",
            reason="TOO_MANY_WEBHOOKS",
            metadata={"resource": f"projects/{project_id}"},
        )
    await insert_secret(conn, webhook_id, key)
    return _webhook(row)


async def get_webhook_by_request(
    conn: Connection, project_id: str, request_id: str | None
) -> Webhook | None:
    """Reads the webhook that a request id made before."""
    row = await conn.fetchrow(
        "select * from webhook where project_id = $1 and request_id = $2", project_id, request_id
    )
    return _webhook(row) if row else None


async def get_webhook(conn: Connection, name: str, *, lock: bool = False) -> Webhook:
    """Reads a webhook by its name; with `lock`, nobody changes it until the transaction ends.

    Raises:
        NotFound: There is none, or in another project.
    """
    row = await conn.fetchrow(
        "select * from webhook where id = $1 and project_id = $2" + (" for update" if lock else ""),
        last_segment(name),
        project_of(name),
    )
    if row is None:
        raise not_found(name)
    return _webhook(row)


async def list_webhooks(
    conn: Connection, project_id: str, *, before: str | None, limit: int
) -> list[Webhook]:
    """Reads webhooks of a project, newest first, older than `before`."""
    rows = await conn.fetch(
        "select * from webhook where project_id = $1 and ($2::text is null or id < $2)"
        " order by id desc limit $3",
        project_id,
        before,
        limit,
    )
    return [_webhook(row) for row in rows]


async def lock_wanting(
    conn: Connection, project_id: str, event_type: EventType, happened: datetime
) -> list[str]:
    """Returns the ids of the webhooks to be told of something; none is deleted until the commit.

    What happened before a webhook was created is not told to it: the first start of this consumer
    reads a month of events.
    """
    rows = await conn.fetch(
        """
        select id from webhook
        where project_id = $1 and not disabled and create_time <= $3
          and (cardinality(event_types) = 0 or $2 = any(event_types))
        order by id for key share
        """,
        project_id,
        event_type,
        happened,
    )
    return [row["id"] for row in rows]


async def update_webhook(conn: Connection, webhook: Webhook) -> Webhook:
    """Writes back what can be changed of a webhook that is locked."""
    row = await conn.fetchrow(
        """
        update webhook set display_name = $2, url = $3, event_types = $4, disabled = $5,
          revision = revision + 1, update_time = now()
        where id = $1 returning *
        """,
        webhook.id,
        webhook.display_name,
        webhook.url,
        list(webhook.event_types),
        webhook.disabled,
    )
    assert row is not None
    return _webhook(row)


async def disable_webhook(conn: Connection, webhook_id: str) -> None:
    """Disables a webhook, if it is there and not disabled yet."""
    await conn.execute(
        "update webhook set disabled = true, revision = revision + 1, update_time = now()"
        " where id = $1 and not disabled",
        webhook_id,
    )


async def delete_webhook(conn: Connection, name: str) -> None:
    """Deletes a webhook with its secrets and deliveries.

    Raises:
        NotFound: There is none.
    """
    deleted = await conn.fetchval(
        "delete from webhook where id = $1 and project_id = $2 returning true",
        last_segment(name),
        project_of(name),
    )
    if not deleted:
        raise not_found(name)


async def rotate_secret(conn: Connection, webhook: Webhook, key: bytes) -> Webhook:
    """Gives a locked webhook a new secret; the one before signs too for a day."""
    await conn.execute(
        "update webhook_secret set end_time = now() + make_interval(hours => $2)"
        " where webhook_id = $1 and end_time is null",
        webhook.id,
        _OVERLAP_HOURS,
    )
    await conn.execute(
        """
        delete from webhook_secret where webhook_id = $1 and position not in (
          select position from webhook_secret
          where webhook_id = $1 and end_time > now() order by position desc limit $2)
        """,
        webhook.id,
        _MAX_OLD_SECRETS,
    )
    await insert_secret(conn, webhook.id, key)
    row = await conn.fetchrow(
        "update webhook set revision = revision + 1, update_time = now() where id = $1 returning *",
        webhook.id,
    )
    assert row is not None
    return _webhook(row)


async def insert_secret(conn: Connection, webhook_id: str, key: bytes) -> None:
    """Adds the secret in force of a webhook that has none."""
    await conn.execute(
        "insert into webhook_secret (webhook_id, key) values ($1, $2)", webhook_id, key
    )


async def list_keys(conn: Connection, webhook_id: str) -> list[bytes]:
    """Reads the keys that sign now, the newest first."""
    rows = await conn.fetch(
        "select key from webhook_secret where webhook_id = $1"
        " and (end_time is null or end_time > now()) order by position desc",
        webhook_id,
    )
    return [row["key"] for row in rows]


async def get_first_key(conn: Connection, webhook_id: str) -> bytes | None:
    """Reads the key a webhook was created with, for who repeats the creation within a day."""
    key: bytes | None = await conn.fetchval(
        """
        select key from webhook_secret s
        where webhook_id = $1 and end_time is null
          and create_time > now() - make_interval(hours => $2)
          and not exists (
            select from webhook_secret where webhook_id = $1 and position < s.position)
        """,
        webhook_id,
        _REPEAT_HOURS,
    )
    return key


def _webhook(row: asyncpg.Record) -> Webhook:
    return Webhook(
        id=row["id"],
        project_id=row["project_id"],
        display_name=row["display_name"],
        url=row["url"],
        event_types=tuple(EventType(number) for number in row["event_types"]),
        disabled=row["disabled"],
        revision=row["revision"],
        request_sha256=row["request_sha256"],
        create_time=row["create_time"],
        update_time=row["update_time"],
    )
