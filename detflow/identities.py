"""Whose a token is, asked of the version service and remembered for ten seconds."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from detflow import channels, telemetry
from detflow.access import Principal, bad_token, from_proto, hash_token
from detflow.errors import DeadlineExceeded, Unavailable
from detflow.sharing import SharedRead
from detflow.v1 import access_pb2, access_pb2_grpc

log = telemetry.get_logger(__name__)

Identify: TypeAlias = Callable[[str], Awaitable[Principal]]

FRESH_SECONDS = 10.0
GRACE_SECONDS = 300.0
_AWAY_SECONDS = 1.0
_PATIENCE_SECONDS = 2.0
_MAX_KNOWN = 10_000


@dataclass(frozen=True, slots=True)
class _Known:
    principal: Principal
    time: float  # monotonic


class Identities:
    """Remembers whose tokens are; what does not count is asked again every time.

    Args:
        ask: Says whose a token is; raises Unauthenticated if it does not count.
        fresh_seconds: How long an answer is taken as it is.
        grace_seconds: How long it is taken while nobody can be asked.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        ask: Identify,
        *,
        fresh_seconds: float = FRESH_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._fresh_seconds = fresh_seconds
        self._grace_seconds = grace_seconds
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._asking: SharedRead[str, Principal] = SharedRead(ask)
        self._away_until = 0.0

    async def identify(self, token: str) -> Principal:
        """Returns whose a token is.

        Raises:
            Unauthenticated: BAD_TOKEN.
            Unavailable: Nobody can be asked, and it was not known before.
        """
        key = hash_token(token)
        known = self._known.get(key)
        now = self._clock()
        if known and now < known.time + self._fresh_seconds:
            return _unless_ended(known.principal)
        grace = known is not None and now < known.time + self._grace_seconds
        if known and grace and now < self._away_until:
            return _unless_ended(known.principal)
        try:
            # Who is known waits less for an answer that is probably the same.
            async with asyncio.timeout(_PATIENCE_SECONDS if grace else None):
                principal = await self._asking.get(token)
        except (Unavailable, DeadlineExceeded, TimeoutError) as error:
            if not (known and grace):
                raise Unavailable(
                    "who calls cannot be found out for the moment; retry", reason="ACCESS_AWAY"
                ) from error
            log.warning("the last answer counts", subject=known.principal.subject)
            self._away_until = self._clock() + _AWAY_SECONDS
            return _unless_ended(known.principal)
        except Exception:
            self._known.pop(key, None)
            raise
        self._known[key] = _Known(principal, now)
        self._known.move_to_end(key)
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return _unless_ended(principal)


def asking(stub: access_pb2_grpc.AccessServiceAsyncStub) -> Identify:
    """Returns what asks the version service, on a channel that shows the services' token."""

    async def ask(token: str) -> Principal:
        request = access_pb2.AuthenticateRequest(token=token)
        with channels.translate():
            return from_proto(await stub.Authenticate(request))

    return ask


def _unless_ended(principal: Principal) -> Principal:
    if principal.expire_time is not None and principal.expire_time <= datetime.now(UTC):
        raise bad_token()
    return principal
