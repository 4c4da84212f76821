"""An attempt that begins while Postgres is away waits for it."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from detflow.errors import Unavailable
from detflow.events import Bus
from detflow.postgres import Connection, Database
from services.trainer import store
from services.trainer.attempt import Attempt
from services.trainer.domain import State
from services.trainer.executors import Devices
from tests.chaos.test_histories import claimed
from tests.trainer_rig import FAST


async def test_attempt_that_begins_without_its_database_goes_on_with_it(
    make_database: Callable[[str], Awaitable[Database]],
    bus: Bus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    db = await make_database("trainer")
    training = await claimed(db, "v")
    async with db.transaction() as conn:  # so that there is nothing left to do
        await store.update_state(conn, training.id, State.FAILED, attempt=1)
    connection, num_asked = db.connection, 0

    @contextlib.asynccontextmanager
    async def away_at_first() -> AsyncIterator[Connection]:
        nonlocal num_asked
        num_asked += 1
        if num_asked <= 2:
            raise Unavailable("the database is away for the moment; retry")
        async with connection() as conn:
            yield conn

    monkeypatch.setattr(db, "connection", away_at_first)
    attempt = Attempt(
        training,
        None,
        devices=Devices(),
        db=db,
        bus=bus,
        executor=cast(Any, None),
        owner="test",
        deadlines=FAST,
    )
    await attempt.run()
    assert num_asked > 2
