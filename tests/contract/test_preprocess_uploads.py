"""Uploads through a real server: in one stream, in parts, broken off and continued, thrown away."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from detflow import channels
from detflow.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from detflow.events import Bus
from detflow.store import ObjectStore
from detflow.v1 import dataset_pb2
from services.preprocess import upload_store, uploads
from tests.preprocess_rig import PROJECT, DatasetState, Rig, rig, running, until
from tests.preprocess_samples import pack, yolo_files

__all__ = ["rig"]

Part = dataset_pb2.UploadArchiveRequest
Write = dataset_pb2.WriteUploadRequest
RECEIVED = dataset_pb2.Upload.RECEIVED
RECEIVING = dataset_pb2.Upload.RECEIVING


async def send(rig: Rig, *parts: Part) -> dataset_pb2.Upload:
    """Uploads messages as they are."""
    with channels.translate():
        upload: dataset_pb2.Upload = await rig.datasets.UploadArchive(iter(parts))
    return upload


async def begin(
    rig: Rig, size_bytes: int, *, sha256: str = "", request_id: str = "", project: str = PROJECT
) -> dataset_pb2.Upload:
    """Begins an upload in parts."""
    request = dataset_pb2.CreateUploadRequest(
        parent=project, size_bytes=size_bytes, sha256=sha256, request_id=request_id
    )
    with channels.translate():
        upload: dataset_pb2.Upload = await rig.datasets.CreateUpload(request)
    return upload


def messages(name: str, offset: int, data: bytes) -> list[Write]:
    """The messages that write bytes."""
    start = Write(start=Write.Start(name=name, offset=offset))
    return [start, *(Write(chunk=data[i : i + (1 << 20)]) for i in range(0, len(data), 1 << 20))]


async def write(rig: Rig, name: str, offset: int, data: bytes) -> dataset_pb2.Upload:
    """Writes bytes in one stream."""
    with channels.translate():
        upload: dataset_pb2.Upload = await rig.datasets.WriteUpload(
            iter(messages(name, offset, data))
        )
    return upload


async def get(rig: Rig, name: str) -> dataset_pb2.Upload:
    """Reads an upload."""
    with channels.translate():
        upload: dataset_pb2.Upload = await rig.datasets.GetUpload(
            dataset_pb2.GetUploadRequest(name=name)
        )
    return upload


async def delete(rig: Rig, name: str) -> None:
    """Throws an upload away."""
    with channels.translate():
        await rig.datasets.DeleteUpload(dataset_pb2.DeleteUploadRequest(name=name))


def stored(rig: Rig, name: str = "") -> list[str]:
    """Keys of the parts in the object store."""
    return sorted(rig.service.store.list("/".join(["uploads", *name.split("/")[3:]])))


def content(rig: Rig, name: str) -> bytes:
    """What is stored of an upload."""
    folder = Path(rig.service.store.url.removeprefix("file://"))
    return b"".join((folder / key).read_bytes() for key in stored(rig, name))


async def test_an_archive_in_one_stream_is_stored_with_size_and_hash(rig: Rig) -> None:
    upload = await send(
        rig, Part(parent=PROJECT), Part(chunk=b"abc"), Part(chunk=b"def"), Part(size_bytes=6)
    )
    assert upload.name.startswith(f"{PROJECT}/uploads/")
    assert (upload.size_bytes, upload.committed_bytes, upload.state) == (6, 6, RECEIVED)
    assert upload.sha256 == hashlib.sha256(b"abcdef").hexdigest()
    assert not upload.HasField("expire_time")
    assert await get(rig, upload.name) == upload
    assert content(rig, upload.name) == b"abcdef"


async def test_malformed_streams_are_refused_and_leave_nothing(rig: Rig) -> None:
    streams: list[list[Part]] = [
        [Part(chunk=b"abc"), Part(size_bytes=3)],
        [Part(parent=PROJECT), Part(parent=PROJECT)],
        [Part(parent=PROJECT), Part(size_bytes=0)],
        [Part(parent=PROJECT), Part(chunk=b""), Part(size_bytes=0)],
        [Part(parent=PROJECT), Part(chunk=b"abc"), Part(size_bytes=4)],
        [Part(parent="elsewhere"), Part(chunk=b"abc"), Part(size_bytes=3)],
        [Part()],
        [],
    ]
    for parts in streams:
        with pytest.raises(InvalidArgument):
            await send(rig, *parts)
    await until(lambda: not stored(rig))


async def test_a_project_that_is_not_there_is_not_found(rig: Rig) -> None:
    with pytest.raises(NotFound, match="projects/nope does not exist"):
        await send(rig, Part(parent="projects/nope"), Part(chunk=b"abc"), Part(size_bytes=3))
    with pytest.raises(NotFound, match="projects/nope does not exist"):
        await begin(rig, 3, project="projects/nope")


async def test_a_stream_without_its_last_message_is_refused_as_cut_off(rig: Rig) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await send(rig, Part(parent=PROJECT), Part(chunk=b"abc"))
    assert caught.value.reason == "INCOMPLETE_UPLOAD"


async def test_one_stream_that_is_broken_off_leaves_nothing_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 1000)

    async def parts() -> AsyncIterator[Part]:
        yield Part(parent=PROJECT)
        yield Part(chunk=b"x" * 1000)
        await asyncio.Event().wait()

    call = rig.datasets.UploadArchive(parts())
    await until(lambda: bool(stored(rig)))
    call.cancel()
    await until(lambda: not stored(rig))


async def test_an_archive_over_the_limit_is_refused(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Bus, tmp_path: Path
) -> None:
    url = await make_database_url("preprocess")
    async with running(url, nats_url, bus, tmp_path, max_upload_bytes=1000) as rig:
        for attempt in (rig.upload(b"x" * 1001), begin(rig, 1001)):
            with pytest.raises(ResourceExhausted) as caught:
                await attempt
            assert caught.value.reason == "ARCHIVE_LIMIT"


async def test_an_upload_in_parts_goes_on_where_it_stood_and_is_imported_as_if_whole(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 5000)
    data = pack(yolo_files(10))
    sha256 = hashlib.sha256(data).hexdigest()
    upload = await begin(rig, len(data), sha256=sha256)
    assert (upload.state, upload.size_bytes, upload.committed_bytes) == (RECEIVING, len(data), 0)
    assert upload.expire_time.seconds - upload.create_time.seconds == 24 * 3600

    upload = await write(rig, upload.name, 0, data[:7000])
    assert (upload.state, upload.committed_bytes) == (RECEIVING, 7000)
    with pytest.raises(FailedPrecondition) as caught:
        await rig.create(upload.name)
    assert caught.value.reason == "UPLOAD_INCOMPLETE"
    assert caught.value.metadata["committed_bytes"] == "7000"

    upload = await write(rig, upload.name, 7000, data[7000:])
    assert (upload.state, upload.sha256) == (RECEIVED, sha256)
    assert content(rig, upload.name) == data
    assert await write(rig, upload.name, len(data), b"") == upload  # the answer was lost

    parts = (await rig.watch_dataset((await rig.create(upload.name)).name))[-1].dataset
    assert parts.state == DatasetState.READY
    whole = await rig.import_archive(data, "whole")
    assert whole.content_sha256 == parts.content_sha256


async def test_all_that_came_before_a_break_is_kept(rig: Rig) -> None:
    data = bytes(range(256)) * (40 << 10)  # 10 MiB: a part and a bit
    upload = await begin(rig, len(data))
    sent = asyncio.Event()

    async def broken() -> AsyncIterator[Write]:
        for message in messages(upload.name, 0, data)[:-1]:
            yield message
        sent.set()
        await asyncio.Event().wait()

    call = rig.datasets.WriteUpload(broken())
    await sent.wait()
    await until(lambda: bool(stored(rig)))
    call.cancel()

    async def came() -> int:
        return (await get(rig, upload.name)).committed_bytes

    async with asyncio.timeout(10):
        while await came() <= uploads.PART_BYTES:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    offset = await came()
    assert (await write(rig, upload.name, offset, data[offset:])).state == RECEIVED
    assert content(rig, upload.name) == data


async def test_a_wrong_offset_is_answered_with_the_right_one(rig: Rig) -> None:
    upload = await begin(rig, 6)
    await write(rig, upload.name, 0, b"abc")
    for offset in (0, 2, 4):
        with pytest.raises(FailedPrecondition, match="has 3 bytes: go on there") as caught:
            await write(rig, upload.name, offset, b"def")
        assert caught.value.reason == "WRONG_OFFSET"
        assert caught.value.metadata["committed_bytes"] == "3"


async def test_of_two_writers_at_once_one_wins_and_no_byte_is_mixed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 1 << 20)
    upload = await begin(rig, 5 << 20)
    answers = await asyncio.gather(
        *(write(rig, upload.name, 0, letter * (5 << 20)) for letter in (b"a", b"b", b"c")),
        return_exceptions=True,
    )
    won = [answer for answer in answers if not isinstance(answer, BaseException)]
    lost = [answer for answer in answers if isinstance(answer, DetflowError)]
    assert len(won) <= 1 and len(won) + len(lost) == 3
    for error in lost:
        assert isinstance(error, (Aborted, FailedPrecondition))
        assert error.reason in ("UPLOAD_MOVED", "WRONG_OFFSET")
    offset = (await get(rig, upload.name)).committed_bytes
    kept = content(rig, upload.name)
    assert len(kept) == offset > 0  # what the losers stored is gone
    assert all(len(set(kept[i : i + (1 << 20)])) == 1 for i in range(0, offset, 1 << 20))


async def test_more_bytes_than_were_said_are_refused(rig: Rig) -> None:
    upload = await begin(rig, 5)
    with pytest.raises(InvalidArgument, match="5 bytes and more came") as caught:
        await write(rig, upload.name, 0, b"abcdef")
    assert caught.value.reason == "UPLOAD_TOO_LONG"
    assert (await get(rig, upload.name)).committed_bytes == 5
    with pytest.raises(InvalidArgument):
        await write(rig, upload.name, 5, b"f")


async def test_bytes_of_another_hash_are_refused_and_thrown_away(rig: Rig) -> None:
    upload = await begin(rig, 6, sha256=hashlib.sha256(b"abcdef").hexdigest(), request_id="r")
    await write(rig, upload.name, 0, b"abc")
    with pytest.raises(InvalidArgument, match="begin the upload again") as caught:
        await write(rig, upload.name, 3, b"dEf")
    assert caught.value.reason == "HASH_MISMATCH"
    with pytest.raises(NotFound):
        await get(rig, upload.name)
    await until(lambda: not stored(rig))
    again = await begin(rig, 6, sha256=upload.sha256, request_id="r")
    assert (await write(rig, again.name, 0, b"abcdef")).state == RECEIVED


async def test_the_same_request_id_gives_the_same_upload(rig: Rig) -> None:
    made = await asyncio.gather(*(begin(rig, 6, request_id="once") for _ in range(5)))
    assert len({upload.name for upload in made}) == 1
    await write(rig, made[0].name, 0, b"abc")
    assert (await begin(rig, 6, request_id="once")).committed_bytes == 3
    with pytest.raises(InvalidArgument) as caught:
        await begin(rig, 7, request_id="once")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    assert (await begin(rig, 7, request_id="once", project="projects/q")).committed_bytes == 0


async def test_a_writer_that_sends_nothing_is_sent_away_with_what_came_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.2)
    upload = await begin(rig, 6)

    async def stalled() -> AsyncIterator[Write]:
        for message in messages(upload.name, 0, b"abc"):
            yield message
        await asyncio.Event().wait()

    with pytest.raises(DeadlineExceeded), channels.translate():
        await rig.datasets.WriteUpload(stalled())
    assert (await get(rig, upload.name)).committed_bytes == 3
    assert (await write(rig, upload.name, 3, b"def")).state == RECEIVED


async def test_bytes_behind_a_part_that_could_not_be_stored_are_not_stored(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 1 << 20)
    upload = await begin(rig, 3 << 20)
    put, attempts = ObjectStore.put, 0

    def failing(self: ObjectStore, key: str, data: Any) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise Unavailable("the object store is away")
        return put(self, key, data)

    data = b"".join(letter * (1 << 20) for letter in (b"a", b"b", b"c"))
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", failing)
        with pytest.raises(Unavailable):
            await write(rig, upload.name, 0, data)
    assert (await get(rig, upload.name)).committed_bytes == 1 << 20
    assert (await write(rig, upload.name, 1 << 20, data[1 << 20 :])).state == RECEIVED
    assert content(rig, upload.name) == data


async def test_a_full_disk_is_told_and_what_came_before_stays(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await begin(rig, 6)
    await write(rig, upload.name, 0, b"abc")

    def full(*_: Any, **__: Any) -> None:
        raise GenericError("Unable to copy data to file: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", full)
        for attempt in (write(rig, upload.name, 3, b"def"), rig.upload(b"abcdef")):
            with pytest.raises(ResourceExhausted) as caught:
                await attempt
            assert caught.value.reason == "DISK_FULL"
    assert (await write(rig, upload.name, 3, b"def")).state == RECEIVED


async def test_an_archive_that_the_store_has_lost_can_be_uploaded_again(rig: Rig) -> None:
    data = pack(yolo_files(3))
    for name, state in (("lost", DatasetState.FAILED), ("again", DatasetState.READY)):
        upload = await begin(rig, len(data), request_id="same")
        upload = await write(rig, upload.name, 0, data)
        if name == "lost":
            rig.service.store.put(stored(rig, upload.name)[0], data[:-1] + b"x")
        dataset = (await rig.watch_dataset((await rig.create(upload.name, name)).name))[-1].dataset
        assert dataset.state == state
        if name == "lost":
            assert dataset.failure.status.code == DataLoss.code.value[0]
            await until(lambda: not stored(rig))


async def test_malformed_writes_are_refused(rig: Rig) -> None:
    upload = await begin(rig, 6)
    start = messages(upload.name, 0, b"")[0]
    for parts in ([], [Write(chunk=b"abc")], [start, start], [Write()]):
        with pytest.raises(InvalidArgument), channels.translate():
            await rig.datasets.WriteUpload(iter(parts))


async def test_uploads_of_another_project_are_not_found(rig: Rig) -> None:
    upload = await begin(rig, 6)
    foreign = upload.name.replace(PROJECT, "projects/q")
    for name in (foreign, f"{PROJECT}/uploads/nothing"):
        for call in (get(rig, name), delete(rig, name), write(rig, name, 0, b"abc")):
            with pytest.raises(NotFound):
                await call


async def test_a_deleted_upload_leaves_nothing_unless_it_is_being_imported(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(3)))
    async with rig.service.db.transaction() as conn:
        await conn.execute(
            "insert into dataset (id, project_id, display_name, upload_id, skip_invalid,"
            " lease_expires) values ('d', 'p', 'd', $1, false, now() + interval '1 hour')",
            upload.name.split("/")[-1],
        )
    with pytest.raises(FailedPrecondition, match="projects/p/datasets/d is being imported"):
        await delete(rig, upload.name)
    async with rig.service.db.transaction() as conn:
        await conn.execute("delete from dataset")
    await delete(rig, upload.name)
    with pytest.raises(NotFound):
        await get(rig, upload.name)
    await until(lambda: not stored(rig))


async def test_expired_uploads_are_collected_unless_an_import_needs_them(rig: Rig) -> None:
    whole, needed = [await rig.upload(b"x" * 10) for _ in range(2)]
    abandoned, fresh = [await begin(rig, 10) for _ in range(2)]
    for upload in (abandoned, fresh):
        await write(rig, upload.name, 0, b"abc")
    async with rig.service.db.transaction() as conn:
        days = await conn.fetchval(
            "select extract(day from expire_time - create_time) from upload where id = $1",
            whole.name.split("/")[-1],
        )
        assert days >= 7 - 1e-3
        await conn.execute(
            "update upload set expire_time = now() - interval '1 second' where id <> $1",
            fresh.name.split("/")[-1],
        )
        await conn.execute(
            "insert into dataset (id, project_id, display_name, upload_id, skip_invalid,"
            " lease_expires) values ('d', 'p', 'd', $1, false, now() + interval '1 hour')",
            needed.name.split("/")[-1],
        )
        assert await upload_store.delete_expired_uploads(conn) == 2
    kept = {upload.name.split("/")[-1] for upload in (needed, fresh)}
    await until(lambda: {key.split("/")[1] for key in stored(rig)} == kept)
