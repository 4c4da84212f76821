"""Every answer and refusal of CompareTrainings through a real server."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from detflow import channels
from detflow.errors import (
    Cancelled,
    DeadlineExceeded,
    DetflowError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from detflow.events import Bus
from detflow.server import Service
from detflow.store import ObjectStore
from detflow.v1 import (
    common_pb2,
    comparison_pb2,
    comparison_pb2_grpc,
    events_pb2,
    metrics_pb2,
    metrics_pb2_grpc,
    training_pb2,
)
from services.metrics import comparison, comparison_service
from tests.metrics_fakes import FakeTraining, Row, ground_truth
from tests.metrics_rig import put_evaluation, serving

Stub: TypeAlias = "comparison_pb2_grpc.ComparisonServiceAsyncStub"  # known to type checkers only

COMPARE = "services.metrics.comparison_service.compare"
NUM_IMAGES = 60
A, B = (f"projects/p/versions/v/trainings/{letter}" for letter in "ab")
TRUTH = ground_truth(
    NUM_IMAGES, 2, [(image, image % 2, [0, 0, 40, 40], 0) for image in range(1, NUM_IMAGES + 1)]
)


def rows(num_found: int, *, others: int = 0) -> list[Row]:
    """Finds the boxes of the last images exactly, and as many things where there are none."""
    found: list[Row] = [
        (image, image % 2, 0.9 - image / 1000, 0, 0, 40, 40)
        for image in range(NUM_IMAGES - num_found + 1, NUM_IMAGES + 1)
    ]
    wrong: list[Row] = [(image, 0, 0.95, 200, 200, 240, 240) for image in range(1, others + 1)]
    return found + wrong


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    store: ObjectStore,
    tmp_path: Path,
) -> AsyncIterator[Service]:
    async with serving(await make_database_url("metrics"), nats_url, store, tmp_path) as service:
        yield service


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Stub]:
    async with channels.channel(service.address) as channel:
        yield comparison_pb2_grpc.ComparisonServiceStub(channel)


async def compare(stub: Stub, *trainings: str, **fields: Any) -> comparison_pb2.Comparison:
    request = comparison_pb2.CompareTrainingsRequest(
        parent="projects/p", trainings=trainings, **fields
    )
    with channels.translate():
        return await stub.CompareTrainings(request, timeout=30)


async def refusal(stub: Stub, *trainings: str, **fields: Any) -> DetflowError:
    with pytest.raises(DetflowError) as refused:
        await compare(stub, *trainings, **fields)
    return refused.value


async def test_better_training_is_told_with_intervals_classes_and_images(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    for split in ("val", "test"):
        await put_evaluation(service.db, store, A, TRUTH, rows(30, others=12), split=split)
        await put_evaluation(service.db, store, B, TRUTH, rows(58), split=split)
    found = await compare(stub, A, B)
    assert found.split == common_pb2.SPLIT_TEST
    assert (found.num_images, found.num_resamples, found.confidence_level) == (60, 1000, 0.95)
    assert [side.training for side in found.sides] == [A, B]
    assert found.sides[1].best_f1.recall == pytest.approx(58 / 60)
    assert [(d.training, d.metric) for d in found.deltas] == [
        (B, name) for name in ("map50_95", "map50", "map75", "precision", "recall", "f1")
    ]
    recall = found.deltas[4]
    assert (recall.baseline, recall.value) == pytest.approx((0.5, 58 / 60))
    assert recall.delta == pytest.approx(28 / 60)
    # Of 60 images drawn those that B alone finds are 28 give or take 2 * sqrt(60 p (1 - p)).
    spread = 1.96 * np.sqrt(28 / 60 * 32 / 60 / 60)
    assert (recall.low, recall.high) == pytest.approx(
        (recall.delta - spread, recall.delta + spread), abs=0.02
    )
    assert all(delta.significant and delta.low > 0 for delta in found.deltas)
    assert [(c.class_name, c.num_ground_truths) for c in found.class_deltas] == [
        ("class 0", 30),
        ("class 1", 30),
    ]
    for delta in found.class_deltas:
        assert delta.low <= delta.delta <= delta.high and delta.significant
        assert delta.delta == pytest.approx(delta.value - delta.baseline)
    # Found by B alone: image 3 to 30; of these and the others the first comes first.
    assert len(found.images) == 28
    assert list(found.images[0].f1s) == [0.0, 1.0]
    assert found.images[0].difference == 1.0
    assert found.images[0].image_path == "00000003.jpg"
    assert list(found.images[0].inference_results) == [
        f"{training}/inferenceResults/test-3" for training in (A, B)
    ]
    on_val = await compare(stub, A, B, split=common_pb2.SPLIT_VAL)
    assert on_val.split == common_pb2.SPLIT_VAL
    assert on_val.deltas == found.deltas


async def test_first_training_is_the_baseline_and_chance_is_not_called_a_difference(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    same = A.replace("/a", "/same")
    await put_evaluation(service.db, store, A, TRUTH, rows(40), split="test")
    await put_evaluation(service.db, store, same, TRUTH, rows(40), split="test")
    await put_evaluation(service.db, store, B, TRUTH, rows(39), split="test")
    found = await compare(stub, B, same, A)
    assert [d.training for d in found.deltas] == [same] * 6 + [A] * 6
    assert [d.training for d in found.class_deltas] == [same] * 2 + [A] * 2
    assert not any(d.significant for d in found.deltas)
    assert not any(d.significant for d in found.class_deltas)
    assert all(d.low <= 0 <= d.high for d in found.deltas)
    assert [list(image.f1s) for image in found.images] == [[0.0, 1.0, 1.0]]
    equal = await compare(stub, A, same)
    assert [(d.delta, d.low, d.high) for d in equal.deltas] == [(0.0, 0.0, 0.0)] * 6
    assert not equal.images


async def test_same_seed_gives_the_same_answer_and_what_was_compared_is_kept(
    service: Service, stub: Stub, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    compare_splits = comparison.compare

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return compare_splits(*arguments, **options)

    monkeypatch.setattr(COMPARE, counted)
    for training, num_found in ((A, 30), (B, 40)):
        await put_evaluation(service.db, store, training, TRUTH, rows(num_found), split="test")
    options = {"num_resamples": 50, "confidence_level": 0.8, "seed": -7}
    first, again = [await compare(stub, A, B, **options) for _ in range(2)]
    assert first == again
    assert (first.num_resamples, first.confidence_level) == (50, 0.8)
    assert len(calls) == 1
    wider = await compare(stub, A, B, **(options | {"confidence_level": 0.99}))
    other = await compare(stub, A, B, **(options | {"seed": 8}))
    assert len(calls) == 3
    assert wider.deltas[4].low < first.deltas[4].low < first.deltas[4].high < wider.deltas[4].high
    assert other.deltas[4].low != first.deltas[4].low


async def test_class_without_ground_truth_has_no_delta(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    truth = ground_truth(2, 2, [(1, 0, [0, 0, 40, 40], 0)])
    wrong: list[Row] = [(2, 0, 0.5, 0, 0, 40, 40)]
    for training in (A, B):
        await put_evaluation(service.db, store, training, truth, wrong, split="test")
    found = await compare(stub, A, B)
    empty = found.class_deltas[1]
    assert (empty.baseline, empty.value, empty.delta, empty.low, empty.high) == (-1, -1, 0, 0, 0)
    assert (empty.num_ground_truths, empty.significant) == (0, False)


async def test_parameters_that_differ_are_listed(
    service: Service, stub: Stub, store: ObjectStore, bus: Bus
) -> None:
    first, second = FakeTraining(bus, "dfirst"), FakeTraining(bus, "dsecond")
    for training, model in ((first, "yolov8n"), (second, "yolov8s")):
        message = training_pb2.Training(
            name=training.name,
            revision=1,
            state=training_pb2.Training.QUEUED,
            model=model,
            batch_size=16,
            epochs=20,
        )
        if training is first:
            message.warm_start.training = A
        message.hyperparameters.update(
            {"seed": 0.0, "lr0": 0.01 if training is first else 0.1, "cos_lr": training is first}
        )
        if training is second:
            message.hyperparameters.update({"momentum": 0.9})
        await training.publish("state_changed", events_pb2.Event(training=message))
        await heard(service, training)
        await put_evaluation(service.db, store, training.name, TRUTH, rows(30), split="test")
    found = await compare(stub, first.name, second.name)
    assert [side.model for side in found.sides] == ["yolov8n", "yolov8s"]
    assert [(one.name, list(one.values)) for one in found.parameters] == [
        ("model", ["yolov8n", "yolov8s"]),
        ("warm_start", [A, ""]),
        ("cos_lr", ["true", "false"]),
        ("lr0", ["0.01", "0.1"]),
        ("momentum", ["", "0.9"]),
    ]


async def heard(service: Service, training: FakeTraining) -> None:
    """Waits until what was published of a training has been applied."""
    async with channels.channel(service.address) as channel:
        stub = metrics_pb2_grpc.MetricsServiceStub(channel)
        watch = stub.WatchMetrics(metrics_pb2.WatchMetricsRequest(training=training.name))
        async with asyncio.timeout(20):
            async for _ in watch:
                watch.cancel()
                return


async def test_trainings_on_other_data_are_refused_saying_what_differs(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    boxes = [(image, image % 2, [0.0, 0, 40, 40], 0) for image in range(1, NUM_IMAGES + 1)]
    moved = [(1, 1, [1.0, 0, 40, 40], 0), *boxes[1:]]
    larger = ground_truth(NUM_IMAGES, 2, boxes)
    for image in larger["images"]:
        image["width"] = 1280
    others = {
        "their boxes are not the same": ground_truth(NUM_IMAGES, 2, moved),
        "their classes are not the same": ground_truth(NUM_IMAGES, 3, boxes),
        "60 and 61 images, of which 60 are in both": ground_truth(NUM_IMAGES + 1, 2, boxes),
        "their images have other sizes": larger,
    }
    await put_evaluation(service.db, store, A, TRUTH, rows(1), split="test")
    for number, (words, truth) in enumerate(others.items()):
        other = f"projects/p/versions/w/trainings/other{number}"
        await put_evaluation(service.db, store, other, truth, rows(1), split="test")
        refused = await refusal(stub, A, other)
        assert isinstance(refused, FailedPrecondition)
        assert refused.reason == "DIFFERENT_DATA"
        for expected in (words, f"{A}/evaluations/test", f"{other}/evaluations/test"):
            assert expected in refused.message
    same_data = "projects/p/versions/w/trainings/samedata"
    await put_evaluation(service.db, store, same_data, TRUTH, rows(1), split="test")
    versions = (await compare(stub, A, same_data)).parameters
    assert [(one.name, list(one.values)) for one in versions] == [
        ("version", ["projects/p/versions/v", "projects/p/versions/w"])
    ]


async def test_what_cannot_be_compared_is_refused(
    service: Service, stub: Stub, store: ObjectStore
) -> None:
    await put_evaluation(service.db, store, A, TRUTH, rows(1), split="test")
    refused = await refusal(stub, A, B)
    assert isinstance(refused, NotFound)
    assert B in refused.message
    await put_evaluation(service.db, store, B, TRUTH, rows(1), split="val")
    refused = await refusal(stub, A, B)
    assert isinstance(refused, NotFound)
    assert refused.reason == "EVALUATION_NOT_FOUND"
    assert f"{B}/evaluations/test" in refused.message

    await put_evaluation(service.db, store, B, TRUTH, rows(1), split="test")
    async with service.db.connection() as conn:
        await conn.execute("update evaluation set matches = null where training_id = 'b'")
    refused = await refusal(stub, A, B)
    assert isinstance(refused, FailedPrecondition)
    assert refused.reason == "NO_MATCHES"
    assert f"{B}/evaluations/test" in refused.message

    elsewhere = "projects/q/versions/v/trainings/a"
    for trainings, field in (
        ((A, A), "trainings"),
        ((A,), "trainings"),
        ((A, "a"), "trainings[1]"),
        ((A, elsewhere), "trainings[1]"),
        (tuple(f"{A}{n}" for n in range(11)), "trainings"),
    ):
        refused = await refusal(stub, *trainings)
        assert isinstance(refused, InvalidArgument)
        assert [one.field for one in refused.violations] == [field]
    for fields in (
        {"num_resamples": -1},
        {"num_resamples": 10_001},
        {"confidence_level": 1.0},
        {"confidence_level": float("nan")},
        {"split": common_pb2.SPLIT_TRAIN},
    ):
        refused = await refusal(stub, A, B, **fields)
        assert isinstance(refused, InvalidArgument)
        assert [one.field for one in refused.violations] == list(fields)


async def test_more_resamples_than_fit_into_memory_are_refused(
    service: Service, stub: Stub, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_service, "_MAX_DRAWN", 1000)
    for training in (A, B):
        await put_evaluation(service.db, store, training, TRUTH, rows(1), split="test")
    assert (await compare(stub, A, B, num_resamples=250)).num_resamples == 250
    refused = await refusal(stub, A, B, num_resamples=251)
    assert isinstance(refused, InvalidArgument)
    assert refused.reason == "TOO_MANY_RESAMPLES"
    assert "at most 250" in refused.message


async def test_comparison_that_takes_too_long_ends_and_says_what_to_do(
    service: Service, stub: Stub, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(*_: Any, cancelled: threading.Event, **__: Any) -> None:
        assert cancelled.wait(20)
        ended.set()

    monkeypatch.setattr(COMPARE, endless)
    monkeypatch.setattr(comparison_service, "_MAX_SECONDS", 0.1)
    for training in (A, B):
        await put_evaluation(service.db, store, training, TRUTH, rows(1), split="test")
    refused = await refusal(stub, A, B, num_resamples=5000)
    assert isinstance(refused, DeadlineExceeded)
    assert refused.reason == "TOO_SLOW"
    assert "5000 resamples" in refused.message and "ask for fewer" in refused.message
    assert await asyncio.to_thread(ended.wait, 20)


async def test_work_ends_when_the_caller_goes_away(
    service: Service, stub: Stub, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, ended = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    compare_splits = comparison.compare

    def watched(*arguments: Any, cancelled: threading.Event, **options: Any) -> Any:
        loop.call_soon_threadsafe(started.set)
        assert cancelled.wait(20)
        found = compare_splits(*arguments, cancelled=cancelled, **options)
        loop.call_soon_threadsafe(ended.set)
        return found

    monkeypatch.setattr(COMPARE, watched)
    for training, num_found in ((A, 30), (B, 40)):
        await put_evaluation(service.db, store, training, TRUTH, rows(num_found), split="test")
    call = asyncio.create_task(compare(stub, A, B, num_resamples=10_000))
    async with asyncio.timeout(20):
        await started.wait()
        call.cancel()
        await ended.wait()
    with pytest.raises((asyncio.CancelledError, Cancelled)):
        await call
    monkeypatch.setattr(COMPARE, compare_splits)
    found = await compare(stub, A, B, num_resamples=10_000)  # nothing half done was kept
    assert found.deltas[4].significant
