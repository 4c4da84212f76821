"""Signing in with an OIDC issuer, and HTTPS: a gateway before a real version service.

The issuer is a small one of the tests, on loopback; it checks PKCE and the client's secret.
"""

import base64
import hashlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc.aio
import httpx
import jwt
import pytest
from aiohttp import BasicAuth, web
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio  # type: ignore[attr-defined]

from detflow import errors, tls
from detflow.errors import InvalidArgument
from detflow.events import Bus
from detflow.settings import Settings
from detflow.v1 import access_pb2
from gateway import oidc
from gateway.__main__ import Server
from gateway.app import Gateway
from gateway.backends import Backends
from gateway.routes import SERVICES
from tests import access_rig, gateway_rig
from tests.access_rig import OWNER, SERVICE, bearer
from tests.gateway_rig import details
from tests.tls_rig import Authority

CLIENT, SECRET = "detflow test", "s:cret"
HERE = "https://detflow.example"
SAME_ORIGIN = {"sec-fetch-site": "same-origin"}


class FakeIssuer:
    """Signs everybody in as Kim, who is asked for nothing."""

    def __init__(self) -> None:
        self.url = ""
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.claims: dict[str, Any] = {}
        self.discovery: dict[str, Any] = {}
        self.answer: web.Response | None = None  # of the token endpoint, instead of a token
        self.codes: dict[str, dict[str, str]] = {}
        self.forms: list[dict[str, str]] = []
        self.num_key_calls = 0
        self.num_discoveries = 0

    async def discover(self, request: web.Request) -> web.Response:
        self.num_discoveries += 1
        return web.json_response(
            {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize?tenant=1",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/keys",
            }
            | self.discovery
        )

    async def list_keys(self, request: web.Request) -> web.Response:
        self.num_key_calls += 1
        public = jwt.get_algorithm_by_name("ES256").to_jwk(self.key.public_key(), as_dict=True)
        return web.json_response({"keys": [public | {"kid": "k", "alg": "ES256", "use": "sig"}]})

    def authorize(self, url: str) -> str:
        """Does what the browser and the person do there; returns where the browser is sent back."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        assert url.startswith(f"{self.url}/authorize?tenant=1&")
        assert (query["response_type"], query["client_id"]) == ("code", CLIENT)
        assert query["code_challenge_method"] == "S256" and "openid" in query["scope"].split()
        self.codes["code-1"] = query
        return f"{query['redirect_uri']}?code=code-1&state={query['state']}"

    async def exchange(self, request: web.Request) -> web.Response:
        form = {name: str(value) for name, value in (await request.post()).items()}
        self.forms.append(form)
        if self.answer is not None:
            return self.answer
        asked = self.codes.pop(form["code"], None)
        challenge = hashlib.sha256(form["code_verifier"].encode()).digest()
        given = base64.urlsafe_b64encode(challenge).rstrip(b"=").decode()
        client = BasicAuth.decode(request.headers["authorization"])
        if asked is None or given != asked["code_challenge"]:
            return web.json_response({"error": "invalid_grant"}, status=400)
        assert form["redirect_uri"] == asked["redirect_uri"]
        assert (client.login, client.password) == ("detflow%20test", "s%3Acret")
        now = int(time.time())
        claims = {
            **{"iss": self.url, "aud": CLIENT, "sub": "kim-7", "iat": now, "exp": now + 300},
            **{"nonce": asked["nonce"], "email": "kim@example.com", "email_verified": True},
            **self.claims,
        }
        token = jwt.encode(claims, self.key, "ES256", headers={"kid": "k"})
        return web.json_response({"id_token": token, "access_token": "x", "token_type": "Bearer"})


@asynccontextmanager
async def serving(fake: FakeIssuer) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_get("/.well-known/openid-configuration", fake.discover)
    app.router.add_get("/keys", fake.list_keys)
    app.router.add_post("/token", fake.exchange)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield
    finally:
        await runner.cleanup()


@pytest.fixture
async def issuer() -> AsyncIterator[FakeIssuer]:
    fake = FakeIssuer()
    async with serving(fake):
        yield fake


def settings(issuer: FakeIssuer, **more: Any) -> Settings:
    given = {"oidc_client_secret": SECRET, "public_url": HERE, "service_token": SERVICE} | more
    return Settings(oidc_issuer=issuer.url, oidc_client_id=CLIENT, drain_seconds=2, **given)


@pytest.fixture
async def version(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
    issuer: FakeIssuer,
) -> AsyncIterator[access_rig.Rig]:
    async with access_rig.running(
        make_database_url, nats_url, tmp_path, oidc_issuer=issuer.url, oidc_client_id=CLIENT
    ) as rig:
        yield rig


@pytest.fixture
async def http(version: access_rig.Rig, issuer: FakeIssuer) -> AsyncIterator[httpx.AsyncClient]:
    """A browser, as a proxy with TLS passes its requests on."""
    addresses = dict.fromkeys(SERVICES, version.service.address)
    headers = {"host": "detflow.example"}
    async with gateway_rig.in_front_of(addresses, settings(issuer), headers=headers) as running:
        yield running[2]


def cookies(answer: httpx.Response) -> dict[str, str]:
    """What an answer sets, by name, with the attributes."""
    return {
        one.partition("=")[0]: one.partition("=")[2]
        for one in answer.headers.get_list("set-cookie")
    }


async def leave(http: httpx.AsyncClient, issuer: FakeIssuer) -> tuple[str, str]:
    """Goes to the issuer and back; returns the path to come back to and the cookie to bring."""
    gone = await http.get("/login/oidc")
    assert gone.status_code == 303
    cookie = cookies(gone)["__Host-detflow_login"]
    assert "; HttpOnly; SameSite=Lax; Max-Age=600; Secure" in cookie
    back = issuer.authorize(gone.headers["location"])
    assert back.startswith(f"{HERE}/login/callback?")
    return back.removeprefix(HERE), f"__Host-detflow_login={cookie.partition(';')[0]}"


async def come_back(http: httpx.AsyncClient, issuer: FakeIssuer) -> httpx.Response:
    path, cookie = await leave(http, issuer)
    return await http.get(path, headers={"cookie": cookie, "sec-fetch-site": "cross-site"})


def is_refused(answer: httpx.Response) -> bool:
    """Whether nobody was signed in, said on a page, and the browser may begin anew."""
    given = cookies(answer)
    return (
        answer.status_code == 403
        and "You are not signed in" in answer.text
        and list(given) == ["__Host-detflow_login"]
        and "Max-Age=0" in given["__Host-detflow_login"]
    )


async def test_person_of_the_issuer_is_signed_in_with_the_role_of_a_member(
    http: httpx.AsyncClient, issuer: FakeIssuer, version: access_rig.Rig
) -> None:
    member = access_pb2.Member(user="Kim@example.com", role=access_pb2.EDITOR)
    await version.access.CreateMember(
        access_pb2.CreateMemberRequest(parent="projects/default", member=member),
        metadata=bearer(OWNER),
    )
    options = (await http.get("/login/options")).json()
    name = issuer.url.removeprefix("http://")
    assert options == {"oidc": {"path": "/login/oidc", "name": name}}
    answer = await come_back(http, issuer)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert answer.headers["strict-transport-security"] == "max-age=31536000"
    given = cookies(answer)
    assert "Max-Age=0" in given["__Host-detflow_login"]
    session, _, attributes = given["__Host-detflow_session"].partition(";")
    assert attributes == " Path=/; HttpOnly; SameSite=Strict; Max-Age=604800; Secure"
    headers = {"cookie": f"__Host-detflow_session={session}"}
    who = (await http.get("/v1/principal", headers=headers)).json()
    assert (who["kind"], who["subject"]) == ("USER", "users/kim@example.com")
    assert who["grants"] == [{"project": "projects/default", "role": "EDITOR"}]
    # Without the prefix it could have been set by another host of the domain.
    other = await http.get("/v1/principal", headers={"cookie": f"detflow_session={session}"})
    assert other.status_code == 401


async def test_answer_that_this_browser_did_not_ask_for_counts_nothing(
    http: httpx.AsyncClient, issuer: FakeIssuer
) -> None:
    _, other = await leave(http, issuer)
    path, cookie = await leave(http, issuer)
    for headers in ({}, {"cookie": other}, {"cookie": "__Host-detflow_login=x"}):
        assert is_refused(await http.get(path, headers=headers))
    shown = {"cookie": cookie}
    assert is_refused(await http.get(path.partition("&state=")[0], headers=shown))
    assert is_refused(await http.get(f"{path}&iss=https://other.example", headers=shown))
    denied = path.replace("code=code-1", "error=access_denied")
    assert is_refused(await http.get(denied, headers=shown))
    assert not issuer.forms  # none of them got as far
    assert (await http.get(path, headers=shown)).status_code == 303
    assert is_refused(await http.get(path, headers=shown))  # the issuer takes a code once


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another"},
        {"iss": "https://other.example"},
        {"exp": 1},
    ],
    ids=["nonce of another sign-in", "no nonce", "for another client", "issuer", "ended"],
)
async def test_token_that_is_not_for_this_sign_in_counts_nothing(
    http: httpx.AsyncClient, issuer: FakeIssuer, claims: dict[str, Any]
) -> None:
    issuer.claims = claims
    assert is_refused(await come_back(http, issuer))


async def test_issuer_out_of_order_is_said_on_a_page(
    http: httpx.AsyncClient, issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "_DISCOVERY_SECONDS", 0.0)
    monkeypatch.setattr(oidc, "_RETRY_SECONDS", 600.0)
    issuer.discovery = {"issuer": "https://other.example"}
    for _ in range(3):  # it is not asked again at once
        assert (await http.get("/login/oidc")).status_code == 503
    assert issuer.num_discoveries == 1
    monkeypatch.setattr(oidc, "_RETRY_SECONDS", 0.0)
    for discovery in (
        {"issuer": "https://other.example"},
        {"token_endpoint": "http://other.example/token"},
        {"authorization_endpoint": None},
        {"padding": "x" * 300_000},
        {"token_endpoint_auth_methods_supported": None, "token_endpoint": 7},
    ):
        issuer.discovery = discovery
        answer = await http.get("/login/oidc")
        assert answer.status_code == 503 and "not possible right now" in answer.text
        assert "set-cookie" not in answer.headers
    issuer.discovery = {}
    for wrong in (
        web.json_response({}),
        web.json_response({"id_token": "x" * 9000}),
        web.Response(text="<html>"),
        web.json_response({"error": "<script>"}, status=500),
        web.Response(status=302, headers={"location": f"{issuer.url}/keys"}),
    ):
        issuer.answer = wrong
        page = await come_back(http, issuer)
        assert page.status_code == 503 and "<script" not in page.text
        assert "__Host-detflow_session" not in cookies(page)
    assert not issuer.num_key_calls  # no redirect was followed, and no token was looked at


async def test_without_a_public_url_the_issuer_leads_back_to_loopback(
    version: access_rig.Rig, issuer: FakeIssuer
) -> None:
    addresses = dict.fromkeys(SERVICES, version.service.address)
    async with gateway_rig.in_front_of(addresses, settings(issuer, public_url="")) as running:
        http = running[2]
        gone = await http.get("/login/oidc")
        back = issuer.authorize(gone.headers["location"])
        assert back.startswith(f"{http.base_url}/login/callback?")
        answer = await http.get(back)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert (await http.get("/v1/principal")).json()["kind"] == "USER"


async def test_gateway_that_others_reach_needs_a_public_url_and_https(issuer: FakeIssuer) -> None:
    backends = Backends(dict.fromkeys(SERVICES, "127.0.0.1:1"))
    for wrong, variable in (
        (settings(issuer, public_url="", http_listen="0.0.0.0:0"), "DETFLOW_PUBLIC_URL"),
        (Settings(oidc_issuer=issuer.url), "DETFLOW_OIDC_CLIENT_ID"),
        (Settings(oidc_issuer="http://other.example", oidc_client_id="x"), "DETFLOW_OIDC_ISSUER"),
    ):
        with pytest.raises(InvalidArgument, match=variable):
            Gateway(backends, wrong)
    await backends.close()


async def test_service_away_leaves_the_link_and_says_so() -> None:
    async with gateway_rig.running() as rig:
        rig.backend.replies["CreateSession"] = gateway_rig.failing(errors.Unavailable("away"))
        page = await rig.http.post("/login/session", data={"ticket": "abc"}, headers=SAME_ORIGIN)
        assert page.status_code == 503 and "not possible right now" in page.text
        for body in ({}, {"ticket": ""}, {"ticket": "<b>"}, {"ticket": "a" * 200}):
            page = await rig.http.post("/login/session", data=body, headers=SAME_ORIGIN)
            assert page.status_code == 400 and "detflow open" in page.text
        assert (await rig.http.get("/login/oidc")).status_code == 404


async def test_metrics_take_a_token_where_others_can_reach_the_gateway(
    version: access_rig.Rig,
) -> None:
    addresses = dict.fromkeys(SERVICES, version.service.address)
    for given in (Settings(public_url=HERE), Settings(http_listen="0.0.0.0:0")):
        async with gateway_rig.in_front_of(addresses, given) as (_, _, http, _):
            refused = await http.get("/metrics")
            assert details(refused, "ErrorInfo")["reason"] == "NO_TOKEN"
            shown = {"authorization": f"Bearer {OWNER}"}
            assert "http_requests" in (await http.get("/metrics", headers=shown)).text
            assert (await http.get("/readyz")).status_code == 200
    elsewhere = Settings(metrics_listen="127.0.0.1:0")
    async with gateway_rig.in_front_of(addresses, elsewhere) as (_, _, http, _):
        assert (await http.get("/metrics")).status_code == 404


def trusting(authority: Authority, **client: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.file)
    if client:
        context.load_cert_chain(**client)
    return context


async def test_https_with_and_without_certificates_of_clients(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    server = authority.issue("server")
    known = authority.issue("client")
    nowhere = dict.fromkeys(SERVICES, "127.0.0.1:1")
    # A client that keeps its connection does not hear that it is closed, and holds up the end.
    client: dict[str, Any] = {"headers": {"connection": "close"}}
    plain = trusting(authority)
    given = Settings(tls_cert_file=server.cert, tls_key_file=server.key)
    async with gateway_rig.in_front_of(nowhere, given, verify=plain, **client) as running:
        _, uvicorn, http, _ = running
        answer = await http.get("/healthz")
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert uvicorn.config.ssl is not None
        assert uvicorn.config.ssl.minimum_version >= ssl.TLSVersion.TLSv1_2
        async with httpx.AsyncClient() as other:
            with pytest.raises(httpx.ConnectError):
                await other.get(f"{http.base_url}/healthz")
    given = replace(given, tls_client_ca_file=authority.file)
    shown = trusting(authority, certfile=known.cert, keyfile=known.key)
    async with gateway_rig.in_front_of(nowhere, given, verify=shown, **client) as running:
        gateway, _, http, _ = running
        assert (await http.get("/healthz")).status_code == 200
        async with httpx.AsyncClient(verify=plain) as other:
            with pytest.raises(httpx.TransportError):
                await other.get(f"{http.base_url}/healthz")
        with pytest.raises(InvalidArgument, match="nothing"):
            Server(gateway, replace(given, tls_cert_file="nothing"))


async def test_services_with_tls_are_reached_with_a_certificate_they_trust(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    server, known = authority.issue("server"), authority.issue("client")
    service = grpc.aio.server()
    health = health_aio.HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, service)
    credentials = tls.server_credentials(
        cert_file=server.cert, key_file=server.key, client_ca_file=authority.file
    )
    address = f"127.0.0.1:{service.add_secure_port('127.0.0.1:0', credentials)}"
    await service.start()
    known_settings = Settings(
        **{f"{name}_address": address for name in SERVICES},  # type: ignore[arg-type]
        tls_ca_file=authority.file,
        tls_cert_file=known.cert,
        tls_key_file=known.key,
    )
    stranger = replace(known_settings, tls_cert_file="", tls_key_file="")
    for settings, state in ((known_settings, "SERVING"), (stranger, "UNREACHABLE")):
        backends = Backends.connect(settings)
        assert set((await backends.health()).values()) == {state}
        await backends.close()
    await service.stop(0)
