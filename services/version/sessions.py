"""Links that sign a browser in once, and the sessions that they begin: SQL beside its function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from detflow.postgres import Connection

TICKET_TIME = timedelta(seconds=60)
SESSION_TIME = timedelta(hours=12)
"""How long a session lasts after its last use."""
MAX_SESSION_TIME = timedelta(days=7)


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Whom a ticket or a session stands for: exactly one of the first three is set.

    Attributes:
        owner_sha256: Of the owner's token as it was.
        api_key_id: Of the API key.
        user_keys: By which the user may be a member; the first is in the subject.
        display_name: Name shown to people.
    """

    owner_sha256: bytes | None = None
    api_key_id: str | None = None
    user_keys: Sequence[str] | None = None
    display_name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A browser that is signed in."""

    holder: Holder
    expire_time: datetime


async def insert_ticket(conn: Connection, token_sha256: bytes, holder: Holder) -> datetime:
    """Adds a ticket; returns when it ends."""
    end: datetime = await conn.fetchval(
        "insert into login_ticket (token_sha256, owner_sha256, api_key_id, user_keys,"
        " display_name, expire_time) values ($1, $2, $3, $4, $5, now() + $6)"
        " returning expire_time",
        token_sha256,
        *_columns(holder),
        TICKET_TIME,
    )
    return end


async def delete_ticket(conn: Connection, token_sha256: bytes) -> Holder | None:
    """Takes a ticket, which only one caller can; None if it was used, has ended or never was."""
    row = await conn.fetchrow(
        "delete from login_ticket where token_sha256 = $1 and expire_time > now() returning *",
        token_sha256,
    )
    return None if row is None else _holder(row)


async def insert_session(conn: Connection, token_sha256: bytes, holder: Holder) -> Session:
    """Begins a session."""
    (row,) = await conn.fetch(
        "insert into session (token_sha256, owner_sha256, api_key_id, user_keys, display_name,"
        " expire_time, end_time) values ($1, $2, $3, $4, $5, now() + $6, now() + $7) returning *",
        token_sha256,
        *_columns(holder),
        SESSION_TIME,
        MAX_SESSION_TIME,
    )
    return _session(row)


async def use_session(conn: Connection, token_sha256: bytes) -> Session | None:
    """Reads a session that counts and moves its end on, at most once a minute."""
    row = await conn.fetchrow(
        "select *, least(now() + $2, end_time) - expire_time > interval '1 minute' as moves"
        " from session where token_sha256 = $1 and expire_time > now()",
        token_sha256,
        SESSION_TIME,
    )
    if row is not None and row["moves"]:
        row = await conn.fetchrow(
            "update session set expire_time = least(now() + $2, end_time)"
            " where token_sha256 = $1 and expire_time > now() returning *",
            token_sha256,
            SESSION_TIME,
        )
    return None if row is None else _session(row)


async def delete_session(conn: Connection, token_sha256: bytes) -> None:
    """Ends a session, if it has not ended."""
    await conn.execute("delete from session where token_sha256 = $1", token_sha256)


async def delete_ended(conn: Connection) -> None:
    """Removes the tickets and sessions that have ended, and keys that ended a month ago."""
    await conn.execute("delete from login_ticket where expire_time < now()")
    await conn.execute("delete from session where expire_time < now()")
    await conn.execute("delete from api_key where expire_time < now() - interval '30 days'")


def _columns(holder: Holder) -> tuple[Any, ...]:
    keys = None if holder.user_keys is None else list(holder.user_keys)
    return holder.owner_sha256, holder.api_key_id, keys, holder.display_name


def _holder(row: Any) -> Holder:
    return Holder(
        owner_sha256=row["owner_sha256"],
        api_key_id=row["api_key_id"],
        user_keys=row["user_keys"],
        display_name=row["display_name"],
    )


def _session(row: Any) -> Session:
    return Session(holder=_holder(row), expire_time=row["expire_time"])
