"""`python -m tests.scale`: what docs/scaling.md tells of a million versions."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg

from detflow.client import Client
from detflow.local import postgres, stack
from detflow.local.demo_data import write_dataset
from tests.scale.capacity import kilobytes_per_watch, relayed_per_second
from tests.scale.fill import (
    NUM_EPOCHS,
    VERSIONS_PER_TRAINING,
    Connections,
    Sample,
    fill,
    make_projects,
)
from tests.scale.measure import Times, measure
from tests.stack_rig import free_base_port


def main() -> None:
    """Fills in three steps, measures after each and prints a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=__doc__)
    parser.add_argument(
        "--versions", type=int, default=1_000_000, help="when it is full: 100,000 or more"
    )
    parser.add_argument("--calls", type=int, default=300, help="of each kind")
    arguments = parser.parse_args()
    sizes = [arguments.versions // part for part in (100, 10, 1)]
    asyncio.run(run(sizes, arguments.calls))


async def run(sizes: Sequence[int], num_calls: int) -> dict[int, dict[str, Times]]:
    """Fills and measures step by step.

    Args:
        sizes: Versions there are in each step: more than before, a multiple of ten.
        num_calls: Calls of each kind.

    Returns:
        By number of versions what each kind of call took.
    """
    found: dict[int, dict[str, Times]] = {}
    with tempfile.TemporaryDirectory(prefix="detflow-scale-") as folder:
        data_dir, port = Path(folder) / "data", free_base_port()
        async with stack.stack(data_dir, port=port, fsync=False) as supervisor:
            token = (data_dir / "access" / "owner-token").read_text().strip()
            with Client(f"127.0.0.1:{port}", environ={}, token=token) as client:
                sample = await asyncio.to_thread(make_sample, client, Path(folder) / "shapes")
            async with connected(data_dir) as connections:
                await make_projects(connections)
                full = 0
                for size in sizes:
                    start = time.monotonic()
                    await fill(connections, sample, full + 1, size)
                    print(
                        f"{size:,} versions after {time.monotonic() - start:.0f} s more", flush=True
                    )
                    full = size
                    found[size] = await measure(port, token, size, num_calls)
                show(found)
                await show_sizes(connections, full)
                rate = await relayed_per_second(connections["version"])
                print(f"a relay publishes {rate:.0f} events a second")
                version = f"127.0.0.1:{port + 1}", token, supervisor.pids()["version"]
                print(f"an open watch takes {await kilobytes_per_watch(*version):.0f} kB")
    return found


def make_sample(client: Client, folder: Path) -> Sample:
    """Trains one small version for real."""
    write_dataset(folder, 20)
    dataset = client.datasets.import_(folder)
    version = client.versions.wait(client.versions.create(dataset.name).name)
    training = client.trainings.start(
        version.name, model="yolov8n", batch_size=4, epochs=1, hyperparameters={"image_size": 64}
    )
    return Sample(client.trainings.wait(training.name).name)


@contextlib.asynccontextmanager
async def connected(data_dir: Path) -> AsyncIterator[Connections]:
    """Connects to the database of a running stack, once in each service's schema."""
    folder = data_dir / "postgres"
    cluster = postgres.Cluster(directory=folder, port=int((folder / "port").read_text()))
    async with contextlib.AsyncExitStack() as stack:
        found = {}
        for service in postgres.SERVICES:
            conn = await asyncpg.connect(
                cluster.url(), server_settings={"search_path": service}, command_timeout=3600
            )
            stack.push_async_callback(conn.close)
            found[service] = conn
        yield found


def show(found: dict[int, dict[str, Times]]) -> None:
    """Prints milliseconds, p50 / p99, and what the p99 grew by."""
    sizes = sorted(found)
    print(f"\n| milliseconds, p50 / p99 | {' | '.join(f'{size:,}' for size in sizes)} | p99 x |")
    print(f"|---|{'---|' * (len(sizes) + 1)}")
    for name in found[sizes[0]]:
        cells = [f"{found[size][name].p50:.1f} / {found[size][name].p99:.1f}" for size in sizes]
        ratio = found[sizes[-1]][name].p99 / found[sizes[0]][name].p99
        print(f"| {name} | {' | '.join(cells)} | {ratio:.1f} |")
    print(f"\nload when it ended: {os.getloadavg()[0]:.1f}")


async def show_sizes(connections: Connections, num_versions: int) -> None:
    """Prints what the tables of each service take, and how many points they hold."""
    for service, conn in connections.items():
        rows = await conn.fetch(
            "select relname, pg_total_relation_size(oid) as size from pg_class"
            " where relnamespace = current_schema()::regnamespace and relkind = 'r'"
            " order by 2 desc limit 4"
        )
        total = ", ".join(f"{row['relname']} {row['size'] / 1e6:.0f} MB" for row in rows)
        print(f"{service}: {total}")
    num_series: int = await connections["metrics"].fetchval(
        "select cardinality(values) from epoch_row limit 1"
    )
    points = num_versions // VERSIONS_PER_TRAINING * NUM_EPOCHS * num_series
    print(f"{num_series} series of {NUM_EPOCHS} epochs each: {points:,} points")


if __name__ == "__main__":
    main()
