"""What is remembered of tokens, who may start without them, and how much one may call."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta

import pytest

from detflow import access
from detflow.access import OWNER, Principal, bad_token
from detflow.errors import InvalidArgument, ResourceExhausted, Unauthenticated, Unavailable
from detflow.identities import FRESH_SECONDS, GRACE_SECONDS, Identities
from detflow.limits import Limits
from detflow.settings import Settings


class Asked:
    """Whom tokens are asked of; counts, and can be away."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.num_calls = 0
        self.error: Exception | None = None
        self.answer = OWNER
        self.gate = asyncio.Event()
        self.gate.set()

    def clock(self) -> float:
        return self.time

    async def ask(self, token: str) -> Principal:
        self.num_calls += 1
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.answer


async def test_answer_is_remembered_for_ten_seconds() -> None:
    asked = Asked()
    known = Identities(asked.ask, clock=asked.clock)
    for _ in range(5):
        assert await known.identify("t") is OWNER
    assert asked.num_calls == 1
    asked.time += FRESH_SECONDS - 0.1
    await known.identify("t")
    assert asked.num_calls == 1
    asked.time += 0.1
    asked.error = bad_token()
    with pytest.raises(Unauthenticated):
        await known.identify("t")
    # What was taken away does not come back while nobody can be asked.
    asked.error = Unavailable("away")
    with pytest.raises(Unavailable):
        await known.identify("t")


async def test_those_who_ask_at_once_share_a_question() -> None:
    asked = Asked()
    asked.gate.clear()
    known = Identities(asked.ask, clock=asked.clock)
    waiting = [asyncio.ensure_future(known.identify("t")) for _ in range(50)]
    other = asyncio.ensure_future(known.identify("u"))
    while asked.num_calls < 2:  # noqa: ASYNC110  # two tasks, each at its first line
        await asyncio.sleep(0)
    asked.gate.set()
    await asyncio.gather(*waiting, other)
    assert asked.num_calls == 2


async def test_who_is_known_is_let_in_for_five_minutes_while_nobody_can_be_asked() -> None:
    asked = Asked()
    known = Identities(asked.ask, clock=asked.clock)
    await known.identify("t")
    asked.error = Unavailable("away")
    asked.time += GRACE_SECONDS - 1
    assert await known.identify("t") is OWNER
    assert await known.identify("t") is OWNER
    assert asked.num_calls == 2  # not asked again at once
    with pytest.raises(Unavailable) as caught:
        await known.identify("new")
    assert caught.value.reason == "ACCESS_AWAY"
    asked.time += 2
    with pytest.raises(Unavailable):
        await known.identify("t")
    asked.error = None
    assert await known.identify("t") is OWNER


async def test_token_ends_at_its_time_though_it_is_remembered() -> None:
    asked = Asked()
    known = Identities(asked.ask, clock=asked.clock)
    asked.answer = dataclasses.replace(OWNER, expire_time=datetime.now(UTC) + timedelta(hours=1))
    await known.identify("t")
    asked.answer = dataclasses.replace(OWNER, expire_time=datetime.now(UTC))
    asked.time += FRESH_SECONDS
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            await known.identify("t")


async def test_no_more_is_remembered_than_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detflow.identities._MAX_KNOWN", 3)
    asked = Asked()
    known = Identities(asked.ask, clock=asked.clock)
    for token in "abcd":
        await known.identify(token)
    await known.identify("d")
    assert asked.num_calls == 4
    await known.identify("a")
    assert asked.num_calls == 5


def test_calls_are_counted_by_principal_and_second() -> None:
    asked = Asked()
    limits = Limits(10, 0, asked.clock)

    def begin(subject: str) -> bool:
        try:
            limits.enter(subject)
        except ResourceExhausted as error:
            assert (error.reason, error.retry_seconds) == ("RATE_LIMIT", 1)
            return False
        limits.leave(subject)
        return True

    assert [begin("a") for _ in range(25)] == [True] * 20 + [False] * 5
    assert begin("b")
    asked.time += 0.5
    assert [begin("a") for _ in range(6)] == [True] * 5 + [False]
    asked.time += 60
    assert [begin("a") for _ in range(21)] == [True] * 20 + [False]


def test_open_calls_are_counted_until_they_end() -> None:
    asked = Asked()
    limits = Limits(0, 2, asked.clock)
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(ResourceExhausted) as caught:
        limits.enter("a")
    assert caught.value.reason == "TOO_MANY_CALLS"
    limits.enter("b")
    limits.leave("a")
    limits.enter("a")


def test_idle_principals_are_forgotten_and_busy_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("detflow.limits._MAX_KNOWN", 2)
    asked = Asked()
    limits = Limits(1, 1, asked.clock)
    limits.enter("busy")
    limits.enter("idle")
    limits.leave("idle")
    asked.time += 60
    limits.enter("new")
    with pytest.raises(ResourceExhausted, match="under way"):
        limits.enter("busy")
    limits.leave("busy")
    limits.leave("new")


LONG = "x" * 32


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "set DETFLOW_SERVICE_TOKEN"),
        ({"service_token": "short"}, "DETFLOW_SERVICE_TOKEN must have 32 characters"),
        ({"service_token": LONG, "owner_token": "short"}, "DETFLOW_OWNER_TOKEN must have 32"),
        ({"service_token": "x y" + LONG}, "without spaces"),
        ({"service_token": LONG, "owner_token": LONG}, "must differ"),
        ({"access": "closed"}, "required or open, not 'closed'"),
        ({"access": "open", "listen": "0.0.0.0:7101"}, "DETFLOW_LISTEN is 0.0.0.0:7101"),
        ({"access": "open", "listen": "[::]:7101"}, "DETFLOW_LISTEN"),
        ({"access": "open", "listen": "example.com:1"}, "DETFLOW_LISTEN"),
        ({"access": "open", "http_listen": "10.0.0.1:80"}, "DETFLOW_HTTP_LISTEN"),
    ],
)
def test_process_that_could_not_tell_its_callers_apart_does_not_start(
    settings: dict[str, str], problem: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        access.check_settings(Settings(**settings))  # type: ignore[arg-type]
    assert problem in caught.value.message
    assert LONG not in caught.value.message


def test_process_starts_with_tokens_or_open_where_only_this_machine_reaches_it() -> None:
    access.check_settings(Settings(service_token=LONG, listen="0.0.0.0:1"))
    for listen in ("127.0.0.1:0", "localhost:7101", "[::1]:7101"):
        access.check_settings(Settings(access="open", listen=listen))
