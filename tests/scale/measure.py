"""How long reading takes, through gRPC and HTTP, whatever else is stored."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from detflow import channels
from detflow.settings import Settings
from detflow.v1 import (
    metrics_pb2,
    metrics_pb2_grpc,
    preprocess_pb2,
    preprocess_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
    version_pb2,
    version_pb2_grpc,
)
from tests.benchmarks.rig import percentile
from tests.scale.fill import (
    LARGE,
    NUM_EPOCHS,
    VERSIONS_PER_TRAINING,
    training_name,
    version_name,
)

_WARM_UP = 10
_DEEP_PAGES = 3

Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of one kind of call."""

    p50: float
    p99: float


async def measure(port: int, token: str, num_versions: int, num_calls: int) -> dict[str, Times]:
    """Makes every kind of call many times, one after the other.

    Args:
        port: Port of the gateway.
        token: The owner's.
        num_versions: Versions there are; a tenth of them with a training.
        num_calls: Calls of each kind.

    Returns:
        By kind of call what it took.
    """
    settings = Settings(service_token=token)
    async with contextlib.AsyncExitStack() as stack:
        version, preprocess, trainer, metrics = [
            await stack.enter_async_context(
                channels.channel(f"127.0.0.1:{port + number}", settings)
            )
            for number in range(1, 5)
        ]
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {token}"}
            )
        )
        calls = {
            **await _of_versions(version_pb2_grpc.VersionServiceStub(version), num_versions),
            **_of_preprocessings(
                preprocess_pb2_grpc.PreprocessServiceStub(preprocess), num_versions
            ),
            **_of_trainings(trainer_pb2_grpc.TrainerServiceStub(trainer), num_versions),
            **_of_metrics(metrics_pb2_grpc.MetricsServiceStub(metrics), num_versions),
            **_by_http(http, num_versions),
        }
        return {name: await _time(call, num_calls) for name, call in calls.items()}


async def _time(call: Call, num_calls: int) -> Times:
    milliseconds = []
    for number in range(_WARM_UP + num_calls):
        start = time.perf_counter()
        await call()
        if number >= _WARM_UP:
            milliseconds.append(1000 * (time.perf_counter() - start))
    return Times(percentile(milliseconds, 50), percentile(milliseconds, 99))


async def _of_versions(
    stub: version_pb2_grpc.VersionServiceAsyncStub, num_versions: int
) -> dict[str, Call]:
    chance = random.Random(1)
    team = "projects/team-7"

    def listing(**query: Any) -> Call:
        async def call() -> None:
            request = version_pb2.ListVersionsRequest(parent=f"projects/{LARGE}", **query)
            page = await stub.ListVersions(request)
            assert page.versions, query

        return call

    async def get() -> None:
        name = version_name(chance.randint(1, num_versions))
        found = await stub.GetVersion(version_pb2.GetVersionRequest(name=name))
        assert found.name == name

    async def watch() -> None:
        stream = stub.WatchVersions(version_pb2.WatchVersionsRequest(parent=team))
        async for _ in stream:
            break
        stream.cancel()

    token = ""
    for _ in range(_DEEP_PAGES):  # as deep as a thousandth of all is large
        page = await stub.ListVersions(
            version_pb2.ListVersionsRequest(
                parent=f"projects/{LARGE}",
                page_size=max(1, min(1000, num_versions // 100)),
                page_token=token,
            )
        )
        token = page.next_page_token
    return {
        "GetVersion": get,
        "ListVersions, first page": listing(),
        "ListVersions, a deep page": listing(page_token=token),
        "ListVersions by mAP50": listing(order_by="metrics.map50 desc"),
        "ListVersions, mAP50 >= 0.5, by name": listing(
            filter="metrics.map50 >= 0.5", order_by="display_name"
        ),
        "ListVersions of a label": listing(filter='labels.site = "hall-10"'),
        "WatchVersions, first answer": watch,
    }


def _of_preprocessings(
    stub: preprocess_pb2_grpc.PreprocessServiceAsyncStub, num_versions: int
) -> dict[str, Call]:
    chance = random.Random(2)

    async def get() -> None:
        name = version_name(chance.randint(1, num_versions))
        await stub.GetPreprocessing(preprocess_pb2.GetPreprocessingRequest(version=name))

    return {"GetPreprocessing": get}


def _of_trainings(
    stub: trainer_pb2_grpc.TrainerServiceAsyncStub, num_versions: int
) -> dict[str, Call]:
    chance = random.Random(3)
    some = _some_training(chance, num_versions)

    async def get() -> None:
        name = some()
        found = await stub.GetTraining(trainer_pb2.GetTrainingRequest(name=name))
        assert found.name == name

    async def of_project() -> None:
        parent = f"projects/{LARGE}/versions/-"
        page = await stub.ListTrainings(trainer_pb2.ListTrainingsRequest(parent=parent))
        assert page.trainings

    async def watch() -> None:
        stream = stub.WatchTraining(trainer_pb2.WatchTrainingRequest(name=some()))
        async for item in stream:
            assert item.HasField("training")
            break
        stream.cancel()

    return {
        "GetTraining": get,
        "ListTrainings of a project": of_project,
        "WatchTraining, first answer": watch,
    }


def _of_metrics(
    stub: metrics_pb2_grpc.MetricsServiceAsyncStub, num_versions: int
) -> dict[str, Call]:
    some = _some_training(random.Random(4), num_versions)

    async def series() -> None:
        request = metrics_pb2.ListMetricSeriesRequest(training=some())
        found = await stub.ListMetricSeries(request)
        assert {len(one.values) for one in found.series} == {NUM_EPOCHS}

    async def evaluation() -> None:
        name = f"{some()}/evaluations/test"
        await stub.GetEvaluation(metrics_pb2.GetEvaluationRequest(name=name))

    async def watch() -> None:
        stream = stub.WatchMetrics(metrics_pb2.WatchMetricsRequest(training=some()))
        async for _ in stream:
            break
        stream.cancel()

    return {
        "ListMetricSeries": series,
        "GetEvaluation": evaluation,
        "WatchMetrics, first answer": watch,
    }


def _by_http(client: httpx.AsyncClient, num_versions: int) -> dict[str, Call]:
    chance = random.Random(5)
    some = _some_training(chance, num_versions)

    def getting(path: Callable[[], str]) -> Call:
        async def call() -> None:
            (await client.get(f"/v1/{path()}")).raise_for_status()

        return call

    return {
        "HTTP get of a version": getting(lambda: version_name(chance.randint(1, num_versions))),
        "HTTP list of versions": getting(lambda: f"projects/{LARGE}/versions"),
        "HTTP list of series": getting(lambda: f"{some()}/metrics"),
    }


def _some_training(chance: random.Random, num_versions: int) -> Callable[[], str]:
    last = num_versions // VERSIONS_PER_TRAINING - 1  # of those whose version is there too
    return lambda: training_name(chance.randint(1, last))
