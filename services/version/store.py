"""Versions in Postgres: SQL beside its function, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NoReturn

import asyncpg

from detflow.errors import Aborted, AlreadyExists, not_found
from detflow.postgres import Connection
from services.version.domain import (
    LIVE,
    TRASH_TIME,
    Bundle,
    Metrics,
    State,
    StoredObject,
    Version,
    name_key,
)
from services.version.filter import Condition
from services.version.listing import EVERYTHING, NEWEST_FIRST, Order, PageKey


async def insert_version(
    conn: Connection,
    *,
    version_id: str,
    project_id: str,
    display_name: str,
    dataset: str,
    class_names: Sequence[str],
    recipe: bytes,
    request_id: str | None,
    request_sha256: bytes,
    dataset_sha256: str = "",
    labels: Mapping[str, str] | None = None,
    parent_version: str | None = None,
) -> Version:
    """Adds a version in PREPROCESSING.

    Raises:
        AlreadyExists: DUPLICATE_NAME, naming the version that has this display name.
    """
    try:
        (row,) = await conn.fetch(
            """
            insert into version (
              id, project_id, display_name, name_key, state, dataset, class_names, recipe,
              request_id, request_sha256, dataset_sha256, labels, parent_version,
              create_time, update_time)
            select $1, $2, $3, $4, 'PREPROCESSING', $5, $6, $7, $8, $9, $10, $11, $12, time, time
            from clock_timestamp() as time  -- in the order in which the project was locked
            returning *
            """,
            version_id,
            project_id,
            display_name,
            name_key(display_name),
            dataset,
            list(class_names),
            recipe,
            request_id,
            request_sha256,
            dataset_sha256,
            json.dumps(dict(labels or {})),
            parent_version,
        )
    except asyncpg.UniqueViolationError as error:
        _raise_duplicate_name(error, display_name)
    return _version(row)


async def get_version(
    conn: Connection, project_id: str, version_id: str, *, lock: bool = False
) -> Version:
    """Reads a version, in the trash or not.

    With `lock`, nobody else changes it until the transaction ends.

    Raises:
        NotFound: There is none with this id in this project.
    """
    row = await conn.fetchrow(
        "select * from version where project_id = $1 and id = $2" + (" for update" if lock else ""),
        project_id,
        version_id,
    )
    if row is None:
        raise not_found(f"projects/{project_id}/versions/{version_id}")
    return _version(row)


async def get_version_by_request(
    conn: Connection, project_id: str, request_id: str | None
) -> Version | None:
    """Reads the version that a request created, if it did."""
    row = await conn.fetchrow(
        "select * from version where project_id = $1 and request_id = $2", project_id, request_id
    )
    return _version(row) if row else None


async def list_versions(
    conn: Connection,
    project_id: str,
    *,
    order: Order = NEWEST_FIRST,
    after: PageKey | None = None,
    condition: Condition = EVERYTHING,
    limit: int | None = None,
    show_deleted: bool = False,
) -> list[Version]:
    """Reads a project's versions.

    Args:
        conn: Connection in a transaction.
        project_id: Project.
        order: In which order.
        after: Where the page before ended.
        condition: Only those for which this is true; its parameters begin with $2.
        limit: At most so many.
        show_deleted: Those in the trash too.
    """
    if condition != EVERYTHING:
        # Which index helps depends on what is looked for; a plan for anything would use none.
        await conn.execute("set local plan_cache_mode = force_custom_plan")
    rows: list[asyncpg.Record] = []
    for part in order.parts(after):
        parameters: list[Any] = [project_id, *condition.parameters, *part.start]
        start = [f"${len(parameters) - len(part.start) + 1 + i}" for i in range(len(part.start))]
        behind = f"and ({', '.join(part.columns)}) {part.behind} ({', '.join(start)})"
        rows += await conn.fetch(
            f"""
            select * from version
            where project_id = $1 and {part.condition} and {condition.sql}
              {"" if show_deleted else "and delete_time is null"} {behind if start else ""}
            order by {", ".join(f"{column} {part.direction}" for column in part.columns)}
            limit ${len(parameters) + 1}
            """,
            *parameters,
            None if limit is None else limit - len(rows),
        )
        if len(rows) == limit:
            break
    return [_version(row) for row in rows]


async def list_recent_version_ids(
    conn: Connection, project_id: str, within: timedelta
) -> list[str]:
    """Reads the ids of versions that changed a short while ago, in the trash or not."""
    rows = await conn.fetch(
        "select id from version where project_id = $1 and update_time > now() - $2::interval",
        project_id,
        within,
    )
    return [row["id"] for row in rows]


async def update_version(
    conn: Connection, before: Version, *, display_name: str, labels: Mapping[str, str]
) -> Version:
    """Changes the name and the labels of a version that is not in the trash.

    Raises:
        AlreadyExists: DUPLICATE_NAME, naming the version that has this display name.
        Aborted: The version changed since `before` was read.
    """
    try:
        row = await conn.fetchrow(
            """
            update version
            set display_name = $3, name_key = $4, labels = $5, revision = revision + 1,
                update_time = now()
            where id = $1 and revision = $2 and delete_time is null returning *
            """,
            before.id,
            before.revision,
            display_name,
            name_key(display_name),
            json.dumps(dict(labels)),
        )
    except asyncpg.UniqueViolationError as error:
        _raise_duplicate_name(error, display_name)
    return _changed(row, before)


async def update_deleted(
    conn: Connection, before: Version, *, deleted: bool, trash_time: timedelta = TRASH_TIME
) -> Version:
    """Moves a version to the trash, where it stays for `trash_time`, or out of it.

    Raises:
        AlreadyExists: DUPLICATE_NAME: another version took its name while it was in the trash.
        Aborted: The version changed since `before` was read.
    """
    try:
        row = await conn.fetchrow(
            """
            update version
            set delete_time = case when $3 then now() end,
                purge_time = case when $3 then now() + $4 end, revision = revision + 1,
                update_time = now()
            where id = $1 and revision = $2 and (delete_time is null) = $3 returning *
            """,
            before.id,
            before.revision,
            deleted,
            trash_time,
        )
    except asyncpg.UniqueViolationError as error:
        _raise_duplicate_name(error, before.display_name)
    return _changed(row, before)


async def update_state(conn: Connection, before: Version, after: Version) -> Version:
    """Moves a version to another state, with what belongs to it, or changes only that.

    Raises:
        Aborted: The version changed since `before` was read.
    """
    bundle, metrics = after.bundle, after.metrics
    row = await conn.fetchrow(
        """
        update version
        set state = $4, num_images = $5, manifest_key = $6, manifest_size_bytes = $7,
            manifest_sha256 = $8, training_id = $9, run_time = $10, failure = $11,
            preprocessing_revision = $12, metrics_training_id = $13, map50 = $14,
            map50_95 = $15, precision = $16, recall = $17, revision = revision + 1,
            update_time = now()
        where id = $1 and revision = $2 and state = $3 returning *
        """,
        before.id,
        before.revision,
        before.state,
        after.state,
        list(bundle.num_images) if bundle else None,
        bundle.manifest.key if bundle else None,
        bundle.manifest.size_bytes if bundle else None,
        bundle.manifest.sha256 if bundle else None,
        after.training_id,
        after.run_time,
        after.failure,
        after.preprocessing_revision,
        metrics.training_id if metrics else None,
        metrics.map50 if metrics else None,
        metrics.map50_95 if metrics else None,
        metrics.precision if metrics else None,
        metrics.recall if metrics else None,
    )
    return _changed(row, before)


async def delete_expired(conn: Connection) -> Version | None:
    """Removes a version whose time in the trash is over and for which nothing runs any more.

    Returns:
        The version as it was, with the revision of its end; None if there is none to remove, or
        others are at it.
    """
    row = await conn.fetchrow(
        """
        delete from version where id = (
          select id from version where purge_time <= now() and state <> all($1)
          order by purge_time limit 1 for update skip locked)
        returning *
        """,
        [State.PREPROCESSING, *LIVE],
    )
    return _version(row, revision=row["revision"] + 1) if row else None


async def update_preprocessing_revision(conn: Connection, version_id: str, revision: int) -> None:
    """Notes that a preprocessing event was applied that changed nothing a user can see."""
    await conn.execute(
        "update version set preprocessing_revision = $2 where id = $1", version_id, revision
    )


async def get_time(conn: Connection) -> datetime:
    """Reads the database's clock, the same for every replica of a service."""
    time: datetime = await conn.fetchval("select clock_timestamp()")
    return time


def _raise_duplicate_name(error: asyncpg.UniqueViolationError, display_name: str) -> NoReturn:
    if error.constraint_name != "version_name_key":
        raise error
    raise AlreadyExists(
        f"another version of this project is called {display_name!r}; choose another name",
        reason="DUPLICATE_NAME",
        metadata={"display_name": display_name},
    ) from error


def _changed(row: asyncpg.Record | None, before: Version) -> Version:
    """Reads the row that a guarded update returned; none means that somebody else was faster."""
    if row is None:
        raise Aborted(
            f"{before.name} was changed by somebody else meanwhile; read it again and retry",
            reason="CONCURRENT_CHANGE",
        )
    return _version(row)


def _version(row: asyncpg.Record, revision: int | None = None) -> Version:
    bundle, metrics = None, None
    if row["manifest_key"] is not None:
        manifest = StoredObject(
            key=row["manifest_key"],
            size_bytes=row["manifest_size_bytes"],
            sha256=row["manifest_sha256"],
        )
        num_train, num_val, num_test = row["num_images"]
        bundle = Bundle(manifest=manifest, num_images=(num_train, num_val, num_test))
    if row["metrics_training_id"] is not None:
        metrics = Metrics(
            training_id=row["metrics_training_id"],
            map50=row["map50"],
            map50_95=row["map50_95"],
            precision=row["precision"],
            recall=row["recall"],
        )
    return Version(
        id=row["id"],
        project_id=row["project_id"],
        display_name=row["display_name"],
        state=State(row["state"]),
        dataset=row["dataset"],
        class_names=tuple(row["class_names"]),
        recipe=row["recipe"],
        bundle=bundle,
        training_id=row["training_id"],
        run_time=row["run_time"],
        failure=row["failure"],
        labels=json.loads(row["labels"]),
        dataset_sha256=row["dataset_sha256"],
        parent_version=row["parent_version"],
        metrics=metrics,
        preprocessing_revision=row["preprocessing_revision"],
        revision=row["revision"] if revision is None else revision,
        create_time=row["create_time"],
        update_time=row["update_time"],
        delete_time=row["delete_time"],
        purge_time=row["purge_time"],
        request_sha256=row["request_sha256"],
    )
