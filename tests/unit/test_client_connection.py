"""How the SDK is imported, how long its calls take, and what it does while a service restarts."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import detflow
from detflow import errors
from detflow.client import cancelling
from detflow.local.process import free_port
from detflow.v1 import trainer_pb2_grpc, training_pb2


class Trainer(trainer_pb2_grpc.TrainerServiceServicer):
    """Answers when it is let."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()

    def GetTraining(self, request: Any, context: Any) -> Any:
        self.may_answer.wait(60)
        return training_pb2.Training(name=request.name)

    StopTraining = GetTraining


def serve(port: int, trainer: Trainer) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(2))
    trainer_pb2_grpc.add_TrainerServiceServicer_to_server(trainer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server


def client_of(port: int, timeout: float) -> detflow.Client:
    environ = {"DETFLOW_TRAINER_ADDRESS": f"127.0.0.1:{port}"}
    return detflow.Client("127.0.0.1:1", timeout=timeout, environ=environ)


def test_package_gives_the_client_and_loads_it_only_when_asked() -> None:
    code = (
        "import sys, detflow\n"
        "assert 'grpc' not in sys.modules and 'detflow.client' not in sys.modules\n"
        "detflow.Client('127.0.0.1:1', environ={}).close()\n"
        "assert not {'numpy', 'torch', 'matplotlib', 'rich'} & {*sys.modules}\n"
        "detflow.Clint\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "module 'detflow' has no attribute 'Clint'" in done.stderr


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_timeout_must_be_a_time(timeout: float) -> None:
    with pytest.raises(errors.InvalidArgument, match="above 0"):
        detflow.Client(timeout=timeout)


def test_call_ends_after_the_timeout_of_its_client() -> None:
    port, trainer = free_port(), Trainer()  # type: ignore[abstract]
    server = serve(port, trainer)
    with client_of(port, 30.0) as client:
        assert client.trainings.get("t").name == "t"
    trainer.may_answer.clear()
    with client_of(port, 0.2) as client:
        with pytest.raises(errors.DeadlineExceeded, match="allow more with Client"):
            client.trainings.get("t")
    trainer.may_answer.set()
    server.stop(None).wait()


def test_reads_go_on_while_a_service_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    port, trainer = free_port(), Trainer()  # type: ignore[abstract]
    servers = [serve(port, trainer)]
    with client_of(port, 30.0) as client:
        client.trainings.get("t")
        servers[0].stop(None).wait()
        # What changes something is not waited with: it might be done long after it was wanted.
        with pytest.raises(errors.Unavailable, match="cannot reach"):
            client.trainings.stop("t")
        monkeypatch.setattr(
            cancelling, "pause", lambda seconds: servers.append(serve(port, trainer))
        )
        assert client.trainings.get("t").name == "t"
    for server in servers[1:]:
        server.stop(None).wait()
    assert len(servers) > 1


def test_who_never_answered_is_not_waited_for() -> None:
    with client_of(free_port(), 60.0) as client:
        with pytest.raises(errors.Unavailable, match="start it with `detflow up`"):
            client.trainings.get("t")


def test_way_to_stop_must_be_one_of_three() -> None:
    with client_of(free_port(), 60.0) as client:
        with pytest.raises(errors.InvalidArgument, match="pause, finish, discard"):
            client.trainings.stop("t", mode="now")
