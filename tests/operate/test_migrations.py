"""Migrations leave what the release before needs, so that both run side by side."""

import asyncio
import re
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from detflow.postgres import Database

_ROOT = Path(__file__).parents[2]
_FOLDERS = (_ROOT / "detflow", *sorted((_ROOT / "services").iterdir()))
MIGRATIONS = sorted(path for folder in _FOLDERS for path in folder.glob("migrations/*.sql"))

# What an older process does on the table may fail after these.
_BREAKING = {
    "drops what may be used": r"\bdrop\s+(table|column|view|type|function|trigger)\b",
    "renames what is used": r"\brename\b",
    "changes a type": r"\balter\s+column\s+\w+\s+(set\s+data\s+)?type\b",
    "lets no null in any more": r"\balter\s+column\s+\w+\s+set\s+not\s+null\b",
    "takes a default away": r"\balter\s+column\s+\w+\s+drop\s+default\b",
    "refuses what was fine": r"\badd\s+(constraint|primary\s+key|check|unique|foreign)\b",
}
_COLUMN = re.compile(
    r"\badd\s+column\s+(?:if\s+not\s+exists\s+)?(\w+)\s+([^;]*?)(?=,\s*add\b|$)", re.S
)

# The rule came with the first release: these are older, and no release had what they take away.
_BEFORE_THE_FIRST_RELEASE = {
    "metrics/0004_series.sql",
    "preprocess/0004_uploads_in_parts.sql",
    "trainer/0002_queue.sql",
    "version/0002_lifecycle.sql",
    "version/0003_recipe.sql",
}
# Migration -> why the release before does not mind.
_ALLOWED: dict[str, str] = {}


def name_of(path: Path) -> str:
    return f"{path.parts[-3]}/{path.name}"


def statements(sql: str) -> Iterator[str]:
    """Yields the statements, in lower case, without comments, strings and bodies of functions."""
    sql = re.sub(r"--[^\n]*", " ", sql)
    sql = re.sub(r"\$\$.*?\$\$", "''", sql, flags=re.S)
    sql = re.sub(r"'(?:[^']|'')*'", "''", sql)
    yield from filter(None, (one.strip().lower() for one in sql.split(";")))


def problems(sql: str) -> list[str]:
    """Says what of a migration the release before would not bear."""
    found = []
    made = set(re.findall(r"\bcreate\s+table\s+(\w+)", " ".join(statements(sql))))
    for one in statements(sql):
        table = re.match(r"alter\s+table\s+(?:only\s+)?(\w+)", one)
        if table and table[1] in made:
            continue  # nobody has used it yet
        for what, pattern in _BREAKING.items():
            if re.search(pattern, one):
                found.append(f"{what}: {one[:80]}")
        for column, rest in _COLUMN.findall(one):
            if "not null" in rest and not re.search(r"\bdefault\b|\bgenerated\b", rest):
                found.append(f"{column} must be given: {one[:80]}")
        index = re.match(r"create\s+unique\s+index\s+\w+\s+on\s+(\w+)", one)
        if index and index[1] not in made:
            found.append(f"refuses what was fine: {one[:80]}")
    return found


@pytest.mark.parametrize("path", MIGRATIONS, ids=name_of)
def test_migration_leaves_what_the_release_before_needs(path: Path) -> None:
    found = problems(path.read_text())
    name = name_of(path)
    if name in _BEFORE_THE_FIRST_RELEASE or name in _ALLOWED:
        assert found, f"{name} is fine: take it from the list"
        return
    assert not found, (
        f"{found}: add first what takes its place, and drop it a release later; if the release"
        " before does not mind, say why in _ALLOWED"
    )


@pytest.mark.parametrize(
    "sql",
    [
        "drop table t",
        "alter table t drop column c",
        "alter table t rename column a to b",
        "alter table t rename to u",
        "alter table t alter column c type bigint",
        "alter table t alter column c set data type bigint",
        "alter table t add column a int, add column b text not null",
        "alter table t add column a text not null, add column b int default 1",
        "alter table t alter column c set not null",
        "alter table t add constraint k check (c > 0)",
        "create unique index i on t (c)",
        "-- add column\nalter table t -- x\n  drop\n  column c;",
    ],
)
def test_breaking_migration_is_found(sql: str) -> None:
    assert problems(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "create table t (a int not null); create unique index i on t (a);"
        " alter table t add constraint k check (a > 0)",
        "alter table t add column a int not null default 0, add column b text",
        "alter table t add column a int not null generated always as (b) stored",
        "create index i on t (c)",
        "-- drop table t\ninsert into t values ('drop table t; rename')",
        "create function f() returns trigger language plpgsql as $$ begin drop table x; end $$",
        "alter table t alter column c drop not null",
    ],
)
def test_additive_migration_passes(sql: str) -> None:
    assert not problems(sql)


def test_migrations_are_numbered_once() -> None:
    numbers = [(path.parent, path.name[:4]) for path in MIGRATIONS]
    assert len(numbers) == len(set(numbers))
    assert all(re.fullmatch(r"\d{4}_[a-z_]+\.sql", path.name) for path in MIGRATIONS)


async def test_a_migration_that_waits_for_a_table_lets_readers_go_first(
    make_database_url: Callable[[str], Awaitable[str]], tmp_path: Path
) -> None:
    database = await Database.connect(await make_database_url("metrics"), "metrics", max_size=4)
    folder = tmp_path / "metrics" / "migrations"
    folder.mkdir(parents=True)
    shutil.copytree(_ROOT / "services" / "metrics" / "migrations", folder, dirs_exist_ok=True)
    (folder / "9999_more.sql").write_text("alter table training add column more text")
    async with database.connection() as reader, database.connection() as late:
        long = reader.transaction()
        await long.start()
        await reader.execute("select from training")
        migrating = asyncio.create_task(database.migrate(folder))
        waits = (
            "select exists (select from pg_locks where not granted and relation ="
            " 'training'::regclass)"
        )
        async with asyncio.timeout(20):
            while not await reader.fetchval(waits):  # noqa: ASYNC110  # Postgres tells nobody
                await asyncio.sleep(0.01)
        # Behind it, and yet the read is answered while the long one still goes on.
        async with asyncio.timeout(20):
            assert await late.fetchval("select count(*) from training") == 0
        assert not migrating.done()
        await long.rollback()
        async with asyncio.timeout(20):
            await migrating
        assert await late.fetchval("select count(more) from training") == 0
    await database.close()
