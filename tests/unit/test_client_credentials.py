"""Who gets to see a token, and who does not."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import detflow
from detflow.errors import InvalidArgument, Unauthenticated
from detflow.local.process import secret
from detflow.local.running import Running, locked
from detflow.v1 import access_pb2, version_pb2

TOKEN = "dfk_" + "k" * 43
NOBODY = "nobody"


class Listener(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Answers every call with what it was shown; lists what it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def service(self, details: Any) -> Any:
        shown = dict(details.invocation_metadata).get("authorization", NOBODY)
        self.seen.append(shown)

        def principal(_request: bytes, _context: Any) -> bytes:
            return access_pb2.Principal(subject=shown).SerializeToString()

        def messages(_request: bytes, _context: Any) -> Iterator[bytes]:
            message = version_pb2.WatchVersionsResponse(
                cursor=shown, snapshot=version_pb2.VersionsSnapshot()
            )
            yield message.SerializeToString()

        if "Watch" in details.method:
            return grpc.unary_stream_rpc_method_handler(messages)
        return grpc.unary_unary_rpc_method_handler(principal)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def port(listener: Listener) -> Iterator[int]:
    """Of a server that is shown what clients show."""
    server = grpc.server(ThreadPoolExecutor(2), handlers=[listener])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None)


def who(address: str, environ: dict[str, str], **options: Any) -> str:
    with detflow.Client(address, environ=environ, **options) as client:
        return client.access.principal().subject


def test_token_is_shown_with_calls_watches_and_downloads(port: int, tmp_path: Path) -> None:
    environ = {f"DETFLOW_{name}_ADDRESS": f"127.0.0.1:{port}" for name in ("VERSION", "PREPROCESS")}
    with detflow.Client("127.0.0.1:1", environ=environ, token=TOKEN) as client:
        assert client.access.principal().subject == f"Bearer {TOKEN}"
        assert next(client.versions.watch()).cursor == f"Bearer {TOKEN}"


async def test_token_is_shown_by_the_async_client(port: int) -> None:
    environ = {"DETFLOW_VERSION_ADDRESS": f"127.0.0.1:{port}", "DETFLOW_TOKEN": TOKEN}
    async with detflow.AsyncClient("127.0.0.1:1", environ=environ) as client:
        assert (await client.access.principal()).subject == f"Bearer {TOKEN}"


def test_nearer_token_wins(port: int, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("of-a-file\n")
    address = f"127.0.0.1:{port - 1}"
    environ = {"DETFLOW_DATA_DIR": str(tmp_path)}
    assert who(address, environ) == NOBODY
    environ["DETFLOW_TOKEN_FILE"] = str(file)
    assert who(address, environ) == "Bearer of-a-file"
    environ["DETFLOW_TOKEN"] = "of-the-environment"
    assert who(address, environ) == "Bearer of-the-environment"
    assert who(address, environ, token="given") == "Bearer given"


@pytest.fixture
def owner(tmp_path: Path) -> str:
    """Token of the stack that keeps its data in tmp_path."""
    (tmp_path / "access").mkdir()
    return secret(tmp_path / "access" / "owner-token")


def test_owner_of_the_stack_that_runs_here_is_known_to_it(
    port: int, owner: str, tmp_path: Path
) -> None:
    environ = {"DETFLOW_DATA_DIR": str(tmp_path)}
    with locked(tmp_path) as (_, note):
        note(Running(pid=1, port=port - 1, ready=True))
        assert who(f"127.0.0.1:{port - 1}", environ) == f"Bearer {owner}"
        assert who(f"http://127.0.0.1:{port - 1}/", environ) == f"Bearer {owner}"
        assert who(f"127.0.0.1:{port - 1}", environ, token="") == NOBODY
    assert who(f"127.0.0.1:{port - 1}", environ) == NOBODY


def test_its_token_goes_nowhere_else(
    port: int, owner: str, listener: Listener, tmp_path: Path
) -> None:
    environ = {"DETFLOW_DATA_DIR": str(tmp_path)}
    with locked(tmp_path) as (_, note):
        note(Running(pid=1, port=9, ready=True))
        assert who(f"127.0.0.1:{port - 1}", environ) == NOBODY
        # The right gateway, but a service that is said to be elsewhere.
        elsewhere = {**environ, "DETFLOW_VERSION_ADDRESS": f"127.0.0.1:{port}"}
        assert who("127.0.0.1:9", elsewhere) == NOBODY
        note(Running(pid=1, port=port - 1, ready=True))
        # Its ports at another address of this machine may be another user's.
        assert who(f"localhost:{port - 1}", environ) == NOBODY
        there = {**environ, "DETFLOW_VERSION_ADDRESS": f"localhost:{port}"}
        assert who(f"127.0.0.1:{port - 1}", there) == NOBODY
    assert {*listener.seen} == {NOBODY}


def test_nothing_is_shown_before_the_stack_is_ready(
    port: int, owner: str, listener: Listener, tmp_path: Path
) -> None:
    with locked(tmp_path) as (_, note):
        note(Running(pid=1, port=port - 1, ready=False))
        assert who(f"127.0.0.1:{port - 1}", {"DETFLOW_DATA_DIR": str(tmp_path)}) == NOBODY


def test_token_does_not_go_over_a_network_unencrypted() -> None:
    with pytest.raises(InvalidArgument, match="DETFLOW_INSECURE=1") as caught:
        detflow.Client("gpu-server:7100", environ={}, token=TOKEN)
    assert TOKEN not in str(caught.value)
    # Nor to a service that is elsewhere, though the gateway is here.
    with pytest.raises(InvalidArgument, match="not sent to gpu-server:7101"):
        detflow.Client(
            environ={"DETFLOW_VERSION_ADDRESS": "gpu-server:7101", "DETFLOW_TOKEN": TOKEN}
        )
    detflow.Client("gpu-server:7100", environ={"DETFLOW_INSECURE": "1"}, token=TOKEN).close()
    detflow.Client("https://gpu-server:7100", environ={}, token=TOKEN).close()


@pytest.mark.parametrize("token", ["two words", "line\nline", "caf\u00e9-token"])
def test_what_cannot_be_a_token_is_refused_without_being_told(token: str) -> None:
    with pytest.raises(InvalidArgument, match="the token holds") as caught:
        detflow.Client(environ={}, token=token)
    assert token not in str(caught.value)


def test_token_file_that_is_none_is_named(tmp_path: Path) -> None:
    for file, words in ((tmp_path / "none", "No such file"), (tmp_path / "empty", "is empty")):
        (tmp_path / "empty").touch()
        with pytest.raises(InvalidArgument, match=words) as caught:
            detflow.Client(environ={"DETFLOW_TOKEN_FILE": str(file)})
        assert str(file) in str(caught.value)


def test_token_is_not_in_what_is_printed_or_pickled() -> None:
    with detflow.Client(environ={}, token=TOKEN) as client:
        assert TOKEN not in repr(client)
        assert TOKEN not in repr(vars(client))
        assert TOKEN not in repr(client.access)
        with pytest.raises(TypeError):
            pickle.dumps(client)


def test_refusal_says_what_to_set(owner: str, tmp_path: Path) -> None:
    def refuse(_request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you")
        raise AssertionError

    class Refusing(grpc.GenericRpcHandler):  # type: ignore[type-arg]
        def service(self, _details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Refusing()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0') - 1}"
    server.start()
    environ = {"DETFLOW_DATA_DIR": str(tmp_path)}
    with pytest.raises(Unauthenticated, match="set DETFLOW_TOKEN to an API key"):
        who(address, environ)
    with pytest.raises(Unauthenticated, match="does not take this token") as caught:
        who(address, environ, token=TOKEN)
    assert TOKEN not in str(caught.value)
    with locked(tmp_path) as (_, note):
        note(Running(pid=1, port=int(address.rpartition(":")[2]), ready=False))
        with pytest.raises(Unauthenticated, match="is still starting"):
            who(address, environ)
        # That another one runs here does not make its token one of this address.
        note(Running(pid=1, port=9, ready=True))
        with pytest.raises(Unauthenticated, match="set DETFLOW_TOKEN to an API key"):
            who(address, environ)
    server.stop(None)
