"""Bundles that an earlier release had begun are begun again: it dealt images in another way."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from detflow.postgres import Database

MIGRATIONS = Path(__file__).parents[2] / "services" / "preprocess" / "migrations"


async def test_shards_of_unfinished_bundles_are_forgotten_and_collected(
    make_database_url: Callable[[str], Awaitable[str]], tmp_path: Path
) -> None:
    before = tmp_path / "preprocess" / "migrations"
    before.mkdir(parents=True)
    for path in sorted(MIGRATIONS.glob("*.sql"))[:5]:
        shutil.copy(path, before)
    database = await Database.connect(await make_database_url("preprocess"), schema="upgraded")
    try:
        await database.migrate(before)
        async with database.connection() as conn:
            for state in ("RUNNING", "SUCCEEDED"):
                await conn.execute(
                    "insert into preprocessing (version_id, version_name, version_revision,"
                    " dataset_id, recipe, state) values ($1, $1, 1, 'd', '', $1)",
                    state,
                )
                await conn.execute(
                    "insert into shard values ($1, 'train', 0, 'bundles/shards/' || $1, 1, '', 1)",
                    state,
                )
        await database.migrate(MIGRATIONS)
        async with database.connection() as conn:
            assert await conn.fetchval("select array_agg(version_id) from shard") == ["SUCCEEDED"]
            garbage = await conn.fetchval("select array_agg(prefix) from garbage")
        assert garbage == ["bundles/shards/RUNNING"]
    finally:
        await database.close()
