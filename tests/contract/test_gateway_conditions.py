"""Idempotency-Key, ETag, If-Match and If-None-Match through a real gateway."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from buf.validate import validate_pb2
from detflow import errors
from detflow.v1 import version_pb2, webhook_pb2
from gateway.conditions import MAX_KEY_LENGTH, takes_key
from gateway.routes import bindings
from tests.gateway_rig import Rig, details, failing, running

P = "/v1/projects/p"
V = f"{P}/versions/v"
VERSION = {"dataset": "projects/p/datasets/d"}


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def answer_with_etag(rig: Rig, etag: str) -> None:
    async def reply(_request: Any, _context: Any) -> Any:
        return version_pb2.Version(name=V[4:], etag=etag)

    for rpc in ("GetVersion", "UpdateVersion", "DeleteVersion"):
        rig.backend.replies[rpc] = reply


@pytest.mark.parametrize(
    ("key", "read"),
    [("8e03978e-40d5", "8e03978e-40d5"), ('"8e03 978e"', "8e03 978e"), ("x" * 64, "x" * 64)],
)
async def test_idempotency_key_is_the_request_id(rig: Rig, key: str, read: str) -> None:
    headers = {"idempotency-key": key}
    assert (await rig.http.post(f"{P}/versions", json=VERSION, headers=headers)).status_code == 200
    assert rig.backend.calls[-1][1].request_id == read
    upload = {"sizeBytes": "1", "requestId": read}  # the same said twice is no conflict
    assert (
        await rig.http.post(f"{P}/uploads:begin", json=upload, headers=headers)
    ).status_code == 200
    assert rig.backend.calls[-1][1].request_id == read


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (f"{P}/versions?requestId=other", "key"),
        (f"{P}/versions", ""),
        (f"{P}/versions", '"'),
        (f"{P}/versions", "two words"),
        (f"{P}/versions", "x" * 65),
        (f"{V}:undelete", "key"),
        (f"{P}/uploads", "key"),
    ],
)
async def test_key_that_cannot_be_honoured_is_refused(rig: Rig, path: str, key: str) -> None:
    arguments: dict[str, Any] = {"json": VERSION if path.startswith(f"{P}/versions?") else {}}
    headers = {"idempotency-key": key}
    if path == f"{P}/versions":
        arguments = {"json": VERSION}
    if path.endswith("/uploads"):
        arguments, headers = {"content": b"x"}, headers | {"content-type": "application/zip"}
    answer = await rig.http.post(path, headers=headers, **arguments)
    assert answer.status_code == 400
    violation = details(answer, "BadRequest")["fieldViolations"][0]
    assert (violation["field"], violation["reason"]) == ("Idempotency-Key", "BAD_HEADER")
    assert not rig.backend.calls


async def test_reads_do_not_mind_a_key(rig: Rig) -> None:
    answer = await rig.http.get(V, headers={"idempotency-key": "key", "if-match": '"1"'})
    assert answer.status_code == 200


def test_request_ids_take_what_a_key_may_be() -> None:
    creates = [one.rpc.input_type for one in bindings() if takes_key(one)]
    assert len(creates) >= 6
    for message in creates:
        options = message.fields_by_name["request_id"].GetOptions()
        assert options.Extensions[validate_pb2.field].string.max_len == MAX_KEY_LENGTH


async def test_resource_has_its_etag_and_is_not_sent_again(rig: Rig) -> None:
    answer_with_etag(rig, '"1f"')
    first = await rig.http.get(V)
    assert (first.headers["etag"], first.headers["cache-control"]) == ('"1f"', "private, no-cache")
    assert first.json()["etag"] == '"1f"'
    for known in ('"1f"', 'W/"1f"', '"0", "1f"', "*"):
        again = await rig.http.get(V, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", '"1f"')
        assert "content-type" not in again.headers
    assert (await rig.http.get(V, headers={"if-none-match": '"1"'})).status_code == 200
    changed = await rig.http.patch(V, json={"displayName": "a"}, headers={"if-none-match": '"1f"'})
    assert (changed.status_code, changed.headers["etag"]) == (200, '"1f"')
    assert changed.headers["cache-control"] == "no-store"


async def test_resource_whose_etag_is_no_header_has_none(rig: Rig) -> None:
    answer_with_etag(rig, '"1"\r\nset-cookie: x')
    answer = await rig.http.get(V)
    assert "etag" not in answer.headers and "set-cookie" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"


async def test_if_match_is_the_etag_of_the_request(rig: Rig) -> None:
    headers = {"if-match": '"1f"'}
    await rig.http.delete(V, headers=headers)
    assert rig.backend.calls[-1][1] == version_pb2.DeleteVersionRequest(name=V[4:], etag='"1f"')
    await rig.http.patch(V, json={"displayName": "a"}, headers=headers)
    request = rig.backend.calls[-1][1]
    assert (request.version.etag, list(request.update_mask.paths)) == ('"1f"', ["display_name"])
    await rig.http.patch(f"{P}/webhooks/w", json={"url": "https://a.example"}, headers=headers)
    changed: webhook_pb2.UpdateWebhookRequest = rig.backend.calls[-1][1]
    assert changed.webhook.etag == '"1f"'
    await rig.http.delete(V, headers={"if-match": "*"})
    deletion: version_pb2.DeleteVersionRequest = rig.backend.calls[-1][1]
    assert deletion.etag == ""


async def test_what_has_changed_is_412_by_if_match_and_409_by_the_field(rig: Rig) -> None:
    rig.backend.replies["DeleteVersion"] = failing(errors.Aborted("x", reason="ETAG_MISMATCH"))
    answer = await rig.http.delete(V, headers={"if-match": '"1"'})
    assert (answer.status_code, answer.json()["error"]["code"]) == (412, 412)
    assert answer.json()["error"]["status"] == "ABORTED"
    assert (await rig.http.delete(V, params={"etag": '"1"'})).status_code == 409
    rig.backend.replies["DeleteVersion"] = failing(errors.Aborted("x", reason="CONCURRENT_CHANGE"))
    assert (await rig.http.delete(V, headers={"if-match": '"1"'})).status_code == 409
    rig.backend.calls.clear()
    weak = await rig.http.delete(V, headers={"if-match": 'W/"1"'})
    assert (weak.status_code, rig.backend.calls) == (412, [])


@pytest.mark.parametrize(
    ("path", "condition"),
    [
        (f"{V}?etag=%222%22", '"1"'),
        (V, "1"),
        (V, '"1", "2"'),
        (f"{P}/webhooks/w", '"1"'),
        (f"{P}/datasets/d", '"1"'),
    ],
)
async def test_condition_that_cannot_be_checked_is_refused(
    rig: Rig, path: str, condition: str
) -> None:
    answer = await rig.http.delete(path, headers={"if-match": condition})
    assert answer.status_code == 400
    assert details(answer, "BadRequest")["fieldViolations"][0]["field"] == "If-Match"
    assert not rig.backend.calls


async def test_the_document_names_the_headers(rig: Rig) -> None:
    paths = (await rig.http.get("/openapi.json")).json()["paths"]

    def headers(path: str, method: str) -> set[str]:
        return {one["name"] for one in paths[path][method]["parameters"] if one["in"] == "header"}

    version = "/v1/projects/{project}/versions/{version}"
    assert headers("/v1/projects/{project}/versions", "post") == {"Idempotency-Key"}
    assert headers(version, "get") == {"If-None-Match"}
    assert headers(version, "patch") == headers(version, "delete") == {"If-Match"}
    assert headers(f"{version}:undelete", "post") == set()
    assert "ETag" in paths[version]["get"]["responses"]["200"]["headers"]
    assert {"304"} <= paths[version]["get"]["responses"].keys()
    assert {"412"} <= paths[version]["delete"]["responses"].keys()
