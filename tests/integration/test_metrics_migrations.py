"""Series kept by an earlier release are read by this one."""

import math
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from detflow.postgres import Database
from services.metrics import series_store
from services.metrics.series import epoch_series

MIGRATIONS = Path(__file__).parents[2] / "services" / "metrics" / "migrations"


async def test_points_kept_one_by_one_become_rows_of_epochs(
    make_database_url: Callable[[str], Awaitable[str]], tmp_path: Path
) -> None:
    first = tmp_path / "metrics" / "migrations"
    first.mkdir(parents=True)
    for path in sorted(MIGRATIONS.glob("000[123]_*.sql")):
        shutil.copy(path, first)
    points = [
        *(("a", epoch, name, 1, epoch + 0.5) for epoch in (1, 2) for name in ("lr", "val/map50")),
        *(("a", 3, name, 2, 3.5) for name in ("Zoo", "lr", "val/map50")),
        ("b", 1, "lr", 1, math.nan),
    ]
    database = await Database.connect(await make_database_url("metrics"), schema="upgraded")
    try:
        await database.migrate(first)
        async with database.connection() as conn:
            for one in ("a", "b", "empty"):
                await conn.execute(
                    "insert into training (id, project_id, name) values ($1, 'p', $1)", one
                )
            await conn.executemany(
                "insert into series_point (training_id, epoch, name, attempt, value)"
                " values ($1, $2, $3, $4, $5)",
                points,
            )
        await database.migrate(MIGRATIONS)
        async with database.transaction() as conn:
            # An attempt that was under way goes on with the lists of names it had.
            await series_store.insert_epoch(
                conn, training_id="a", attempt=2, epoch=4, values={"val/map50": 4.5, "lr": 4.5}
            )
            found = {
                one: epoch_series(await series_store.list_epochs(conn, one))
                for one in ("a", "b", "empty")
            }
            num_lists = await conn.fetchval(
                "select count(*) from series_names where training_id = 'a'"
            )
    finally:
        await database.close()
    assert {one.name: dict(zip(one.epochs_N, one.values_N, strict=True)) for one in found["a"]} == {
        "Zoo": {3: 3.5},
        "lr": {1: 1.5, 2: 2.5, 3: 3.5, 4: 4.5},
        "val/map50": {1: 1.5, 2: 2.5, 3: 3.5, 4: 4.5},
    }
    assert math.isnan(found["b"][0].values_N[0])
    assert not found["empty"]
    assert num_lists == 2
