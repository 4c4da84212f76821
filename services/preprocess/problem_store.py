"""What was wrong with imported archives, in Postgres."""

from __future__ import annotations

from collections.abc import Sequence

from detflow.postgres import Connection
from services.preprocess.domain import Problem, Reason

_ROWS_PER_COPY = 50_000  # far from the time that one command may take


async def insert_problems(
    conn: Connection, dataset_id: str, problems: Sequence[Problem], num_total: int
) -> None:
    """Records the problems of an import, with the end of which they belong in one transaction.

    Args:
        conn: Connection in a transaction.
        dataset_id: The dataset.
        problems: Those to keep, in the order of their places.
        num_total: How many there were.
    """
    await conn.execute("update dataset set num_problems = $2 where id = $1", dataset_id, num_total)
    for start in range(0, len(problems), _ROWS_PER_COPY):
        await conn.copy_records_to_table(
            "import_problem",
            columns=("dataset_id", "position", "place", "reason", "description"),
            records=(
                (dataset_id, position, problem.where, problem.reason, problem.description)
                for position, problem in enumerate(
                    problems[start : start + _ROWS_PER_COPY], start=start
                )
            ),
        )


async def list_problems(
    conn: Connection, dataset_id: str, after: int, limit: int
) -> list[tuple[int, Problem]]:
    """Reads problems in the order of their places, with their positions.

    Args:
        conn: Connection.
        dataset_id: The dataset.
        after: Position after which to begin; -1 for the first.
        limit: At most this many.
    """
    rows = await conn.fetch(
        """
        select position, place, reason, description from import_problem
        where dataset_id = $1 and position > $2 order by position limit $3
        """,
        dataset_id,
        after,
        limit,
    )
    return [
        (row["position"], Problem(row["place"], Reason(row["reason"]), row["description"]))
        for row in rows
    ]
