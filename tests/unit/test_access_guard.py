"""A call on its way through the guard: what is written down, and what is closed."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from detflow.access import METADATA, Kind, Principal, Role, current
from detflow.errors import NotFound, PermissionDenied
from detflow.guard import Guard
from detflow.settings import Settings
from detflow.v1 import access_pb2, dataset_pb2, trainer_pb2

START = "/detflow.v1.TrainerService/StartTraining"
UPLOAD = "/detflow.v1.DatasetService/UploadArchive"


class Written:
    """What the audit log would hold."""

    def __init__(self) -> None:
        self.events: list[str] = []

    async def begun(self, entry: access_pb2.AuditEntry) -> None:
        self.events.append(f"begun {entry.resource}")

    async def ended(self, entry: access_pb2.AuditEntry, code: grpc.StatusCode) -> None:
        self.events.append(f"ended {entry.resource} {code.name}")

    async def refused(self, entry: access_pb2.AuditEntry, code: grpc.StatusCode) -> None:
        self.events.append(f"refused {entry.resource} {code.name}")


class Call:
    """The context of a call with a token."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ((METADATA, "Bearer editor"),)

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def guard(written: Written) -> Guard:
    editor = Principal(kind=Kind.API_KEY, subject="k", display_name="k", roles={"p1": Role.EDITOR})

    async def identify(token: str) -> Principal:
        return editor

    audit: Any = written
    return Guard(Settings(service_token="s" * 32), audit, identify)


def start(project_id: str, *, validate_only: bool = False) -> trainer_pb2.StartTrainingRequest:
    return trainer_pb2.StartTrainingRequest(
        parent=f"projects/{project_id}/versions/v", validate_only=validate_only
    )


async def test_call_is_written_down_before_and_after_and_a_trial_is_not(
    guard: Guard, written: Written
) -> None:
    async with guard.admit(START, Call(), "r") as admitted:
        await admitted.authorize(start("p1"))
        assert written.events == ["begun projects/p1/versions/v"]
        assert current().subject == "k"
    with pytest.raises(ZeroDivisionError):
        async with guard.admit(START, Call(), "r") as admitted:
            await admitted.authorize(start("p1"))
            _ = 1 / 0
    assert [event.rsplit(" ", 1)[-1] for event in written.events[1::2]] == ["OK", "INTERNAL"]
    written.events.clear()
    async with guard.admit(START, Call(), "r") as admitted:
        await admitted.authorize(start("p1", validate_only=True))
    assert not written.events
    with pytest.raises(NotFound):
        async with guard.admit(START, Call(), "r") as admitted:
            await admitted.authorize(start("p2"))
    assert written.events == ["refused projects/p2/versions/v NOT_FOUND"]


async def test_stream_that_turns_to_another_project_ends_and_its_entry_says_so(
    guard: Guard, written: Written
) -> None:
    with pytest.raises(NotFound, match="projects/p2 does not exist"):
        async with guard.admit(UPLOAD, Call(), "r") as admitted:
            await admitted.authorize(dataset_pb2.UploadArchiveRequest(parent="projects/p1"))
            await admitted.authorize(dataset_pb2.UploadArchiveRequest(chunk=b"x"))
            await admitted.authorize(dataset_pb2.UploadArchiveRequest(parent="projects/p2"))
    assert written.events == ["begun projects/p1", "ended projects/p1 NOT_FOUND"]


async def test_method_that_the_table_does_not_know_is_closed(guard: Guard) -> None:
    with pytest.raises(PermissionDenied):
        async with guard.admit("/detflow.v1.NewService/DoAll", Call(), "r") as admitted:
            await admitted.authorize(start("p1"))


def test_nobody_calls_outside_of_a_call() -> None:
    with pytest.raises(LookupError):
        current()
