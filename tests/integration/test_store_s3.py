"""The object store on a real S3 server, by itself and under the whole stack."""

import dataclasses
import pickle
import shutil
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import from_url

from detflow import backup
from detflow.errors import DataLoss, Unavailable, from_status
from detflow.events import Bus
from detflow.local.demo_data import write_dataset
from detflow.store import ObjectStore
from detflow.v1 import dataset_pb2
from services.preprocess import assembly, sources
from tests import preprocess_rig, s3_rig, stack_rig
from tests.installation_rig import MakeInstallation, make_installation
from tests.preprocess_samples import pack, yolo_files

__all__ = ["make_installation"]

URL = "s3://detflow/some prefix"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for the server's sockets."""
    path = Path(tempfile.mkdtemp(prefix="detflow-s3-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[s3_rig.S3]:
    prepared = s3_rig.prepare(folder / "a")
    with prepared.running(), pytest.MonkeyPatch.context() as patch:
        for name, value in prepared.environment.items():
            patch.setenv(name, value)
        yield prepared


@pytest.fixture
def bucket(s3: s3_rig.S3) -> ObjectStore:
    return ObjectStore(URL)


def test_objects_are_put_read_listed_and_deleted(bucket: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 100_000)  # several parts
    small = bucket.put("a/b/small", b"small")
    large = bucket.put("a/large", source)
    bucket.put("ab", b"")
    assert bucket.get(small) == b"small"
    assert bucket.get_range("a/large", 257, 3) == bytes((1, 2, 3))
    bucket.download(large, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert sorted(bucket.list("a")) == ["a/b/small", "a/large"]
    bucket.delete("a/large")
    bucket.delete("a/large")
    assert list(bucket.list("a")) == ["a/b/small"]
    assert bucket.exists("a/b/small") and not bucket.exists("a/large")
    assert bucket.put("a/b/small", b"other").size_bytes == 5
    with pytest.raises(DataLoss):
        bucket.get(small)


def test_an_object_that_is_there_is_not_replaced_by_put_if_absent(bucket: ObjectStore) -> None:
    first = bucket.put_if_absent("once", b"first")
    bucket.put_if_absent("once", b"second")
    assert bucket.get(first) == b"first"


def test_a_process_that_gets_a_pickled_store_opens_the_same_bucket(bucket: ObjectStore) -> None:
    stored = bucket.put("pickled", b"x")
    assert pickle.loads(pickle.dumps(bucket)).get(stored) == b"x"


def test_lost_and_changed_objects_are_data_loss_and_leave_no_file(
    bucket: ObjectStore, tmp_path: Path
) -> None:
    content = bytearray(b"x" * 3_000_000)
    stored = bucket.put("flipped", bytes(content))
    content[2_000_000] ^= 1
    obstore.put(from_url(URL), "flipped", bytes(content))
    with pytest.raises(DataLoss, match="SHA-256"):
        bucket.get(stored)
    with pytest.raises(DataLoss, match="SHA-256"):
        bucket.download(stored, tmp_path / "file")
    for start in (2_999_999, 3_000_001):
        with pytest.raises(DataLoss, match="no 2 bytes"):
            bucket.get_range("flipped", start, 2)
    bucket.delete("flipped")
    with pytest.raises(DataLoss, match="is gone"):
        bucket.get(stored)
    with pytest.raises(DataLoss, match="is gone"):
        bucket.download(stored, tmp_path / "file")
    with pytest.raises(DataLoss, match="is gone"):
        bucket.get_range("flipped", 0, 1)
    assert not list(tmp_path.iterdir())


def test_wrong_credentials_are_told_with_the_remedy(
    bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = bucket.put("secret", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Unavailable, match=r"403 Forbidden.*check.*credentials") as caught:
        ObjectStore(URL).get(stored)
    assert caught.value.reason == "STORE_UNAVAILABLE"


def test_a_server_that_is_away_is_unavailable(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = s3_rig.prepare(folder / "b")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = ObjectStore(URL)
    with server.running() as process:
        stored = bucket.put("kept", b"kept")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(Unavailable, match=r"does not answer.*check") as caught:
            bucket.get(stored)
        assert caught.value.reason == "STORE_UNAVAILABLE"
        with pytest.raises(Unavailable):
            bucket.download(stored, tmp_path / "file")
    assert not list(tmp_path.iterdir())


async def test_datasets_are_imported_from_buckets(
    s3: s3_rig.S3,
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Bus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = yolo_files(20)
    bucket = from_url("s3://data")
    for name, data in files.items():
        obstore.put(bucket, f"sets/cells & co/{name.replace('00', '한%41+')}", data)
    obstore.put(bucket, "sets/cells.zip", pack(files))
    url = await make_database_url("preprocess")
    async with preprocess_rig.running(
        url, nats_url, bus, tmp_path, import_urls="s3://data/sets,s3://nothing"
    ) as rig:

        async def import_url(url: str, name: str) -> dataset_pb2.Dataset:
            created = await rig.create("", name, source_url=url)
            return (await rig.watch_dataset(created.name))[-1].dataset

        folder = await import_url("s3://data/sets/cells & co/", "folder")
        assert (folder.num_images, folder.num_boxes) == (20, 20), folder.failure
        archive = await import_url("s3://data/sets/cells.zip", "archive")
        uploaded = await rig.import_archive(pack(files), "uploaded")
        assert archive.content_sha256 == uploaded.content_sha256

        assemble = assembly.assemble

        async def change_then_assemble(*arguments: Any) -> None:
            obstore.put(bucket, "sets/cells.zip", b"x" + pack(files)[1:])
            await assemble(*arguments)

        for name, reason in (
            ("s3://nothing/a.zip", "SOURCE_NOT_FOUND"),
            ("s3://nothing/a/", "SOURCE_NOT_FOUND"),
            ("s3://data/sets/cell", "SOURCE_NOT_FOUND"),
            ("s3://data/sets/cell/", "SOURCE_NOT_FOUND"),
            ("s3://data/sets/cells.zip", "SOURCE_CHANGED"),
            ("s3://data/sets/cells.zip", "SOURCE_DENIED"),
            ("s3://data/sets/", "SOURCE_DENIED"),
        ):
            with monkeypatch.context() as patch:
                if reason == "SOURCE_CHANGED":
                    patch.setattr(sources, "assemble", change_then_assemble)
                if reason == "SOURCE_DENIED":
                    patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
                error = from_status((await import_url(name, name)).failure.status)
            assert error.reason == reason, error.message
            assert name in error.message


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_job_with_all_objects_in_a_bucket(s3: s3_rig.S3, tmp_path: Path) -> None:
    write_dataset(tmp_path / "shapes", 40)
    settings = {"DETFLOW_STORE_URL": "s3://detflow/job", **s3.environment}
    stack = stack_rig.start(tmp_path / "data", stack_rig.free_base_port(), settings)
    try:
        imported = stack.detflow("datasets", "import", str(tmp_path / "shapes"), "--json")
        assert imported.code == 0, imported.err
        created = stack.detflow("versions", "create", "--dataset", "shapes", "--augment", "hflip")
        assert created.code == 0, created.err
        tiny = ("--model", "yolov8n", "--batch", "8", "--epochs", "2", "--set", "image_size=64")
        trained = stack.detflow("train", "V_0", *tiny, seconds=200)
        assert trained.code == 0, trained.err
        measured = stack.detflow("metrics", "V_0", "--json").json
        assert [e["split"] for e in measured["evaluations"]] == ["SPLIT_VAL", "SPLIT_TEST"]
        keys = list(ObjectStore("s3://detflow/job").list("trainings"))
        assert any(key.endswith("predictions-test.parquet") for key in keys)
        assert not any((stack.data_dir / "store").iterdir())
    finally:
        stack_rig.end(stack, signal.SIGTERM)


async def test_a_backup_of_a_bucket_is_kept_in_a_bucket(
    s3: s3_rig.S3, make_installation: MakeInstallation
) -> None:
    made = await make_installation(migrated=True)
    of_bucket = dataclasses.replace(
        made,
        system=dataclasses.replace(made.system, store_url="s3://detflow/source"),
        store=ObjectStore("s3://detflow/source"),
    )
    await of_bucket.add_upload("u1", b"x" * 6_000_000)  # more than one part
    folder = "s3://detflow/backups of mine"
    first = await backup.create(of_bucket.system, folder, lambda progress: None)
    again = await backup.create(of_bucket.system, folder, lambda progress: None)
    assert (first.num_objects, again.num_objects, again.num_lost) == (1, 1, 0)
    copies = [key for key in ObjectStore(folder).list("") if "/objects/" in key]
    assert copies == [f"{first.id}/objects/uploads/u1/0"]

    other = await make_installation()
    target = dataclasses.replace(other.system, store_url="s3://detflow/target")
    await backup.restore(target, folder, lambda progress: None)
    assert [*ObjectStore("s3://detflow/target").list("")] == ["uploads/u1/0"]
    assert await other.rows() == await of_bucket.rows()
    assert (await backup.verify(folder, lambda progress: None))[1] == []
