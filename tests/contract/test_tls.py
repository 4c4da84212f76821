"""Services with TLS, and clients with and without the right certificates."""

import dataclasses
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import detflow
from detflow import channels, tls
from detflow.errors import InvalidArgument, Unavailable
from detflow.server import Service
from detflow.v1 import access_pb2, access_pb2_grpc
from tests import access_rig
from tests.tls_rig import Authority, Certificate

MakeUrl = Callable[[str], Awaitable[str]]


class Anybody(access_pb2_grpc.AccessServiceServicer):
    """Knows everybody."""

    def GetPrincipal(self, request: Any, context: Any) -> access_pb2.Principal:
        return access_pb2.Principal(subject="anybody")


@contextmanager
def serving(shown: Certificate | None, client_ca_file: str = "") -> Iterator[dict[str, str]]:
    """Serves with a certificate, or without TLS; yields the environment that leads there."""
    server = grpc.server(ThreadPoolExecutor(2))
    servicer: Any = Anybody  # the generated base is abstract in its methods
    access_pb2_grpc.add_AccessServiceServicer_to_server(servicer(), server)
    if shown is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port(
            "127.0.0.1:0",
            tls.server_credentials(
                cert_file=shown.cert, key_file=shown.key, client_ca_file=client_ca_file
            ),
        )
    server.start()
    yield {"DETFLOW_VERSION_ADDRESS": f"127.0.0.1:{port}", "DETFLOW_DATA_DIR": "/nowhere"}
    server.stop(None)


def who(environ: dict[str, str], address: str = "https://127.0.0.1:1", **options: Any) -> str:
    with detflow.Client(address, environ=environ, **options) as client:
        return client.access.principal().subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority(folder, "authority")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Authority:
    return Authority(folder, "stranger")


def test_client_that_trusts_the_authority_is_answered(authority: Authority) -> None:
    with serving(authority.issue("server")) as environ:
        assert who(environ, ca_file=authority.file) == "anybody"
        assert who({**environ, "DETFLOW_TLS_CA_FILE": authority.file}) == "anybody"


def test_client_that_does_not_is_told_what_to_set(
    authority: Authority, stranger: Authority
) -> None:
    with serving(authority.issue("server")) as environ:
        with pytest.raises(Unavailable, match=r"not trusted.*DETFLOW_TLS_CA_FILE"):
            who(environ, ca_file=stranger.file)
        with pytest.raises(Unavailable, match=r"not trusted.*DETFLOW_TLS_CA_FILE"):
            who(environ)


def test_client_and_server_that_disagree_on_tls_are_told(authority: Authority) -> None:
    with serving(authority.issue("server")) as environ:
        with pytest.raises(Unavailable, match="if it has TLS, say https://"):
            who(environ, "127.0.0.1:1")
    with serving(None) as environ:
        with pytest.raises(Unavailable, match="it has no TLS; leave https:// away"):
            who(environ, ca_file=authority.file)


def test_expired_certificate_is_called_that(authority: Authority) -> None:
    with serving(authority.issue("old", ended=True)) as environ:
        with pytest.raises(Unavailable, match="its certificate has expired"):
            who(environ, ca_file=authority.file)


def test_certificate_of_another_name_is_refused(authority: Authority) -> None:
    with serving(authority.issue("server", host="detflow.example")) as environ:
        with pytest.raises(Unavailable, match="its certificate is for another name"):
            who(environ, ca_file=authority.file)


def test_client_needs_a_certificate_where_the_server_asks_for_one(
    authority: Authority, stranger: Authority
) -> None:
    right, wrong = authority.issue("client"), stranger.issue("other")
    expired = authority.issue("old-client", ended=True)
    with serving(authority.issue("server"), authority.file) as environ:
        trusting = {**environ, "DETFLOW_TLS_CA_FILE": authority.file}
        assert who(trusting, cert_file=right.cert, key_file=right.key) == "anybody"
        for options in (
            {},
            {"cert_file": wrong.cert, "key_file": wrong.key},
            {"cert_file": expired.cert, "key_file": expired.key},
        ):
            with pytest.raises(Unavailable, match="name yours in DETFLOW_TLS_CERT_FILE"):
                who(trusting, **options)


def test_files_that_are_none_are_named(authority: Authority, folder: Path) -> None:
    shown, other = authority.issue("server"), authority.issue("client")
    text = folder / "text"
    text.write_text("no certificate\n")
    for options, words in (
        ({"ca_file": f"{folder}/none"}, "cannot read .*/none: No such file"),
        ({"ca_file": str(text)}, "text holds no certificate of an authority"),
        ({"cert_file": shown.cert}, "name both files"),
        ({"cert_file": shown.cert, "key_file": other.key}, "no certificate with its key"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            who({}, **options)
    with pytest.raises(InvalidArgument, match=r"say https://127\.0\.0\.1:1"):
        who({}, "127.0.0.1:1", ca_file=authority.file)


async def test_services_show_each_other_certificates(
    make_database_url: MakeUrl,
    nats_url: str,
    bus: Any,
    tmp_path: Path,
    authority: Authority,
    stranger: Authority,
) -> None:
    shown, wrong = authority.issue("service"), stranger.issue("wrong")
    settings = access_rig.settings(
        await make_database_url("version"),
        nats_url,
        tmp_path,
        tls_cert_file=shown.cert,
        tls_key_file=shown.key,
        tls_ca_file=authority.file,
        tls_client_ca_file=authority.file,
    )
    request = access_pb2.AuthenticateRequest(token=access_rig.OWNER)
    async with access_rig.version_service(settings) as rig:
        address = rig.service.address
        async with channels.channel(address, settings) as channel:
            stub = access_pb2_grpc.AccessServiceStub(channel)
            assert (await stub.Authenticate(request)).subject == "owner"
        outsider = dataclasses.replace(settings, tls_cert_file=wrong.cert, tls_key_file=wrong.key)
        async with channels.channel(address, outsider) as channel:
            stub = access_pb2_grpc.AccessServiceStub(channel)
            with pytest.raises(Unavailable), channels.translate():
                await stub.Authenticate(request)


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("tls_cert_file", "set DETFLOW_TLS_CERT_FILE too"),
        ("tls_key_file", "name both files"),
        ("tls_ca_file", "set DETFLOW_TLS_CA_FILE"),
    ],
)
async def test_service_with_half_of_the_settings_does_not_start(
    authority: Authority, tmp_path: Path, missing: str, remedy: str
) -> None:
    shown = authority.issue("server")
    settings = access_rig.settings(
        "postgresql://nowhere",
        "nats://nowhere",
        tmp_path,
        tls_cert_file=shown.cert,
        tls_key_file=shown.key,
        tls_ca_file=authority.file,
        tls_client_ca_file=authority.file,
    )
    without: dict[str, Any] = {missing: ""}
    half = dataclasses.replace(settings, **without)
    with pytest.raises(InvalidArgument, match=remedy):
        async with Service("version", migrations=None, settings=half):
            pass
