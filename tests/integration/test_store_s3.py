"""The object store on a real S3 server, by itself and under the whole stack."""

import pickle
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from detflow.errors import DataLoss, Unavailable
from detflow.local.demo_data import write_dataset
from detflow.store import ObjectStore
from tests import s3_rig, stack_rig

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
