"""Versions made by an earlier release are read by this one."""

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from detflow.postgres import Database
from detflow.v1 import version_pb2
from services.version import store

MIGRATIONS = Path(__file__).parents[2] / "services" / "version" / "migrations"


async def test_recipes_kept_in_columns_become_messages(
    make_database_url: Callable[[str], Awaitable[str]], tmp_path: Path
) -> None:
    first = tmp_path / "version" / "migrations"
    first.mkdir(parents=True)
    shutil.copy(MIGRATIONS / "0001_projects_and_versions.sql", first)
    database = await Database.connect(await make_database_url("version"), schema="upgraded")
    try:
        await database.migrate(first)
        async with database.connection() as conn:
            await conn.executemany(
                """
                insert into version (id, project_id, display_name, name_key, state, dataset,
                  class_names, percentages, max_side_px, grayscale, augmentations, seed,
                  request_sha256)
                values ($1, 'default', $1, $1, 'PREPROCESSING', 'd', '{}', $2, $3, $4, $5, $6, '')
                """,
                [
                    ("plain", [70, 20, 10], 0, False, [], 0),
                    (
                        "full",
                        [98, 1, 1],
                        8192,
                        True,
                        ["AUGMENTATION_ROTATE_270", "AUGMENTATION_FLIP_LEFT_RIGHT"],
                        -(2**63),
                    ),
                    ("large", [1, 1, 98], 32, False, ["AUGMENTATION_ROTATE_90"], 2**63 - 1),
                ],
            )
        await database.migrate(MIGRATIONS)
        async with database.connection() as conn:
            versions = {v.id: v for v in await store.list_versions(conn, "default")}
    finally:
        await database.close()

    assert {
        id_: version_pb2.Recipe.FromString(version.recipe) for id_, version in versions.items()
    } == {
        "plain": version_pb2.Recipe(split=version_pb2.SplitRatio(train=70, val=20, test=10)),
        "full": version_pb2.Recipe(
            split=version_pb2.SplitRatio(train=98, val=1, test=1),
            max_side_px=8192,
            grayscale=True,
            augmentations=[
                version_pb2.AUGMENTATION_ROTATE_270,
                version_pb2.AUGMENTATION_FLIP_LEFT_RIGHT,
            ],
            seed=-(2**63),
        ),
        "large": version_pb2.Recipe(
            split=version_pb2.SplitRatio(train=1, val=1, test=98),
            max_side_px=32,
            augmentations=[version_pb2.AUGMENTATION_ROTATE_90],
            seed=2**63 - 1,
        ),
    }
