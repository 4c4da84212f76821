"""Who is let in: Host, Origin, durations, addresses."""

import pytest

from detflow import telemetry
from detflow.errors import InvalidArgument
from detflow.settings import Settings
from gateway import backends, credentials, security
from gateway.__main__ import split_address
from gateway.errors import HttpError
from gateway.security import Address

LOCAL = Address(loopback=True)
ANYWHERE = Address(loopback=False)
PUBLIC = Address(loopback=True, public="https://d.example", is_secure=True)


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:7100", "LOCALHOST.", "a.localhost:1", "127.0.0.1", "[::1]:7100"],
)
def test_loopback_names_are_let_in(host: str) -> None:
    for address in (LOCAL, PUBLIC):
        security.check_host({b"host": host.encode()}, address)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1", "[::2]:1"]
)
def test_other_names_are_let_in_only_beyond_loopback(host: str) -> None:
    security.check_host({b"host": host.encode()}, ANYWHERE)
    for address in (LOCAL, PUBLIC):
        with pytest.raises(HttpError) as caught:
            security.check_host({b"host": host.encode()}, address)
        assert caught.value.http == 421
        # Probes come by the address of the machine, and see nothing.
        security.check_host({b"host": host.encode()}, address, "/readyz")


@pytest.mark.parametrize("host", ["d.example", "D.example", "d.example:443"])
def test_public_name_is_let_in_with_the_port_of_its_scheme_or_none(host: str) -> None:
    security.check_host({b"host": host.encode()}, PUBLIC)
    with pytest.raises(HttpError):
        security.check_host({b"host": f"{host.partition(':')[0]}:8443".encode()}, PUBLIC)


@pytest.mark.parametrize("host", ["", "a b", "a/b", "a:b", "<script>"])
def test_malformed_hosts_are_refused_everywhere(host: str) -> None:
    with pytest.raises(HttpError) as caught:
        security.check_host({b"host": host.encode()}, ANYWHERE)
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
    security.check_origin("GET", headers, LOCAL, has_cookie=True)
    if allowed:
        security.check_origin("POST", headers, LOCAL)
    else:
        with pytest.raises(HttpError):
            security.check_origin("POST", headers, LOCAL)
    if headers and allowed:
        security.check_origin("POST", headers, LOCAL, has_cookie=True)
    else:
        with pytest.raises(HttpError):
            security.check_origin("POST", headers, LOCAL, has_cookie=True)


def test_origin_over_https_is_the_public_one_whatever_host_the_proxy_sends() -> None:
    for origin, host, allowed in (
        (b"https://d.example", b"localhost", True),
        (b"http://d.example", b"d.example", False),
        (b"http://d.example", b"localhost", False),
        (b"https://d.example.evil", b"localhost", False),
    ):
        headers = {b"origin": origin, b"host": host}
        if allowed:
            security.check_origin("POST", headers, PUBLIC, has_cookie=True)
        else:
            with pytest.raises(HttpError):
                security.check_origin("POST", headers, PUBLIC, has_cookie=True)


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("", ""),
        ("https://D.example/", "https://d.example"),
        ("https://d.example:443", "https://d.example"),
        ("https://d.example:8443", "https://d.example:8443"),
        ("http://localhost:7100", "http://localhost:7100"),
    ],
)
def test_public_url_is_an_origin(url: str, origin: str) -> None:
    address = Address.of(Settings(public_url=url))
    assert (address.public, address.is_secure) == (origin, origin.startswith("https"))


@pytest.mark.parametrize(
    "url",
    ["d.example", "http://d.example", "https://d.example/detflow", "https://u@d.example", "https:"],
)
def test_public_url_that_is_no_origin_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="DETFLOW_PUBLIC_URL"):
        Address.of(Settings(public_url=url))


@pytest.mark.parametrize(
    ("cookie", "plain", "secure"),
    [
        ("detflow_session=dfs_a", "dfs_a", ""),
        ("x=1; detflow_session=dfs_a; y=2", "dfs_a", ""),
        ("__Host-detflow_session=dfs_b; detflow_session=dfs_a", "dfs_a", "dfs_b"),
        ("detflow_session=", "", ""),
        ("detflow_session=a b", "", ""),
        ('detflow_session="a"', "", ""),
        ("xdetflow_session=a", "", ""),
        ("detflow_session=" + "a" * 200, "", ""),
        ("\xff=\xfe", "", ""),
    ],
)
def test_cookie_becomes_the_token_of_the_call(cookie: str, plain: str, secure: str) -> None:
    for address, expected in ((LOCAL, plain), (PUBLIC, secure)):
        headers = {b"cookie": cookie.encode("latin-1")}
        assert credentials.use_cookie(headers, address) == bool(expected)
        assert headers.get(b"authorization", b"").decode() == (
            f"Bearer {expected}" if expected else ""
        )


def test_header_wins_over_the_cookie() -> None:
    headers = {b"authorization": b"Bearer k", b"cookie": b"detflow_session=dfs_a"}
    assert not credentials.use_cookie(headers, LOCAL)
    assert headers[b"authorization"] == b"Bearer k"


def test_cookie_is_for_this_host_and_no_script() -> None:
    assert credentials.set_cookie("detflow_session", "dfs_a", 60, LOCAL) == (
        "detflow_session=dfs_a; Path=/; HttpOnly; SameSite=Strict; Max-Age=60"
    )
    assert credentials.set_cookie("detflow_session", "dfs_a", 60, PUBLIC) == (
        "__Host-detflow_session=dfs_a; Path=/; HttpOnly; SameSite=Strict; Max-Age=60; Secure"
    )


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


def test_calls_are_of_a_new_trace_when_there_is_none_or_a_broken_one() -> None:
    telemetry.trace_to("gateway", Settings())
    for given in ("", "00-zz-yy-01", "00-" + "0" * 32 + "-" + "1" * 16 + "-01"):
        with telemetry.span("request", {"traceparent": given}) as trace_id:
            metadata = dict(backends.metadata_of({}, "r"))
        assert trace_id.strip("0")
        assert metadata["traceparent"].split("-")[1] == trace_id


def test_of_the_headers_only_some_are_passed_on() -> None:
    forwarded = dict(backends.metadata_of({b"authorization": b"Bearer x", b"cookie": b"a"}, "r"))
    assert forwarded["authorization"] == "Bearer x"
    assert "cookie" not in forwarded
    assert "accept-language" not in dict(backends.metadata_of({b"accept-language": b"\xff"}, "r"))


def test_addresses() -> None:
    assert split_address("X", "127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("X", "[::1]:7100") == ("::1", 7100)
    for text in ("7100", ":7100", "host:", "host:x", "host:70000"):
        with pytest.raises(InvalidArgument):
            split_address("X", text)
