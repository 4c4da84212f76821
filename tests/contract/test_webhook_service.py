"""Every RPC of the webhook service through a real server, the SDK and the command line."""

import asyncio
import base64
import json
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from detflow import channels
from detflow.cli import main
from detflow.client import Client
from detflow.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from detflow.events import Bus
from detflow.interceptors import Boundary
from detflow.names import new_id
from detflow.postgres import Database
from detflow.server import Service
from detflow.store import ObjectStore
from detflow.v1 import training_pb2, webhook_pb2, webhook_pb2_grpc
from detflow.v1.project_pb2_grpc import add_ProjectServiceServicer_to_server
from services.metrics.webhooks.store import MAX_WEBHOOKS
from services.version.projects import ProjectService
from tests.metrics_fakes import FakeTraining, ground_truth, parquet, put_bundle
from tests.metrics_rig import serving
from tests.webhook_rig import Receiver, receiving

Stub: TypeAlias = "webhook_pb2_grpc.WebhookServiceAsyncStub"  # known to type checkers only
PARENT = "projects/default"
State = training_pb2.Training
Webhook = webhook_pb2.Webhook


@pytest.fixture
async def version_address(
    make_database: Callable[[str], Awaitable[Database]],
) -> AsyncIterator[str]:
    """The projects of the version service; there is `default`."""
    server = grpc.aio.server(interceptors=[Boundary()])
    add_ProjectServiceServicer_to_server(ProjectService(await make_database("version")), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture
async def service(
    make_database_url: Callable[[str], Awaitable[str]],
    nats_url: str,
    bus: Bus,
    store: ObjectStore,
    tmp_path: Path,
    version_address: str,
) -> AsyncIterator[Service]:
    url = await make_database_url("metrics")
    settings = {
        "version_address": version_address,
        "webhook_hosts": "loopback",
        "log_level": "info",
    }
    async with serving(url, nats_url, store, tmp_path, **settings) as service:
        yield service


@pytest.fixture
async def stub(service: Service) -> AsyncIterator[Stub]:
    async with channels.channel(service.address) as channel:
        yield webhook_pb2_grpc.WebhookServiceStub(channel)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving(200) as one:
        yield one


async def create(
    stub: Stub, url: str, *, request_id: str = "", parent: str = PARENT, **fields: Any
) -> webhook_pb2.Webhook:
    request = webhook_pb2.CreateWebhookRequest(
        parent=parent, webhook=Webhook(url=url, **fields), request_id=request_id
    )
    with channels.translate():
        return await stub.CreateWebhook(request)


async def update(stub: Stub, webhook: webhook_pb2.Webhook, *paths: str) -> webhook_pb2.Webhook:
    request = webhook_pb2.UpdateWebhookRequest(webhook=webhook, update_mask=FieldMask(paths=paths))
    with channels.translate():
        return await stub.UpdateWebhook(request)


async def get(stub: Stub, name: str) -> webhook_pb2.Webhook:
    with channels.translate():
        return await stub.GetWebhook(webhook_pb2.GetWebhookRequest(name=name))


async def list_webhooks(stub: Stub, parent: str = PARENT, **fields: Any) -> Any:
    request = webhook_pb2.ListWebhooksRequest(parent=parent, **fields)
    with channels.translate():
        return await stub.ListWebhooks(request)


async def rotate(stub: Stub, name: str) -> webhook_pb2.Webhook:
    with channels.translate():
        return await stub.RotateWebhookSecret(webhook_pb2.RotateWebhookSecretRequest(name=name))


async def send_test(stub: Stub, name: str) -> webhook_pb2.WebhookDelivery:
    with channels.translate():
        return await stub.TestWebhook(webhook_pb2.TestWebhookRequest(name=name))


async def test_secret_is_in_the_answer_to_the_creation_and_nowhere_else(
    stub: Stub, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    made = await create(stub, receiver.url, event_types=[3, 1])
    assert made.name.startswith(f"{PARENT}/webhooks/")
    assert (made.display_name, made.etag) == ("127.0.0.1", '"1"')
    assert [*made.event_types] == [Webhook.TRAINING_COMPLETED, Webhook.TRAINING_STOPPED]
    rotated = await rotate(stub, made.name)
    await send_test(stub, made.name)
    secrets = [made.secret, rotated.secret]
    assert all(len(secret) == 50 and secret.startswith("whsec_") for secret in secrets)
    shown = await get(stub, made.name)
    (listed,) = (await list_webhooks(stub)).webhooks
    updated = await update(stub, Webhook(name=made.name, display_name="x"), "display_name")
    assert [one.secret for one in (shown, listed, updated)] == ["", "", ""]
    assert "webhook created" in caplog.text and made.name in caplog.text
    for secret in secrets:
        key = secret.removeprefix("whsec_")
        for spelling in (key, repr(base64.b64decode(key)), base64.b64decode(key).hex()):
            assert spelling not in caplog.text


async def test_request_id_makes_creation_safe_to_repeat(stub: Stub, receiver: Receiver) -> None:
    made = await create(stub, receiver.url, request_id="r", display_name="a")
    again = await asyncio.gather(
        *(create(stub, receiver.url, request_id="r", display_name="a") for _ in range(4))
    )
    assert all(one == made for one in again) and made.secret  # the first answer may be lost
    with pytest.raises(InvalidArgument, match="request_id") as caught:
        await create(stub, receiver.url, request_id="r", display_name="b")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    await rotate(stub, made.name)
    assert (await create(stub, receiver.url, request_id="r", display_name="a")).secret == ""


async def test_concurrent_creations_with_one_request_id_make_one(
    stub: Stub, receiver: Receiver
) -> None:
    made = await asyncio.gather(*(create(stub, receiver.url, request_id="r") for _ in range(8)))
    assert len({one.name for one in made}) == len({one.secret for one in made}) == 1
    assert len((await list_webhooks(stub)).webhooks) == 1


async def test_a_project_has_no_more_webhooks_than_it_may(stub: Stub, receiver: Receiver) -> None:
    for number in range(MAX_WEBHOOKS - 2):
        await create(stub, receiver.url, request_id=f"r{number}")
    outcomes = await asyncio.gather(
        *(create(stub, receiver.url) for _ in range(6)), return_exceptions=True
    )
    refused = [one for one in outcomes if isinstance(one, ResourceExhausted)]
    assert len(refused) == 4 and {one.reason for one in refused} == {"TOO_MANY_WEBHOOKS"}
    assert (await create(stub, receiver.url, request_id="r0")).name  # it is there already
    last = (await list_webhooks(stub, page_size=1)).webhooks[0]
    with channels.translate():
        await stub.DeleteWebhook(webhook_pb2.DeleteWebhookRequest(name=last.name))
    await create(stub, receiver.url)


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"url": ""}, "webhook.url", "BAD_URL"),
    ({"url": "ftp://example.com"}, "webhook.url", "BAD_URL"),
    ({"url": "http://a:b@example.com/"}, "webhook.url", "BAD_URL"),
    ({"url": "http://10.0.0.1/"}, "webhook.url", "HOST_NOT_ALLOWED"),
    ({"url": "http://8.8.8.8/"}, "webhook.url", "HOST_NOT_ALLOWED"),
    ({"display_name": "a\nb"}, "webhook.display_name", "BAD_NAME"),
    ({"display_name": " "}, "webhook.display_name", "BAD_NAME"),
    ({"event_types": [0]}, "webhook.event_types[0]", "INVALID_FIELD"),
    ({"event_types": [9]}, "webhook.event_types[0]", "INVALID_FIELD"),
    ({"event_types": [1, 1]}, "webhook.event_types", "INVALID_FIELD"),
]


async def test_bad_field_is_named(stub: Stub) -> None:
    for fields, field, reason in BAD_FIELDS:
        with pytest.raises(InvalidArgument) as caught:
            await create(stub, **{"url": "http://127.0.0.1:1/"} | fields)
        assert [field] == [violation.field for violation in caught.value.violations], fields
        assert caught.value.reason == reason


async def test_project_and_webhook_must_be_there(stub: Stub, receiver: Receiver) -> None:
    made = await create(stub, receiver.url)
    elsewhere = made.name.replace("default", "other")
    nowhere = f"{PARENT}/webhooks/none"
    calls = [
        create(stub, receiver.url, parent="projects/other"),
        list_webhooks(stub, "projects/other"),
        *(call(stub, name) for call in (get, rotate, send_test) for name in (elsewhere, nowhere)),
        *(update(stub, Webhook(name=name, url=receiver.url)) for name in (elsewhere, nowhere)),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            await call
    for request in (
        webhook_pb2.DeleteWebhookRequest(name=elsewhere),
        webhook_pb2.ListWebhookDeliveriesRequest(parent=elsewhere),
    ):
        method = getattr(stub, type(request).__name__.removesuffix("Request"))
        with pytest.raises(NotFound), channels.translate():
            await method(request)
    assert (await get(stub, made.name)).name == made.name


async def test_update_changes_what_the_mask_names(stub: Stub, receiver: Receiver) -> None:
    made = await create(stub, receiver.url, display_name="a", event_types=[1])
    new = Webhook(name=made.name, display_name="b", url=receiver.url + "2", disabled=True)
    renamed = await update(stub, new, "display_name")
    assert (renamed.display_name, renamed.url, renamed.disabled) == ("b", receiver.url, False)
    assert [*renamed.event_types] == [1] and renamed.etag == '"2"'
    assert await update(stub, new, "display_name") == renamed  # nothing left to change
    everything = await update(stub, new, "*")
    assert (everything.url, everything.disabled) == (new.url, True)
    assert [*everything.event_types] == []
    enabled = await update(stub, Webhook(name=made.name), "disabled")
    assert not enabled.disabled
    set_fields = await update(stub, Webhook(name=made.name, event_types=[Webhook.TRAINING_FAILED]))
    assert (set_fields.url, [*set_fields.event_types]) == (new.url, [2])


async def test_update_is_refused_with_the_reason(stub: Stub, receiver: Receiver) -> None:
    made = await create(stub, receiver.url)
    with pytest.raises(Aborted) as stale:
        await update(stub, Webhook(name=made.name, disabled=True, etag='"9"'))
    assert stale.value.reason == "ETAG_MISMATCH"
    for webhook, path, reason in (
        (Webhook(name=made.name, url="x"), "secret", "BAD_FIELD_MASK"),
        (Webhook(name=made.name, url="http://10.0.0.1/"), "url", "HOST_NOT_ALLOWED"),
        (Webhook(name=made.name), "url", "BAD_URL"),
        (Webhook(name=made.name, url=receiver.url), "display_name", "BAD_NAME"),
        (Webhook(name="projects/default", url=receiver.url), "url", "BAD_RESOURCE_NAME"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await update(stub, webhook, path)
        assert caught.value.reason in (reason, "INVALID_FIELD"), caught.value.message
    assert (await get(stub, made.name)).etag == made.etag


async def test_lists_are_paged_newest_first(stub: Stub, receiver: Receiver) -> None:
    names = [(await create(stub, receiver.url)).name for _ in range(3)]
    first = await list_webhooks(stub, page_size=2)
    last = await list_webhooks(stub, page_size=2, page_token=first.next_page_token)
    found = [one.name for one in (*first.webhooks, *last.webhooks)]
    assert found == names[::-1] and last.next_page_token == ""
    ids = [(await send_test(stub, names[0])).id for _ in range(3)]
    request = webhook_pb2.ListWebhookDeliveriesRequest(parent=names[0], page_size=2)
    page = await stub.ListWebhookDeliveries(request)
    request.page_token = page.next_page_token
    rest = await stub.ListWebhookDeliveries(request)
    assert [one.id for one in (*page.deliveries, *rest.deliveries)] == ids[::-1]
    with pytest.raises(InvalidArgument, match="page_token"):
        await list_webhooks(stub, page_token=page.next_page_token)


async def test_old_secret_signs_beside_the_new_one(stub: Stub, receiver: Receiver) -> None:
    secrets = [(made := await create(stub, receiver.url)).secret]
    for _ in range(2):
        secrets.append((await rotate(stub, made.name)).secret)
    await send_test(stub, made.name)
    received = await receiver.next()
    # All of them: who repeats a rotation whose answer was lost must not lose the first secret.
    assert all(received.is_signed_by(secret) for secret in secrets)
    for _ in range(6):
        await rotate(stub, made.name)
    await send_test(stub, made.name)
    received = await receiver.next()
    assert not received.is_signed_by(secrets[0])
    assert len(received.headers["webhook-signature"].split(" ")) == 5


async def test_old_secret_ends_after_a_day(
    stub: Stub, service: Service, receiver: Receiver
) -> None:
    made = await create(stub, receiver.url)
    rotated = await rotate(stub, made.name)
    async with service.db.transaction() as conn:
        hours = await conn.fetchval(
            "update webhook_secret set end_time = end_time - interval '1 day'"
            " where end_time is not null"
            " returning extract(epoch from end_time - create_time) / 3600"
        )
    assert float(hours) == pytest.approx(0, abs=0.1)
    await send_test(stub, made.name)
    received = await receiver.next()
    assert received.is_signed_by(rotated.secret) and not received.is_signed_by(made.secret)


async def test_test_is_sent_once_and_its_outcome_answered(stub: Stub) -> None:
    async with receiving(500, 200, 410) as receiver:
        made = await create(stub, receiver.url)
        refused = await send_test(stub, made.name)
        taken = await send_test(stub, made.name)
        assert (refused.state, refused.http_status) == (webhook_pb2.WebhookDelivery.FAILED, 500)
        assert refused.test and refused.error == "answered 500" and refused.num_tries == 1
        assert (taken.state, taken.error) == (webhook_pb2.WebhookDelivery.DELIVERED, "")
        first = receiver.received[0]
        assert first.id == refused.id and first.is_signed_by(made.secret)
        assert first.json["type"] == "webhook.test"
        assert first.json["data"] == {"project": PARENT, "webhook": made.name}
        await send_test(stub, made.name)
        assert (await get(stub, made.name)).disabled  # it answered that it is gone
        with pytest.raises(FailedPrecondition) as caught:
            await send_test(stub, made.name)
        assert caught.value.reason == "WEBHOOK_DISABLED"
        assert len(receiver.received) == 3


async def test_completed_training_is_told_with_its_figures(
    stub: Stub, bus: Bus, store: ObjectStore, receiver: Receiver
) -> None:
    made = await create(stub, receiver.url)
    # One box found exactly, one missed.
    truth = ground_truth(2, 1, [(1, 0, [0, 0, 40, 40], 0), (2, 0, [0, 0, 40, 40], 0)])
    empty = ground_truth(1, 1, [])
    predictions = store.put("p.parquet", parquet([(1, 0, 0.75, 0, 0, 40, 40)]))
    training = FakeTraining(bus, new_id(), project="default")
    await training.run()
    subscription = await bus.js.subscribe(f"detflow.v1.evaluation.{training.id}.completed")
    manifest = put_bundle(store, {"val": truth, "test": empty})
    await training.predictions(manifest, predictions, predictions)
    for _ in range(2):
        await subscription.next_msg(timeout=30)
    await training.state(State.SUCCEEDED)  # as the trainer does when it hears of both
    received = await receiver.next()
    assert received.is_signed_by(made.secret)
    body = received.json
    assert body["type"] == "training.completed" and body["data"]["training"] == training.name
    assert body["data"]["metrics"]["val"] == {
        "map50": pytest.approx(51 / 101),
        "map50_95": pytest.approx(51 / 101),
        "precision": 1.0,
        "recall": 0.5,
    }
    assert body["data"]["metrics"]["test"]["map50"] is None
    training.attempt = 2  # which has measured nothing
    await training.state(State.FAILED)
    assert (await receiver.next()).json["data"]["metrics"] == {}
    await stub.DeleteWebhook(webhook_pb2.DeleteWebhookRequest(name=made.name))
    assert not (await list_webhooks(stub)).webhooks


async def test_sdk_creates_finds_changes_and_deletes(
    service: Service, version_address: str, receiver: Receiver
) -> None:
    environ = {"DETFLOW_METRICS_ADDRESS": service.address}

    def use() -> None:
        with Client("127.0.0.1:7100", environ=environ) as client:
            webhooks = client.webhooks
            made = webhooks.create(receiver.url, name="chat", events=["failed", "completed"])
            assert made.secret and [*made.event_types] == [1, 2]
            assert webhooks.find("chat").name == webhooks.find(made.name).name == made.name
            changed = webhooks.update(made.name, display_name="mail", events=[], etag=made.etag)
            assert (changed.display_name, [*changed.event_types]) == ("mail", [])
            with pytest.raises(NotFound, match="chat"):
                webhooks.find("chat")
            with pytest.raises(InvalidArgument, match="is none of completed, failed, stopped"):
                webhooks.create(receiver.url, events=["done"])
            with pytest.raises(InvalidArgument, match="nothing to change"):
                webhooks.update(made.name)
            ids = [webhooks.test(made.name).id for _ in range(3)]
            assert [one.id for one in webhooks.deliveries(made.name, limit=2)] == ids[:0:-1]
            assert len(webhooks.deliveries(made.name)) == 3
            webhooks.delete(made.name)
            assert not webhooks.list()

    await asyncio.to_thread(use)


async def test_command_line(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETFLOW_METRICS_ADDRESS", service.address)

    async def run(*arguments: str) -> tuple[int, str, str]:
        command = ["detflow", "webhooks", *arguments, "--address", "127.0.0.1:1"]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exited:
            await asyncio.to_thread(main)
        printed = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return exited.value.code, printed.out, printed.err

    async with receiving(200, 404) as receiver:
        code, out, _ = await run("create", receiver.url, "--name", "chat", "--on", "failed")
        assert code == 0 and "secret" in out and "whsec_" in out and "told of  failed" in out
        _, out, _ = await run("list")
        header, row = out.splitlines()
        assert header.split()[:2] == ["NAME", "TOLD"] and row.split()[:3] == [
            "chat",
            "failed",
            "enabled",
        ]
        assert (await run("test", "chat"))[:2] == (0, "chat answered 200\n")
        code, _, err = await run("test", "chat")
        assert code == 1 and "chat: answered 404" in err
        _, out, _ = await run("deliveries", "chat")
        assert [line.split()[3:7] for line in out.splitlines()[1:]] == [
            ["test", "failed", "1", "404"],
            ["test", "delivered", "1", "200"],
        ]
        code, out, _ = await run("update", "chat", "--on", "all", "--disable", "--json")
        assert json.loads(out)["disabled"] and json.loads(out)["eventTypes"] == []
        assert "state    disabled" in (await run("show", "chat"))[1]
        assert "whsec_" in (await run("rotate-secret", "chat"))[1]
        assert (await run("create", receiver.url, "--on", "done"))[0] == 2
        code, _, err = await run("create", "http://10.0.0.1/")
        assert code == 1 and "webhook.url" in err and "DETFLOW_WEBHOOK_HOSTS" in err
        assert (await run("delete", "chat"))[1] == "deleted chat\n"
        assert "detflow webhooks create URL" in (await run("list"))[1]
