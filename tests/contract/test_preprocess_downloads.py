"""COCO archives, downloads and lists of problems through the running service."""

import asyncio
import csv
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from detflow import channels
from detflow.errors import FailedPrecondition, InvalidArgument, NotFound
from detflow.v1 import dataset_pb2
from tests.preprocess_rig import PROJECT, DatasetState, Rig
from tests.preprocess_rig import rig as rig  # the fixture
from tests.preprocess_samples import jpeg, pack, with_orientation, yolo_files

COCO, VOC, YOLO = (
    dataset_pb2.DATASET_FORMAT_COCO,
    dataset_pb2.DATASET_FORMAT_VOC,
    dataset_pb2.DATASET_FORMAT_YOLO,
)


def coco_files() -> dict[str, bytes]:
    """Three images in two splits, one of them turned by its EXIF orientation, with a crowd."""
    categories = [{"id": 9, "name": "cat"}, {"id": 3, "name": "개"}]
    train = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 2, 10.5, 20], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0, 0, 48, 64], "iscrowd": 1},
        ],
        "categories": categories,
    }
    val = {
        "images": [{"id": 1, "file_name": "c.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 3, "bbox": [5, 5, 5, 5]}],
        "categories": categories,
    }
    return {
        "set/train2017/a.jpg": with_orientation(jpeg(64, 48, 1), 6),
        "set/train2017/b.jpg": jpeg(64, 48, 2),
        "set/val2017/c.jpg": jpeg(64, 48, 3),
        "set/annotations/instances_train2017.json": json.dumps(train).encode(),
        "set/annotations/instances_val2017.json": json.dumps(val).encode(),
    }


async def download(rig: Rig, name: str, wanted: Any = 0) -> bytes:
    """Downloads a dataset."""
    request = dataset_pb2.DownloadDatasetRequest(name=name, format=wanted)
    with channels.translate():
        return b"".join([part.data async for part in rig.datasets.DownloadDataset(request)])


async def problems(
    rig: Rig, name: str, page_size: int = 0
) -> tuple[list[tuple[str, str]], int, int]:
    """Place and reason of all problems, their total, and the number of pages."""
    found, total, pages, token = [], 0, 0, ""
    while pages == 0 or token:
        request = dataset_pb2.ListImportProblemsRequest(
            parent=name, page_size=page_size, page_token=token
        )
        with channels.translate():
            response = await rig.datasets.ListImportProblems(request)
        found += [(problem.field, problem.reason) for problem in response.problems]
        total, token, pages = response.num_total, response.next_page_token, pages + 1
    return found, total, pages


async def test_coco_is_imported_with_crowds_and_splits_and_downloaded_in_every_format(
    rig: Rig,
) -> None:
    dataset = await rig.import_archive(pack(coco_files()))
    assert dataset.state == DatasetState.READY, dataset.failure
    assert dataset.format == COCO
    assert list(dataset.class_names) == ["개", "cat"]
    assert (dataset.num_boxes, dataset.num_crowd_boxes) == (3, 1)
    split = dataset.existing_split
    assert (split.train, split.val, split.test) == (2, 1, 0)

    data = await download(rig, dataset.name)
    assert data == await download(rig, dataset.name, COCO)
    again = await rig.import_archive(data, "again")
    assert list(again.class_names) == ["개", "cat"]
    assert list(again.num_boxes_by_class) == list(dataset.num_boxes_by_class)
    assert again.existing_split == dataset.existing_split
    assert again.num_crowd_boxes == 1
    assert await download(rig, again.name) == data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.read("images/train/a.jpg") == coco_files()["set/train2017/a.jpg"]
        document = json.loads(archive.read("annotations/instances_train.json"))
    assert document["images"][0] == {"id": 1, "file_name": "a.jpg", "width": 48, "height": 64}
    assert [a["iscrowd"] for a in document["annotations"]] == [0, 1]

    for wanted in (YOLO, VOC):  # which have no word for crowds
        other = await rig.import_archive(await download(rig, dataset.name, wanted), str(wanted))
        assert other.state == DatasetState.READY, other.failure
        assert other.format == wanted
        assert list(other.class_names) == ["개", "cat"]
        assert (other.num_images, other.num_boxes, other.num_crowd_boxes) == (3, 2, 0)
        assert other.existing_split == dataset.existing_split


async def test_a_client_that_goes_away_stops_the_packing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.preprocess import download as module

    num_read, ended = 0, asyncio.Event()
    original = module.Packer.chunks
    read = module.StoredImages.read

    def counted(self: Any, image: Any) -> bytes:
        nonlocal num_read
        num_read += 1
        return read(self, image)

    async def watched(self: Any) -> Any:
        try:
            async for chunk in original(self):
                yield chunk
        finally:
            ended.set()

    monkeypatch.setattr(module.Packer, "chunks", watched)
    monkeypatch.setattr(module.StoredImages, "read", counted)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 10)
    dataset = await rig.import_archive(pack(yolo_files(200, size=(320, 240))))
    call = rig.datasets.DownloadDataset(dataset_pb2.DownloadDatasetRequest(name=dataset.name))
    first: Any = await call.read()
    assert first.data
    call.cancel()
    async with asyncio.timeout(10):
        await ended.wait()
    assert num_read < 200


async def test_every_problem_is_listed_by_place_page_by_page(rig: Rig) -> None:
    files = yolo_files(3)
    rows = ["0 0.5 0.5 0 0.5" if i % 2 else "9 0.5 0.5 0.2 0.2" for i in range(240)]
    files["labels/001.txt"] = "\n".join([*rows, "0 0.99 0.5 0.03 0.5"]).encode()
    dataset = await rig.import_archive(pack(files), skip_invalid=True)
    assert dataset.state == DatasetState.READY
    assert (len(dataset.skipped), dataset.num_skipped) == (100, 240)
    found, total, pages = await problems(rig, dataset.name, 100)
    assert (total, pages) == (241, 3)
    assert found == [
        *((f"labels/001.txt:{i + 1}", "BAD_BOX" if i % 2 else "UNKNOWN_CLASS") for i in range(240)),
        ("labels/001.txt:241", "BOX_CLIPPED"),
    ]

    failed = await rig.import_archive(pack(files), "strict")
    assert failed.state == DatasetState.FAILED
    assert await problems(rig, failed.name, 1000) == (found, 241, 1)

    with channels.translate():
        await rig.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=failed.name))
    with pytest.raises(NotFound):
        await problems(rig, failed.name)

    ready = await rig.import_archive(pack(yolo_files(3)), "good")
    assert await problems(rig, ready.name) == ([], 0, 1)
    request = dataset_pb2.ListImportProblemsRequest(parent=ready.name, page_token="abc")
    with pytest.raises(InvalidArgument), channels.translate():
        await rig.datasets.ListImportProblems(request)


async def test_the_command_line_writes_both_to_files(rig: Rig, tmp_path: Path) -> None:
    async def run(*arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "detflow.cli", "datasets", *arguments),
            *("--project", "p", "--address", "127.0.0.1:7100"),
            env={**os.environ, "DETFLOW_PREPROCESS_ADDRESS": rig.service.address},
        )
        assert await process.wait() == 0

    files = {**coco_files(), "set/train2017/d.jpg": jpeg()}
    dataset = await rig.import_archive(pack(files), "셀")
    await run("problems", "셀", "-o", str(tmp_path / "problems.csv"))
    rows = list(csv.reader((tmp_path / "problems.csv").read_text().splitlines()))
    assert [row[:2] for row in rows] == [
        ["place", "reason"],
        ["set/train2017/d.jpg", "NOT_LISTED"],
    ]
    await run("download", "셀", "--format", "voc", "-o", str(tmp_path))
    assert (tmp_path / "셀.zip").read_bytes() == await download(rig, dataset.name, VOC)


async def test_of_an_archive_that_cannot_be_opened_there_is_a_problem_and_no_download(
    rig: Rig,
) -> None:
    failed = await rig.import_archive(b"PK no zip")
    assert (await problems(rig, failed.name))[0] == [("archive", "CORRUPT_ARCHIVE")]
    with pytest.raises(FailedPrecondition, match="is FAILED, not READY"):
        await download(rig, failed.name)
    with pytest.raises(NotFound):
        await download(rig, f"{PROJECT}/datasets/nothing")
