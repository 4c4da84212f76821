"""One exchange with the receiver of a webhook: a POST, and what came of it."""

from __future__ import annotations

import asyncio
import math
import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp
import yarl

from services.metrics.webhooks.domain import Answer, Message
from services.metrics.webhooks.hosts import AllowedHosts, Gate
from services.metrics.webhooks.signature import sign

_EXCHANGE_SECONDS = 10.0
_MAX_ANSWER_BYTES = 4096
_MAX_QUOTED = 200
_HEADERS = {"content-type": "application/json", "user-agent": "detflow"}


class Sender:
    """Posts messages: no redirects, no cookies, no proxy, one connection for each.

    Args:
        allowed: The hosts it may connect to.
        seconds: Time for the whole exchange.
    """

    def __init__(self, allowed: AllowedHosts, seconds: float = _EXCHANGE_SECONDS) -> None:
        self._allowed = allowed
        self._seconds = seconds

    async def send(self, message: Message) -> Answer:
        """Posts a message once."""
        url = yarl.URL(message.url)
        gate = Gate(self._allowed, url.raw_host or "")
        try:
            async with asyncio.timeout(self._seconds):
                return await self._post(url, gate, message)
        except TimeoutError:
            problem = f"no answer within {self._seconds:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = _explain(error)
        if gate.refused:
            problem = (
                f"the address {gate.refused[0]} is not allowed: change the url, or let who runs"
                " detflow add it to DETFLOW_WEBHOOK_HOSTS"
            )
        return Answer(status=0, error=problem)

    async def _post(self, url: yarl.URL, gate: Gate, message: Message) -> Answer:
        async with (
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=aiohttp.ThreadedResolver(),
                    socket_factory=gate.make_socket,
                    use_dns_cache=False,
                    force_close=True,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=False,
            ) as session,
            session.post(
                url, data=message.body, headers=_HEADERS | sign(message), allow_redirects=False
            ) as response,
        ):
            status = response.status
            if 200 <= status < 300:
                return Answer(status=status, error="")
            if status == 410:
                return Answer(status=status, error="answered 410 Gone; the webhook was disabled")
            if 300 <= status < 400:
                problem = f"answered {status}: redirects are not followed; set the url to the goal"
            else:
                problem = f"answered {status}{_quote(await _read_some(response))}"
            pause = _retry_seconds(response.headers.get("retry-after", ""), message.time)
            return Answer(status=status, error=problem, retry_seconds=pause)


async def _read_some(response: aiohttp.ClientResponse) -> bytes:
    """Reads the beginning of an answer, as far as it comes in order."""
    data = b""
    try:
        while len(data) < _MAX_ANSWER_BYTES:
            chunk = await response.content.read(_MAX_ANSWER_BYTES - len(data))
            if not chunk:
                break
            data += chunk
    except aiohttp.ClientError:
        pass  # the status says what there is to know
    return data


def _quote(data: bytes) -> str:
    """Renders the beginning of an answer that is text."""
    text = " ".join(data.decode(errors="replace").split())[:_MAX_QUOTED]
    return f": {text}" if text and text.isprintable() else ""


def _retry_seconds(text: str, now: datetime) -> float:
    """Reads Retry-After: seconds or a date; 0 if it says nothing that can be understood."""
    try:
        if text.strip().isdecimal():
            seconds = float(text)
        else:
            date = parsedate_to_datetime(text)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
            seconds -= now.timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _explain(error: Exception) -> str:
    """Says in a line why there is no answer."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "the name of the host cannot be resolved"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"the certificate is not valid: {_cut(error.certificate_error)}"
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        return f"TLS failed: {_cut(error.os_error)}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {_reason(error.os_error)}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed without an answer"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the answer is no HTTP"
    if isinstance(error, OSError):
        return f"the connection broke off: {_reason(error)}"
    return _cut(error) or type(error).__name__


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else _cut(error) or type(error).__name__


def _cut(error: object) -> str:
    return " ".join(str(error).split())[:_MAX_QUOTED]
