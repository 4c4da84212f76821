import asyncio

import pytest

from detflow.sharing import SharedRead


async def test_many_at_once_cost_two_reads_and_none_gets_an_older_one() -> None:
    begun: asyncio.Queue[asyncio.Future[int]] = asyncio.Queue()

    async def read(key: str) -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        begun.put_nowait(found)
        return await found

    shared = SharedRead(read)
    first = asyncio.create_task(shared.get("a"))
    reading = await begun.get()
    later = [asyncio.create_task(shared.get("a")) for _ in range(100)]
    await asyncio.sleep(0)
    reading.set_result(1)
    assert await first == 1
    reading = await begun.get()
    latest = asyncio.create_task(shared.get("a"))
    await asyncio.sleep(0)
    reading.set_result(2)
    assert await asyncio.gather(*later) == [2] * 100
    (await begun.get()).set_result(3)
    assert await latest == 3
    assert begun.empty()


async def test_who_leaves_takes_it_from_nobody_and_errors_reach_all() -> None:
    gate = asyncio.Event()

    async def read(key: str) -> int:
        await gate.wait()
        raise ValueError(key)

    shared = SharedRead(read)
    callers = [asyncio.create_task(shared.get("a")) for _ in range(3)]
    await asyncio.sleep(0)
    callers[0].cancel()
    gate.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(one) for one in outcomes] == [asyncio.CancelledError, ValueError, ValueError]
    with pytest.raises(ValueError, match="b"):
        await shared.get("b")
