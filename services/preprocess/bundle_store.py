"""Preprocessings and their shards in Postgres: SQL beside the function that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import asyncpg

from detflow.errors import not_found
from detflow.names import last_segment
from detflow.postgres import Connection
from detflow.v1.common_pb2 import StoredObject
from services.preprocess.bundle import StoredShard
from services.preprocess.domain import LEASE_SECONDS, Preprocessing, PreprocessingState

_PREPROCESSING = """
  version_id, version_name, dataset_id, recipe, state, revision, num_images, manifest, failure,
  create_time, end_time, num_failures
"""


def _preprocessing(row: asyncpg.Record) -> Preprocessing:
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(Preprocessing)}
    values["state"] = PreprocessingState(row["state"])
    values["num_images"] = tuple(row["num_images"]) if row["num_images"] else None
    return Preprocessing(**values)


async def insert_preprocessing(
    conn: Connection,
    *,
    version_name: str,
    version_deleted: bool,
    version_revision: int,
    dataset_id: str,
    recipe: bytes,
) -> Preprocessing | None:
    """Records a version whose bundle is to be made; None if it is known.

    The dataset, if there is one, is locked against its deletion meanwhile.
    """
    await conn.execute("select 1 from dataset where id = $1 for share", dataset_id)
    row = await conn.fetchrow(
        f"""
        insert into preprocessing (
          version_id, version_name, version_deleted, version_revision, dataset_id, recipe)
        values ($1, $2, $3, $4, $5, $6) on conflict do nothing
        returning {_PREPROCESSING}
        """,
        last_segment(version_name),
        version_name,
        version_deleted,
        version_revision,
        dataset_id,
        recipe,
    )
    return _preprocessing(row) if row else None


async def get_preprocessing(conn: Connection, version_name: str) -> Preprocessing:
    """Reads the preprocessing of a version.

    Raises:
        NotFound: There is none for this version in this project.
    """
    row = await conn.fetchrow(
        f"select {_PREPROCESSING} from preprocessing where version_id = $1 and version_name = $2",
        last_segment(version_name),
        version_name,
    )
    if row is None:
        raise not_found(version_name)
    return _preprocessing(row)


async def update_version_deleted(
    conn: Connection, version_id: str, *, deleted: bool, version_revision: int
) -> None:
    """Notes whether a version is in the trash, unless something newer is known."""
    await conn.execute(
        """
        update preprocessing set version_deleted = $2, version_revision = $3
        where version_id = $1 and version_revision < $3
        """,
        version_id,
        deleted,
        version_revision,
    )


async def cancel_preprocessing(conn: Connection, version_id: str) -> Preprocessing | None:
    """PENDING, RUNNING -> CANCELLED; None if it is final already."""
    row = await conn.fetchrow(
        f"""
        update preprocessing set state = 'CANCELLED', revision = revision + 1, end_time = now(),
               claim = null, lease_expires = null
        where version_id = $1 and state in ('PENDING', 'RUNNING')
        returning {_PREPROCESSING}
        """,
        version_id,
    )
    return _preprocessing(row) if row else None


async def claim_preprocessing(conn: Connection, claim: str) -> tuple[Preprocessing, bool] | None:
    """PENDING -> RUNNING, or takes over RUNNING whose lease ran out.

    Returns:
        The preprocessing, and whether its state was changed; None if there is nothing to do.
    """
    row = await conn.fetchrow(
        f"""
        with next as (
          select version_id as id, state as old_state from preprocessing
          where state in ('PENDING', 'RUNNING') and (lease_expires is null or lease_expires < now())
          order by version_id limit 1 for update skip locked
        )
        update preprocessing set claim = $1, lease_expires = now() + make_interval(secs => $2),
               state = 'RUNNING',
               revision = revision + case when state = 'PENDING' then 1 else 0 end
        from next where version_id = next.id
        returning {_PREPROCESSING}, old_state
        """,
        claim,
        LEASE_SECONDS,
    )
    if row is None:
        return None
    return _preprocessing(row), row["old_state"] == PreprocessingState.PENDING


async def renew_preprocessing(conn: Connection, version_id: str, claim: str) -> bool:
    """Extends a lease; False if the claim is lost or the version was deleted."""
    renewed: bool | None = await conn.fetchval(
        """
        update preprocessing set lease_expires = now() + make_interval(secs => $3)
        where version_id = $1 and claim = $2 and state = 'RUNNING' returning true
        """,
        version_id,
        claim,
        LEASE_SECONDS,
    )
    return bool(renewed)


async def release_preprocessing(
    conn: Connection, version_id: str, claim: str, *, failed: bool, delay_seconds: float = 0.0
) -> None:
    """Gives a claim back for another try, counting the failure if it was one."""
    await conn.execute(
        """
        update preprocessing set claim = null, num_failures = num_failures + $3::int,
               lease_expires = now() + make_interval(secs => $4)
        where version_id = $1 and claim = $2 and state = 'RUNNING'
        """,
        version_id,
        claim,
        int(failed),
        delay_seconds,
    )


async def complete_preprocessing(
    conn: Connection,
    *,
    version_id: str,
    claim: str,
    num_images: Sequence[int],
    manifest: StoredObject,
) -> Preprocessing | None:
    """RUNNING -> SUCCEEDED; None if the claim is lost."""
    row = await conn.fetchrow(
        f"""
        update preprocessing set state = 'SUCCEEDED', revision = revision + 1, num_images = $3,
               manifest = $4, end_time = now(), claim = null, lease_expires = null
        where version_id = $1 and claim = $2 and state = 'RUNNING'
        returning {_PREPROCESSING}
        """,
        version_id,
        claim,
        list(num_images),
        manifest.SerializeToString(deterministic=True),
    )
    return _preprocessing(row) if row else None


async def fail_preprocessing(
    conn: Connection, version_id: str, claim: str, failure: bytes
) -> Preprocessing | None:
    """RUNNING -> FAILED; None if the claim is lost."""
    row = await conn.fetchrow(
        f"""
        update preprocessing set state = 'FAILED', revision = revision + 1, failure = $3,
               end_time = now(), claim = null, lease_expires = null
        where version_id = $1 and claim = $2 and state = 'RUNNING'
        returning {_PREPROCESSING}
        """,
        version_id,
        claim,
        failure,
    )
    return _preprocessing(row) if row else None


async def insert_shard(
    conn: Connection, *, version_id: str, claim: str, split: str, position: int, shard: StoredShard
) -> bool:
    """Records a finished shard; False if the claim is lost, so that the work must end."""
    inserted: bool | None = await conn.fetchval(
        """
        insert into shard (version_id, split, position, key, size_bytes, sha256, num_images)
        select version_id, $3, $4, $5, $6, $7, $8 from preprocessing
        where version_id = $1 and claim = $2 and state = 'RUNNING'
        on conflict (version_id, split, position) do update
        set key = excluded.key, size_bytes = excluded.size_bytes, sha256 = excluded.sha256,
            num_images = excluded.num_images
        returning true
        """,
        version_id,
        claim,
        split,
        position,
        shard.key,
        shard.size_bytes,
        shard.sha256,
        shard.num_images,
    )
    return bool(inserted)


async def list_shards(conn: Connection, version_id: str) -> dict[tuple[str, int], StoredShard]:
    """Reads the finished shards of a version by (split, position)."""
    rows = await conn.fetch("select * from shard where version_id = $1", version_id)
    return {
        (row["split"], row["position"]): StoredShard(
            row["key"], row["size_bytes"], row["sha256"], row["num_images"]
        )
        for row in rows
    }


async def insert_bundle_object(conn: Connection, *, version_id: str, claim: str, key: str) -> bool:
    """Notes that a version uses an object that is no shard; False if the claim is lost."""
    inserted: bool | None = await conn.fetchval(
        """
        insert into bundle_object (version_id, key)
        select version_id, $3 from preprocessing
        where version_id = $1 and claim = $2 and state = 'RUNNING'
        on conflict (version_id, key) do update set key = excluded.key
        returning true
        """,
        version_id,
        claim,
        key,
    )
    return bool(inserted)


async def lock_version(conn: Connection, version_id: str) -> None:
    """Makes the events of one version wait for one another until the commit."""
    await conn.execute(
        "select pg_advisory_xact_lock(hashtextextended('version ' || $1, 0))", version_id
    )


async def purge_version(conn: Connection, version_id: str) -> None:
    """Forgets a version for good; what only its bundle used becomes garbage."""
    await conn.execute(
        "insert into purged_version (version_id) values ($1) on conflict do nothing", version_id
    )
    await conn.execute(
        """
        insert into garbage (prefix)
        select key from shard where version_id = $1
        union select key from bundle_object where version_id = $1
        order by 1  -- as everybody: two purges that share objects must not wait for each other
        on conflict (prefix) do update set collect_time = excluded.collect_time
        """,
        version_id,
    )
    await conn.execute("delete from preprocessing where version_id = $1", version_id)


async def is_purged(conn: Connection, version_id: str) -> bool:
    """Says whether a version is gone for good."""
    purged: bool = await conn.fetchval(
        "select exists (select from purged_version where version_id = $1)", version_id
    )
    return purged
