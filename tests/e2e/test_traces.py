"""One trace leads from a request at the gateway to the epochs of the worker."""

import queue
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from detflow.local.demo_data import write_dataset
from tests.stack_rig import Stack, end, free_base_port, start

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
SECONDS = 120.0


@dataclass(frozen=True)
class Span:
    trace_id: str
    service: str
    name: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: queue.Queue[Span] = queue.Queue()

    def Export(self, request: Any, context: Any) -> Any:
        for group in request.resource_spans:
            named = {one.key: one.value.string_value for one in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.put(Span(span.trace_id.hex(), named["service.name"], span.name))
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    taken = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(taken, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield taken, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.fixture(scope="module")
def traced(
    collector: tuple[Collector, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    settings = {"DETFLOW_OTLP_ENDPOINT": collector[1]}
    running = start(tmp_path_factory.mktemp("data"), free_base_port(), settings)
    yield running
    end(running, signal.SIGTERM)


@pytest.mark.slow
def test_one_trace_leads_from_a_request_to_an_epoch(
    traced: Stack, collector: tuple[Collector, str], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shapes", num_images=12)
    with traced.client() as client:
        dataset = client.datasets.import_(tmp_path / "shapes", name="shapes")
        version = client.versions.wait(client.versions.create(dataset.name).name)
        hyperparameters = {"image_size": 64, "optimizer": "AdamW"}
        begun = httpx.post(
            f"{traced.url}/v1/{version.name}/trainings",
            json={"model": "yolov8n", "batchSize": 4, "epochs": 1,
                  "hyperparameters": hyperparameters},
            headers={**traced.headers, "traceparent": PARENT},
        )  # fmt: skip
        assert begun.status_code == 200, begun.text
        training = client.trainings.wait(begun.json()["name"])
        assert training.num_epochs_done == 1

    wanted = {
        ("detflow-gateway", "HTTP POST StartTraining"),
        ("detflow-trainer", "/detflow.v1.TrainerService/StartTraining"),
        ("detflow-trainer", "attempt"),
        ("detflow-worker", "worker of attempt 1"),
        ("detflow-trainer", "consume trainer-records"),  # of the epoch, among others
        ("detflow-metrics", "consume metrics-training"),
        ("detflow-version", "consume version-projection"),
    }
    seen: set[tuple[str, str]] = set()
    while not wanted <= seen:
        span = collector[0].spans.get(timeout=SECONDS)
        if span.trace_id == TRACE_ID:
            seen.add((span.service, span.name))
