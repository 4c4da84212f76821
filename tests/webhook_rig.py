"""A receiver of webhooks: a real HTTP server that answers as the test says."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Received:
    """A request that came in."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def is_signed_by(self, secret: str) -> bool:
        """Checks the signature as https://www.standardwebhooks.com describes it."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        signed = f"{self.id}.{self.headers['webhook-timestamp']}.".encode() + self.body
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        return f"v1,{expected}" in self.headers["webhook-signature"].split(" ")


@dataclass
class Receiver:
    """Answers one status after the other, the last for ever; a callable answers by itself."""

    answers: list[int | Reply]
    url: str = ""
    received: list[Received] = field(default_factory=list)
    arrived: "asyncio.Queue[Received]" = field(default_factory=asyncio.Queue)

    async def next(self) -> Received:
        """Waits for the next request."""
        async with asyncio.timeout(20):
            return await self.arrived.get()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        one = Received(
            request.path, {k.lower(): v for k, v in request.headers.items()}, await request.read()
        )
        self.received.append(one)
        self.arrived.put_nowait(one)
        answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        return web.Response(status=answer) if isinstance(answer, int) else await answer(request)


@contextlib.asynccontextmanager
async def receiving(*answers: int | Reply, host: str = "127.0.0.1") -> AsyncIterator[Receiver]:
    """Serves a receiver on a free port."""
    receiver = Receiver(list(answers) or [200])
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver._answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, host, 0)
    await site.start()
    try:
        receiver.url = f"http://{host}:{runner.addresses[0][1]}/hook"
        yield receiver
    finally:
        await runner.cleanup()
