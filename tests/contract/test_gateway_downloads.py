"""Exported files through a real gateway: whole, named, held back, broken off."""

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from google.api import httpbody_pb2

from detflow import errors
from detflow.v1 import common_pb2, dataset_pb2, export_pb2, version_pb2
from gateway import download
from tests.gateway_rig import Rig, details, running

PATH = "/v1/projects/p/versions/v/trainings/t/exports/e:download"
IMAGE = "/v1/projects/p/versions/v/trainings/t/inferenceResults/val-7:image"
REPORT = "/v1/projects/p/versions/v/trainings/t:report"
MIB = 1 << 20
CHUNKS = [bytes([number]) * (MIB // 4) for number in range(40)]
CONTENT = b"".join(CHUNKS)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as one:
        yield one


def offer(rig: Rig, *, size_bytes: int = len(CONTENT), name: str = "cells-yolov8n.onnx") -> None:
    """Makes GetExport describe a file."""

    async def reply(request: Any, _context: Any) -> Any:
        stored = common_pb2.StoredObject(key="k", size_bytes=size_bytes, sha256="0" * 64)
        return export_pb2.Export(name=request.name, file_name=name, object=stored)

    rig.backend.replies["GetExport"] = reply


def body(data: bytes, kind: str = "application/octet-stream") -> httpbody_pb2.HttpBody:
    return httpbody_pb2.HttpBody(content_type=kind, data=data)


async def whole(_request: Any, _context: Any) -> AsyncIterator[Any]:
    for chunk in CHUNKS:
        yield body(chunk)


async def test_file_arrives_whole_with_its_name_type_and_size(rig: Rig) -> None:
    offer(rig)
    rig.backend.replies["DownloadExport"] = whole
    answer = await rig.http.get(PATH, headers={"x-request-id": "r1"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["etag"] == f'"{"0" * 64}"'
    assert answer.headers["cache-control"] == "private, no-cache"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"cells-yolov8n.onnx\"; filename*=UTF-8''cells-yolov8n.onnx"
    )
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(CONTENT).digest()
    assert [(name, metadata["x-request-id"]) for name, _, metadata in rig.backend.calls] == [
        ("DownloadExport", "r1"),
        ("GetExport", "r1"),
    ]
    assert rig.backend.calls[1][1].name == PATH.removeprefix("/v1/").removesuffix(":download")


async def test_a_file_made_while_it_is_sent_is_named_after_its_resource(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for chunk in CHUNKS:
            yield body(chunk, "application/zip")

    async def dataset(request: Any, _context: Any) -> Any:
        return dataset_pb2.Dataset(name=request.name, display_name="세포")

    rig.backend.replies["GetDataset"] = dataset
    rig.backend.replies["DownloadDataset"] = reply
    path = "/v1/projects/p/datasets/d:download?format=DATASET_FORMAT_COCO"
    answer = await rig.http.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/zip"
    assert "content-length" not in answer.headers
    assert answer.headers["content-disposition"].endswith("UTF-8''%EC%84%B8%ED%8F%AC.zip")
    assert answer.content == CONTENT
    assert rig.backend.calls[0][1].format == dataset_pb2.DATASET_FORMAT_COCO


async def test_a_replay_is_named_after_its_version(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield body(b"{}", "application/json")

    async def version(request: Any, _context: Any) -> Any:
        return version_pb2.Version(name=request.name, display_name="V_0")

    rig.backend.replies["GetVersion"] = version
    rig.backend.replies["DownloadReplay"] = reply
    answer = await rig.http.get("/v1/projects/p/versions/v:replay")
    assert answer.headers["content-type"] == "application/json"
    assert 'filename="V_0.json"' in answer.headers["content-disposition"]
    assert [name for name, _, _ in rig.backend.calls] == ["DownloadReplay", "GetVersion"]
    assert rig.backend.calls[1][1].name == "projects/p/versions/v"


def show(rig: Rig, rpc: str, kind: str, chunks: list[bytes], **info: Any) -> None:
    """Makes an RPC send a file that it says all about itself."""

    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        for number, chunk in enumerate(chunks):
            one = body(chunk, "" if number else kind)
            if not number:
                one.extensions.add().Pack(common_pb2.FileInfo(**info))
            yield one

    rig.backend.replies[rpc] = reply


async def test_file_that_says_what_it_is_is_shown_in_a_sandbox(rig: Rig) -> None:
    info = {"file_name": "val-7.jpg", "size_bytes": len(CONTENT), "etag": "abc-1"}
    show(rig, "GetInferenceImage", "image/jpeg", CHUNKS, **info, inline=True)
    answer = await rig.http.get(f"{IMAGE}?maxSidePx=64")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["content-length"] == str(len(CONTENT))
    assert answer.headers["etag"] == '"abc-1"'
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["content-disposition"] == (
        "inline; filename=\"val-7.jpg\"; filename*=UTF-8''val-7.jpg"
    )
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"].split("; ")
    assert "sandbox" in policy and "default-src 'none'" in policy
    assert not any(one.startswith("script-src") for one in policy)
    assert answer.content == CONTENT
    assert [(name, request.max_side_px) for name, request, _ in rig.backend.calls] == [
        ("GetInferenceImage", 64)
    ]


@pytest.mark.parametrize("known", ['"abc"', 'W/"abc"', '"x", "abc"', "*"])
async def test_file_the_client_has_is_not_sent_again(rig: Rig, known: str) -> None:
    info = {"file_name": "a.jpg", "size_bytes": len(CONTENT), "etag": "abc", "inline": True}
    show(rig, "GetInferenceImage", "image/jpeg", CHUNKS, **info)
    first = await rig.http.get(IMAGE, headers={"if-none-match": '"ab"'})
    assert first.status_code == 200
    again = await rig.http.get(IMAGE, headers={"if-none-match": known})
    assert again.status_code == 304
    assert again.content == b""
    for name in ("etag", "cache-control", "content-security-policy", "content-disposition"):
        assert again.headers[name] == first.headers[name]


@pytest.mark.parametrize(
    ("kind", "inline", "shown", "sent"),
    [
        ("text/html", True, True, "text/html; charset=utf-8"),
        ("text/html; charset=utf-8", True, True, "text/html; charset=utf-8"),
        ("text/html", False, False, "text/html; charset=utf-8"),
        ("image/svg+xml", True, True, "image/svg+xml"),
        ("text/csv", True, False, "text/csv; charset=utf-8"),
        ("application/zip", True, False, "application/zip"),
        ("text/javascript", True, False, "text/javascript; charset=utf-8"),
    ],
)
async def test_only_pictures_and_pages_meant_to_be_are_shown(
    rig: Rig, kind: str, inline: bool, shown: bool, sent: str
) -> None:
    show(rig, "DownloadReport", kind, [b"<p>"], file_name="보고서", inline=inline)
    answer = await rig.http.get(REPORT)
    assert answer.headers["content-type"] == sent
    assert answer.headers["content-disposition"].startswith("inline; " if shown else "attachment; ")
    assert ("sandbox" in answer.headers["content-security-policy"]) is shown
    assert "content-length" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    assert answer.content == b"<p>"


async def test_etag_cannot_leave_its_header(rig: Rig) -> None:
    show(rig, "DownloadReport", "text/html", [b"x"], etag='a"\r\nset-cookie: x', file_name="a")
    answer = await rig.http.get(REPORT)
    assert "etag" not in answer.headers and "set-cookie" not in answer.headers


async def test_file_of_nothing_that_says_nothing_is_a_download(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield body(b"a,b", "text/csv")

    rig.backend.replies["DownloadReport"] = reply
    answer = await rig.http.get(REPORT)
    assert 'attachment; filename="download"' in answer.headers["content-disposition"]
    assert [name for name, _, _ in rig.backend.calls] == ["DownloadReport"]


async def test_the_document_says_what_files_can_be(rig: Rig) -> None:
    paths = (await rig.http.get("/openapi.json")).json()["paths"]
    training = "/v1/projects/{project}/versions/{version}/trainings/{training}"

    def kinds(path: str) -> set[str]:
        return set(paths[path]["get"]["responses"]["200"]["content"])

    image = f"{training}/inferenceResults/{{inferenceResult}}:image"
    assert kinds(image) == {"image/jpeg", "image/png"}
    assert kinds(f"{training}:report") == {"text/html", "application/zip"}
    assert kinds(f"{training}:table") == {"text/csv", "application/json"}
    assert "304" in paths[image]["get"]["responses"]
    assert "application/zip" in kinds(f"{training}/exports/{{export}}:download")
    for path in (image, f"{training}/exports/{{export}}:download"):
        assert {"206", "304", "416"} <= paths[path]["get"]["responses"].keys()
    assert (
        "206" not in paths["/v1/projects/{project}/versions/{version}:replay"]["get"]["responses"]
    )


@pytest.mark.parametrize(
    ("name", "plain", "encoded"),
    [
        ("첫 모델.onnx", "_ __.onnx", "%EC%B2%AB%20%EB%AA%A8%EB%8D%B8.onnx"),
        ('a"b;c.zip', "a_b_c.zip", "a%22b%3Bc.zip"),
        ("../../etc/passwd", "_.._etc_passwd", "_.._etc_passwd"),
        ("a\r\nset-cookie: x", "a__set-cookie_ x", "a__set-cookie%3A%20x"),
        ("", "download", "download"),
    ],
)
def test_file_name_can_neither_leave_its_folder_nor_its_header(
    name: str, plain: str, encoded: str
) -> None:
    value = download.disposition(name)
    assert value == f"attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}"
    assert re.fullmatch(r"[\x20-\x7e]+", value)


async def test_odd_media_type_is_plain_bytes(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield body(b"x", "text/html; charset=utf-8\r\nset-cookie: a")

    offer(rig, size_bytes=1)
    rig.backend.replies["DownloadExport"] = reply
    answer = await rig.http.get(PATH)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "set-cookie" not in answer.headers


async def test_file_of_unknown_size_is_sent_in_chunks(rig: Rig) -> None:
    rig.backend.replies["DownloadExport"] = whole
    answer = await rig.http.get(PATH)
    assert answer.headers["transfer-encoding"] == "chunked"
    assert answer.content == CONTENT


SIZE = len(CONTENT)
EXPORT_ETAG = f'"{"0" * 64}"'


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=1000000-3000000", 1000000, 3000001),
        (f"bytes={MIB // 4}-{MIB // 2 - 1}", MIB // 4, MIB // 2),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=300000-", 300000, SIZE),
        ("bytes=-300000", SIZE - 300000, SIZE),
        (f"Bytes= 5-{SIZE * 2}", 5, SIZE),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
    ],
)
async def test_part_of_a_file(rig: Rig, asked: str, start: int, end: int) -> None:
    offer(rig)
    rig.backend.replies["DownloadExport"] = whole
    for headers in ({"range": asked}, {"range": asked, "if-range": EXPORT_ETAG}):
        answer = await rig.http.get(PATH, headers=headers)
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert answer.headers["content-length"] == str(end - start)
        assert answer.headers["etag"] == EXPORT_ETAG
        assert answer.content == CONTENT[start:end]


@pytest.mark.parametrize(
    "headers",
    [
        {"range": "bytes=0-1,4-5"},
        {"range": "bytes=5-4"},
        {"range": "bytes=a-b"},
        {"range": "lines=1-2"},
        {"range": "bytes=-"},
        {"range": "bytes=1-2", "if-range": '"other"'},
        {"range": "bytes=1-2", "if-range": f"W/{EXPORT_ETAG}"},
        {"range": "bytes=1-2", "if-range": "Wed, 21 Oct 2015 07:28:00 GMT"},
    ],
)
async def test_range_that_is_none_or_of_another_file_gives_the_whole(
    rig: Rig, headers: dict[str, str]
) -> None:
    offer(rig)
    rig.backend.replies["DownloadExport"] = whole
    answer = await rig.http.get(PATH, headers=headers)
    assert (answer.status_code, len(answer.content)) == (200, SIZE)
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"])
async def test_bytes_that_a_file_does_not_have_are_416(rig: Rig, asked: str) -> None:
    offer(rig)
    rig.backend.replies["DownloadExport"] = whole
    answer = await rig.http.get(PATH, headers={"range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert details(answer, "ErrorInfo")["reason"] == "RANGE_NOT_SATISFIABLE"


async def test_file_without_size_or_hash_has_no_parts(rig: Rig) -> None:
    rig.backend.replies["DownloadExport"] = whole
    answer = await rig.http.get(PATH, headers={"range": "bytes=0-1"})
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert "accept-ranges" not in answer.headers


async def test_part_of_a_picture_and_what_fails_before_it_begins(rig: Rig) -> None:
    show(rig, "GetInferenceImage", "image/png", [b"abc", b"def"], etag="e", size_bytes=6)
    answer = await rig.http.get(IMAGE, headers={"range": "bytes=2-3"})
    assert (answer.status_code, answer.content) == (206, b"cd")
    offer(rig)
    rig.backend.replies["DownloadExport"] = damaged
    refused = await rig.http.get(PATH, headers={"range": f"bytes={SIZE - 5}-"})
    assert (refused.status_code, refused.json()["error"]["status"]) == (500, "DATA_LOSS")
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await rig.http.get(PATH, headers={"range": "bytes=7-"})


async def test_head_says_what_a_get_would_without_a_body(rig: Rig) -> None:
    offer(rig)
    rig.backend.replies["DownloadExport"] = whole
    head, get = await rig.http.head(PATH), await rig.http.get(PATH)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "etag", "content-type", "content-disposition"):
        assert head.headers[name] == get.headers[name]
    project = await rig.http.head("/v1/projects/p")
    assert (project.status_code, project.content) == (200, b"")
    assert int(project.headers["content-length"]) > 0
    known = await rig.http.head(PATH, headers={"if-none-match": EXPORT_ETAG})
    assert known.status_code == 304
    stream = await rig.http.head("/v1/projects/p/versions/v/trainings/t:watch")
    assert (stream.status_code, stream.headers["allow"]) == (405, "GET")
    assert (await rig.http.put("/v1/projects/p")).headers["allow"] == "GET, HEAD, PATCH"


async def test_what_fails_at_once_is_an_ordinary_error(rig: Rig) -> None:
    async def reply(_request: Any, _context: Any) -> AsyncIterator[Any]:
        raise errors.FailedPrecondition("is RUNNING; wait", reason="EXPORT_NOT_READY")
        yield

    offer(rig)
    rig.backend.replies["DownloadExport"] = reply
    answer = await rig.http.get(PATH)
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/json"
    assert details(answer, "ErrorInfo")["reason"] == "EXPORT_NOT_READY"
    assert "content-disposition" not in answer.headers


async def damaged(_request: Any, _context: Any) -> AsyncIterator[Any]:
    for chunk in CHUNKS[:20]:
        yield body(chunk)
    raise errors.DataLoss("its hash is another")


async def short(_request: Any, _context: Any) -> AsyncIterator[Any]:
    for chunk in CHUNKS[:20]:
        yield body(chunk)


@pytest.mark.parametrize(
    ("reply", "known"),
    [(damaged, True), (damaged, False), (short, True)],
    ids=["error", "error, size unknown", "too short"],
)
async def test_failure_half_way_breaks_the_connection_off(
    rig: Rig, reply: Any, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if known:
        offer(rig)
    rig.backend.replies["DownloadExport"] = reply
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await rig.http.get(PATH)
    errors_of_server = [
        one
        for one in caplog.records
        if one.name.startswith("uvicorn") and one.levelno >= logging.WARNING
    ]
    assert not errors_of_server
    assert (await rig.http.get("/healthz")).status_code == 200
    figures = (await rig.http.get("/metrics")).text
    assert re.search(r'requests_total\{code="500",method="GET",route="DownloadExport"\}', figures)


async def begin(rig: Rig) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port, limit=1 << 16)
    writer.write(f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return reader, writer


async def test_client_that_does_not_read_stops_the_service_and_one_that_leaves_ends_it(
    rig: Rig,
) -> None:
    blocked, ended, sent = asyncio.Event(), asyncio.Event(), 0

    async def flood(_request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal sent
        try:
            while True:
                write = asyncio.ensure_future(context.write(body(bytes(MIB))))
                done, _ = await asyncio.wait({write}, timeout=1)
                if not done:
                    blocked.set()
                await write
                sent += 1
        finally:  # cancelled, or its write failed: whichever of the two gRPC comes to first
            ended.set()
        yield

    offer(rig, size_bytes=1 << 40)
    rig.backend.replies["DownloadExport"] = flood
    reader, writer = await begin(rig)
    async with asyncio.timeout(30):
        await blocked.wait()
    assert sent < 32  # what sockets and flow-control windows hold
    assert not ended.is_set()
    writer.transport.abort()
    async with asyncio.timeout(5):
        await ended.wait()
    del reader


async def test_client_that_leaves_while_the_service_is_silent_ends_the_call(rig: Rig) -> None:
    async def silent(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield body(b"x")
        await asyncio.Event().wait()

    offer(rig)
    rig.backend.replies["DownloadExport"] = silent
    reader, writer = await begin(rig)
    await reader.readuntil(b"\r\n\r\nx")
    writer.close()
    async with asyncio.timeout(5):
        await rig.backend.cancelled.wait()


async def test_service_that_stalls_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "IDLE_SECONDS", 0.1)

    async def silent(_request: Any, _context: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    rig.backend.replies["DownloadExport"] = silent
    answer = await rig.http.get(PATH)
    assert answer.status_code == 504
    assert details(answer, "ErrorInfo")["reason"] == "DOWNLOAD_STALLED"
    await rig.backend.cancelled.wait()
