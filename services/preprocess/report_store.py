"""Outlines of images, leak reports and statistics in Postgres: SQL beside its function."""

from __future__ import annotations

from detflow.postgres import Connection
from detflow.v1.dataset_pb2 import DatasetStatistics
from detflow.v1.preprocess_pb2 import LeakReport
from services.preprocess.outlines import Outlines

_ROWS_AT_ONCE = 5000


async def list_outlines(conn: Connection, dataset_id: str) -> Outlines:
    """Reads what a split has to know about a dataset's images, inside a transaction."""
    outlines = Outlines()
    rows = conn.cursor(
        """
        select path, sha256, size_bytes, class_ids, existing_split, perceptual_hash
        from image where dataset_id = $1 order by position
        """,
        dataset_id,
        prefetch=_ROWS_AT_ONCE,
    )
    async for row in rows:
        outlines.add(**dict(row))
    return outlines


async def insert_leak_report(conn: Connection, version_id: str, report: LeakReport) -> None:
    """Records what a finished preprocessing kept together."""
    await conn.execute(
        "insert into leak_report (version_id, report) values ($1, $2)",
        version_id,
        report.SerializeToString(deterministic=True),
    )


async def get_leak_report(conn: Connection, version_id: str) -> LeakReport | None:
    """Reads the leak report of a version; None if there is none (yet)."""
    data = await conn.fetchval("select report from leak_report where version_id = $1", version_id)
    return None if data is None else LeakReport.FromString(data)


async def insert_statistics(
    conn: Connection, dataset_id: str, statistics: DatasetStatistics
) -> None:
    """Records what was counted in a dataset, unless somebody else was faster."""
    await conn.execute(
        "insert into dataset_statistics (dataset_id, statistics) values ($1, $2)"
        " on conflict do nothing",
        dataset_id,
        statistics.SerializeToString(deterministic=True),
    )


async def get_statistics(conn: Connection, dataset_id: str) -> DatasetStatistics | None:
    """Reads what was counted in a dataset; None for one that was imported before there was that."""
    data = await conn.fetchval(
        "select statistics from dataset_statistics where dataset_id = $1", dataset_id
    )
    return None if data is None else DatasetStatistics.FromString(data)
