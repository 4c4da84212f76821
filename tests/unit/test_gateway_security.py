"""Who is let in: Host, Origin, durations, addresses."""

import pytest

from detflow.errors import InvalidArgument
from gateway import backends, security
from gateway.__main__ import split_address
from gateway.errors import HttpError


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:7100", "LOCALHOST.", "a.localhost:1", "127.0.0.1", "[::1]:7100"],
)
def test_loopback_names_are_let_in(host: str) -> None:
    security.check_host({b"host": host.encode()}, loopback=True)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "[::2]:1"]
)
def test_other_names_are_let_in_only_beyond_loopback(host: str) -> None:
    security.check_host({b"host": host.encode()}, loopback=False)
    with pytest.raises(HttpError) as caught:
        security.check_host({b"host": host.encode()}, loopback=True)
    assert caught.value.http == 421


@pytest.mark.parametrize("host", ["", "a b", "a/b", "a:b", "<script>"])
def test_malformed_hosts_are_refused_everywhere(host: str) -> None:
    with pytest.raises(HttpError) as caught:
        security.check_host({b"host": host.encode()}, loopback=False)
    assert caught.value.http == 400


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({b"sec-fetch-site": b"same-origin"}, True),
        ({b"sec-fetch-site": b"none"}, True),
        ({b"sec-fetch-site": b"same-site"}, False),
        ({b"sec-fetch-site": b"cross-site"}, False),
        ({b"origin": b"https://d.example", b"host": b"d.example"}, True),
        ({b"origin": b"https://e.example", b"host": b"d.example"}, False),
        ({b"origin": b"null", b"host": b"d.example"}, False),
    ],
)
def test_writes_of_other_origins_are_refused(headers: dict[bytes, bytes], allowed: bool) -> None:
    security.check_origin("GET", headers)
    if allowed:
        security.check_origin("POST", headers)
    else:
        with pytest.raises(HttpError):
            security.check_origin("POST", headers)


@pytest.mark.parametrize("text", [b"", b"0", b"-1", b"x", b"1e9", b"inf", b"nan", b"1" * 40])
def test_durations_that_are_none_are_refused(text: bytes) -> None:
    with pytest.raises(InvalidArgument):
        backends.timeout_seconds({b"x-request-timeout": text})


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 30),
        ({b"x-request-timeout": b"0.5"}, 0.5),
        ({b"grpc-timeout": b"1M"}, 60),
        ({b"grpc-timeout": b"250m"}, 0.25),
        ({b"grpc-timeout": b"9H"}, 60),
    ],
)
def test_durations(headers: dict[bytes, bytes], expected: float) -> None:
    assert backends.timeout_seconds(headers) == expected


def test_metadata_starts_a_trace_when_there_is_none_or_a_broken_one() -> None:
    for given in (b"", b"00-zz-yy-01", b"00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01"):
        metadata = dict(backends.metadata_of({b"traceparent": given}, "r"))
        assert metadata["traceparent"].split("-")[1].strip("0")
    forwarded = dict(backends.metadata_of({b"authorization": b"Bearer x", b"cookie": b"a"}, "r"))
    assert forwarded["authorization"] == "Bearer x"
    assert "cookie" not in forwarded
    assert "tracestate" not in dict(backends.metadata_of({b"tracestate": b"a\xff"}, "r"))


def test_addresses() -> None:
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[::1]:7100") == ("::1", 7100)
    for text in ("7100", ":7100", "host:", "host:x", "host:70000"):
        with pytest.raises(InvalidArgument):
            split_address(text)
