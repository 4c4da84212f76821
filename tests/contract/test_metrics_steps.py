"""Series by step through a real server: listed, thinned, read as columns and watched."""

import asyncio
from typing import Any

import numpy as np
import pytest

from detflow import channels
from detflow.client import Client
from detflow.errors import InvalidArgument, NotFound, ResourceExhausted
from detflow.server import Service
from detflow.v1 import metrics_pb2, training_pb2
from tests.contract.test_metrics_service import Responses, Stub, first, service, stub, training
from tests.metrics_fakes import FakeTraining

__all__ = ["service", "stub", "training"]

LOSS = "train/box_loss"


async def resume(training: FakeTraining) -> None:
    """An epoch and a half of ten steps each, and an attempt that does the last three again."""
    await training.run()
    await training.steps(1, 1, lr=[0.5] * 10, train__box_loss=[*map(float, range(1, 11))])
    await training.epoch(1, lr=0.5)
    await training.steps(2, 1, lr=[0.5] * 6, train__box_loss=[99.0] * 6)
    training.attempt = 2
    await training.steps(2, 4, lr=[0.25] * 3, train__box_loss=[3.0, 2.0, 1.0])


async def list_steps(
    stub: Stub, training: FakeTraining, **more: Any
) -> list[metrics_pb2.MetricSeries]:
    request = metrics_pb2.ListMetricSeriesRequest(
        training=training.name, resolution=metrics_pb2.RESOLUTION_STEP, **more
    )
    with channels.translate():
        return list((await stub.ListMetricSeries(request)).series)


async def watch_steps(stub: Stub, training: FakeTraining, cursor: str = "") -> Responses:
    """Watches until the stream ends; heartbeats left out."""
    request = metrics_pb2.WatchMetricsRequest(
        training=training.name, cursor=cursor, with_steps=True
    )
    async with asyncio.timeout(30):
        with channels.translate():
            return [
                response
                async for response in stub.WatchMetrics(request)
                if response.WhichOneof("what") != "heartbeat"
            ]


async def test_steps_are_listed_and_thinned_without_what_a_resume_did_again(
    stub: Stub, training: FakeTraining
) -> None:
    await resume(training)
    await first(stub, training)
    lr, loss = await list_steps(stub, training)
    assert (lr.name, loss.name) == ("lr", LOSS)
    assert list(loss.values) == [*range(1, 11), 99, 99, 99, 3, 2, 1]
    assert list(loss.positions) == [
        *(number / 10 for number in range(1, 11)),
        *(1 + number / 10 for number in range(1, 7)),
    ]
    assert (loss.num_points, list(loss.epochs)) == (16, [])
    (thin,) = await list_steps(stub, training, names=[LOSS, "unknown"], max_points=6)
    assert thin.num_points == 16
    # Stretches end at 0.85 and 1.6: the first value and the eighth, the last and the 99.
    points = dict(zip(thin.positions, thin.values, strict=True))
    assert points == {0.1: 1.0, 0.8: 8.0, 1.1: 99.0, 1.6: 1.0}


async def test_too_many_values_for_one_answer_are_refused_with_the_way_out(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    names = {f"name{number:02}": [0.0] * 5_000 for number in range(21)}
    for first_step in (1, 5_001):
        await training.steps(1, first_step, num_steps=10_000, **names)
    await first(stub, training)
    with pytest.raises(ResourceExhausted, match="max_points") as caught:
        await list_steps(stub, training, max_points=100_000)
    assert caught.value.reason == "TOO_MANY_VALUES"
    found = await list_steps(stub, training)
    assert {one.num_points for one in found} == {10_000}


async def test_client_reads_columns_that_numpy_takes_without_a_copy(
    service: Service, stub: Stub, training: FakeTraining
) -> None:
    await resume(training)
    await first(stub, training)
    (loss,) = await list_steps(stub, training, names=[LOSS])

    def read() -> None:
        with Client(environ={"DETFLOW_METRICS_ADDRESS": service.address}) as client:
            by_step = client.metrics.columns(training.name)
            by_epoch = client.metrics.columns(training.name, resolution="epoch")
            assert [*by_step] == ["lr", LOSS] and [*by_epoch] == ["lr"]
            assert [*client.metrics.columns(training.name, ["lr", "unknown"])] == ["lr"]
            with pytest.raises(NotFound):
                client.metrics.columns(f"{training.name}x")
            with pytest.raises(InvalidArgument, match="epoch or step"):
                client.metrics.columns(training.name, resolution="day")  # type: ignore[arg-type]
        columns = by_step[LOSS]
        assert columns.values.tolist() == list(loss.values)
        assert columns.positions.tolist() == list(loss.positions)
        assert columns.epochs.tolist() == [1] * 10 + [2] * 6
        assert columns.steps.tolist() == [*range(1, 11), *range(1, 7)]
        for column, kind in ((columns.values, np.float64), (columns.steps, np.int32)):
            view = np.asarray(column)
            assert view.dtype == kind and np.shares_memory(view, np.asarray(column))
        epochs = by_epoch["lr"]
        assert (epochs.values.tolist(), epochs.epochs.tolist()) == ([0.5], [1])
        assert (len(epochs.steps), len(epochs.positions)) == (0, 0)

    await asyncio.to_thread(read)


async def test_columns_come_in_messages_below_a_mebibyte(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    values = [float(number) for number in range(50_000)]
    await training.steps(1, 1, num_steps=50_000, lr=values)
    await first(stub, training)
    request = metrics_pb2.ReadMetricColumnsRequest(
        training=training.name, resolution=metrics_pb2.RESOLUTION_STEP
    )
    parts = [part async for part in stub.ReadMetricColumns(request)]
    assert len(parts) == 2 and sum(part.num_points for part in parts) == 50_000
    assert all(200_000 < part.ByteSize() < 1 << 20 for part in parts)
    assert np.frombuffer(b"".join(part.values for part in parts), "<f8").tolist() == values


async def test_watch_with_steps_goes_on_over_a_resume_and_from_each_cursor(
    stub: Stub, training: FakeTraining
) -> None:
    await training.run()
    await training.steps(1, 1, train__box_loss=[5.0, 4.0])
    received: Responses = []
    request = metrics_pb2.WatchMetricsRequest(training=training.name, with_steps=True, max_points=1)
    async with asyncio.timeout(40):
        async for response in stub.WatchMetrics(request):
            received.append(response)
            if response.HasField("snapshot"):
                await training.steps(1, 3, train__box_loss=[3.0] * 8)
                await training.epoch(1, lr=0.5)
                training.attempt = 2
                await training.steps(1, 9, train__box_loss=[2.0] * 2)
                await training.epoch(1, lr=0.25)
                await training.state(training_pb2.Training.STOPPED)
    kinds = [response.WhichOneof("what") for response in received]
    assert kinds == ["snapshot", "steps", "points", "steps", "points"]
    (in_snapshot,) = received[0].snapshot.step_series
    assert (list(in_snapshot.values), in_snapshot.num_points) == ([4.0], 2)
    blocks = [response.steps for response in received if response.HasField("steps")]
    assert [(b.attempt, b.epoch, b.first_step, b.num_steps) for b in blocks] == [
        (1, 1, 3, 10),
        (2, 1, 9, 10),
    ]
    assert list(blocks[1].columns[0].values) == [2.0, 2.0]
    for n, response in enumerate(received):
        assert await watch_steps(stub, training, response.cursor) == received[n + 1 :]
    (fresh,) = await watch_steps(stub, training)
    assert list(fresh.snapshot.step_series[0].values) == [5.0, 4.0, *[3.0] * 6, 2.0, 2.0]
    plain = metrics_pb2.WatchMetricsRequest(training=training.name, cursor=received[0].cursor)
    without = [one.WhichOneof("what") async for one in stub.WatchMetrics(plain)]
    assert without == ["points", "points"]
