"""Another service's guard, while the version service is there, away, and back again."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import pytest

from detflow import channels
from detflow.access import Role
from detflow.errors import DetflowError, NotFound, Unauthenticated, Unavailable
from detflow.events import Bus
from detflow.identities import Identities
from detflow.local.process import free_port
from detflow.store import ObjectStore
from detflow.v1 import access_pb2, metrics_pb2, metrics_pb2_grpc
from tests import access_rig
from tests.access_rig import OWNER, SERVICE, bearer
from tests.deployment_rig import eventually
from tests.metrics_rig import serving

TRAINING = "projects/default/versions/v/trainings/t"


async def test_who_was_known_goes_on_while_the_version_service_is_away(
    bus: Bus,
    nats_url: str,
    make_database_url: Callable[[str], Awaitable[str]],
    store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgetful = functools.partial(Identities, fresh_seconds=0.0)
    monkeypatch.setattr("detflow.guard.Identities", forgetful)
    listen = f"127.0.0.1:{free_port()}"
    settings = access_rig.settings(
        await make_database_url("version"), nats_url, tmp_path / "version", listen=listen
    )
    async with (
        serving(
            await make_database_url("metrics"),
            nats_url,
            store,
            tmp_path / "metrics",
            access="required",
            service_token=SERVICE,
            version_address=listen,
        ) as metrics,
        grpc.aio.insecure_channel(metrics.address) as channel,
    ):
        stub = metrics_pb2_grpc.MetricsServiceStub(channel)

        async def call(token: str, project: str = "default") -> None:
            name = TRAINING.replace("default", project)
            with channels.translate():
                await stub.ListEvaluations(
                    metrics_pb2.ListEvaluationsRequest(parent=name), metadata=bearer(token)
                )

        async def reason(token: str) -> str:
            try:
                await call(token)
            except DetflowError as error:
                return error.reason
            return ""

        async with access_rig.version_service(settings) as rig:
            key = await rig.create_key("projects/default", Role.VIEWER)
            other = await rig.create_key("projects/default", Role.VIEWER)
            with pytest.raises(NotFound, match=TRAINING):
                await call(key.token)
            with pytest.raises(NotFound, match="projects/other does not exist"):
                await call(key.token, "other")
            with pytest.raises(Unauthenticated):
                await call(OWNER + "x")
        with pytest.raises(NotFound, match=TRAINING):
            await call(key.token)
        with pytest.raises(NotFound, match="projects/other does not exist"):
            await call(key.token, "other")
        for stranger in (other.token, OWNER, "x" * 40):
            with pytest.raises(Unavailable) as caught:
                await call(stranger)
            assert caught.value.reason == "ACCESS_AWAY"
        with pytest.raises(NotFound, match=TRAINING):
            await call(SERVICE)
        async with access_rig.version_service(settings) as rig:
            await rig.access.DeleteApiKey(
                access_pb2.DeleteApiKeyRequest(name=key.name), metadata=bearer(OWNER)
            )
            # The other service may be waiting before it connects again.
            await eventually(lambda: reason(OWNER), lambda found: found == "NOT_FOUND")
            await eventually(lambda: reason(key.token), lambda found: found == "BAD_TOKEN")
