"""Every RPC of the metrics service through a real server, with events as the trainer publishes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from detflow import channels, names
from detflow.errors import DetflowError, InvalidArgument, NotFound, from_status
from detflow.events import EVENTS_STREAM, Bus
from detflow.server import Service
from detflow.store import ObjectStore
from detflow.v1 import events_pb2, metrics_pb2, metrics_pb2_grpc, training_pb2
from detflow.v1.common_pb2 import StoredObject
from tests.metrics_fakes import FakeTraining, Row, ground_truth, parquet, put_bundle
from tests.metrics_rig import serving

Stub: TypeAlias = "metrics_pb2_grpc.MetricsServiceAsyncStub"  # known to type checkers only
Responses = list[metrics_pb2.WatchMetricsResponse]

# One box found exactly, one missed, one prediction of nothing: see test_hand_computed_figures.
TRUTH = ground_truth(2, 1, [(1, 0, [0, 0, 40, 40], 0), (2, 0, [0, 0, 40, 40], 0)])
ROWS: list[Row] = [(1, 0, 0.75, 0, 0, 40, 40), (2, 0, 0.5, 200, 200, 240, 240)]


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Bus,
    store: ObjectStore,
    tmp_path: Path,
) -> AsyncIterator[Service]:
    url = await make_database_url("metrics")
    async with serving(url, nats_url, store, tmp_path) as service:
        yield service


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Stub]:
    async with channels.channel(service.address) as channel:
        yield metrics_pb2_grpc.MetricsServiceStub(channel)


@pytest.fixture
def training(bus: Bus) -> FakeTraining:
    return FakeTraining(bus, names.new_id())


@pytest.fixture
def manifest(store: ObjectStore) -> StoredObject:
    return put_bundle(store, {"val": TRUTH, "test": TRUTH})


@pytest.fixture
def predictions(store: ObjectStore) -> StoredObject:
    return store.put("trainings/t/1/predictions.parquet", parquet(ROWS))


async def watch(stub: Stub, training: FakeTraining, cursor: str = "") -> Responses:
    """Watches until the stream ends; heartbeats left out."""
    request = metrics_pb2.WatchMetricsRequest(training=training.name, cursor=cursor)
    async with asyncio.timeout(30):
        with channels.translate():
            return [
                response
                async for response in stub.WatchMetrics(request)
                if response.WhichOneof("what") != "heartbeat"
            ]


async def first(stub: Stub, training: FakeTraining) -> metrics_pb2.MetricsSnapshot:
    """Reads the snapshot of a watch: it holds every event published before the call."""
    request = metrics_pb2.WatchMetricsRequest(training=training.name)
    call = stub.WatchMetrics(request)
    async with asyncio.timeout(20):
        with channels.translate():
            async for response in call:
                call.cancel()
                return response.snapshot
    raise AssertionError("the watch ended without a snapshot")


async def list_series(
    stub: Stub, name: str, *only: str
) -> dict[str, tuple[list[int], list[float]]]:
    with channels.translate():
        response = await stub.ListMetricSeries(
            metrics_pb2.ListMetricSeriesRequest(training=name, names=only)
        )
    assert [s.name for s in response.series] == sorted(s.name for s in response.series)
    return {s.name: (list(s.epochs), list(s.values)) for s in response.series}


def failure(evaluation: metrics_pb2.Evaluation) -> DetflowError:
    return from_status(evaluation.failure.status)


async def test_series_are_listed_by_name_and_epoch(stub: Stub, training: FakeTraining) -> None:
    await training.run()
    await training.epoch(1, val__map50=0.25, lr=0.01)
    await training.log("epoch 1 done")
    await training.epoch(2, val__map50=0.5, lr=0.005)
    await first(stub, training)
    assert await list_series(stub, training.name) == {
        "lr": ([1, 2], [0.01, 0.005]),
        "val/map50": ([1, 2], [0.25, 0.5]),
    }
    assert await list_series(stub, training.name, "lr", "unknown") == {
        "lr": ([1, 2], [0.01, 0.005])
    }


async def test_resumed_attempt_leaves_no_gap_no_double_and_no_tail(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    for epoch in range(1, 6):
        await training.epoch(epoch, lr=1.0, old=1.0)
    training.attempt = 2
    await training.epoch(3, lr=2.0)
    await first(stub, training)
    assert await list_series(stub, training.name) == {
        "lr": ([1, 2, 3], [1.0, 1.0, 2.0]),
        "old": ([1, 2], [1.0, 1.0]),
    }
    training.attempt = 1
    await training.epoch(4, lr=1.0)  # a straggler of the fenced attempt
    training.attempt = 2
    await training.epoch(4, lr=2.0)
    await first(stub, training)
    assert (await list_series(stub, training.name))["lr"] == ([1, 2, 3, 4], [1.0, 1.0, 2.0, 2.0])


async def test_hand_computed_figures_of_both_splits(
    stub: Stub, training: FakeTraining, manifest: StoredObject, predictions: StoredObject
) -> None:
    await training.run()
    await training.predictions(manifest, predictions, predictions)
    responses = await watch(stub, training)
    listed = await stub.ListEvaluations(metrics_pb2.ListEvaluationsRequest(parent=training.name))
    assert [e.name for e in listed.evaluations] == [
        f"{training.name}/evaluations/val",
        f"{training.name}/evaluations/test",
    ]
    for evaluation in listed.evaluations:
        assert evaluation.state == metrics_pb2.Evaluation.SUCCEEDED
        assert evaluation.attempt == 1
        # Precision 1 up to recall 1/2: 51 of 101 recall levels, at every IoU.
        assert evaluation.coco.map50_95 == pytest.approx(51 / 101)
        assert evaluation.coco.map50 == pytest.approx(51 / 101)
        assert evaluation.coco.ar_max100 == 0.5
        assert evaluation.coco.map_small == -1
        assert evaluation.best_f1 == metrics_pb2.OperatingPoint(
            confidence_threshold=0.75, precision=1.0, recall=0.5, f1=2 / 3
        )
        assert evaluation.classes[0].class_name == "class 0"
        assert evaluation.classes[0].ap50 == pytest.approx(51 / 101)
        counts = (evaluation.num_images, evaluation.num_ground_truths, evaluation.num_predictions)
        assert counts == (2, 2, 2)
        got = await stub.GetEvaluation(metrics_pb2.GetEvaluationRequest(name=evaluation.name))
        assert got == evaluation
    final = {e.name for r in responses for e in (r.evaluation, *r.snapshot.evaluations) if e.name}
    assert final == {e.name for e in listed.evaluations}


async def test_predictions_that_were_changed_give_a_failed_evaluation_with_data_loss(
    stub: Stub,
    bus: Bus,
    training: FakeTraining,
    manifest: StoredObject,
    predictions: StoredObject,
    store: ObjectStore,
) -> None:
    gone = StoredObject(key="trainings/t/1/gone.parquet", size_bytes=3, sha256="0" * 64)
    flipped = bytearray(store.get(predictions))
    flipped[7] ^= 1
    store.put(predictions.key, bytes(flipped))
    await training.run()
    await training.predictions(manifest, predictions, gone)
    await watch(stub, training)
    listed = await stub.ListEvaluations(metrics_pb2.ListEvaluationsRequest(parent=training.name))
    for evaluation, key in zip(listed.evaluations, (predictions.key, gone.key), strict=True):
        assert evaluation.state == metrics_pb2.Evaluation.FAILED
        error = failure(evaluation)
        assert (error.code.name, error.reason) == ("DATA_LOSS", "OBJECT_LOST")
        assert key in error.message
        assert not evaluation.HasField("coco")
    subject = f"detflow.v1.evaluation.{training.id}.completed"
    last = await bus.js.get_last_msg(EVENTS_STREAM, subject)
    assert last.headers is not None
    assert last.headers["detflow-seq"] == "2"
    assert last.headers["ce-subject"] == f"{training.name}/evaluations/test"
    published = events_pb2.Event.FromString(last.data or b"").evaluation
    assert published == listed.evaluations[1]


@pytest.mark.parametrize(
    ("splits", "rows", "reason"),
    [
        ({"test": TRUTH}, ROWS, "BAD_MANIFEST"),
        ({"val": {"images": []}, "test": TRUTH}, ROWS, "BAD_GROUND_TRUTH"),
        ({"val": TRUTH, "test": TRUTH}, [(99, 0, 0.5, 0, 0, 1, 1)], "BAD_PREDICTIONS"),
    ],
)
async def test_what_cannot_be_measured_fails_with_its_reason(
    stub: Stub,
    training: FakeTraining,
    store: ObjectStore,
    predictions: StoredObject,
    splits: dict[str, dict[str, Any]],
    rows: list[Row],
    reason: str,
) -> None:
    val = store.put("trainings/t/1/predictions-val.parquet", parquet(rows))
    await training.run()
    await training.predictions(put_bundle(store, splits), val, predictions)
    await watch(stub, training)
    name = f"{training.name}/evaluations/"
    got = await stub.GetEvaluation(metrics_pb2.GetEvaluationRequest(name=f"{name}val"))
    assert (got.state, failure(got).reason) == (metrics_pb2.Evaluation.FAILED, reason)
    other = await stub.GetEvaluation(metrics_pb2.GetEvaluationRequest(name=f"{name}test"))
    assert other.state == metrics_pb2.Evaluation.SUCCEEDED


async def test_watch_gives_snapshot_changes_and_from_each_cursor_the_exact_suffix(
    stub: Stub, training: FakeTraining, manifest: StoredObject, predictions: StoredObject
) -> None:
    await training.run()
    await training.epoch(1, lr=0.5)
    received: Responses = []
    request = metrics_pb2.WatchMetricsRequest(training=training.name)
    async with asyncio.timeout(40):
        async for response in stub.WatchMetrics(request):
            if response.WhichOneof("what") == "heartbeat":
                continue
            received.append(response)
            if len(received) == 1:
                await training.log("between")
                await training.epoch(2, lr=0.25)
            elif response.HasField("points"):
                await training.predictions(manifest, predictions, predictions)
    kinds = [response.WhichOneof("what") for response in received]
    assert kinds == ["snapshot", "points", "evaluation", "evaluation"]
    assert [list(s.epochs) for s in received[0].snapshot.series] == [[1]]
    assert received[1].points == metrics_pb2.MetricPoints(epoch=2, values={"lr": 0.25}, attempt=1)
    assert {r.evaluation.name.rsplit("/", 1)[1] for r in received[2:]} == {"val", "test"}
    for n, response in enumerate(received):
        assert await watch(stub, training, response.cursor) == received[n + 1 :]
    fresh = await watch(stub, training)
    assert [response.WhichOneof("what") for response in fresh] == ["snapshot"]
    assert len(fresh[0].snapshot.evaluations) == 2


async def test_watch_that_begins_at_any_moment_misses_and_repeats_nothing(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    num_epochs = 40

    async def publish() -> None:
        for epoch in range(1, num_epochs + 1):
            await training.epoch(epoch, lr=float(epoch))
        await training.state(training_pb2.Training.STOPPED)

    async def look() -> list[int]:
        received = await watch(stub, training)
        in_snapshot = [e for series in received[0].snapshot.series for e in series.epochs]
        return in_snapshot + [response.points.epoch for response in received[1:]]

    publishing = asyncio.create_task(publish())
    looks = []
    while not publishing.done():
        looks.append(asyncio.create_task(look()))
        await first(stub, training)
    await publishing
    for epochs in await asyncio.gather(*looks):
        assert epochs == list(range(1, num_epochs + 1))


@pytest.mark.parametrize("state", ["FAILED", "STOPPED", "PAUSED"])
async def test_watch_ends_when_the_training_rests_without_evaluation(
    stub: Stub, training: FakeTraining, state: str
) -> None:
    await training.run()
    await training.epoch(1, lr=0.5)
    request = metrics_pb2.WatchMetricsRequest(training=training.name)
    received = []
    async with asyncio.timeout(20):
        async for response in stub.WatchMetrics(request):
            received.append(response)
            if len(received) == 1:
                await training.state(training_pb2.Training.State.Value(state))
    assert [response.WhichOneof("what") for response in received] == ["snapshot"]
    assert await watch(stub, training, received[0].cursor) == []
    await training.state(training_pb2.Training.QUEUED)
    again = asyncio.create_task(watch(stub, training))
    training.attempt = 2
    await training.run()
    await training.epoch(2, lr=0.25)
    await training.state(training_pb2.Training.FAILED)
    last = (await again)[-1]
    assert last.points.epoch == 2 or 2 in last.snapshot.series[0].epochs


async def test_unknown_and_foreign_trainings_are_not_found_alike(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    await first(stub, training)
    unknown = "projects/p/versions/v1/trainings/nothing"
    foreign = training.name.replace("projects/p/", "projects/other/")
    elsewhere = training.name.replace("versions/v1/", "versions/v2/")
    for name in (unknown, foreign, elsewhere):
        calls: list[Awaitable[Any]] = [
            stub.ListMetricSeries(metrics_pb2.ListMetricSeriesRequest(training=name)),
            stub.ListEvaluations(metrics_pb2.ListEvaluationsRequest(parent=name)),
            stub.GetEvaluation(metrics_pb2.GetEvaluationRequest(name=f"{name}/evaluations/val")),
            anext(aiter(stub.WatchMetrics(metrics_pb2.WatchMetricsRequest(training=name)))),
        ]
        for call in calls:
            with pytest.raises(NotFound) as caught, channels.translate():
                await call
            assert caught.value.reason == "NOT_FOUND"
            assert caught.value.message == f"{name} does not exist"


async def test_evaluation_that_is_not_made_yet_is_not_found(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    await first(stub, training)
    with pytest.raises(NotFound) as caught, channels.translate():
        await stub.GetEvaluation(
            metrics_pb2.GetEvaluationRequest(name=f"{training.name}/evaluations/val")
        )
    assert caught.value.reason == "EVALUATION_NOT_FOUND"
    listed = await stub.ListEvaluations(metrics_pb2.ListEvaluationsRequest(parent=training.name))
    assert not listed.evaluations


async def test_bad_requests_name_their_field(stub: Stub, training: FakeTraining) -> None:
    long = "x" * 300
    cases: list[tuple[Awaitable[Any], str]] = [
        (
            stub.ListMetricSeries(metrics_pb2.ListMetricSeriesRequest(training="trainings/x")),
            "training",
        ),
        (
            stub.ListMetricSeries(
                metrics_pb2.ListMetricSeriesRequest(training=training.name, names=["x"] * 101)
            ),
            "names",
        ),
        (
            stub.GetEvaluation(
                metrics_pb2.GetEvaluationRequest(name=f"{training.name}/evaluations/train")
            ),
            "name",
        ),
        (stub.ListEvaluations(metrics_pb2.ListEvaluationsRequest()), "parent"),
        (
            anext(
                aiter(
                    stub.WatchMetrics(
                        metrics_pb2.WatchMetricsRequest(training=training.name, cursor=long)
                    )
                )
            ),
            "cursor",
        ),
    ]
    for call, field in cases:
        with pytest.raises(InvalidArgument) as caught, channels.translate():
            await call
        assert [v.field for v in caught.value.violations] == [field]
        assert caught.value.reason == "INVALID_FIELD"


async def test_tampered_cursor_is_refused(stub: Stub, training: FakeTraining) -> None:
    await training.run()
    await first(stub, training)
    with pytest.raises(InvalidArgument) as caught:
        await watch(stub, training, cursor="not-a-cursor")
    assert caught.value.reason == "BAD_CURSOR"
