"""ID tokens: which count, and for whom. The issuer is a small one of the test, on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from detflow import channels
from detflow.access import Role
from detflow.errors import FailedPrecondition, InvalidArgument, Unauthenticated, Unavailable
from detflow.events import Bus
from detflow.settings import Settings
from detflow.v1 import access_pb2
from services.version import oidc
from services.version.oidc import make_issuer
from tests import access_rig
from tests.access_rig import OWNER, SERVICE, bearer

CLIENT = "detflow-test"


class FakeIssuer:
    """Serves discovery and keys, and signs whatever it is asked to."""

    def __init__(self) -> None:
        self.url = ""
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.ed = ed25519.Ed25519PrivateKey.generate()
        self.num_key_calls = 0
        self.keys: list[dict[str, Any]] = [
            self.jwk("RS256", self.rsa, "rsa"),
            self.jwk("ES256", self.ec, "ec"),
            self.jwk("EdDSA", self.ed, "ed"),
        ]

    @staticmethod
    def jwk(algorithm: str, key: Any, kid: str) -> dict[str, Any]:
        made: dict[str, Any] = jwt.get_algorithm_by_name(algorithm).to_jwk(
            key.public_key(), as_dict=True
        )
        return {**made, "kid": kid, "alg": algorithm, "use": "sig"}

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": CLIENT,
            "sub": "user-7",
            "iat": now,
            "exp": now + 300,
            "email": "Ann@Example.com",
            "email_verified": True,
            "name": "Ann",
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, **changes: Any) -> str:
        return jwt.encode(self.claims(**changes), self.rsa, "RS256", headers={"kid": "rsa"})

    async def discover(self, request: web.Request) -> web.Response:
        return web.json_response({"issuer": self.url, "jwks_uri": f"{self.url}/keys"})

    async def list_keys(self, request: web.Request) -> web.Response:
        self.num_key_calls += 1
        return web.json_response({"keys": self.keys})


@pytest.fixture(scope="module")
def fake() -> FakeIssuer:
    return FakeIssuer()


@pytest.fixture
async def issuer(fake: FakeIssuer) -> AsyncIterator[FakeIssuer]:
    """The issuer, listening."""
    app = web.Application()
    app.router.add_get("/.well-known/openid-configuration", fake.discover)
    app.router.add_get("/keys", fake.list_keys)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    fake.num_key_calls = 0
    fake.keys = [one for one in fake.keys if one["kid"] != "new"]
    yield fake
    await runner.cleanup()


@pytest.fixture
async def verifier(issuer: FakeIssuer) -> AsyncIterator[oidc.Issuer]:
    made = make_issuer(Settings(oidc_issuer=issuer.url, oidc_client_id=CLIENT))
    assert made is not None
    yield made
    await made.close()


async def refused(verifier: oidc.Issuer, token: str, nonce: str | None = None) -> bool:
    try:
        await verifier.verify(token, nonce)
    except Unauthenticated as error:
        return error.reason == "BAD_TOKEN"
    return False


async def test_genuine_token_counts_whatever_kind_of_key_signed_it(
    issuer: FakeIssuer, verifier: oidc.Issuer
) -> None:
    for algorithm, kid, key in (
        ("RS256", "rsa", issuer.rsa),
        ("ES256", "ec", issuer.ec),
        ("EdDSA", "ed", issuer.ed),
    ):
        token = jwt.encode(issuer.claims(), key, algorithm, headers={"kid": kid})
        user = await verifier.verify(token)
        assert (user.keys, user.display_name) == (("ann@example.com", "user-7"), "Ann")
    assert issuer.num_key_calls == 1  # asked once, remembered


async def test_token_that_is_not_for_this_installation_or_not_genuine_is_refused(
    issuer: FakeIssuer, verifier: oidc.Issuer
) -> None:
    now = int(time.time())
    wrong: list[dict[str, Any]] = [
        {"aud": "somebody-else"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"exp": now - 61},
        {"exp": None},
        {"iat": None},
        {"nbf": now + 120},
        {"sub": None},
        {"azp": "somebody-else"},
        {"email_verified": False, "sub": "ann@example.com"},
    ]
    for changes in wrong:
        assert await refused(verifier, issuer.token(**changes)), changes
    genuine = issuer.token()
    head, body, signature = genuine.split(".")
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    assert await refused(verifier, f"{head}.{body}.{flipped}")
    headers = {"kid": "rsa"}
    stranger = jwt.encode(issuer.claims(), issuer.other, "RS256", headers=headers)
    assert await refused(verifier, stranger)
    nobody: Any = None
    assert await refused(verifier, jwt.encode(issuer.claims(), nobody, "none", headers=headers))
    # The public key as the secret of a symmetric algorithm, which a careless verifier takes. The
    # library refuses to sign so, so it is done by hand.
    public = issuer.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = jwt.get_algorithm_by_name("HS256")
    data = (
        jwt.utils.base64url_encode(b'{"alg":"HS256","typ":"JWT","kid":"rsa"}')
        + b"."
        + body.encode()
    )
    confused = data + b"." + jwt.utils.base64url_encode(signed.sign(data, public))
    assert await refused(verifier, confused.decode())
    mixed = jwt.encode(issuer.claims(), issuer.ec, "ES256", headers=headers)
    assert await refused(verifier, mixed)
    critical = jwt.encode(
        issuer.claims(), issuer.rsa, "RS256", headers={**headers, "crit": ["x"], "x": 1}
    )
    assert await refused(verifier, critical)
    for garbage in ("a.b.c", "..", "eyJhbGciOiJSUzI1NiJ9.e30.", genuine + "x"):
        assert await refused(verifier, garbage), garbage
    assert (await verifier.verify(issuer.token(exp=now - 30))).keys  # clocks differ a little


async def test_nonce_must_be_the_one_that_was_sent(
    issuer: FakeIssuer, verifier: oidc.Issuer
) -> None:
    token = issuer.token(nonce="right")
    assert (await verifier.verify(token, "right")).display_name == "Ann"
    assert await refused(verifier, token, "wrong")
    assert await refused(verifier, issuer.token(), "right")
    assert await refused(verifier, issuer.token(nonce=5), "5")


async def test_email_counts_only_if_the_issuer_has_verified_it(
    issuer: FakeIssuer, verifier: oidc.Issuer
) -> None:
    for verified in (False, None, "true", 1):
        user = await verifier.verify(issuer.token(email_verified=verified))
        assert user.keys == ("user-7",)


async def test_new_key_is_fetched_at_once_but_not_for_every_unknown_id(
    issuer: FakeIssuer, verifier: oidc.Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await verifier.verify(issuer.token())
    token = jwt.encode(issuer.claims(), issuer.other, "RS256", headers={"kid": "new"})
    issuer.keys.append(issuer.jwk("RS256", issuer.other, "new"))
    results = await asyncio.gather(*(refused(verifier, token) for _ in range(20)))
    assert all(results)  # asked a moment ago
    assert issuer.num_key_calls == 1
    monkeypatch.setattr(oidc, "_REFRESH_SECONDS", 0.0)
    assert (await verifier.verify(token)).display_name == "Ann"
    assert issuer.num_key_calls == 2


async def test_issuer_that_is_away_or_lies_lets_nobody_in(
    issuer: FakeIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar = oidc.Issuer(issuer.url + "/", CLIENT)
    with pytest.raises(Unavailable) as caught:
        await liar.verify(issuer.token())
    assert caught.value.reason == "ISSUER_AWAY"
    await liar.close()
    closed = oidc.Issuer("http://127.0.0.1:9", CLIENT)
    with pytest.raises(Unavailable):
        await closed.verify(issuer.token())
    await closed.close()
    monkeypatch.setattr(oidc, "_MAX_BYTES", 10)
    wordy = oidc.Issuer(issuer.url, CLIENT)
    with pytest.raises(Unavailable):
        await wordy.verify(issuer.token())
    await wordy.close()


def test_issuer_without_tls_or_client_id_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="https://"):
        make_issuer(Settings(oidc_issuer="http://idp.example", oidc_client_id=CLIENT))
    with pytest.raises(InvalidArgument, match="DETFLOW_OIDC_CLIENT_ID"):
        make_issuer(Settings(oidc_issuer="https://idp.example"))
    assert make_issuer(Settings()) is None


async def test_person_signs_in_with_the_roles_of_the_moment(
    issuer: FakeIssuer,
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> None:
    async with access_rig.running(
        make_database_url, nats_url, tmp_path, oidc_issuer=issuer.url, oidc_client_id=CLIENT
    ) as rig:

        async def whose(token: str) -> access_pb2.Principal:
            with channels.translate():
                return await rig.access.Authenticate(
                    access_pb2.AuthenticateRequest(token=token), metadata=bearer(SERVICE)
                )

        token = issuer.token(nonce="n")
        with channels.translate():
            session = await rig.access.CreateSession(
                access_pb2.CreateSessionRequest(id_token=token, nonce="n"),
                metadata=bearer(SERVICE),
            )
        assert session.principal.subject == "users/ann@example.com"
        assert not session.principal.grants
        with pytest.raises(Unauthenticated), channels.translate():
            await rig.access.CreateSession(
                access_pb2.CreateSessionRequest(id_token=token, nonce="other"),
                metadata=bearer(SERVICE),
            )
        members = []
        for user, parent, role in (
            ("ANN@example.com", "projects/default", Role.EDITOR),
            ("user-7", "projects/default", Role.VIEWER),
            ("user-7", "projects/-", Role.VIEWER),
        ):
            members.append(
                await rig.access.CreateMember(
                    access_pb2.CreateMemberRequest(
                        parent=parent, member=access_pb2.Member(user=user, role=role)
                    ),
                    metadata=bearer(OWNER),
                )
            )
        for known in (session.token, token):
            found = await whose(known)
            assert {grant.project: grant.role for grant in found.grants} == {
                "projects/default": Role.EDITOR,
                "projects/-": Role.VIEWER,
            }
        for member in members:
            await rig.access.DeleteMember(
                access_pb2.DeleteMemberRequest(name=member.name), metadata=bearer(OWNER)
            )
        assert not (await whose(session.token)).grants
    async with access_rig.running(make_database_url, nats_url, tmp_path) as rig:
        with pytest.raises(FailedPrecondition, match="DETFLOW_OIDC_ISSUER"), channels.translate():
            await rig.access.CreateSession(
                access_pb2.CreateSessionRequest(id_token=token), metadata=bearer(SERVICE)
            )
