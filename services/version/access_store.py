"""API keys and members in Postgres: SQL beside its function, in the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from detflow.access import Role
from detflow.errors import AlreadyExists, not_found
from detflow.postgres import Connection


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """An API key; `project_id` is "-" for one that counts in all."""

    id: str
    project_id: str
    display_name: str
    role: Role.ValueType
    expire_time: datetime | None
    creator: str
    create_time: datetime
    last_use_time: datetime | None

    @property
    def name(self) -> str:
        """projects/{project}/apiKeys/{api_key}."""
        return f"projects/{self.project_id}/apiKeys/{self.id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A person with a role; `project_id` is "-" for all projects."""

    id: str
    project_id: str
    user: str
    role: Role.ValueType
    creator: str
    create_time: datetime

    @property
    def name(self) -> str:
        """projects/{project}/members/{member}."""
        return f"projects/{self.project_id}/members/{self.id}"


def user_key(user: str) -> str:
    """Returns what a user is compared by: of an e-mail address, its spelling does not matter."""
    return user.casefold() if "@" in user else user


async def insert_api_key(
    conn: Connection,
    *,
    key_id: str,
    project_id: str,
    display_name: str,
    role: Role.ValueType,
    token_sha256: bytes,
    expire_time: datetime | None,
    creator: str,
) -> ApiKey:
    """Adds a key."""
    (row,) = await conn.fetch(
        "insert into api_key (id, project_id, display_name, role, token_sha256, expire_time,"
        " creator) values ($1, $2, $3, $4, $5, $6, $7) returning *",
        key_id,
        project_id,
        display_name,
        role,
        token_sha256,
        expire_time,
        creator,
    )
    return _api_key(row)


async def list_api_keys(
    conn: Connection, project_id: str, after: str, limit: int
) -> Sequence[ApiKey]:
    """Reads at most `limit` keys of a project, oldest first, beginning after the id `after`."""
    rows = await conn.fetch(
        "select * from api_key where project_id = $1 and id > $2 order by id limit $3",
        project_id,
        after,
        limit,
    )
    return [_api_key(row) for row in rows]


async def get_api_key(
    conn: Connection, project_id: str, key_id: str, *, lock: bool = False
) -> ApiKey:
    """Reads a key.

    Raises:
        NotFound: There is none of this name.
    """
    row = await conn.fetchrow(
        "select * from api_key where project_id = $1 and id = $2"
        + (" for no key update" if lock else ""),
        project_id,
        key_id,
    )
    if row is None:
        raise not_found(f"projects/{project_id}/apiKeys/{key_id}")
    return _api_key(row)


async def update_api_key(
    conn: Connection,
    key_id: str,
    *,
    display_name: str,
    role: Role.ValueType,
    expire_time: datetime | None,
) -> ApiKey:
    """Changes a key that is locked."""
    (row,) = await conn.fetch(
        "update api_key set display_name = $2, role = $3, expire_time = $4 where id = $1"
        " returning *",
        key_id,
        display_name,
        role,
        expire_time,
    )
    return _api_key(row)


async def delete_api_key(conn: Connection, key_id: str) -> None:
    """Removes a key, and with it the tickets and sessions begun with it."""
    await conn.execute("delete from api_key where id = $1", key_id)


async def use_api_key(conn: Connection, token_sha256: bytes) -> ApiKey | None:
    """Reads the key of a token that counts, and notes its use once a minute."""
    row = await conn.fetchrow(
        "select *, last_use_time is not distinct from date_trunc('minute', now()) as noted"
        " from api_key where token_sha256 = $1 and (expire_time is null or expire_time > now())",
        token_sha256,
    )
    if row is None:
        return None
    if not row["noted"]:
        await conn.execute(
            "update api_key set last_use_time = date_trunc('minute', now()) where id = $1",
            row["id"],
        )
    return _api_key(row)


async def get_api_key_by_id(conn: Connection, key_id: str) -> ApiKey | None:
    """Reads a key that counts."""
    row = await conn.fetchrow(
        "select * from api_key where id = $1 and (expire_time is null or expire_time > now())",
        key_id,
    )
    return None if row is None else _api_key(row)


async def insert_member(
    conn: Connection,
    *,
    member_id: str,
    project_id: str,
    user: str,
    role: Role.ValueType,
    creator: str,
) -> Member:
    """Makes a user a member.

    Raises:
        AlreadyExists: DUPLICATE_MEMBER.
    """
    row = await conn.fetchrow(
        "insert into member (id, project_id, user_name, user_key, role, creator)"
        " values ($1, $2, $3, $4, $5, $6) on conflict (project_id, user_key) do nothing"
        " returning *",
        member_id,
        project_id,
        user,
        user_key(user),
        role,
        creator,
    )
    if row is None:
        raise AlreadyExists(
            f"{user} is a member of projects/{project_id}; change the role instead",
            reason="DUPLICATE_MEMBER",
            metadata={"resource": f"projects/{project_id}"},
        )
    return _member(row)


async def list_members(
    conn: Connection, project_id: str, after: str, limit: int
) -> Sequence[Member]:
    """Reads at most `limit` members of a project, oldest first, beginning after the id `after`."""
    rows = await conn.fetch(
        "select * from member where project_id = $1 and id > $2 order by id limit $3",
        project_id,
        after,
        limit,
    )
    return [_member(row) for row in rows]


async def get_member(
    conn: Connection, project_id: str, member_id: str, *, lock: bool = False
) -> Member:
    """Reads a member.

    Raises:
        NotFound: There is none of this name.
    """
    row = await conn.fetchrow(
        "select * from member where project_id = $1 and id = $2"
        + (" for no key update" if lock else ""),
        project_id,
        member_id,
    )
    if row is None:
        raise not_found(f"projects/{project_id}/members/{member_id}")
    return _member(row)


async def update_member(conn: Connection, member_id: str, role: Role.ValueType) -> Member:
    """Changes the role of a member that is locked."""
    (row,) = await conn.fetch(
        "update member set role = $2 where id = $1 returning *", member_id, role
    )
    return _member(row)


async def delete_member(conn: Connection, member_id: str) -> None:
    """Takes a membership away."""
    await conn.execute("delete from member where id = $1", member_id)


async def list_roles(conn: Connection, keys: Sequence[str]) -> dict[str, Role.ValueType]:
    """Reads the roles by project of a user who is known by several keys; the highest counts."""
    rows = await conn.fetch(
        "select project_id, max(role) as role from member where user_key = any($1::text[])"
        " group by project_id",
        list(keys),
    )
    return {row["project_id"]: row["role"] for row in rows}


def _api_key(row: Any) -> ApiKey:
    return ApiKey(
        id=row["id"],
        project_id=row["project_id"],
        display_name=row["display_name"],
        role=row["role"],
        expire_time=row["expire_time"],
        creator=row["creator"],
        create_time=row["create_time"],
        last_use_time=row["last_use_time"],
    )


def _member(row: Any) -> Member:
    return Member(
        id=row["id"],
        project_id=row["project_id"],
        user=row["user_name"],
        role=row["role"],
        creator=row["creator"],
        create_time=row["create_time"],
    )
