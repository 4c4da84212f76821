"""Series of thousands of trainings: how long reading takes, and what they take on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import asyncpg
import grpc
import numpy as np
from google.protobuf import json_format

from detflow import channels
from detflow.client import Client
from detflow.client.columns import join
from detflow.local import postgres
from detflow.local.process import free_port
from detflow.v1 import events_pb2, metrics_pb2, metrics_pb2_grpc, training_pb2
from services.metrics import series_store
from services.metrics.series import Series
from services.metrics.service import to_metric_columns, to_metric_series
from tests.benchmarks.rig import percentile
from tests.benchmarks.training import _nats

_NAMES = sorted(
    [f"{split}/{name}_loss" for split in ("train", "val") for name in ("box", "cls", "dfl")]
    + [f"val/{name}" for name in ("map50", "map50_95", "precision", "recall")]
    + ["lr", "images_per_second", "data_wait_share", "memory_bytes", "epoch_seconds"]
    + [f"more/{number}" for number in range(5)]
)
_STEP_NAMES = ("train/box_loss", "train/cls_loss", "train/dfl_loss", "lr", "images_per_second")
_NUM_EPOCHS = 100
_TRAINING = "projects/p/versions/v/trainings/"

T = TypeVar("T")


def run(quick: bool = False) -> dict[str, Any]:
    """Fills the tables and reads from them through the service, a process of its own.

    Args:
        quick: 200 trainings and 20,000 values instead of 10,000 and a million.

    Returns:
        Milliseconds of listing 100 epochs x 20 series of trainings chosen at random; size on disk;
        seconds of reading a million values by step through the SDK; bytes of a million steps in the
        event stream; and what 1000 values take as JSON and as columns.
    """
    return asyncio.run(_run(200 if quick else 10_000, 1_000 if quick else 50_000))


async def _run(num_trainings: int, num_steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="detflow-series-") as name:
        async with _service(Path(name)) as (address, conn):
            filling = time.perf_counter()
            await _fill(conn, num_trainings)
            filling = time.perf_counter() - filling
            before = await _sizes(conn)
            listed = await _list(address, num_trainings)
            figures: dict[str, Any] = {
                "trainings": num_trainings,
                "filled_in_seconds": round(filling, 1),
                "list_100_epochs_x_20": listed,
                "disk": {
                    "mb": round(sum(before.values()) / 1e6, 1),
                    "kb_per_training": round(sum(before.values()) / num_trainings / 1e3, 1),
                },
            }
            for label, block in (("blocks_of_500", 500), ("blocks_of_50", 50)):
                training = f"steps{block}"
                written = await _write_steps(conn, training, num_steps, block)
                figures[f"steps_in_{label}"] = {
                    "values": num_steps * len(_NAMES),
                    "write_milliseconds_per_block": round(1000 * written, 2),
                    **await asyncio.to_thread(_read, address, training, num_steps),
                }
            size = sum((await _sizes(conn)).values()) - sum(before.values())
            figures["disk_mb_of_both"] = round(size / 1e6, 1)
    return figures | {
        "stream_mb_per_million_steps": {
            f"blocks_of_{block}": round(_event_bytes(block) / block, 1) for block in (500, 50, 5)
        },
        "1000_values": _encodings(),
    }


@contextlib.asynccontextmanager
async def _service(
    folder: Path,
) -> AsyncIterator[tuple[str, asyncpg.Connection[asyncpg.Record]]]:
    """Runs Postgres, NATS and the metrics service; yields its address and a connection."""
    cluster = postgres.prepare(folder / "postgres")
    database = cluster.start(folder / "postgres.log")
    try:
        with _nats(folder / "nats") as nats_url:
            address = f"127.0.0.1:{free_port()}"
            environment = {
                "DETFLOW_DATABASE_URL": cluster.url("metrics"),
                "DETFLOW_NATS_URL": nats_url,
                "DETFLOW_STORE_URL": (folder / "store").as_uri(),
                "DETFLOW_DATA_DIR": str(folder / "work"),
                "DETFLOW_LISTEN": address,
                "DETFLOW_LOG_LEVEL": "warning",
                "DETFLOW_ACCESS": "open",
            }
            with _process("services.metrics", environment):
                async with grpc.aio.insecure_channel(address) as channel:
                    async with asyncio.timeout(30):
                        await channel.channel_ready()
                conn = await asyncpg.connect(
                    cluster.url("metrics"), server_settings={"search_path": "metrics"}
                )
                yield address, conn
                await conn.close()
    finally:
        database.send_signal(postgres.STOP_SIGNAL)
        database.wait()


@contextlib.contextmanager
def _process(module: str, environment: Mapping[str, str]) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", module], env={**os.environ, **environment})
    try:
        yield
    finally:
        process.terminate()
        process.wait()


async def _fill(conn: asyncpg.Connection[asyncpg.Record], num_trainings: int) -> None:
    """Stores finished trainings of 100 epochs and 20 series each."""
    await conn.execute(
        "insert into training (id, project_id, name, state)"
        " select id, 'p', $2 || id, 5 from"
        " (select 'd' || lpad(n::text, 15, '0') as id from generate_series(1, $1) n) as ids",
        num_trainings,
        _TRAINING,
    )
    await conn.execute(
        "insert into series_names (training_id, number, names) select id, 1, $1 from training",
        _NAMES,
    )
    # Epoch by epoch, as trainings that run at the same time would write them.
    for epoch in range(1, _NUM_EPOCHS + 1):
        await conn.execute(
            "insert into epoch_row (training_id, epoch, attempt, names, values)"
            " select id, $1, 1, 1, array(select random() * length(id) from generate_series(1, 20))"
            " from training",
            epoch,
        )
    await conn.execute("vacuum analyze")


async def _sizes(conn: asyncpg.Connection[asyncpg.Record]) -> dict[str, int]:
    """Returns the bytes of each table with its index, by name."""
    return {
        table: await conn.fetchval("select pg_total_relation_size($1::regclass)", table)
        for table in ("series_names", "epoch_row", "step_block")
    }


async def _list(address: str, num_trainings: int) -> dict[str, float]:
    chance = random.Random(0)
    milliseconds = []
    async with channels.channel(address) as channel:
        stub = metrics_pb2_grpc.MetricsServiceStub(channel)
        for number in range(1020):
            name = f"{_TRAINING}d{chance.randint(1, num_trainings):015}"
            start = time.perf_counter()
            response = await stub.ListMetricSeries(
                metrics_pb2.ListMetricSeriesRequest(training=name)
            )
            if number >= 20:
                milliseconds.append(1000 * (time.perf_counter() - start))
            assert [len(one.values) for one in response.series] == [_NUM_EPOCHS] * len(_NAMES)
    return {
        "p50_ms": round(percentile(milliseconds, 50), 2),
        "p99_ms": round(percentile(milliseconds, 99), 2),
    }


async def _write_steps(
    conn: asyncpg.Connection[asyncpg.Record], training: str, num_steps: int, block: int
) -> float:
    """Stores a training of 500 steps an epoch; returns the seconds of one block."""
    await conn.execute(
        "insert into training (id, project_id, name, state) values ($1, 'p', $2, 5)",
        training,
        f"{_TRAINING}{training}",
    )
    numbers = np.random.default_rng(0)
    start = time.perf_counter()
    for first in range(0, num_steps, block):
        await series_store.insert_steps(
            conn,
            training_id=training,
            attempt=1,
            epoch=first // 500 + 1,
            first_step=first % 500 + 1,
            num_steps=500,
            columns={name: numbers.random(block).tolist() for name in _NAMES},
        )
    return (time.perf_counter() - start) / (num_steps / block)


def _read(address: str, training: str, num_steps: int) -> dict[str, float]:
    """Reads all values as columns and a thousand of each series, some times."""
    name = f"{_TRAINING}{training}"
    with Client(environ={"DETFLOW_METRICS_ADDRESS": address}) as client:

        def columns() -> None:
            found = client.metrics.columns(name)
            assert [len(one.values) for one in found.values()] == [num_steps] * len(_NAMES)

        def thinned() -> None:
            found = client.metrics.series(name, steps=True)
            assert all(0 < len(one.values) <= 1000 for one in found)
            assert [one.num_points for one in found] == [num_steps] * len(_NAMES)

        return {
            "columns_seconds": round(median(_seconds(columns, 7)), 3),
            "thinned_to_1000_seconds": round(median(_seconds(thinned, 7)), 3),
            "one_series_thinned_seconds": round(
                median(_seconds(lambda: client.metrics.series(name, ["lr"], steps=True), 7)), 3
            ),
        }


def _seconds(call: Callable[[], T], times: int) -> list[float]:
    call()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _event_bytes(block: int) -> int:
    """Returns the size of the event of a block as a YOLO training sends it."""
    numbers = np.random.default_rng(0)
    names = (*_STEP_NAMES, "data_wait_share", "memory_bytes")
    columns = [
        training_pb2.StepMetrics.Column(name=name, values=numbers.random(block)) for name in names
    ]
    steps = training_pb2.StepMetrics(
        attempt=1, epoch=100, first_step=1, num_steps=block, columns=columns
    )
    return events_pb2.Event(steps=steps).ByteSize()


def _encodings() -> dict[str, float]:
    """Returns milliseconds of 1000 values from numbers to bytes and back to numbers."""
    values = np.random.default_rng(0).random(1000)
    series = Series(
        name="train/box_loss",
        epochs_N=np.arange(1000),
        steps_N=np.arange(1000),
        positions_N=values,
        values_N=values,
        num_points=1000,
    )

    def as_json() -> None:
        content = json_format.MessageToJson(to_metric_series(series))
        parsed = json_format.Parse(content, metrics_pb2.MetricSeries())
        assert len(parsed.values) == 1000

    def as_columns() -> None:
        parts = [part.SerializeToString() for part in to_metric_columns(series)]
        found = join(map(metrics_pb2.MetricColumns.FromString, parts))
        assert len(np.asarray(found["train/box_loss"].values)) == 1000

    return {
        "json_ms": round(1000 * median(_seconds(as_json, 100)), 2),
        "columns_ms": round(1000 * median(_seconds(as_columns, 100)), 3),
    }
