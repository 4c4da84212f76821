"""Figures about a service's state for Prometheus, read from its tables every few seconds.

Every replica of a service reports the same state: take `max`, not `sum`, of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from prometheus_client import Gauge

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.postgres import Database

log = telemetry.get_logger(__name__)

_SECONDS = 10.0


@dataclass(frozen=True)
class Query:
    """Where the values of a gauge are.

    Attributes:
        gauge: The gauge.
        sql: Gives a row for each combination of the gauge's labels, in their order, and then the
            value; combinations without a row are not reported.
    """

    gauge: Gauge
    sql: str


OUTBOX: tuple[Query, ...] = (
    Query(
        Gauge("detflow_outbox_pending", "Events that were not published yet"),
        "select count(*) from outbox where publish_time is null",
    ),
    Query(
        Gauge("detflow_outbox_oldest_seconds", "Age of the oldest event not published yet"),
        "select coalesce(extract(epoch from now() - min(create_time)), 0)"
        " from outbox where publish_time is null",
    ),
)


async def report(
    db: Database, queries: Sequence[Query], more: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Sets the gauges for ever.

    Args:
        db: Database of the service.
        queries: What is looked up.
        more: Sets further gauges.
    """
    while True:
        try:
            for query in queries:
                await read(db, query)
            if more is not None:
                await more()
        except Unavailable as error:
            log.warning("figures are out of date", error=str(error))
        await asyncio.sleep(_SECONDS)


async def read(db: Database, query: Query) -> None:
    """Sets one gauge.

    Raises:
        Unavailable: Postgres is away.
    """
    async with db.connection() as conn:
        rows = [tuple(row) for row in await conn.fetch(query.sql)]
    if query.gauge._labelnames:
        query.gauge.clear()
        for *labels, value in rows:
            query.gauge.labels(*labels).set(float(value))
    else:
        query.gauge.set(float(rows[0][0]))
