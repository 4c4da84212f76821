"""Which answers are packed with gzip, and which never are."""

import gzip
from collections.abc import AsyncIterator
from typing import Any

import pytest

from detflow import errors
from detflow.v1 import dataset_pb2, version_pb2, webhook_pb2
from gateway import compression
from tests.gateway_rig import Rig, failing, running

DATASET = "/v1/projects/p/datasets/d"


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def answer_with(rig: Rig, rpc: str, message: Any) -> None:
    async def reply(_request: Any, _context: Any) -> Any:
        return message

    rig.backend.replies[rpc] = reply


async def fetch(rig: Rig, path: str, accepts: str) -> tuple[Any, bytes]:
    """Returns headers and the body as it was sent (httpx would unpack it)."""
    async with rig.http.stream("GET", path, headers={"accept-encoding": accepts}) as answer:
        return answer.headers, b"".join([piece async for piece in answer.aiter_raw()])


@pytest.mark.parametrize("num_classes", [100, 20000])
async def test_large_json_is_packed_for_those_who_take_it(rig: Rig, num_classes: int) -> None:
    names = [f"클래스 {number}" for number in range(num_classes)]
    answer_with(rig, "GetDataset", dataset_pb2.Dataset(class_names=names))
    headers, packed = await fetch(rig, DATASET, "br, gzip;q=0.5")
    assert (headers["content-encoding"], headers["vary"]) == ("gzip", "accept-encoding")
    assert int(headers["content-length"]) == len(packed)
    for accepts in ("identity", "gzip;q=0", "gzip; q=0.000", "gzipped"):
        headers, plain = await fetch(rig, DATASET, accepts)
        assert "content-encoding" not in headers
        assert headers["vary"] == "accept-encoding"
        assert plain == gzip.decompress(packed)
    assert len(packed) < len(plain) / 2


async def test_what_is_small_or_has_an_etag_is_sent_as_it_is(rig: Rig) -> None:
    headers, _ = await fetch(rig, DATASET, "gzip")
    assert "content-encoding" not in headers
    version = version_pb2.Version(etag='"1"', class_names=["x" * compression.MIN_BYTES])
    answer_with(rig, "GetVersion", version)
    headers, _ = await fetch(rig, "/v1/projects/p/versions/v", "gzip")
    assert headers["etag"] == '"1"' and "content-encoding" not in headers


async def test_secrets_and_errors_are_never_packed(rig: Rig) -> None:
    secret = webhook_pb2.Webhook(secret="whsec_" + "x" * compression.MIN_BYTES)
    answer_with(rig, "CreateWebhook", secret)
    accepts = {"accept-encoding": "gzip"}
    created = await rig.http.post(
        "/v1/projects/p/webhooks", json={"url": "https://a.example"}, headers=accepts
    )
    assert created.status_code == 200 and "content-encoding" not in created.headers
    rig.backend.replies["GetDataset"] = failing(errors.NotFound("x" * compression.MIN_BYTES))
    refused = await rig.http.get(DATASET, headers=accepts)
    assert refused.status_code == 404 and "content-encoding" not in refused.headers
