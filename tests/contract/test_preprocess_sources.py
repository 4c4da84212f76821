"""Imports of what lies in an object store of the user; here a folder, which is one too."""

import gzip
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from detflow.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    from_status,
)
from detflow.events import Bus
from detflow.v1 import dataset_pb2
from services.preprocess import sources
from services.preprocess.archive import Limits
from services.preprocess.sources import Sources, parse_source
from tests.preprocess_rig import DatasetState, Rig, running
from tests.preprocess_samples import pack, yolo_files
from tests.unit.test_preprocess_tar import pack as pack_tar


@pytest.fixture
async def rig(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Bus, tmp_path: Path
) -> AsyncIterator[Rig]:
    """A service that may import from a folder, and from where its own store is."""
    allowed = f"s3://elsewhere/data, file://{tmp_path}/in,file://{tmp_path}/service"
    url = await make_database_url("preprocess")
    folder = tmp_path / "service"
    async with running(
        url, nats_url, bus, folder, import_urls=allowed, max_upload_bytes=1 << 20
    ) as rig:
        yield rig


def write(folder: Path, files: Mapping[str, bytes]) -> str:
    """Writes files; returns the URL of the folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return f"file://{folder}/"


async def import_url(rig: Rig, url: str, name: str = "cells") -> dataset_pb2.Dataset:
    """Imports from a URL; returns the dataset in its final state."""
    created = await rig.create("", name, source_url=url)
    return (await rig.watch_dataset(created.name))[-1].dataset


async def test_archives_and_folders_elsewhere_are_the_same_dataset_as_when_uploaded(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)  # several pieces of each
    files = yolo_files(12)
    folder = write(tmp_path / "in" / "a folder", files | {".DS_Store": b"x"})
    archives = write(
        tmp_path / "in",
        {"한.zip": pack(files), "b.tar": pack_tar(files), "c.tgz": gzip.compress(pack_tar(files))},
    )
    uploaded = await rig.import_archive(pack(files), "uploaded")
    for url in (folder, *(f"{archives}{name}" for name in ("한.zip", "b.tar", "c.tgz"))):
        dataset = await import_url(rig, url, url[-20:])
        assert dataset.state == DatasetState.READY, dataset.failure
        assert dataset.content_sha256 == uploaded.content_sha256
        assert dataset.source_url == url
    scratch = rig.service.settings.data_dir / "preprocess"
    assert not list(scratch.rglob("source*"))


BAD_URLS = [
    "https://example.org/a.zip",
    "s3://elsewhere/data/../secret/a.zip",
    "s3://elsewhere/data/%2e%2e/secret/a.zip",
    "s3://elsewhere/data//a.zip",
    "s3://elsewhere/data\\a.zip",
    "s3://key:secret@elsewhere/data/a.zip",
    "s3://elsewhere:9000/data/a.zip",
    "s3://elsewhere/data/a.zip?X-Amz-Signature=secret",
    "s3://elsewhere/data/a.zip#secret",
    "s3:///data/a.zip",
    "file://host/etc/passwd",
    "data/a.zip",
]


async def test_what_is_no_plain_url_is_refused_without_repeating_it(rig: Rig) -> None:
    for url in BAD_URLS:
        with pytest.raises(InvalidArgument) as caught:
            await rig.create("", source_url=url)
        assert caught.value.reason == "BAD_SOURCE_URL"
        assert "secret" not in caught.value.message


async def test_only_what_is_allowed_is_read_and_never_the_own_store(
    rig: Rig, tmp_path: Path
) -> None:
    outside = write(tmp_path / "inside", yolo_files(3))
    store = rig.service.store.url
    for url in (outside, "s3://elsewhere/database/a.zip", "gs://elsewhere/data/a.zip", "file:///"):
        with pytest.raises(FailedPrecondition, match="DETFLOW_IMPORT_URLS") as caught:
            await rig.create("", source_url=url)
        assert caught.value.reason == "SOURCE_NOT_ALLOWED"
    for url in (f"{store}/", f"{store}/uploads/x", f"file://{tmp_path}/service/"):
        with pytest.raises(FailedPrecondition, match="own store"):
            await rig.create("", source_url=url)


async def test_a_link_does_not_lead_out_of_what_is_allowed(rig: Rig, tmp_path: Path) -> None:
    write(tmp_path / "outside", yolo_files(3))
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "in" / "link")
    os.symlink(rig.service.store.url.removeprefix("file://"), tmp_path / "in" / "own")
    for name in ("link/", "own/", "link/data.yaml"):
        with pytest.raises(FailedPrecondition):
            await rig.create("", source_url=f"file://{tmp_path}/in/{name}")
    os.remove(tmp_path / "in" / "own")
    dataset = await import_url(rig, f"file://{tmp_path}/in/")
    assert from_status(dataset.failure.status).reason == "SOURCE_NOT_ALLOWED"


async def test_what_is_not_there_is_not_found_with_the_url(rig: Rig, tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}/in/gone.zip", f"file://{tmp_path}/in/gone/"):
        error = from_status((await import_url(rig, url)).failure.status)
        assert isinstance(error, NotFound) and error.reason == "SOURCE_NOT_FOUND"
        assert url in error.message


async def test_names_and_sizes_are_checked_as_in_an_archive(rig: Rig, tmp_path: Path) -> None:
    url = write(tmp_path / "in" / "twice", {"images/a.jpg": b"", "images/A.jpg": b""})
    error = from_status((await import_url(rig, url)).failure.status)
    assert error.reason == "DUPLICATE_NAME"
    url = write(tmp_path / "in" / "large", {"images/a.bmp": b"x" * (2 << 20)})
    error = from_status((await import_url(rig, url)).failure.status)
    assert isinstance(error, ResourceExhausted) and error.reason == "ARCHIVE_LIMIT"


async def test_either_an_upload_or_a_url_is_named(rig: Rig) -> None:
    for upload, url in (("projects/p/uploads/u", "s3://elsewhere/data/a.zip"), ("", "")):
        with pytest.raises(InvalidArgument, match="either upload or source_url"):
            await rig.create(upload, source_url=url)
    with pytest.raises(NotFound):
        await rig.create("", source_url="s3://elsewhere/data/a.zip", project="projects/nope")


def checked(url: str, allowed: str, store: str = "s3://own/store") -> str:
    """The URL as it is stored."""
    found = Sources(allowed=allowed, store_url=store, limits=Limits(), max_bytes=1)
    return found.check(url).url


def test_a_prefix_ends_where_a_name_ends_and_buckets_have_no_case() -> None:
    assert checked("S3://Bucket/Data/a.zip", "s3://bucket/Data/") == "s3://bucket/Data/a.zip"
    assert checked("s3://bucket", "s3://bucket/") == "s3://bucket/"
    assert checked("az://c/x/", "gs://b, az://c") == "az://c/x/"
    for url in ("s3://bucket/Database/a.zip", "s3://bucket/data/a.zip", "s3://bucket2/Data/a.zip"):
        with pytest.raises(FailedPrecondition):
            checked(url, "s3://bucket/Data")
    with pytest.raises(FailedPrecondition, match="own store"):
        checked("s3://own/", "s3://own")
    assert checked("s3://own/storehouse/", "s3://own") == "s3://own/storehouse/"
    with pytest.raises(FailedPrecondition, match="DETFLOW_IMPORT_URLS"):
        checked("s3://bucket/a.zip", "")


def test_settings_that_cannot_be_compared_are_refused_at_the_start() -> None:
    for allowed, store in (
        ("s3://bucket/%20", "s3://own"),
        ("bucket", "s3://own"),
        ("s3://bucket", "https://own.example.org"),
    ):
        with pytest.raises(InvalidArgument, match="must be like s3://bucket/folder"):
            checked("s3://bucket/a", allowed, store)
    assert parse_source("s3://bucket/a b/ü").path == "a b/ü"
