"""Archives and weights through a real gateway: streamed, bounded, broken off, refused early."""

import asyncio
import dataclasses
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from detflow import errors
from detflow.settings import Settings
from detflow.v1 import dataset_pb2, prediction_pb2, weights_pb2
from gateway import upload
from tests.gateway_rig import Rig, details, running

PATH = "/v1/projects/p/uploads"
WEIGHTS = "/v1/projects/p/weights"
PREDICT = "/v1/projects/p/versions/v/trainings/t:predict"
BYTES = {"content-type": "application/octet-stream"}
ZIP = {"content-type": "application/zip"}
MIB = 1 << 20


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(Settings(max_upload_bytes=100 * MIB)) as one:
        yield one


async def blocks(count: int, size: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) * size


async def test_archive_arrives_whole_in_chunks_of_at_most_one_mebibyte(rig: Rig) -> None:
    sizes: list[int] = []
    parents: list[str] = []

    async def receive(requests: Any, _context: Any) -> Any:
        digest = hashlib.sha256()
        async for one in requests:
            if one.WhichOneof("part") == "parent":
                parents.append(one.parent)
            else:
                sizes.append(len(one.chunk))
                digest.update(one.chunk)
        return dataset_pb2.Upload(
            name="projects/p/uploads/u", size_bytes=sum(sizes), sha256=digest.hexdigest()
        )

    rig.backend.replies["UploadArchive"] = receive
    expected = hashlib.sha256()
    async for block in blocks(333, 12345):
        expected.update(block)
    answer = await rig.http.post(PATH, content=blocks(333, 12345), headers=ZIP)
    assert answer.status_code == 200
    assert answer.json()["sha256"] == expected.hexdigest()
    assert answer.json()["sizeBytes"] == str(333 * 12345)
    assert parents == ["projects/p"]
    assert max(sizes) == MIB


async def test_empty_archive_is_the_services_to_judge(rig: Rig) -> None:
    answer = await rig.http.post(PATH, content=b"", headers=ZIP)
    assert answer.json()["sizeBytes"] == "0"


async def test_wrong_type_is_415_and_too_large_is_413(rig: Rig) -> None:
    for kind in ("application/json", "multipart/form-data; boundary=x", "text/plain"):
        answer = await rig.http.post(PATH, content=b"PK", headers={"content-type": kind})
        assert answer.status_code == 415
    declared = await rig.http.post(PATH, content=b"x" * (100 * MIB + 1), headers=ZIP)
    assert details(declared, "ErrorInfo")["reason"] == "ARCHIVE_LIMIT"
    assert not rig.backend.calls
    real = await rig.http.post(PATH, content=blocks(101, MIB), headers=ZIP)
    assert real.status_code == 413


async def test_weights_are_named_by_the_query_and_arrive_whole(rig: Rig) -> None:
    first: list[Any] = []

    async def receive(requests: Any, _context: Any) -> Any:
        digest, num_bytes = hashlib.sha256(), 0
        async for one in requests:
            digest.update(one.chunk)
            num_bytes += len(one.chunk)
            if one.HasField("header"):
                first.append(one.header)
            elif one.HasField("size_bytes"):
                assert one.size_bytes == num_bytes
        return weights_pb2.Weights(sha256=digest.hexdigest(), size_bytes=num_bytes)

    rig.backend.replies["UploadWeights"] = receive
    content = bytes(range(256)) * 8192
    answer = await rig.http.post(
        WEIGHTS, params={"displayName": "첫 가중치.pt"}, content=content, headers=BYTES
    )
    assert answer.json()["sha256"] == hashlib.sha256(content).hexdigest()
    assert first == [
        weights_pb2.UploadWeightsHeader(parent="projects/p", display_name="첫 가중치.pt")
    ]
    await rig.http.post(WEIGHTS, params={"display_name": "b"}, content=b"", headers=BYTES)
    assert first[1].display_name == "b"


async def test_weights_have_the_limits_of_archives(rig: Rig) -> None:
    json_body = await rig.http.post(WEIGHTS, json={"displayName": "a"})
    assert json_body.status_code == 415
    assert "send the weights file itself" in json_body.text
    large = await rig.http.post(WEIGHTS, content=b"x" * (100 * MIB + 1), headers=BYTES)
    assert (large.status_code, details(large, "ErrorInfo")["reason"]) == (413, "WEIGHTS_LIMIT")
    long_name = await rig.http.post(
        WEIGHTS, params={"displayName": "x" * 64}, content=b"PK", headers=BYTES
    )
    assert long_name.status_code == 400


async def test_weights_above_their_own_limit_are_413_whatever_the_settings_allow(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = upload.KINDS["UploadWeights"]
    assert kind.max_bytes == 2 << 30
    monkeypatch.setitem(upload.KINDS, "UploadWeights", dataclasses.replace(kind, max_bytes=MIB))
    for content in (b"x" * (MIB + 1), blocks(2, MIB)):
        answer = await rig.http.post(WEIGHTS, content=content, headers=BYTES)
        assert answer.status_code == 413
        assert details(answer, "ErrorInfo")["reason"] == "WEIGHTS_LIMIT"
        assert "DETFLOW_MAX_UPLOAD_BYTES" not in answer.text


async def test_image_is_predicted_as_the_query_says(rig: Rig) -> None:
    first: list[Any] = []

    async def receive(requests: Any, _context: Any) -> Any:
        num_bytes = 0
        async for one in requests:
            num_bytes += len(one.chunk)
            if one.HasField("header"):
                first.append(one.header)
        return prediction_pb2.Prediction(file_name=first[0].file_name, width_px=num_bytes)

    rig.backend.replies["PredictImage"] = receive
    for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream"):
        answer = await rig.http.post(
            PREDICT,
            params={"confidenceThreshold": "0", "nmsIou": "0.5", "fileName": "가.jpg"},
            content=b"x" * (MIB + 1),
            headers={"content-type": kind},
        )
        assert (answer.json()["fileName"], answer.json()["widthPx"]) == ("가.jpg", MIB + 1)
    header = first[0]
    assert header.training == "projects/p/versions/v/trainings/t"
    assert header.HasField("confidence_threshold") and header.confidence_threshold == 0
    assert header.nms_iou == 0.5 and header.file_name == "가.jpg"
    text = await rig.http.post(PREDICT, content=b"x", headers={"content-type": "image/svg+xml"})
    assert text.status_code == 415 and "send the image itself" in text.text


async def test_image_that_is_too_large_is_413_whoever_finds_it_so(rig: Rig) -> None:
    large = await rig.http.post(PREDICT, content=blocks(65, MIB), headers=BYTES)
    assert (large.status_code, details(large, "ErrorInfo")["reason"]) == (413, "IMAGE_LIMIT")

    async def refuse(requests: Any, _context: Any) -> Any:
        raise errors.ResourceExhausted("40000x40000 pixels", reason="IMAGE_TOO_LARGE")

    rig.backend.replies["PredictImage"] = refuse
    wide = await rig.http.post(PREDICT, content=b"BM", headers=BYTES)
    assert (wide.status_code, details(wide, "ErrorInfo")["reason"]) == (413, "IMAGE_TOO_LARGE")


async def test_prediction_ends_when_nobody_waits_for_it(rig: Rig) -> None:
    arrived = asyncio.Event()

    async def receive(requests: Any, _context: Any) -> Any:
        async for _ in requests:
            pass
        arrived.set()
        await asyncio.Event().wait()

    rig.backend.replies["PredictImage"] = receive
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(
        f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        "Content-Length: 2\r\n\r\nBM".encode()
    )
    async with asyncio.timeout(10):
        await arrived.wait()
        writer.close()
        await rig.backend.cancelled.wait()


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (PATH, "displayName"),
        (PATH, "chunk"),
        (PATH, "sizeBytes"),
        (WEIGHTS, "chunk"),
        (WEIGHTS, "parent"),
        (WEIGHTS, "header.displayName"),
        (PREDICT, "training"),
    ],
)
async def test_uploads_take_no_other_query(rig: Rig, path: str, key: str) -> None:
    answer = await rig.http.post(path, params={key: "1"}, content=b"PK", headers=BYTES)
    assert details(answer, "ErrorInfo")["reason"] == "BAD_QUERY"
    assert not rig.backend.calls


async def test_early_refusal_of_the_service_is_the_answer(rig: Rig) -> None:
    reason = "STORE_FULL"

    async def refuse(requests: Any, _context: Any) -> Any:
        async for one in requests:
            if one.chunk:
                raise errors.ResourceExhausted("the store is full", reason=reason)

    rig.backend.replies["UploadArchive"] = refuse
    answer = await rig.http.post(PATH, content=blocks(50, MIB), headers=ZIP)
    assert answer.status_code == 429
    assert details(answer, "ErrorInfo")["reason"] == "STORE_FULL"
    reason = "ARCHIVE_LIMIT"
    answer = await rig.http.post(PATH, content=blocks(50, MIB), headers=ZIP)
    assert answer.status_code == 413
    assert details(answer, "ErrorInfo")["reason"] == "ARCHIVE_LIMIT"
    missing = await rig.http.post("/v1/projects/UPPER/uploads", content=b"PK", headers=ZIP)
    assert missing.status_code == 400


async def swallow(requests: Any, _context: Any) -> Any:
    """Reads all there is and never answers: a cancel may look like an end at first."""
    async for _ in requests:
        pass
    await asyncio.Event().wait()


async def begin_upload(rig: Rig) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\n"
        f"Content-Length: {64 * MIB}\r\n\r\n".encode()
    )
    return writer


async def test_abort_of_the_client_cancels_the_rpc(rig: Rig) -> None:
    arrived = asyncio.Event()

    async def receive(requests: Any, _context: Any) -> Any:
        async for one in requests:
            if one.chunk:
                arrived.set()
        await asyncio.Event().wait()

    rig.backend.replies["UploadArchive"] = receive
    writer = await begin_upload(rig)
    writer.write(b"x" * (2 * MIB))
    await arrived.wait()
    writer.close()
    async with asyncio.timeout(5):
        await rig.backend.cancelled.wait()


async def test_a_service_that_does_not_read_stops_the_client(rig: Rig) -> None:
    release = asyncio.Event()

    async def stuck(requests: Any, _context: Any) -> Any:
        await release.wait()
        return dataset_pb2.Upload(size_bytes=sum([len(one.chunk) async for one in requests]))

    rig.backend.replies["UploadArchive"] = stuck
    writer = await begin_upload(rig)
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 64 * MIB:
            writer.write(b"x" * MIB)
            sent += MIB
            async with asyncio.timeout(1):
                await writer.drain()
    assert sent < 40 * MIB
    release.set()
    writer.close()


async def test_a_client_that_stalls_is_sent_away(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "IDLE_SECONDS", 0.1)
    rig.backend.replies["UploadArchive"] = swallow
    code, body = await rig.raw(
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/zip\r\n"
        "Content-Length: 100\r\n\r\nPK".encode()
    )
    assert code == 408
    assert b"BODY_TIMEOUT" in body
    async with asyncio.timeout(5):
        await rig.backend.cancelled.wait()


async def test_a_json_body_that_stalls_is_sent_away(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.body.SECONDS", 0.1)
    code, body = await rig.raw(
        b"POST /v1/projects?projectId=abc HTTP/1.1\r\nHost: localhost\r\n"
        b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"dis'
    )
    assert code == 408
    assert b"BODY_TIMEOUT" in body
    assert not rig.backend.calls


PART = "/v1/projects/p/uploads/u"
UPLOAD = dataset_pb2.Upload


def at(offset: int) -> dict[str, str]:
    """The headers of a part."""
    return BYTES | {"upload-offset": str(offset)}


async def test_part_says_where_it_belongs_and_hears_how_far_the_upload_is(rig: Rig) -> None:
    starts: list[Any] = []

    async def write(requests: Any, _context: Any) -> Any:
        num_bytes = 0
        async for one in requests:
            if one.HasField("start"):
                starts.append(one.start)
            num_bytes += len(one.chunk)
        committed = starts[-1].offset + num_bytes
        state = UPLOAD.RECEIVED if committed == 5 * MIB else UPLOAD.RECEIVING
        return UPLOAD(name="projects/p/uploads/u", committed_bytes=committed, state=state)

    rig.backend.replies["WriteUpload"] = write
    first = await rig.http.patch(PART, content=blocks(3, MIB), headers=at(0))
    assert first.json()["committedBytes"] == str(3 * MIB)
    assert first.headers["upload-offset"] == str(3 * MIB)
    assert first.headers["upload-complete"] == "?0"
    last = await rig.http.patch(PART, content=blocks(2, MIB), headers=at(3 * MIB))
    assert (last.headers["upload-offset"], last.headers["upload-complete"]) == (f"{5 * MIB}", "?1")
    assert [(one.name, one.offset) for one in starts] == [
        ("projects/p/uploads/u", 0),
        ("projects/p/uploads/u", 3 * MIB),
    ]

    async def get(request: Any, _context: Any) -> Any:
        return UPLOAD(name=request.name, committed_bytes=7)

    rig.backend.replies["GetUpload"] = get
    assert (await rig.http.get(PART)).headers["upload-offset"] == "7"


async def test_part_without_its_place_and_query_is_refused(rig: Rig) -> None:
    for text in (None, "", "-1", "1.5", "x", "1" * 19):
        headers = BYTES if text is None else BYTES | {"upload-offset": text}
        answer = await rig.http.patch(PART, content=b"x", headers=headers)
        assert (answer.status_code, details(answer, "ErrorInfo")["reason"]) == (400, "BAD_OFFSET")
    answer = await rig.http.patch(PART, params={"offset": 1}, content=b"x", headers=at(0))
    assert details(answer, "ErrorInfo")["reason"] == "BAD_QUERY"
    assert not rig.backend.calls


async def test_wrong_place_is_409_with_the_right_one(rig: Rig) -> None:
    async def refuse(requests: Any, _context: Any) -> Any:
        async for _ in requests:
            raise errors.FailedPrecondition(
                "go on at 7", reason="WRONG_OFFSET", metadata={"committed_bytes": "7"}
            )

    rig.backend.replies["WriteUpload"] = refuse
    answer = await rig.http.patch(PART, content=blocks(20, MIB), headers=at(0))
    assert (answer.status_code, answer.headers["upload-offset"]) == (409, "7")
    assert answer.json()["error"]["status"] == "FAILED_PRECONDITION"


async def test_what_came_before_the_client_went_away_reaches_the_service(rig: Rig) -> None:
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def write(requests: Any, _context: Any) -> Any:
        ended.set_result(sum([len(one.chunk) async for one in requests]))
        return UPLOAD()

    rig.backend.replies["WriteUpload"] = write
    _, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(
        f"PATCH {PART} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        f"Upload-Offset: 0\r\nContent-Length: {64 * MIB}\r\n\r\n".encode()
    )
    writer.write(b"x" * (3 * MIB + 17))
    await writer.drain()
    writer.close()
    async with asyncio.timeout(5):
        assert await ended == 3 * MIB + 17
    assert not rig.backend.cancelled.is_set()


async def test_part_of_a_client_that_stalls_is_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "IDLE_SECONDS", 0.1)
    kept: list[int] = []

    async def write(requests: Any, _context: Any) -> Any:
        kept.append(sum([len(one.chunk) async for one in requests]))
        return UPLOAD()

    rig.backend.replies["WriteUpload"] = write
    code, body = await rig.raw(
        f"PATCH {PART} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        "Upload-Offset: 0\r\nContent-Length: 100\r\n\r\nPK".encode()
    )
    assert code == 408 and b"go on behind what was kept" in body
    assert kept == [2]
