"""Statistics of datasets that are READY, counted now if their import did not."""

from __future__ import annotations

import asyncio

from detflow.errors import FailedPrecondition
from detflow.postgres import Database
from detflow.v1.dataset_pb2 import DatasetStatistics
from services.preprocess import store as sql
from services.preprocess.domain import Dataset, DatasetState, Reason
from services.preprocess.report_store import get_statistics, insert_statistics
from services.preprocess.statistics import BATCH, StatisticsBuilder


async def statistics_of(db: Database, dataset: Dataset) -> DatasetStatistics:
    """Reads what was counted in a dataset; the first time, for one of an earlier release, counts.

    Raises:
        FailedPrecondition: DATASET_NOT_READY.
    """
    if dataset.state is not DatasetState.READY:
        raise FailedPrecondition(
            f"{dataset.name} is {dataset.state}, not READY; there are statistics of READY datasets",
            reason=Reason.DATASET_NOT_READY,
            metadata={"dataset": dataset.name},
        )
    async with db.connection() as conn:
        known = await get_statistics(conn, dataset.id)
    if known is None:
        known = await _count(db, dataset)
        async with db.connection() as conn:
            await insert_statistics(conn, dataset.id, known)
    known.name = f"{dataset.name}/statistics"
    return known


async def _count(db: Database, dataset: Dataset) -> DatasetStatistics:
    builder = StatisticsBuilder(dataset.class_names)
    for begin in range(0, dataset.num_images, BATCH):
        async with db.connection() as conn:
            images = await sql.list_images(conn, dataset.id, range(begin, begin + BATCH))
        await asyncio.to_thread(builder.add, images)
    return await asyncio.to_thread(builder.finish)
