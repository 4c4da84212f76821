"""What is known of the trainings of versions, in Postgres: how far followed, what was measured."""

from __future__ import annotations

from detflow.postgres import Connection
from services.version.domain import FollowedTraining, Metrics, TrainingState


async def get_followed_training(conn: Connection, training_id: str) -> FollowedTraining | None:
    """Reads how far a training's events were applied; None if none was."""
    row = await conn.fetchrow("select * from version_training where training_id = $1", training_id)
    if row is None:
        return None
    return FollowedTraining(
        training_id=row["training_id"],
        revision=row["revision"],
        state=TrainingState(row["state"]),
        attempt=row["attempt"],
    )


async def update_followed_training(
    conn: Connection, version_id: str, training: FollowedTraining
) -> None:
    """Notes how far a training's events were applied."""
    await conn.execute(
        """
        insert into version_training (training_id, version_id, revision, state, attempt)
        values ($1, $2, $3, $4, $5)
        on conflict (training_id) do update
        set revision = excluded.revision, state = excluded.state, attempt = excluded.attempt
        """,
        training.training_id,
        version_id,
        training.revision,
        training.state,
        training.attempt,
    )


async def insert_evaluation(
    conn: Connection, version_id: str, attempt: int, metrics: Metrics
) -> None:
    """Notes what was measured of a training's attempt, unless it is known of a newer one."""
    await conn.execute(
        """
        insert into version_evaluation (
          training_id, version_id, attempt, map50, map50_95, precision, recall)
        values ($1, $2, $3, $4, $5, $6, $7)
        on conflict (training_id) do update
        set attempt = excluded.attempt, map50 = excluded.map50, map50_95 = excluded.map50_95,
            precision = excluded.precision, recall = excluded.recall
        where version_evaluation.attempt < excluded.attempt
        """,
        metrics.training_id,
        version_id,
        attempt,
        metrics.map50,
        metrics.map50_95,
        metrics.precision,
        metrics.recall,
    )


async def get_newest_metrics(conn: Connection, version_id: str) -> Metrics | None:
    """Reads what was measured of a version's newest training that succeeded; None if nothing was.

    A training can be known to have succeeded before what was measured of it is, and the other way
    round: there are figures once both are known of the same attempt.
    """
    row = await conn.fetchrow(
        """
        select e.training_id, e.map50, e.map50_95, e.precision, e.recall
        from version_training t
        join version_evaluation e on e.training_id = t.training_id and e.attempt = t.attempt
        where t.version_id = $1 and t.state = 'SUCCEEDED'
        order by t.training_id desc limit 1
        """,
        version_id,
    )
    return Metrics(**row) if row else None
