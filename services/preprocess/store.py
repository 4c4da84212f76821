"""Datasets and their images in Postgres: SQL beside the function that runs it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import asyncpg

from detflow.errors import (
    MAX_VIOLATIONS,
    AlreadyExists,
    FailedPrecondition,
    Violation,
    not_found,
)
from detflow.postgres import Connection
from services.preprocess.domain import (
    LEASE_SECONDS,
    Dataset,
    DatasetState,
    Image,
    Problem,
    Reason,
    Statistics,
    dataset_prefix,
)
from services.preprocess.garbage_store import insert_garbage

_DATASET = """
  id, project_id, display_name, state, upload_id, source_url, skip_invalid, wanted_format, format,
  class_names, num_images, num_boxes, num_background_images, num_boxes_by_class, skipped,
  num_skipped, content_sha256, existing_split, num_crowd_boxes, num_problems, failure,
  create_time, import_time, num_failures
"""
_IMAGE_COLUMNS = tuple(
    "dataset_id position path sha256 width height shard_key shard_offset size_bytes"
    " class_ids boxes existing_split crowds perceptual_hash".split()
)


def _dataset(row: asyncpg.Record) -> Dataset:
    values: dict[str, Any] = dict(row)
    values["state"] = DatasetState(row["state"])
    values["class_names"] = tuple(row["class_names"])
    values["num_boxes_by_class"] = tuple(row["num_boxes_by_class"])
    values["existing_split"] = tuple(row["existing_split"]) if row["existing_split"] else None
    values["skipped"] = tuple(
        Problem(where, Reason(reason), description)
        for where, reason, description in json.loads(row["skipped"])
    )
    return Dataset(**values)


async def insert_dataset(
    conn: Connection,
    *,
    dataset_id: str,
    project_id: str,
    display_name: str,
    request_id: str,
    upload_id: str | None,
    source_url: str,
    skip_invalid: bool,
    wanted_format: str | None,
) -> Dataset | None:
    """Records a dataset to be imported.

    Returns:
        None if the request id was used before; `get_requested_dataset` finds what it made.

    Raises:
        AlreadyExists: DUPLICATE_NAME: the project has a dataset of this display name.
    """
    try:
        row = await conn.fetchrow(
            f"""
            insert into dataset (id, project_id, display_name, request_id, upload_id, source_url,
                                 skip_invalid, wanted_format)
            values ($1, $2, $3, nullif($4, ''), $5, $6, $7, $8)
            on conflict on constraint dataset_request_id do nothing
            returning {_DATASET}
            """,
            dataset_id,
            project_id,
            display_name,
            request_id,
            upload_id,
            source_url,
            skip_invalid,
            wanted_format,
        )
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name != "dataset_display_name":
            raise
        raise AlreadyExists(
            f"the project has a dataset named {display_name!r}; choose another name or delete it",
            reason=Reason.DUPLICATE_NAME,
            metadata={"display_name": display_name},
        ) from error
    return _dataset(row) if row else None


async def get_requested_dataset(
    conn: Connection, project_id: str, request_id: str
) -> Dataset | None:
    """Reads the dataset that a request id made, if it was used."""
    row = await conn.fetchrow(
        f"select {_DATASET} from dataset where project_id = $1 and request_id = $2",
        project_id,
        request_id,
    )
    return _dataset(row) if row else None


async def get_dataset(conn: Connection, project_id: str, dataset_id: str) -> Dataset:
    """Reads a dataset.

    Raises:
        NotFound: There is none in this project.
    """
    row = await conn.fetchrow(
        f"select {_DATASET} from dataset where id = $1 and project_id = $2", dataset_id, project_id
    )
    if row is None:
        raise not_found(f"projects/{project_id}/datasets/{dataset_id}")
    return _dataset(row)


async def get_ready_dataset(conn: Connection, project_id: str, dataset_id: str) -> Dataset:
    """Reads a dataset that versions are to be made of.

    Raises:
        NotFound: There is none in this project.
        FailedPrecondition: DATASET_NOT_READY.
    """
    dataset = await get_dataset(conn, project_id, dataset_id)
    if dataset.state is not DatasetState.READY:
        raise FailedPrecondition(
            f"{dataset.name} is {dataset.state}, not READY; make the version of a READY dataset",
            reason=Reason.DATASET_NOT_READY,
            metadata={"dataset": dataset.name},
        )
    return dataset


async def list_datasets(
    conn: Connection, project_id: str, before: str | None, limit: int
) -> list[Dataset]:
    """Reads a project's datasets, newest first, those older than id `before`."""
    rows = await conn.fetch(
        f"""
        select {_DATASET} from dataset
        where project_id = $1 and ($2::text is null or id < $2)
        order by id desc limit $3
        """,
        project_id,
        before,
        limit,
    )
    return [_dataset(row) for row in rows]


async def delete_dataset(conn: Connection, project_id: str, dataset_id: str) -> Dataset:
    """Deletes a dataset with its images; its objects become garbage.

    Raises:
        NotFound: There is none in this project.
        FailedPrecondition: DATASET_IN_USE: versions that are not in the trash were made of it; they
            are the violations.
    """
    row = await conn.fetchrow(
        f"select {_DATASET} from dataset where id = $1 and project_id = $2 for update",
        dataset_id,
        project_id,
    )
    if row is None:
        raise not_found(f"projects/{project_id}/datasets/{dataset_id}")
    users = await conn.fetch(
        """
        select version_name, count(*) over () as num_users from preprocessing
        where dataset_id = $1 and not version_deleted and state not in ('FAILED', 'CANCELLED')
        order by version_id limit $2
        """,
        dataset_id,
        MAX_VIOLATIONS,
    )
    if users:
        names, total = [user["version_name"] for user in users], users[0]["num_users"]
        more = f" and {total - 1} more were" if total > 1 else " was"
        raise FailedPrecondition(
            f"{names[0]}{more} made of this dataset; delete what uses it first",
            reason=Reason.DATASET_IN_USE,
            violations=[Violation(name, Reason.DATASET_IN_USE, "uses it") for name in names],
            total=total,
            metadata={"version": names[0], "num_versions": str(total)},
        )
    await conn.execute("delete from dataset where id = $1", dataset_id)
    await insert_garbage(conn, dataset_prefix(dataset_id))
    return _dataset(row)


async def claim_dataset(conn: Connection, claim: str) -> Dataset | None:
    """Claims a dataset that waits for its import or whose importer's lease ran out."""
    row = await conn.fetchrow(
        f"""
        update dataset set claim = $1, lease_expires = now() + make_interval(secs => $2)
        where id = (
          select id from dataset
          where state = 'IMPORTING' and (lease_expires is null or lease_expires < now())
          order by id limit 1 for update skip locked
        )
        returning {_DATASET}
        """,
        claim,
        LEASE_SECONDS,
    )
    return _dataset(row) if row else None


async def renew_dataset(conn: Connection, dataset_id: str, claim: str) -> bool:
    """Extends a lease; False if the claim is lost, so that the work must end."""
    renewed: bool | None = await conn.fetchval(
        """
        update dataset set lease_expires = now() + make_interval(secs => $3)
        where id = $1 and claim = $2 and state = 'IMPORTING' returning true
        """,
        dataset_id,
        claim,
        LEASE_SECONDS,
    )
    return bool(renewed)


async def release_dataset(
    conn: Connection, dataset_id: str, claim: str, *, failed: bool, delay_seconds: float = 0.0
) -> None:
    """Gives a claim back for another try, counting the failure if it was one."""
    await conn.execute(
        """
        update dataset set claim = null, num_failures = num_failures + $3::int,
               lease_expires = now() + make_interval(secs => $4)
        where id = $1 and claim = $2 and state = 'IMPORTING'
        """,
        dataset_id,
        claim,
        int(failed),
        delay_seconds,
    )


async def complete_dataset(
    conn: Connection,
    *,
    dataset_id: str,
    claim: str,
    layout_format: str,
    class_names: Sequence[str],
    statistics: Statistics,
    skipped: Sequence[Problem],
    num_skipped: int,
    images: Sequence[Image],
) -> Dataset | None:
    """IMPORTING -> READY with all images; None if the claim is lost."""
    row = await conn.fetchrow(
        f"""
        update dataset set state = 'READY', format = $3, class_names = $4, num_images = $5,
               num_boxes = $6, num_background_images = $7, num_boxes_by_class = $8, skipped = $9,
               num_skipped = $10, content_sha256 = $11, existing_split = $12,
               num_crowd_boxes = $13, num_bytes = $14, import_time = now(), claim = null,
               lease_expires = null
        where id = $1 and claim = $2 and state = 'IMPORTING'
        returning {_DATASET}
        """,
        dataset_id,
        claim,
        layout_format,
        list(class_names),
        statistics.num_images,
        statistics.num_boxes,
        statistics.num_background_images,
        list(statistics.num_boxes_by_class),
        json.dumps([[p.where, p.reason, p.description] for p in skipped]),
        num_skipped,
        statistics.content_sha256,
        statistics.existing_split,
        statistics.num_crowd_boxes,
        sum(image.size_bytes for image in images),
    )
    if row is None:
        return None
    await conn.copy_records_to_table(
        "image",
        columns=_IMAGE_COLUMNS,
        records=(
            (
                dataset_id,
                position,
                image.path,
                image.sha256,
                image.width,
                image.height,
                image.shard_key,
                image.offset,
                image.size_bytes,
                image.class_ids,
                image.boxes,
                image.existing_split,
                image.crowds,
                image.perceptual_hash,
            )
            for position, image in enumerate(images)
        ),
    )
    return _dataset(row)


async def fail_dataset(
    conn: Connection, dataset_id: str, claim: str, failure: bytes
) -> Dataset | None:
    """IMPORTING -> FAILED; None if the claim is lost."""
    row = await conn.fetchrow(
        f"""
        update dataset set state = 'FAILED', failure = $3, import_time = now(), claim = null,
               lease_expires = null
        where id = $1 and claim = $2 and state = 'IMPORTING'
        returning {_DATASET}
        """,
        dataset_id,
        claim,
        failure,
    )
    if row is None:
        return None
    await insert_garbage(conn, dataset_prefix(dataset_id))
    return _dataset(row)


async def list_image_places(
    conn: Connection, dataset_id: str
) -> list[tuple[str, str | None, int, int]]:
    """Reads path, existing split, width and height of every image, in the order of positions."""
    rows = await conn.fetch(
        "select path, existing_split, width, height from image where dataset_id = $1"
        " order by position",
        dataset_id,
    )
    return [tuple(row) for row in rows]


async def list_images(conn: Connection, dataset_id: str, positions: Sequence[int]) -> list[Image]:
    """Reads images by position, ascending."""
    rows = await conn.fetch(
        """
        select path, sha256, width, height, shard_key, shard_offset, size_bytes, class_ids, boxes,
               existing_split, crowds, perceptual_hash
        from image where dataset_id = $1 and position = any($2::int[]) order by position
        """,
        dataset_id,
        list(positions),
    )
    return [
        Image(
            path=row["path"],
            sha256=row["sha256"],
            width=row["width"],
            height=row["height"],
            shard_key=row["shard_key"],
            offset=row["shard_offset"],
            size_bytes=row["size_bytes"],
            class_ids=tuple(row["class_ids"]),
            boxes=tuple(row["boxes"]),
            existing_split=row["existing_split"],
            crowds=tuple(row["crowds"]),
            perceptual_hash=row["perceptual_hash"],
        )
        for row in rows
    ]
