"""Filters, orders and pages of versions on real Postgres, against the same said in Python."""

import operator
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from detflow.postgres import Connection, Database
from services.version import store
from services.version.domain import METRICS, State, Version
from services.version.filter import parse_filter
from services.version.listing import FIELDS, Order, PageKey, parse_order, state_number

MakeDatabase = Callable[[str], Awaitable[Database]]

TIMES = ("create_time", "update_time")
START = datetime(2026, 1, 31, tzinfo=UTC)
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Filter:
    """A filter as text and as a function."""

    text: str
    accepts: Callable[[Version], bool]


def comparison(chance: random.Random) -> Filter:
    """Makes a comparison of some field."""
    kind = chance.choice(["state", "display_name", "dataset", "time", "metric", "label", "has"])
    sign = chance.choice(["=", "!="])
    is_same = COMPARE[sign]
    if kind == "state":
        state = chance.choice([State.READY, State.COMPLETED, State.FAILED])
        return Filter(f"state {sign} {state}", lambda v: is_same(v.state, state))
    if kind == "display_name":
        number = chance.randrange(4)
        if chance.random() < 0.5:
            text = f'display_name{sign}"V%_{number}*"'
            return Filter(text, lambda v: is_same(v.display_name.startswith(f"V%_{number}"), True))
        return Filter(
            f'display_name {sign} " V%_{number} "',
            lambda v: is_same(v.display_name, f"V%_{number}"),
        )
    if kind == "dataset":
        name = f"projects/default/datasets/d{chance.randrange(2)}"
        return Filter(f"dataset {sign} {name}", lambda v: is_same(v.dataset, name))
    if kind == "label":
        key, value = chance.choice("ab"), chance.choice(["x", 'q"\\', "한글"])
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return Filter(
            f'labels.{key} {sign} "{escaped}"', lambda v: is_same(v.labels.get(key), value)
        )
    if kind == "has":
        key = chance.choice("ab")
        return Filter(f"labels:{key}", lambda v: key in v.labels)
    sign = chance.choice([*COMPARE])
    compare = COMPARE[sign]
    if kind == "time":
        field = chance.choice(TIMES)
        time = START + timedelta(days=chance.randrange(10))
        text = chance.choice([time.isoformat(), f'"{time:%Y-%m-%d}"'])
        return Filter(f"{field} {sign} {text}", lambda v: compare(getattr(v, field), time))
    metric, bound = chance.choice(METRICS), chance.randrange(5) / 4
    return Filter(
        f"metrics.{metric} {sign} {bound}",
        lambda v: v.metrics is not None and compare(getattr(v.metrics, metric), bound),
    )


def some_filter(chance: random.Random, depth: int) -> Filter:
    """Makes a filter with AND, OR, NOT and parentheses."""
    kind = chance.choice(["comparison", "and", "or", "not"]) if depth else "comparison"
    if kind == "comparison":
        return comparison(chance)
    one, other = some_filter(chance, depth - 1), some_filter(chance, depth - 1)
    if kind == "not":
        return Filter(f"NOT ({one.text})", lambda v: not one.accepts(v))
    if kind == "and":
        return Filter(
            f"({one.text}) AND ({other.text})", lambda v: one.accepts(v) and other.accepts(v)
        )
    return Filter(f"({one.text}) OR({other.text})", lambda v: one.accepts(v) or other.accepts(v))


async def insert(conn: Connection, number: int, chance: random.Random) -> None:
    """Adds a version of which everything varies."""
    name = f"V%_{number % 4}{'' if number < 4 else chr(64 + number)}"
    labels = {key: chance.choice(["x", 'q"\\', "한글"]) for key in "ab" if chance.random() < 0.5}
    version = await store.insert_version(
        conn,
        version_id=f"d{chance.randrange(10**6)}n{number}",
        project_id="default",
        display_name=name,
        dataset=f"projects/default/datasets/d{number % 2}",
        class_names=["circle"],
        recipe=b"",
        request_id=None,
        request_sha256=b"",
        labels=labels,
    )
    figures = [chance.randrange(5) / 4 for _ in METRICS]
    state = chance.choice([State.FAILED, State.READY, State.COMPLETED])
    await conn.execute(
        """
        update version set state = $2, create_time = $3, update_time = $4, num_images = '{7,2,1}',
          manifest_key = 'm', manifest_size_bytes = 1, manifest_sha256 = 'ab'
        where id = $1
        """,
        version.id,
        state,
        START + timedelta(days=chance.randrange(10)),
        START + timedelta(days=chance.randrange(10)),
    )
    if chance.random() < 0.5:
        await conn.execute(
            "update version set metrics_training_id = 'dt', map50 = $2, map50_95 = $3,"
            " precision = $4, recall = $5 where id = $1",
            version.id,
            *figures,
        )


def in_order(versions: list[Version], order: Order) -> list[Version]:
    """Sorts versions; those without what they are sorted by come last."""
    has = [v for v in versions if order.value(v) is not None]
    has_not = [v for v in versions if order.value(v) is None]
    return [
        *sorted(has, key=lambda v: (order.value(v), v.id), reverse=order.descending),
        *sorted(has_not, key=lambda v: v.id, reverse=order.descending),
    ]


async def pages(conn: Connection, order: Order, size: int, **query: Any) -> list[Version]:
    """Reads page by page, the key of each through its token's form."""
    found: list[Version] = []
    after: PageKey | None = None
    while True:
        page = await store.list_versions(
            conn, "default", order=order, after=after, limit=size + 1, **query
        )
        found += page[:size]
        if len(page) <= size:
            return found
        after = order.parse_key([*order.key(page[size - 1])])


async def test_any_filter_and_order_gives_the_same_pages_as_python(
    make_database: MakeDatabase,
) -> None:
    db = await make_database("version")
    chance = random.Random(4)
    async with db.transaction() as conn:
        for number in range(24):
            await insert(conn, number, chance)
        everything = await store.list_versions(conn, "default")
        orders = [
            parse_order(f"{field}{direction}")
            for field in (*TIMES, "display_name", "state", *(f"metrics.{m}" for m in METRICS))
            for direction in ("", " desc")
        ]
        num_found = set()
        for number in range(200):
            wanted = some_filter(chance, depth=3)
            order = orders[number % len(orders)]
            condition = parse_filter(wanted.text, FIELDS, first=2)
            found = await pages(conn, order, chance.randrange(1, 9), condition=condition)
            expected = in_order([v for v in everything if wanted.accepts(v)], order)
            assert [v.id for v in found] == [v.id for v in expected], wanted.text
            num_found.add(len(found))
    assert len(num_found) > 15  # the filters are no trivial ones


async def test_page_of_ten_thousand_versions_is_read_from_an_index(
    make_database: MakeDatabase,
) -> None:
    db = await make_database("version")
    async with db.transaction() as conn:
        await conn.execute(
            """
            insert into version (
              id, project_id, display_name, name_key, state, dataset, class_names, recipe,
              request_sha256, create_time, update_time, labels, metrics_training_id, map50,
              map50_95, precision, recall)
            select 'd' || n, 'default', 'V_' || n, 'V_' || n, 'FAILED', 'd', '{}', '', '',
              now() - n * interval '1 second', now() - n * interval '1 second',
              jsonb_build_object('site', n::text), measured, figure, figure, figure, figure
            from generate_series(1, 10000) n,
              lateral (select case when n % 2 = 0 then 'dt' end as measured,
                case when n % 2 = 0 then random() end as figure)
            """
        )
        await conn.execute("analyze version")
        explained: Any = _Explaining(conn)
        for field in ("create_time", "update_time", "display_name", "state", "metrics.map50"):
            order = parse_order(f"{field} desc")
            page = await store.list_versions(conn, "default", order=order, limit=51)
            after = order.parse_key([*order.key(page[-1])])
            await store.list_versions(explained, "default", order=order, after=after, limit=51)
        label = parse_filter("labels.site = 77", FIELDS, first=2)
        await store.list_versions(explained, "default", condition=label, limit=51)
    assert len(explained.plans) == 6
    for plan in explained.plans[:5]:
        assert "Sort" not in plan and "Index" in plan, plan
        assert "Limit" in plan
    assert "version_by_label" in explained.plans[5]


class _Explaining:
    """A connection that keeps the plans of what is fetched."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self.plans: list[str] = []

    async def execute(self, query: str) -> None:
        await self._conn.execute(query)

    async def fetch(self, query: str, *parameters: Any) -> Any:
        rows = await self._conn.fetch(f"explain (analyze) {query}", *parameters)
        self.plans.append("\n".join(row[0] for row in rows))
        return await self._conn.fetch(query, *parameters)


def test_states_are_numbered_as_in_the_contract() -> None:
    from detflow.v1 import version_pb2

    for state in State:
        assert state_number(state) == version_pb2.Version.State.Value(state)
