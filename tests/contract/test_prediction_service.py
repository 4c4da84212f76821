"""Images predicted through a real server: what is seen of them, what is refused, who waits."""

import asyncio
import errno
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from detflow import images
from detflow.errors import (
    Aborted,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    from_status,
)
from detflow.events import Bus
from detflow.v1 import prediction_pb2, version_pb2
from detflow.v1.common_pb2 import Progress
from services.metrics.prediction import images_in, predictors
from services.metrics.prediction import service as prediction_service
from tests import prediction_rig
from tests.export_rig import Export
from tests.prediction_rig import BOX_SIDE, POINTS, SIZE, Message, Rig, messages, probe
from tests.preprocess_samples import encode, with_orientation

RED, GREEN, BLUE = (0, 0, 255), (0, 255, 0), (255, 0, 0)  # BGR


@pytest.fixture
async def rig(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    tmp_path: Path,
) -> AsyncIterator[Rig]:
    url = await make_database_url("trainer")
    async with prediction_rig.running(nats_url=nats_url, database_url=url, folder=tmp_path) as one:
        yield one


def quarters(width: int = 128, height: int = 128) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Red and green above, blue and white below."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    return pixels


PNG = encode(".png", quarters())
EXPECTED = ["blue", "blue", "green", "green", "red", "red"]


def seen(found: prediction_pb2.Prediction) -> dict[tuple[str, int], float]:
    """What was found by class and by the point of the probe, which is told by the box."""
    scale = max(found.width_px, found.height_px) / SIZE
    result = {}
    for one in found.detections:
        centre = ((one.box.x1 + one.box.x2) / 2 / scale, (one.box.y1 + one.box.y2) / 2 / scale)
        distances = [abs(centre[0] - x) + abs(centre[1] - y) for x, y in POINTS]
        result[one.class_name, int(np.argmin(distances))] = one.confidence
    return result


async def refused(
    call: Awaitable[object], error: type[DetflowError], reason: str, *texts: str
) -> DetflowError:
    with pytest.raises(error) as caught:
        await call
    assert caught.value.reason == reason, caught.value.message
    for text in texts:
        assert text in caught.value.message
    return caught.value


# --- what is found


async def test_image_is_predicted_with_the_export_that_its_user_made(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETFLOW_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    training = await rig.ready()
    found = await rig.predict(training, PNG, file_name="사진.png", drawn_side_px=96)
    assert (found.file_name, found.width_px, found.height_px) == ("사진.png", 128, 128)
    assert (found.model, found.image_size_px, found.confidence_threshold) == ("yolov8n", SIZE, 0.25)
    assert seen(found) == pytest.approx(
        {("red", 0): 1, ("green", 1): 1, ("blue", 2): 1}
        | {(name, 3): 1 for name in ("red", "green", "blue")},
        abs=1e-6,
    )
    first = next(one for one in found.detections if one.class_name == "red" and one.box.x1 < 30)
    half = BOX_SIDE / 2
    assert [first.box.x1, first.box.y2] == pytest.approx([2 * (16 - half), 2 * (16 + half)])
    parts = found.latency
    assert parts.total_seconds > parts.decode_seconds + parts.inference_seconds > 0
    assert images.header_of(found.drawn_image).upright_size == (96, 96)
    assert rig.exports.jobs.started.empty()
    (process,) = predicting_processes()  # which decodes what strangers send
    assert "secret" not in str(process.environ())
    assert process.environ()["PATH"] == os.environ["PATH"]


async def test_threshold_overlap_and_number_are_the_callers(rig: Rig) -> None:
    training = await rig.ready()
    dim = encode(".png", (quarters() * 0.4).astype(np.uint8))
    assert len((await rig.predict(training, dim)).detections) == 6
    found = await rig.predict(training, dim, confidence_threshold=0.5)
    assert not found.detections and found.confidence_threshold == 0.5
    everything = await rig.predict(training, dim, confidence_threshold=0.0)
    assert everything.confidence_threshold == 0.0 and len(everything.detections) == 12
    assert len((await rig.predict(training, dim, max_detections=2)).detections) == 2


async def test_odd_images_are_converted_as_in_datasets(rig: Rig) -> None:
    training = await rig.ready()
    turned = with_orientation(encode(".jpg", np.rot90(quarters(96, 128))), 6)
    deep = encode(".png", quarters().astype(np.uint16) * 257)  # type: ignore[arg-type]
    clear = encode(".png", np.dstack((quarters(), np.full((128, 128), 0, np.uint8))))
    sent = messages(training, [turned, deep, clear], confidence_threshold=0.6)
    answers = [one.prediction for one in await rig.predict_all(sent)]
    assert (answers[0].width_px, answers[0].height_px) == (96, 128)
    assert sorted(one.class_name for one in answers[1].detections) == EXPECTED
    assert len(answers[2].detections) == 12  # all white
    top = [o.class_name for o in answers[0].detections if o.box.y2 < 64 and o.box.x2 < 48]
    assert top == ["red"]


async def test_model_sees_what_the_recipe_of_its_version_makes(rig: Rig) -> None:
    rig.others.recipe.grayscale = True
    rig.others.recipe.exact_size.CopyFrom(
        version_pb2.ExactSize(width_px=64, height_px=64, fit=version_pb2.ExactSize.FIT_STRETCH)
    )
    training = await rig.ready()
    wide = encode(".png", quarters(128, 32))
    found = await rig.predict(training, wide, confidence_threshold=0.01)
    by_class = {one.class_name for one in found.detections}
    assert by_class == {"blue", "green", "red"}
    confidences = sorted({round(one.confidence, 2) for one in found.detections})
    assert confidences == pytest.approx([0.11, 0.3, 0.59, 1.0], abs=0.02)  # luma of the four
    assert (found.width_px, found.height_px) == (128, 32)
    edges = {(one.box.x2, one.box.y2) for one in found.detections}  # in the image, not stretched
    assert edges == {(40, 10), (104, 10), (40, 26), (104, 26)}


async def test_images_of_one_call_are_answered_in_order_with_failures_among_them(
    rig: Rig,
) -> None:
    training = await rig.ready()
    sent = messages(training, [PNG, b"GIF89a", PNG[:200], b"", PNG], chunk_bytes=100)
    answers = [one.prediction for one in await rig.predict_all(sent)]
    assert [one.file_name for one in answers] == ["0", "1", "2", "3", "4"]
    assert [len(one.detections) for one in answers] == [6, 0, 0, 0, 6]
    problems = [from_status(one.failure.status) for one in answers[1:4]]
    assert [problem.reason for problem in problems] == [
        "UNSUPPORTED_IMAGE",
        "CORRUPT_IMAGE",
        "CORRUPT_IMAGE",
    ]
    assert problems[0].message == (
        "1: the content is a GIF; convert it to JPEG, PNG, BMP, WebP or TIFF"
    )


# --- the model


async def test_first_two_callers_have_one_export_made_and_see_its_progress(rig: Rig) -> None:
    training = await rig.training()
    call: Any = rig.stub.PredictImages(prediction_rig.as_stream(messages(training, [PNG])))
    other = asyncio.create_task(rig.predict(training, PNG))
    job = await rig.exports.jobs.next()
    made = job.spec.export.export
    assert (made.format, made.precision, made.image_size_px) == (Export.ONNX, Export.FP32, SIZE)
    assert made.dynamic and not made.end_to_end
    heard: Any = asyncio.ensure_future(call.read())
    while not heard.done():  # what is said before somebody watches is not heard
        job.on_progress(Progress(stage="convert", percent=40.0))
        await asyncio.wait({heard}, timeout=0.1)
    assert heard.result().progress.stage == "convert"
    job.succeed(rig.exports.store, probe())
    while not (answer := await call.read()).HasField("prediction"):
        pass
    assert len(answer.prediction.detections) == 6
    assert len((await other).detections) == 6
    assert len((await rig.exports.list_exports(training)).exports) == 1
    assert rig.exports.jobs.started.empty()


async def test_export_of_weights_that_the_training_had_before_is_not_used(rig: Rig) -> None:
    training = await rig.ready()
    rig.others.trainings[training].end_time.seconds += 60  # it went on, and ended again
    call = asyncio.create_task(rig.predict(training, PNG))
    (await rig.exports.jobs.next()).succeed(rig.exports.store, probe())
    assert len((await call).detections) == 6


async def test_training_must_be_there_and_have_weights(rig: Rig) -> None:
    training = await rig.training(has_weights=False)
    await refused(
        rig.predict(training, PNG), FailedPrecondition, "TRAINING_HAS_NO_WEIGHTS", "STOPPED"
    )
    nobody = training.replace("/t1", "/t2")
    await refused(rig.predict(nobody, PNG), NotFound, "NOT_FOUND", nobody)
    await refused(rig.predict_all(messages(nobody, [PNG])), NotFound, "NOT_FOUND")
    await refused(rig.predict("t1", PNG), InvalidArgument, "INVALID_FIELD", "header.training")


async def test_failed_export_is_told_and_tried_again_when_it_is_deleted(rig: Rig) -> None:
    training = await rig.training()
    call = asyncio.create_task(rig.predict(training, PNG))
    problem = FailedPrecondition("it differs", reason="EXPORT_DIFFERS")
    job = await rig.exports.jobs.next()
    job.result.set_exception(problem)
    told = await refused(call, FailedPrecondition, "EXPORT_FAILED", "it differs", "Delete it")
    await refused(rig.predict(training, PNG), FailedPrecondition, "EXPORT_FAILED")
    await rig.exports.delete(told.metadata["export"])
    call = asyncio.create_task(rig.predict(training, PNG))
    (await rig.exports.jobs.next()).succeed(rig.exports.store, probe())
    assert len((await call).detections) == 6


async def test_export_cancelled_meanwhile_ends_the_call_and_the_next_makes_another(
    rig: Rig,
) -> None:
    training = await rig.training()
    call = asyncio.create_task(rig.predict(training, PNG))
    await rig.exports.jobs.next()
    (export,) = (await rig.exports.list_exports(training)).exports
    await rig.exports.cancel(export.name)
    await refused(call, Aborted, "EXPORT_CANCELLED", export.name)
    call = asyncio.create_task(rig.predict(training, PNG))
    (await rig.exports.jobs.next()).succeed(rig.exports.store, probe())
    assert len((await call).detections) == 6


async def test_model_whose_export_was_deleted_is_made_again(rig: Rig) -> None:
    training = await rig.ready()
    await rig.predict(training, PNG)
    (export,) = (await rig.exports.list_exports(training)).exports
    await rig.exports.delete(export.name)
    assert len((await rig.predict(training, PNG)).detections) == 6  # it is in memory
    rig.exports.store.delete(export.object.key)
    (process,) = predicting_processes()
    process.kill()
    process.wait(10)
    call = asyncio.create_task(rig.predict(training, PNG))
    (await rig.exports.jobs.next()).succeed(rig.exports.store, probe())
    assert len((await call).detections) == 6


# --- what is refused


@pytest.mark.parametrize(
    ("image", "error", "reason", "text"),
    [
        (b"", InvalidArgument, "CORRUPT_IMAGE", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", InvalidArgument, "UNSUPPORTED_IMAGE", "SVG"),
        (b"%PDF-1.7", InvalidArgument, "UNSUPPORTED_IMAGE", "a PDF document"),
        (
            b"BM" + bytes(12) + (40).to_bytes(4, "little") + (40000).to_bytes(4, "little") * 2,
            ResourceExhausted,
            "IMAGE_TOO_LARGE",
            "40000x40000",
        ),
    ],
    ids=["empty", "svg", "pdf", "huge"],
)
def test_bad_images(image: bytes, error: type[DetflowError], reason: str, text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        images.check_size(images.header_of(image))
    assert caught.value.reason == reason


async def test_image_beyond_the_limit_is_refused_and_the_next_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_in, "MAX_IMAGE_BYTES", len(PNG))
    training = await rig.ready()
    large = PNG + b"\0"
    await refused(
        rig.predict(training, large), ResourceExhausted, "IMAGE_LIMIT", f"{len(PNG)} bytes"
    )
    answers = await rig.predict_all(messages(training, [large, PNG], chunk_bytes=50))
    assert from_status(answers[0].prediction.failure.status).reason == "IMAGE_LIMIT"
    assert len(answers[1].prediction.detections) == 6


async def test_messages_out_of_order_or_cut_off_are_refused(rig: Rig) -> None:
    training = await rig.ready()
    header, chunk, size = messages(training, [PNG])
    for sent, reason in (
        ([chunk], "INVALID_FIELD"),
        ([size], "INVALID_FIELD"),
        ([header, header], "INVALID_FIELD"),
        ([header, chunk], "INCOMPLETE_UPLOAD"),
        ([header, chunk, Message(size_bytes=1)], "INCOMPLETE_UPLOAD"),
        ([header, Message()], "INVALID_FIELD"),
    ):
        await refused(rig.predict_all(sent), InvalidArgument, reason)
    assert await rig.predict_all([]) == []
    too_sure = messages(training, [PNG], confidence_threshold=1.5)
    await refused(
        rig.predict_all(too_sure), InvalidArgument, "INVALID_FIELD", "confidence_threshold"
    )


# --- who waits


def predicting_processes() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "services.metrics.prediction" in child.cmdline()
    ]


async def until(happened: Callable[[], bool]) -> None:
    """Lets everything else go on until something has happened."""
    async with asyncio.timeout(20):
        while not happened():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0)


async def test_line_is_bounded_and_who_leaves_it_costs_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction_service, "MAX_CALLS", 2)
    asked: list[bytes] = []
    ask = predictors._ask

    async def count(child: Any, task: Any, data: bytes) -> bytes:
        asked.append(data)
        return await ask(child, task, data)

    monkeypatch.setattr(predictors, "_ask", count)
    training = await rig.ready()
    await rig.predict(training, PNG)
    asked.clear()
    (process,) = predicting_processes()
    process.suspend()
    first = asyncio.create_task(rig.predict(training, PNG, file_name="first"))
    await until(lambda: len(asked) == 1)
    second = asyncio.create_task(rig.predict(training, encode(".bmp", quarters())))
    await until(lambda: rig.predictors._line.qsize() == 1)
    error = await refused(rig.predict(training, PNG), ResourceExhausted, "BUSY", "try again")
    assert error.code.name == "RESOURCE_EXHAUSTED"
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    (waiting,) = rig.predictors._line._queue  # type: ignore[attr-defined]
    await until(waiting.result.done)
    process.resume()
    assert (await first).file_name == "first"
    assert len((await rig.predict(training, PNG)).detections) == 6
    assert asked == [PNG, PNG]


async def test_images_that_wait_take_bounded_memory(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = await rig.ready()
    rig.service._room = images_in.Room(2 * len(PNG) + 10)
    for _ in range(3):  # what was taken is given back
        assert len((await rig.predict(training, PNG)).detections) == 6
    answers = await rig.predict_all(messages(training, [PNG] * 5, chunk_bytes=100))
    assert [len(one.prediction.detections) for one in answers] == [6] * 5
    large = PNG + bytes(len(PNG) + 11)
    await refused(rig.predict(training, large), ResourceExhausted, "BUSY", "try again")
    assert len((await rig.predict(training, PNG)).detections) == 6


async def test_process_that_dies_is_replaced_and_its_image_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = await rig.ready()
    await rig.predict(training, PNG)
    (process,) = predicting_processes()
    process.suspend()
    call = asyncio.create_task(rig.predict(training, PNG))
    await asyncio.sleep(0)
    process.kill()
    assert len((await call).detections) == 6
    (other,) = predicting_processes()
    assert other != process
    other.kill()
    other.wait(10)

    def fill(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # what fails is told, and the next one goes on
        patch.setattr(rig.exports.store.__class__, "download", fill)
        await refused(rig.predict(training, PNG), ResourceExhausted, "DISK_FULL")
    assert len((await rig.predict(training, PNG)).detections) == 6


async def test_image_that_ends_processes_is_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = await rig.ready()
    for number, error, reason in (
        (signal.SIGSEGV, InvalidArgument, "CORRUPT_IMAGE"),
        (signal.SIGKILL, ResourceExhausted, "IMAGE_TOO_LARGE"),
    ):
        program = f"import os, sys; sys.stdin.buffer.read(9); os.kill(os.getpid(), {int(number)})"
        with monkeypatch.context() as patch:
            patch.setattr(predictors, "COMMAND", (sys.executable, "-c", program))
            await refused(rig.predict(training, PNG), error, reason, "a.jpg: ")
    assert len((await rig.predict(training, PNG)).detections) == 6
