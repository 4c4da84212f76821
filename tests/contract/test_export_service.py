"""Every RPC of the export service through the real wiring; the test does the jobs."""

import asyncio
import contextlib
import importlib.util
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from detflow import channels
from detflow.errors import (
    Aborted,
    DataLoss,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from detflow.events import Bus
from detflow.v1 import export_pb2
from detflow.v1.common_pb2 import Progress
from tests import export_rig
from tests.export_rig import VERSION, Rig
from tests.trainer_rig import eventually

Export = export_pb2.Export


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    url = await make_database_url("trainer")
    async with export_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as one:
        yield one


async def refused(
    call: Awaitable[object], error: type[DetflowError], reason: str, *texts: str
) -> DetflowError:
    """Awaits a call that must be refused, for a reason that names these."""
    with pytest.raises(error) as caught:
        await call
    assert caught.value.reason == reason
    for text in texts:
        assert text in caught.value.message
    return caught.value


def reason(export: export_pb2.Export) -> str:
    info = error_details_pb2.ErrorInfo()
    export.failure.status.details[0].Unpack(info)
    return str(info.reason)


# --- create


async def test_create_returns_at_once_in_queued_with_every_option_resolved(rig: Rig) -> None:
    training = await rig.training(image_size=416)
    export = await rig.create(training)
    assert export.name.startswith(f"{training}/exports/")
    assert (export.state, export.revision) == (Export.QUEUED, 1)
    assert (export.precision, export.image_size_px, export.batch_size) == (Export.FP32, 416, 1)
    assert (export.opset, export.dynamic, export.end_to_end) == (17, False, False)
    assert export.file_name == "yolov8n-t1-416.onnx"
    assert export.HasField("create_time") and not export.HasField("end_time")


async def test_job_is_told_weights_options_and_where_to_store(rig: Rig) -> None:
    training = await rig.training(image_size=640)
    export = await rig.create(training, precision=Export.FP16, image_size_px=320, dynamic=True)
    told = (await rig.jobs.next()).spec.export
    assert (told.weights.key, told.manifest.key) == ("w", "m")
    assert told.export.name == export.name
    assert (told.export.image_size_px, told.export.precision) == (320, Export.FP16)
    assert told.key.endswith("/yolov8n-t1-320-fp16.onnx")


async def test_same_request_id_gives_the_same_export(rig: Rig) -> None:
    training = await rig.training()
    first, *others = await asyncio.gather(*(rig.create(training, "r") for _ in range(5)))
    assert {other.name for other in others} == {first.name}
    assert len((await rig.list_exports(training)).exports) == 1


@pytest.mark.parametrize(
    ("options", "field", "why", "text"),
    [
        ({"precision": Export.INT8}, "precision", "UNSUPPORTED_PRECISION", "OPENVINO"),
        ({"image_size_px": 100}, "image_size_px", "OUT_OF_RANGE", "multiple of 32"),
        ({"opset": 12}, "opset", "OUT_OF_RANGE", "from 13 to 20"),
        ({"format": Export.PYTORCH, "dynamic": True}, "dynamic", "UNSUPPORTED_OPTION", "ONNX"),
        ({"format": Export.OPENVINO, "opset": 17}, "opset", "UNSUPPORTED_OPTION", "ONNX"),
        (
            {"format": Export.OPENVINO, "end_to_end": True},
            "end_to_end",
            "UNSUPPORTED_OPTION",
            "ONNX",
        ),
        ({"format": Export.PYTORCH, "simplify": True}, "simplify", "UNSUPPORTED_OPTION", "ONNX"),
    ],
)
async def test_option_that_does_not_fit_names_field_and_what_is_allowed(
    rig: Rig, options: dict[str, Any], field: str, why: str, text: str
) -> None:
    training = await rig.training()
    error = await refused(rig.create(training, **options), InvalidArgument, why, field, text)
    assert [violation.field for violation in error.violations] == [f"export.{field}"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"format": Export.FORMAT_UNSPECIFIED}, "export.format"),
        ({"image_size_px": 5000}, "export.image_size_px"),
        ({"batch_size": 1000}, "export.batch_size"),
    ],
)
async def test_value_out_of_range_is_refused_by_the_contract(
    rig: Rig, options: dict[str, Any], field: str
) -> None:
    training = await rig.training()
    error = await refused(rig.create(training, **options), InvalidArgument, "INVALID_FIELD")
    assert [violation.field for violation in error.violations] == [field]


async def test_training_without_weights_has_nothing_to_export(rig: Rig) -> None:
    training = await rig.training(has_weights=False)
    await refused(
        rig.create(training), FailedPrecondition, "TRAINING_HAS_NO_WEIGHTS", training, "STOPPED"
    )


async def test_training_of_a_deleted_version_is_not_exported_but_its_exports_stay(
    rig: Rig,
) -> None:
    training = await rig.training()
    export = await rig.create(training)
    async with rig.db.connection() as conn:
        await conn.execute("insert into deleted_version values ('v', 1, true)")
    await refused(rig.create(training), FailedPrecondition, "VERSION_DELETED", "undelete")
    assert (await rig.get(export.name)).name == export.name


async def test_missing_openvino_is_told_with_its_remedy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = await rig.training()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    await refused(
        rig.create(training, format=Export.OPENVINO),
        FailedPrecondition,
        "OPENVINO_MISSING",
        "pip install 'detflow[openvino]'",
    )


# --- read


async def test_what_is_not_there_is_not_found(rig: Rig) -> None:
    training = await rig.training()
    export = await rig.create(training)
    elsewhere = export.name.replace("/versions/v/", "/versions/other/")
    missing = f"{training}/exports/nothing"
    for name in (missing, elsewhere):
        for call in (rig.get(name), rig.cancel(name), rig.delete(name), rig.download(name)):
            await refused(call, NotFound, "NOT_FOUND", name)
        await refused(anext(rig.watch(name)), NotFound, "NOT_FOUND", name)
    for parent in (f"{VERSION}/trainings/nothing", "projects/q/versions/v/trainings/t1"):
        await refused(rig.create(parent), NotFound, "NOT_FOUND", parent)
        await refused(rig.list_exports(parent), NotFound, "NOT_FOUND", parent)


async def test_pages_hold_all_exports_of_the_training_newest_first(rig: Rig) -> None:
    training, other = await rig.training("t1"), await rig.training("t2")
    made = [(await rig.create(training)).name for _ in range(5)]
    await rig.create(other)
    seen: list[str] = []
    token = ""
    while not seen or token:
        page = await rig.list_exports(training, page_size=2, page_token=token)
        seen += [export.name for export in page.exports]
        token = page.next_page_token
    assert seen == made[::-1]
    token = (await rig.list_exports(training, page_size=1)).next_page_token
    await refused(rig.list_exports(other, page_token=token), InvalidArgument, "BAD_PAGE_TOKEN")


# --- make


async def test_finished_export_has_object_differences_and_end_time(rig: Rig) -> None:
    export = await rig.create(await rig.training())
    stored = (await rig.jobs.next()).succeed(rig.store, b"model")
    done = await rig.until(export.name, Export.SUCCEEDED)
    assert done.object == stored
    assert (done.max_box_difference_px, done.max_confidence_difference) == (0.25, 0.125)
    assert done.HasField("end_time") and done.revision == 3
    assert await rig.history(export.name) == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_exports_are_made_one_after_the_other(rig: Rig) -> None:
    training = await rig.training()
    first, second = await rig.create(training), await rig.create(training)
    job = await rig.jobs.next()
    assert job.spec.export.export.name == first.name
    assert rig.jobs.started.empty()
    assert (await rig.get(second.name)).state == Export.QUEUED
    job.succeed(rig.store, b"model")
    assert (await rig.jobs.next()).spec.export.export.name == second.name


async def test_failure_of_the_job_is_the_failure_of_the_export(rig: Rig) -> None:
    export = await rig.create(await rig.training())
    job = await rig.jobs.next()
    job.result.set_exception(FailedPrecondition("3 px apart", reason="EXPORT_DIFFERS"))
    failed = await rig.until(export.name, Export.FAILED)
    assert (reason(failed), failed.failure.status.message) == ("EXPORT_DIFFERS", "3 px apart")
    assert not failed.HasField("object")


@pytest.mark.parametrize(
    "error", [Aborted("killed", reason="JOB_DIED"), Unavailable("no store", reason="AWAY")]
)
async def test_job_that_dies_is_begun_again_and_the_third_death_is_the_end(
    rig: Rig, error: DetflowError
) -> None:
    export = await rig.create(await rig.training())
    keys = []
    for _ in range(3):
        job = await rig.jobs.next()
        keys.append(job.spec.export.key)
        rig.store.put(job.spec.export.key, b"half")
        job.result.set_exception(error)
    failed = await rig.until(export.name, Export.FAILED)
    assert reason(failed) == error.reason
    assert await rig.history(export.name) == ["QUEUED", "RUNNING"] * 3 + ["FAILED"]
    assert len(set(keys)) == 3, "a late writer could replace the file of a later attempt"

    async def nothing_is_left() -> bool:
        return not list(rig.store.list("exports"))

    await eventually(nothing_is_left)


# --- cancel and delete


async def test_cancel_ends_the_job_and_what_it_stored_goes(rig: Rig) -> None:
    export = await rig.create(await rig.training())
    job = await rig.jobs.next()
    rig.store.put(job.spec.export.key, b"half")
    assert (await rig.cancel(export.name)).state == Export.CANCELLED
    await asyncio.wait_for(job.ended.wait(), 10)
    assert (await rig.cancel(export.name)).state == Export.CANCELLED
    assert await rig.history(export.name) == ["QUEUED", "RUNNING", "CANCELLED"]

    async def is_gone() -> bool:
        return not rig.store.exists(job.spec.export.key)

    await eventually(is_gone)


async def test_cancelled_export_that_waits_is_never_made(rig: Rig) -> None:
    training = await rig.training()
    first, second = await rig.create(training), await rig.create(training)
    third = await rig.create(training)
    await rig.cancel(second.name)
    for expected in (first, third):
        job = await rig.jobs.next()
        assert job.spec.export.export.name == expected.name
        job.succeed(rig.store, b"model")
    await rig.until(third.name, Export.SUCCEEDED)
    assert await rig.history(second.name) == ["QUEUED", "CANCELLED"]


async def test_finished_export_cannot_be_cancelled(rig: Rig) -> None:
    export = await rig.create(await rig.training())
    (await rig.jobs.next()).succeed(rig.store, b"model")
    await rig.until(export.name, Export.SUCCEEDED)
    await refused(rig.cancel(export.name), FailedPrecondition, "EXPORT_FINISHED", "SUCCEEDED")


@pytest.mark.parametrize("finished", [True, False])
async def test_deleted_export_is_gone_with_its_file(rig: Rig, finished: bool) -> None:
    training = await rig.training()
    export = await rig.create(training, "r")
    job = await rig.jobs.next()
    if finished:
        job.succeed(rig.store, b"model")
        await rig.until(export.name, Export.SUCCEEDED)
    else:
        rig.store.put(job.spec.export.key, b"half")
    await rig.delete(export.name)
    await refused(rig.get(export.name), NotFound, "NOT_FOUND")
    assert not (await rig.list_exports(training)).exports
    await refused(rig.delete(export.name), NotFound, "NOT_FOUND")
    await asyncio.wait_for(job.ended.wait(), 10)

    async def is_gone() -> bool:
        async with rig.db.connection() as conn:
            rows = await conn.fetchval("select count(*) from export")
        return not rows and not rig.store.exists(job.spec.export.key)

    await eventually(is_gone)
    last = "SUCCEEDED" if finished else "CANCELLED"
    assert await rig.history(export.name) == ["QUEUED", "RUNNING", last]


# --- watch


async def test_watch_shows_progress_and_every_state_and_ends(rig: Rig) -> None:
    export = await rig.create(await rig.training())
    job = await rig.jobs.next()
    states: list[int] = []
    stages: list[str] = []
    async with asyncio.timeout(20):
        async for item in rig.watch(export.name):
            if item.HasField("export"):
                states.append(item.export.state)
                if item.export.state == Export.RUNNING:
                    job.on_progress(Progress(stage="convert", percent=10))
            elif item.HasField("progress") and not job.result.done():
                stages.append(item.progress.stage)
                job.succeed(rig.store, b"model")
    assert states[-2:] == [Export.RUNNING, Export.SUCCEEDED]
    assert stages == ["convert"]


async def test_watch_resumes_after_its_cursor_without_gap_or_repetition(rig: Rig) -> None:
    training = await rig.training()
    busy = await rig.create(training)
    job = await rig.jobs.next()
    export = await rig.create(training)
    async with contextlib.aclosing(rig.watch(export.name)) as stream:
        first = await anext(stream)
    assert first.export.state == Export.QUEUED
    job.succeed(rig.store, b"model")
    (await rig.jobs.next()).succeed(rig.store, b"model")
    await rig.until(export.name, Export.SUCCEEDED)
    async with asyncio.timeout(20):
        rest = [item async for item in rig.watch(export.name, first.cursor)]
    assert [item.export.state for item in rest] == [Export.RUNNING, Export.SUCCEEDED]
    assert (await rig.get(busy.name)).state == Export.SUCCEEDED
    await refused(anext(rig.watch(export.name, "nonsense")), InvalidArgument, "BAD_CURSOR")


# --- download


@pytest.mark.parametrize("num_bytes", [1, 1 << 20, (5 << 19) + 7])
async def test_file_comes_back_in_chunks(rig: Rig, num_bytes: int) -> None:
    export = await rig.create(await rig.training(), format=Export.PYTORCH)
    content = bytes(index * 31 % 251 for index in range(num_bytes))
    (await rig.jobs.next()).succeed(rig.store, content)
    done = await rig.until(export.name, Export.SUCCEEDED)
    chunks = await rig.download(export.name)
    assert b"".join(chunk.data for chunk in chunks) == content
    assert len(chunks) == math.ceil(num_bytes / (1 << 20))
    assert chunks[0].content_type == "application/zip"
    assert done.file_name.endswith(".zip")


async def test_export_that_is_not_done_has_no_file(rig: Rig) -> None:
    export = await rig.create(await rig.training())
    await refused(
        rig.download(export.name), FailedPrecondition, "EXPORT_HAS_NO_FILE", "wait for it"
    )
    await rig.cancel(export.name)
    await refused(
        rig.download(export.name), FailedPrecondition, "EXPORT_HAS_NO_FILE", "export again"
    )


@pytest.mark.parametrize("damage", ["flipped", "shortened", "gone"])
async def test_damaged_file_is_data_loss_and_never_comes_whole(rig: Rig, damage: str) -> None:
    export = await rig.create(await rig.training())
    content = bytes(3 << 20)
    stored = (await rig.jobs.next()).succeed(rig.store, content)
    await rig.until(export.name, Export.SUCCEEDED)
    if damage == "gone":
        rig.store.delete(stored.key)
    else:
        damaged = b"\x01" + content[1:] if damage == "flipped" else content[:-1]
        rig.store.put(stored.key, damaged)
    got = b""
    with pytest.raises(DataLoss) as caught:
        request = export_pb2.DownloadExportRequest(name=export.name)
        with channels.translate():
            async for chunk in rig.stub.DownloadExport(request):
                got += chunk.data
    assert (caught.value.reason, caught.value.metadata["key"]) == ("OBJECT_LOST", stored.key)
    assert len(got) < len(content)
