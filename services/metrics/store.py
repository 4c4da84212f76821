"""The tables of the metrics service; every function runs on the caller's connection."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import asyncpg

from detflow import names
from detflow.errors import NotFound, not_found
from detflow.postgres import Connection
from services.metrics import garbage
from services.metrics.domain import (
    Applied,
    ClassFigures,
    CocoSummary,
    Evaluation,
    Job,
    Measurement,
    OperatingPoint,
    Training,
    TrainingState,
)


async def lock_training(
    conn: Connection, *, training_id: str, project_id: str, name: str
) -> Training | None:
    """Returns a training, recorded now if it is new, locked until the transaction ends.

    There is none of a version that was purged.
    """
    row = await conn.fetchrow("select * from training where id = $1 for update", training_id)
    if row is None:
        version_id = name.split("/")[3]
        await conn.execute(
            "select pg_advisory_xact_lock_shared(hashtextextended('version ' || $1, 0))", version_id
        )
        row = await conn.fetchrow(
            """
            insert into training (id, project_id, name)
            select $1, $2, $3 where not exists (
              select from purged_version where version_id = $4)
            on conflict (id) do update set name = excluded.name
            returning *
            """,
            training_id,
            project_id,
            name,
            version_id,
        )
    return _training(row) if row else None


async def get_training(conn: Connection, training_id: str) -> Training | None:
    """Returns a training, or None if no event told of it."""
    row = await conn.fetchrow("select * from training where id = $1", training_id)
    return _training(row) if row else None


async def find_training(conn: Connection, name: str) -> Training:
    """Reads a training by its full name.

    Raises:
        NotFound: No event told of it, or it is one of another project or version.
    """
    training = await get_training(conn, names.last_segment(name))
    if training is None or training.name != name:
        raise not_found(name)
    return training


async def lock_training_by_id(conn: Connection, training_id: str) -> None:
    """Locks a training that is there until the transaction ends."""
    await conn.execute("select from training where id = $1 for update", training_id)


async def update_training(conn: Connection, training: Training) -> None:
    """Writes a locked training back."""
    await conn.execute(
        "update training set state = $2, revision = $3, attempt = $4, applied_seq = $5,"
        " applied_ahead = $6, message = $7 where id = $1",
        training.id,
        int(training.state),
        training.revision,
        training.attempt,
        training.applied.seq,
        list(training.applied.ahead),
        training.message,
    )


async def purge_version(conn: Connection, version_id: str) -> None:
    """Forgets the trainings of a version for good, with all that was measured of them."""
    await conn.execute(
        "select pg_advisory_xact_lock(hashtextextended('version ' || $1, 0))", version_id
    )
    await conn.execute(
        "insert into purged_version (version_id) values ($1) on conflict do nothing", version_id
    )
    await conn.execute(
        """
        with gone as (
          delete from training where split_part(name, '/', 4) = $1 returning id
        )
        insert into garbage (key)
        select matches_key from evaluation e join gone on e.training_id = gone.id
        where matches_key is not null
        on conflict (key) do update set collect_time = now()
        """,
        version_id,
    )


async def is_purged(conn: Connection, version_id: str) -> bool:
    """Says whether a version is gone for good."""
    purged: bool = await conn.fetchval(
        "select exists (select from purged_version where version_id = $1)", version_id
    )
    return purged


async def insert_job(
    conn: Connection,
    *,
    training_id: str,
    attempt: int,
    split: str,
    manifest: bytes,
    predictions: bytes,
    traceparent: str,
) -> None:
    """Queues predictions to be measured, unless this or a newer attempt's have been."""
    await conn.execute(
        "insert into evaluation_job"
        " (training_id, attempt, split, manifest, predictions, traceparent)"
        " select $1, $2, $3, $4, $5, $6 where not exists (select from evaluation"
        "  where training_id = $1 and split = $3 and attempt >= $2) on conflict do nothing",
        training_id,
        attempt,
        split,
        manifest,
        predictions,
        traceparent,
    )


async def delete_jobs(conn: Connection, *, training_id: str, up_to_attempt: int) -> None:
    """Gives up what waits to be measured of a training's attempts up to this one."""
    await conn.execute(
        "delete from evaluation_job where training_id = $1 and attempt <= $2",
        training_id,
        up_to_attempt,
    )


async def claim_job(conn: Connection, *, lease: str, lease_seconds: float) -> Job | None:
    """Takes the oldest job that is due and nobody works on, validation before test."""
    row = await conn.fetchrow(
        """
        update evaluation_job j
        set lease = $1, run_after = now() + make_interval(secs => $2), num_tries = num_tries + 1
        from training t
        where t.id = j.training_id and (j.training_id, j.attempt, j.split) = (
          select training_id, attempt, split from evaluation_job
          where run_after <= now()
          order by create_time, training_id, split desc limit 1 for update skip locked)
        returning j.*, t.name
        """,
        lease,
        lease_seconds,
    )
    if row is None:
        return None
    return Job(
        training=row["name"],
        training_id=row["training_id"],
        attempt=row["attempt"],
        split=row["split"],
        manifest=row["manifest"],
        predictions=row["predictions"],
        traceparent=row["traceparent"],
        num_tries=row["num_tries"],
        lease=row["lease"],
    )


async def update_job_lease(conn: Connection, job: Job, *, seconds: float) -> bool:
    """Keeps (or, with less time, gives back) a job; False if it is someone else's or gone."""
    return bool(
        await conn.fetchval(
            "update evaluation_job set run_after = now() + make_interval(secs => $5)"
            " where training_id = $1 and attempt = $2 and split = $3 and lease = $4"
            " returning true",
            job.training_id,
            job.attempt,
            job.split,
            job.lease,
            seconds,
        )
    )


async def delete_job(conn: Connection, job: Job) -> bool:
    """Removes a finished job; False if it is someone else's or gone."""
    return bool(
        await conn.fetchval(
            "delete from evaluation_job"
            " where training_id = $1 and attempt = $2 and split = $3 and lease = $4"
            " returning true",
            job.training_id,
            job.attempt,
            job.split,
            job.lease,
        )
    )


async def insert_evaluation(
    conn: Connection,
    job: Job,
    *,
    measurement: Measurement | None = None,
    ground_truth_sha256: str = "",
    matches: bytes | None = None,
    failure: bytes | None = None,
) -> Evaluation | None:
    """Records an evaluation in place of an older attempt's; None if a newer one is there.

    Its matches are no garbage from now on, those of the older attempt are.
    """
    old_key = await conn.fetchval(
        "select matches_key from evaluation where training_id = $1 and split = $2 and attempt < $3",
        job.training_id,
        job.split,
        job.attempt,
    )
    row = await conn.fetchrow(
        """
        insert into evaluation
          (training_id, split, attempt, measurement, failure, ground_truth_sha256, manifest,
           matches, matches_key)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        on conflict (training_id, split) do update
        set attempt = excluded.attempt, measurement = excluded.measurement,
            failure = excluded.failure, ground_truth_sha256 = excluded.ground_truth_sha256,
            manifest = excluded.manifest, matches = excluded.matches,
            matches_key = excluded.matches_key, create_time = now()
        where evaluation.attempt < excluded.attempt
        returning evaluation.*
        """,
        job.training_id,
        job.split,
        job.attempt,
        json.dumps(dataclasses.asdict(measurement)) if measurement else None,
        failure,
        ground_truth_sha256,
        job.manifest,
        matches,
        job.matches_key if matches else None,
    )
    if row is None:
        return None
    if matches:
        await garbage.unmark(conn, job.matches_key)
    if old_key:
        await garbage.mark(conn, old_key)
    return _evaluation(row, job.training)


async def list_evaluations(conn: Connection, training: Training) -> list[Evaluation]:
    """Lists the evaluations of a training: validation, then test."""
    rows = await conn.fetch(
        "select * from evaluation where training_id = $1 order by split desc", training.id
    )
    return [_evaluation(row, training.name) for row in rows]


async def find_evaluation(conn: Connection, training: str, split: str) -> Evaluation:
    """Reads the evaluation of one split of a training, by its full name.

    Raises:
        NotFound: There is no such training, or EVALUATION_NOT_FOUND: it is not measured yet.
    """
    for evaluation in await list_evaluations(conn, await find_training(conn, training)):
        if evaluation.split == split:
            return evaluation
    raise NotFound(
        f"there is no {training}/evaluations/{split}; a training is evaluated when it has finished",
        reason="EVALUATION_NOT_FOUND",
    )


def measurement_from_json(fields: Mapping[str, Any]) -> Measurement:
    """Rebuilds what `dataclasses.asdict` and JSON made of a measurement."""
    return Measurement(
        coco=CocoSummary(**fields["coco"]),
        best_f1=_operating_point(fields["best_f1"]),
        classes=tuple(
            ClassFigures(**{**figures, "best_f1": _operating_point(figures.get("best_f1"))})
            for figures in fields["classes"]
        ),
        num_images=fields["num_images"],
        num_ground_truths=fields["num_ground_truths"],
        num_predictions=fields["num_predictions"],
    )


def _operating_point(fields: Mapping[str, Any] | None) -> OperatingPoint | None:
    return OperatingPoint(**fields) if fields else None


def _training(row: asyncpg.Record) -> Training:
    return Training(
        id=row["id"],
        project_id=row["project_id"],
        name=row["name"],
        state=TrainingState(row["state"]),
        revision=row["revision"],
        attempt=row["attempt"],
        applied=Applied(row["applied_seq"], tuple(row["applied_ahead"])),
        message=row["message"],
    )


def _evaluation(row: asyncpg.Record, training: str) -> Evaluation:
    return Evaluation(
        training=training,
        split=row["split"],
        attempt=row["attempt"],
        measurement=(
            measurement_from_json(json.loads(row["measurement"])) if row["measurement"] else None
        ),
        failure=row["failure"],
        create_time=row["create_time"],
        ground_truth_sha256=row["ground_truth_sha256"],
        manifest=row["manifest"],
        matches=row["matches"],
    )
