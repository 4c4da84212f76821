"""Every RPC of DatasetService through a real server."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from detflow import channels
from detflow.errors import (
    AlreadyExists,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    from_status,
)
from detflow.events import Bus
from detflow.v1 import dataset_pb2
from services.preprocess.archive import Limits
from tests.preprocess_rig import (
    PROJECT,
    DatasetState,
    Rig,
    reasons,
    rig,
    running,
    until,
    version_of,
)
from tests.preprocess_samples import (
    encode,
    jpeg,
    pack,
    picture,
    voc_xml,
    with_orientation,
    yolo_files,
)

__all__ = ["rig"]


async def get(rig: Rig, name: str) -> dataset_pb2.Dataset:
    """Reads a dataset."""
    with channels.translate():
        dataset: dataset_pb2.Dataset = await rig.datasets.GetDataset(
            dataset_pb2.GetDatasetRequest(name=name)
        )
    return dataset


async def delete(rig: Rig, name: str) -> None:
    """Deletes a dataset."""
    with channels.translate():
        await rig.datasets.DeleteDataset(dataset_pb2.DeleteDatasetRequest(name=name))


async def test_datasets_of_a_project_that_is_not_there_are_not_found(rig: Rig) -> None:
    with pytest.raises(NotFound, match="projects/nope does not exist"), channels.translate():
        await rig.datasets.ListDatasets(dataset_pb2.ListDatasetsRequest(parent="projects/nope"))


async def test_create_returns_at_once_and_the_import_follows(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(10)))
    created = await rig.create(upload.name, "검은 고양이 😀")
    assert created.state == DatasetState.IMPORTING
    responses = await rig.watch_dataset(created.name)
    ready = responses[-1].dataset

    assert ready.state == DatasetState.READY
    assert ready.display_name == "검은 고양이 😀"
    assert ready.format == dataset_pb2.DATASET_FORMAT_YOLO
    assert list(ready.class_names) == ["disc", "square"]
    assert (ready.num_images, ready.num_boxes, ready.num_background_images) == (10, 10, 0)
    assert list(ready.num_boxes_by_class) == [5, 5]
    assert len(ready.content_sha256) == 64
    assert ready.HasField("import_time")
    assert await get(rig, ready.name) == ready


async def test_equal_data_has_an_equal_hash_whatever_the_order_in_the_archive(rig: Rig) -> None:
    files = yolo_files(5)
    one = await rig.import_archive(pack(files), "one")
    two = await rig.import_archive(pack(dict(reversed(files.items()))), "two")
    files["labels/000.txt"] = b""
    three = await rig.import_archive(pack(files), "three")
    assert one.content_sha256 == two.content_sha256 != three.content_sha256
    assert three.num_background_images == 1


async def test_watch_shows_progress_and_resumes_at_its_cursor(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(40)))
    created = await rig.create(upload.name)
    responses = await rig.watch_dataset(created.name)
    percents = [r.progress.percent for r in responses if r.HasField("progress")]
    assert percents == sorted(percents)
    first = next(r for r in responses if r.HasField("dataset"))
    if first.dataset.state == DatasetState.IMPORTING:
        again = await rig.watch_dataset(created.name, first.cursor)
        assert again[-1].dataset.state == DatasetState.READY


async def test_the_same_request_id_gives_the_same_dataset(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(3)))
    made = await asyncio.gather(*(rig.create(upload.name, request_id="once") for _ in range(5)))
    assert len({dataset.name for dataset in made}) == 1


async def test_a_display_name_is_unique_in_its_project(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(3)))
    await rig.create(upload.name, "cells", request_id="a")
    with pytest.raises(AlreadyExists):
        await rig.create(upload.name, "cells", request_id="b")
    other = await rig.upload(pack(yolo_files(3)), "projects/q")
    await rig.create(other.name, "cells", project="projects/q")


async def test_an_upload_of_another_project_is_not_found(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(3)), "projects/q")
    foreign = upload.name.replace("projects/q", PROJECT)
    for name in (upload.name, foreign, f"{PROJECT}/uploads/nothing"):
        with pytest.raises(NotFound):
            await rig.create(name)


@pytest.mark.parametrize("name", ["", "x" * 64, "a\nb", "a\u202eb"])
async def test_bad_display_names_are_refused(rig: Rig, name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await rig.create(f"{PROJECT}/uploads/u", name)
    assert caught.value.violations[0].field == "dataset.display_name"


async def test_an_unknown_dataset_and_one_of_another_project_look_the_same(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(3)))
    foreign = dataset.name.replace("projects/p/", "projects/q/")
    for name in (foreign, f"{PROJECT}/datasets/nothing"):
        for call in (get, delete, Rig.watch_dataset):
            with pytest.raises(NotFound, match=f"^{name} does not exist$"):
                await call(rig, name)


async def test_list_pages_through_a_project_newest_first(rig: Rig) -> None:
    upload = await rig.upload(pack(yolo_files(3)))
    names = [(await rig.create(upload.name, f"set {i}")).name for i in range(5)]
    other = await rig.upload(b"x", "projects/q")
    await rig.create(other.name, project="projects/q")

    seen: list[str] = []
    token = ""
    while True:
        request = dataset_pb2.ListDatasetsRequest(parent=PROJECT, page_size=2, page_token=token)
        page = await rig.datasets.ListDatasets(request)
        seen += [dataset.name for dataset in page.datasets]
        token = page.next_page_token
        if not token:
            break
    assert seen == names[::-1]

    request = dataset_pb2.ListDatasetsRequest(parent=PROJECT, page_token="tampered")
    with pytest.raises(InvalidArgument, match="page_token"), channels.translate():
        await rig.datasets.ListDatasets(request)


async def test_delete_removes_rows_and_objects(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(5)))
    prefix = f"datasets/{dataset.name.split('/')[-1]}"
    assert list(rig.service.store.list(prefix))
    await delete(rig, dataset.name)
    with pytest.raises(NotFound):
        await get(rig, dataset.name)
    await until(lambda: not list(rig.service.store.list(prefix)))


async def test_a_dataset_that_a_version_uses_is_not_deleted(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(5)))
    version = version_of(dataset.name)
    await rig.tell("created", version)
    await rig.watch_preprocessing(version.name)
    with pytest.raises(FailedPrecondition) as caught:
        await delete(rig, dataset.name)
    assert caught.value.reason == "DATASET_IN_USE"
    assert caught.value.metadata["version"] == version.name
    assert [violation.field for violation in caught.value.violations] == [version.name]

    others = [f"{PROJECT}/versions/w{number:03}" for number in range(120)]
    async with rig.service.db.connection() as conn:
        await conn.executemany(
            "insert into preprocessing (version_id, version_name, version_revision, dataset_id,"
            " recipe, state) values ($1, $2, 1, $3, '', 'SUCCEEDED')",
            [(name[-4:], name, dataset.name.split("/")[-1]) for name in others],
        )
        with pytest.raises(FailedPrecondition, match="and 120 more were made") as many:
            await delete(rig, dataset.name)
        named = [violation.field for violation in many.value.violations]
        assert named == [version.name, *others][: len(named)]
        assert len(named) > 20
        assert many.value.total == 121
        await conn.execute("delete from preprocessing where version_id like 'w%'")

    version.revision = 2
    await rig.tell("deleted", version)
    async with asyncio.timeout(10):
        while True:
            try:
                await delete(rig, dataset.name)
                break
            except FailedPrecondition:
                await asyncio.sleep(0.02)


VOC = {"JPEGImages/a.jpg": jpeg(), "Annotations/a.xml": voc_xml(("cell", 1, 2, 10, 20))}

BAD_ARCHIVES: dict[str, tuple[bytes, type[DetflowError], list[tuple[str, str]]]] = {
    "unsafe path": (
        pack({"../evil.jpg": b"", **yolo_files(2)}),
        InvalidArgument,
        [("../evil.jpg", "UNSAFE_PATH")],
    ),
    "nested archive": (
        pack({"a.zip": b"PK", **yolo_files(2)}),
        InvalidArgument,
        [("a.zip", "UNSUPPORTED_ENTRY")],
    ),
    "not a zip": (b"hello", InvalidArgument, [("archive", "CORRUPT_ARCHIVE")]),
    "truncated": (pack(yolo_files(2))[:-40], InvalidArgument, [("archive", "CORRUPT_ARCHIVE")]),
    "empty": (pack({}), InvalidArgument, [("archive", "EMPTY_DATASET")]),
    "no images": (pack({"a.txt": b""}), InvalidArgument, [("archive", "EMPTY_DATASET")]),
    "no labels": (pack({"a.jpg": jpeg()}), InvalidArgument, [("archive", "UNKNOWN_LAYOUT")]),
    "two names": (
        pack({"images/A.jpg": b"", "images/a.jpg": b""}),
        InvalidArgument,
        [("images/a.jpg", "DUPLICATE_NAME")],
    ),
    "bomb": (
        pack({"images/a.bmp": bytes(3 << 20)}),
        ResourceExhausted,
        [("archive", "ARCHIVE_LIMIT")],
    ),
    "empty image": (
        pack(yolo_files(2) | {"images/000.jpg": b""}),
        InvalidArgument,
        [("images/000.jpg", "CORRUPT_IMAGE")],
    ),
    "truncated image": (
        pack(yolo_files(2) | {"images/001.jpg": jpeg()[:-200]}),
        InvalidArgument,
        [("images/001.jpg", "CORRUPT_IMAGE")],
    ),
    "wrong extension": (
        pack(yolo_files(2) | {"images/001.jpg": encode(".png", picture())}),
        InvalidArgument,
        [("images/001.jpg", "TYPE_MISMATCH")],
    ),
    "bad rows": (
        pack(
            yolo_files(2) | {"labels/001.txt": b"0 0.5 0.5 0.1 0.1\n0 nan 0 0 0\n7 0.5 0.5 0.1 0.1"}
        ),
        InvalidArgument,
        [("labels/001.txt:2", "BAD_BOX"), ("labels/001.txt:3", "UNKNOWN_CLASS")],
    ),
    "label without image": (
        pack(yolo_files(2) | {"labels/009.txt": b""}),
        InvalidArgument,
        [("labels/009.txt", "MISSING_IMAGE")],
    ),
    "dtd": (
        pack(VOC | {"Annotations/a.xml": b"<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>"}),
        InvalidArgument,
        [("Annotations/a.xml", "DTD_FORBIDDEN")],
    ),
    "yaml with a tag": (
        pack(yolo_files(2) | {"data.yaml": b"!!python/object/apply:os.system [id]"}),
        InvalidArgument,
        [("data.yaml", "BAD_DATA_YAML")],
    ),
}


async def test_bad_archives_fail_with_the_place_and_the_reason_and_keep_nothing(
    make_database_url: Callable[[str], Awaitable[str]], nats_url: str, bus: Bus, tmp_path: Path
) -> None:
    url = await make_database_url("preprocess")
    limits = Limits(ratio=10, free_bytes=1 << 20)
    async with running(url, nats_url, bus, tmp_path, limits=limits) as rig:
        for name, (data, kind, violations) in BAD_ARCHIVES.items():
            dataset = await rig.import_archive(data, name)
            assert dataset.state == DatasetState.FAILED, name
            error = from_status(dataset.failure.status)
            assert type(error) is kind, name
            assert error.reason == violations[0][1], name
            assert reasons(dataset.failure) == violations, name
            assert error.message.count(violations[0][0]), name
        await until(lambda: not list(rig.service.store.list("datasets")))


async def test_skip_invalid_leaves_out_what_is_wrong_and_lists_it(rig: Rig) -> None:
    files = yolo_files(6) | {
        "images/000.jpg": b"",
        "images/001.jpg": encode(".png", picture()),
        "labels/002.txt": b"0 0.5 0.5 0.25 0.5\n0 0.5 0.5 0 0\n",
        "labels/003.txt": b"0 0.5 0.5 1.01 0.5\n",
        "labels/004.txt": b"\xff\xd8",
    }
    dataset = await rig.import_archive(pack(files), skip_invalid=True)
    assert dataset.state == DatasetState.READY
    assert dataset.num_images == 3  # 002, 003, 005
    assert dataset.num_boxes == 3
    assert dataset.num_skipped == 4
    assert [(p.field, p.reason) for p in dataset.skipped] == [
        ("images/000.jpg", "CORRUPT_IMAGE"),
        ("images/001.jpg", "TYPE_MISMATCH"),
        ("labels/002.txt:2", "BAD_BOX"),
        ("labels/004.txt", "CORRUPT_LABEL"),
        ("labels/003.txt:1", "BOX_CLIPPED"),
    ]


async def test_at_most_a_hundred_problems_are_listed_with_the_total(rig: Rig) -> None:
    rows = b"0 0.5 0.5 0 0\n" * 150
    dataset = await rig.import_archive(pack(yolo_files(3) | {"labels/001.txt": rows}))
    error = from_status(dataset.failure.status)
    assert [v.field for v in error.violations] == [f"labels/001.txt:{n}" for n in range(1, 101)]
    assert error.total == 150

    dataset = await rig.import_archive(
        pack(yolo_files(3) | {"labels/001.txt": rows}), "skipping", skip_invalid=True
    )
    assert (len(dataset.skipped), dataset.num_skipped, dataset.num_boxes) == (100, 150, 2)


async def test_nothing_left_after_skipping_is_an_empty_dataset(rig: Rig) -> None:
    files = {"images/a.jpg": b"", "labels/a.txt": b"0 0.5 0.5 0.1 0.1"}
    dataset = await rig.import_archive(pack(files), skip_invalid=True)
    assert from_status(dataset.failure.status).reason == "EMPTY_DATASET"


async def test_boxes_match_the_upright_image(rig: Rig) -> None:
    files = {
        "JPEGImages/a.jpg": with_orientation(jpeg(64, 48), 6),
        "Annotations/a.xml": voc_xml(("cell", 1, 2, 48, 64)),
    }
    dataset = await rig.import_archive(pack(files))
    assert dataset.state == DatasetState.READY
    files["Annotations/a.xml"] = voc_xml(("cell", 1, 2, 64, 48))
    dataset = await rig.import_archive(pack(files), "not upright")
    assert reasons(dataset.failure) == [("Annotations/a.xml object[1]", "BAD_BOX")]


async def test_a_bad_cursor_is_refused(rig: Rig) -> None:
    dataset = await rig.import_archive(pack(yolo_files(3)))
    with pytest.raises(InvalidArgument) as caught:
        await rig.watch_dataset(dataset.name, "nonsense")
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
