"""Projects in Postgres, and the names they give out: SQL beside its function."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg

from detflow.errors import AlreadyExists, not_found
from detflow.postgres import Connection
from services.version.domain import AUTOMATIC_NAME, Project


async def insert_project(
    conn: Connection,
    project_id: str,
    display_name: str,
    *,
    max_storage_bytes: int = 0,
    max_running_trainings: int = 0,
) -> Project:
    """Adds a project.

    Raises:
        AlreadyExists: DUPLICATE_PROJECT.
    """
    try:
        (row,) = await conn.fetch(
            "insert into project (id, display_name, max_storage_bytes, max_running_trainings)"
            " values ($1, $2, $3, $4) returning *",
            project_id,
            display_name,
            max_storage_bytes,
            max_running_trainings,
        )
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != "project_pkey":
            raise
        raise AlreadyExists(
            f"projects/{project_id} exists; choose another project_id",
            reason="DUPLICATE_PROJECT",
            metadata={"resource": f"projects/{project_id}"},
        ) from error
    return _project(row)


async def get_project(conn: Connection, project_id: str, *, lock: bool = False) -> Project:
    """Reads a project; with `lock`, nobody else gives out names in it until the transaction ends.

    Raises:
        NotFound: There is none with this id.
    """
    row = await conn.fetchrow(
        "select * from project where id = $1" + (" for no key update" if lock else ""), project_id
    )
    if row is None:
        raise not_found(f"projects/{project_id}")
    return _project(row)


async def list_projects(
    conn: Connection, visible: Sequence[str] | None, after: int, limit: int
) -> list[Project]:
    """Reads at most `limit` projects, oldest first, beginning after position `after`.

    Args:
        conn: Connection.
        visible: Ids of those that the caller may see; None: all.
        after: Position.
        limit: How many.
    """
    rows = await conn.fetch(
        "select * from project where position > $1 and ($3::text[] is null or id = any($3))"
        " order by position limit $2",
        after,
        limit,
        visible,
    )
    return [_project(row) for row in rows]


async def update_project(conn: Connection, project: Project) -> Project:
    """Writes the name and the limits of a project that is locked."""
    (row,) = await conn.fetch(
        "update project set display_name = $2, max_storage_bytes = $3, max_running_trainings = $4"
        " where id = $1 returning *",
        project.id,
        project.display_name,
        project.max_storage_bytes,
        project.max_running_trainings,
    )
    return _project(row)


async def take_display_name(conn: Connection, project_id: str) -> str:
    """Takes the next V_n of a project that is locked.

    The number only grows, so the name of a deleted version never comes back. Names that a user gave
    by hand, to a version that is there or in the trash, are skipped.
    """
    while True:
        number: int = await conn.fetchval(
            "update project set next_version_number = next_version_number + 1 where id = $1"
            " returning next_version_number - 1",
            project_id,
        )
        name = AUTOMATIC_NAME.format(number)
        if not await conn.fetchval(
            "select exists (select from version where project_id = $1 and name_key = $2)",
            project_id,
            name,
        ):
            return name


def _project(row: asyncpg.Record) -> Project:
    return Project(
        id=row["id"],
        display_name=row["display_name"],
        position=row["position"],
        create_time=row["create_time"],
        max_storage_bytes=row["max_storage_bytes"],
        max_running_trainings=row["max_running_trainings"],
    )
