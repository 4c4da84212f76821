"""One exchange with a receiver of webhooks: what is sent, and what is made of every answer."""

import asyncio
import base64
import dataclasses
import json
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from services.metrics.webhooks.domain import SCHEDULE_SECONDS, Answer, Message, pause_seconds
from services.metrics.webhooks.hosts import AllowedHosts
from services.metrics.webhooks.sender import Sender
from services.metrics.webhooks.signature import sign, to_secret
from tests.webhook_rig import Reply, receiving

LOOPBACK = AllowedHosts.parse("loopback")
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)


def message(url: str, *keys: bytes) -> Message:
    return Message(id="m1", url=url, body=b'{"a":"\xed\x95\x9c"}', keys=keys or (b"k",), time=NOW)


async def send(url: str, allowed: AllowedHosts = LOOPBACK, seconds: float = 5.0) -> Answer:
    return await Sender(allowed, seconds).send(message(url))


def test_signature_is_that_of_the_specification() -> None:
    # From the test vectors of the reference libraries.
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = Message(
        id="msg_p5jXN8AQM9LWM0D4loKWxJek",
        url="",
        body=b'{"test": 2432232314}',
        keys=[key, b"old"],
        time=datetime.fromtimestamp(1614265330, UTC),
    )
    headers = sign(signed)
    first, second = headers["webhook-signature"].split(" ")
    assert first == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert second.startswith("v1,") and second != first
    assert headers["webhook-timestamp"] == "1614265330"
    assert to_secret(key) == "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


async def test_message_is_posted_as_it_is() -> None:
    async with receiving(204) as receiver:
        assert await send(receiver.url) == Answer(status=204, error="")
        received = await receiver.next()
    assert received.body == message("").body
    assert received.headers["content-type"] == "application/json"
    assert received.headers["webhook-id"] == "m1"
    assert received.is_signed_by(to_secret(b"k")) and not received.is_signed_by(to_secret(b"x"))


def example(language: str) -> str:
    """The code of the how-to that checks a signature."""
    guide = (Path(__file__).parents[2] / "docs/how-to/webhooks.md").read_text()
    (code,) = re.findall(rf"```{language} name=verify\n(.*?)```", guide, re.DOTALL)
    return str(code)


def broken(headers: dict[str, str]) -> list[dict[str, str]]:
    """The headers of a message, each time with something that must not pass."""
    long_ago = str(int(headers["webhook-timestamp"]) - 1000)
    return [
        headers | {"webhook-id": "other"},
        headers | {"webhook-timestamp": long_ago},
        headers | {"webhook-signature": headers["webhook-signature"].replace("v1,", "v2,")},
        headers | {"webhook-signature": ""},
    ]


def test_code_of_the_guide_checks_signatures_in_python() -> None:
    place: dict[str, Any] = {}
    exec(example("python"), place)
    sent = dataclasses.replace(message("", b"new", b"k"), time=datetime.now(UTC))
    headers = sign(sent)
    place["verify"](to_secret(b"k"), headers, sent.body)
    for secret, given, body in [
        (to_secret(b"x"), headers, sent.body),
        (to_secret(b"k"), headers, sent.body + b" "),
        *((to_secret(b"k"), wrong, sent.body) for wrong in broken(headers)),
    ]:
        with pytest.raises(ValueError):
            place["verify"](secret, given, body)


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the code")
def test_code_of_the_guide_checks_signatures_in_node() -> None:
    sent = dataclasses.replace(message("", b"new", b"k"), time=datetime.now(UTC))
    cases = [sign(sent), *broken(sign(sent))]
    script = f"""{example("js")}
    for (const headers of {json.dumps(cases)}) {{
      try {{
        verify("{to_secret(b"k")}", headers, Buffer.from("{sent.body.hex()}", "hex"));
        console.log("taken");
      }} catch (error) {{ console.log(error.message); }}
    }}"""
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "taken",
        "not signed with this secret",
        "too old, or from the future",
        "not signed with this secret",
        "not signed with this secret",
    ]


def text(status: int, body: bytes, **headers: str) -> Reply:
    async def reply(_: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return reply


@pytest.mark.parametrize(
    ("reply", "status", "error"),
    [
        (text(500, b"oh  no\n" + b"x" * 9000), 500, "answered 500: oh no x"),
        (text(404, b"\x1b[31m"), 404, "answered 404"),
        (text(401, b"\x1f\x8b\x08", content_encoding="gzip"), 401, "answered 401"),
        (text(302, b"", location="http://127.0.0.1:1/"), 302, "redirects are not followed"),
        (text(410, b""), 410, "the webhook was disabled"),
    ],
)
async def test_other_answers_are_errors_in_a_line(reply: Reply, status: int, error: str) -> None:
    async with receiving(reply) as receiver:
        answer = await send(receiver.url)
        assert len(receiver.received) == 1
    assert answer.status == status and error in answer.error
    assert not answer.is_taken and len(answer.error) < 300 and answer.error.isprintable()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        (format_datetime(NOW.replace(hour=13), usegmt=True), 3600),
        (format_datetime(NOW.replace(hour=11), usegmt=True), 0),
        ("soon", 0),
        ("-5", 0),
        ("9" * 400, 0),
        ("", 0),
    ],
)
async def test_retry_after_is_read(header: str, seconds: float) -> None:
    async with receiving(text(503, b"", retry_after=header)) as receiver:
        assert (await send(receiver.url)).retry_seconds == seconds


async def test_receiver_that_does_not_answer_is_given_up_in_time() -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        while True:
            await response.write(b".")
            await asyncio.sleep(0.01)

    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async with receiving(hang, drip) as receiver:
        for _ in range(2):  # before the first byte, and in the middle of the answer
            answer = await send(receiver.url, seconds=0.2)
            assert answer.status in (0, 500) and not answer.is_taken
        assert answer.error


async def test_endless_answer_is_not_read() -> None:
    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)

    async with receiving(flood) as receiver:
        assert (await send(receiver.url)).error == "answered 500: " + "x" * 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433", "127.1"]
)
async def test_nothing_is_sent_to_an_address_that_is_not_allowed(host: str) -> None:
    async with receiving() as receiver:
        url = receiver.url.replace("127.0.0.1", host)
        answer = await send(url, AllowedHosts.parse("external,private"))
        assert not receiver.received
    assert answer.status == 0 and answer.error
    if host[0] in "1l[" and host.count(".") == 3:
        assert "DETFLOW_WEBHOOK_HOSTS" in answer.error


async def test_name_is_judged_by_what_it_resolves_to_when_it_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    resolve, now = loop.getaddrinfo, "8.8.8.8"

    async def resolved(host: str, *rest: object, **options: object) -> object:
        return await resolve(now if host == "example.com" else host, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "getaddrinfo", resolved)
    allowed = AllowedHosts.parse("external")
    async with receiving() as receiver:
        url = receiver.url.replace("127.0.0.1", "example.com")
        await allowed.check_url(url, "url")  # it passes when it is created
        now = "127.0.0.1"
        answer = await send(url, allowed)
        assert not receiver.received and "127.0.0.1 is not allowed" in answer.error
        assert (await send(url, AllowedHosts.parse("example.com"))).is_taken


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert (await send(receiver.url)).is_taken
        assert not proxy.received and receiver.received


async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"220 mail.example.com ESMTP\r\n")
    writer.close()


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    ("serve", "scheme", "error"),
    [
        (garbage, "http", "the answer is no HTTP"),
        (silence, "http", "the connection was closed without an answer"),
        (garbage, "https", "TLS failed"),
        (None, "http", "cannot connect: Connection refused"),
    ],
)
async def test_what_goes_wrong_is_said_in_a_line(
    serve: Callable[..., object] | None, scheme: str, error: str
) -> None:
    server = await asyncio.start_server(serve or silence, "127.0.0.1", 0)  # type: ignore[arg-type]
    port = server.sockets[0].getsockname()[1]
    if serve is None:
        server.close()
        await server.wait_closed()
    answer = await send(f"{scheme}://127.0.0.1:{port}/")
    server.close()
    assert answer.status == 0 and error in answer.error and answer.error.isprintable()


@pytest.fixture
def self_signed(tmp_path: Path) -> ssl.SSLContext:
    """What a server with a certificate of its own needs."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout key -out cert"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    return context


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
async def test_certificate_of_nobody_is_not_accepted(self_signed: ssl.SSLContext) -> None:
    server = await asyncio.start_server(silence, "127.0.0.1", 0, ssl=self_signed)
    answer = await send(f"https://localhost:{server.sockets[0].getsockname()[1]}/")
    server.close()
    assert "the certificate is not valid" in answer.error


def test_eight_tries_spread_over_a_day() -> None:
    failed = Answer(status=500, error="x")
    pauses = [pause_seconds(SCHEDULE_SECONDS, n, failed, 1.0) for n in range(1, 9)]
    assert pauses[-1] is None
    spread = [pause for pause in pauses if pause is not None]
    assert len(spread) == 7 and 60 * 3600 > sum(spread) > 19 * 3600
    assert spread[0] == pytest.approx(6.0)  # 5 s and a fifth more
    assert pause_seconds(SCHEDULE_SECONDS, 1, failed, 0.0) == 5.0


@pytest.mark.parametrize(("asked", "given"), [(1.0, 5.0), (300.0, 300.0), (1e9, 12 * 3600.0)])
def test_receiver_gets_more_time_within_limits_and_never_less(asked: float, given: float) -> None:
    answer = Answer(status=503, error="x", retry_seconds=asked)
    assert pause_seconds(SCHEDULE_SECONDS, 1, answer, 0.0) == given


def test_receiver_that_is_gone_is_not_tried_again() -> None:
    assert pause_seconds(SCHEDULE_SECONDS, 1, Answer(status=410, error="x"), 0.0) is None
