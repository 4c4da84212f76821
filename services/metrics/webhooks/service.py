"""The gRPC servicer of webhooks. The methods are documented in the protos."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Any, TypeAlias

from detflow import telemetry
from detflow.errors import Aborted, FailedPrecondition, bad_field, not_found
from detflow.masks import check_mask
from detflow.names import MAX_NAME_LENGTH, check_display_name, new_id, project_of
from detflow.pagination import decode_token, encode_token, page_size
from detflow.postgres import Database
from detflow.projects import Projects
from detflow.tasks import Bell
from detflow.times import timestamp
from detflow.v1 import webhook_pb2, webhook_pb2_grpc
from services.metrics.webhooks import delivery_store as deliveries
from services.metrics.webhooks import store
from services.metrics.webhooks.body import body_of_test
from services.metrics.webhooks.domain import Delivery, EventType, Message, Webhook
from services.metrics.webhooks.hosts import AllowedHosts
from services.metrics.webhooks.sender import Sender
from services.metrics.webhooks.signature import new_key, to_secret

Context: TypeAlias = object

log = telemetry.get_logger(__name__)

_FIELDS = ("display_name", "url", "event_types", "disabled")
_NAME = re.compile(r"projects/[a-z0-9-]{1,63}/webhooks/[a-z0-9-]{1,63}")


class WebhookService(webhook_pb2_grpc.WebhookServiceServicer):
    """Serves webhooks; `deliverer.Deliverer` sends what they are told.

    Args:
        db: Database of the service.
        projects: The projects there are.
        allowed: The hosts webhooks may be sent to.
        sender: Posts tests.
        due: Rung when a delivery may be due.
    """

    def __init__(
        self, *, db: Database, projects: Projects, allowed: AllowedHosts, sender: Sender, due: Bell
    ) -> None:
        self._db = db
        self._projects = projects
        self._allowed = allowed
        self._sender = sender
        self._due = due

    async def CreateWebhook(  # noqa: D102
        self, request: webhook_pb2.CreateWebhookRequest, context: Context
    ) -> webhook_pb2.Webhook:
        wanted, project_id = request.webhook, project_of(request.parent)
        if wanted.display_name:
            check_display_name(wanted.display_name, "webhook.display_name")
        await self._projects.check(request.parent)
        request_id, fingerprint = request.request_id or None, _fingerprint(wanted)
        async with self._db.connection() as conn:
            made = await store.get_webhook_by_request(conn, project_id, request_id)
        if made is None:
            host = await self._allowed.check_url(wanted.url, "webhook.url")
            key = new_key()
            async with self._db.transaction() as conn:
                made = await store.insert_webhook(
                    conn,
                    webhook_id=new_id(),
                    project_id=project_id,
                    **_values(wanted)
                    | {"display_name": wanted.display_name or host[:MAX_NAME_LENGTH]},
                    request_id=request_id,
                    request_sha256=fingerprint,
                    key=key,
                )
                if made is not None:
                    log.info("webhook created", webhook=made.name)
                    return _to_message(made, key)
                # The same request has come in meanwhile, by another connection.
                made = await store.get_webhook_by_request(conn, project_id, request_id)
                assert made is not None
        if made.request_sha256 != fingerprint:
            raise bad_field(
                "request_id",
                "REQUEST_ID_REUSED",
                f"{request.request_id!r} was used to create {made.name} with other content;"
                " take a new id for each new webhook",
            )
        async with self._db.connection() as conn:
            return _to_message(made, await store.get_first_key(conn, made.id))

    async def GetWebhook(  # noqa: D102
        self, request: webhook_pb2.GetWebhookRequest, context: Context
    ) -> webhook_pb2.Webhook:
        async with self._db.connection() as conn:
            return _to_message(await store.get_webhook(conn, request.name))

    async def ListWebhooks(  # noqa: D102
        self, request: webhook_pb2.ListWebhooksRequest, context: Context
    ) -> webhook_pb2.ListWebhooksResponse:
        await self._projects.check(request.parent)
        query = f"webhooks of {request.parent}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            found = await store.list_webhooks(
                conn,
                project_of(request.parent),
                before=str(key[0]) if key else None,
                limit=size + 1,
            )
        page = found[:size]
        return webhook_pb2.ListWebhooksResponse(
            webhooks=[_to_message(webhook) for webhook in page],
            next_page_token=encode_token(query, page[-1].id) if len(found) > size else "",
        )

    async def UpdateWebhook(  # noqa: D102
        self, request: webhook_pb2.UpdateWebhookRequest, context: Context
    ) -> webhook_pb2.Webhook:
        wanted = request.webhook
        if not _NAME.fullmatch(wanted.name):
            raise bad_field(
                "webhook.name",
                "BAD_RESOURCE_NAME",
                f"must be projects/{{project}}/webhooks/{{webhook}}, not {wanted.name!r}",
            )
        check_mask(request.update_mask, *_FIELDS)
        paths = set(request.update_mask.paths) or {f for f in _FIELDS if getattr(wanted, f)}
        if "*" in paths:
            paths = {*_FIELDS}
        if "display_name" in paths:
            check_display_name(wanted.display_name, "webhook.display_name")
        if "url" in paths:
            await self._allowed.check_url(wanted.url, "webhook.url")
        async with self._db.transaction() as conn:
            webhook = await store.get_webhook(conn, wanted.name, lock=True)
            _check_etag(webhook, wanted.etag)
            changes = {field: new for field, new in _values(wanted).items() if field in paths}
            changed = dataclasses.replace(webhook, **changes)
            if changed != webhook:
                webhook = await store.update_webhook(conn, changed)
        await self._due.ring()
        return _to_message(webhook)

    async def DeleteWebhook(  # noqa: D102
        self, request: webhook_pb2.DeleteWebhookRequest, context: Context
    ) -> webhook_pb2.DeleteWebhookResponse:
        async with self._db.transaction() as conn:
            await store.delete_webhook(conn, request.name)
        log.info("webhook deleted", webhook=request.name)
        return webhook_pb2.DeleteWebhookResponse()

    async def RotateWebhookSecret(  # noqa: D102
        self, request: webhook_pb2.RotateWebhookSecretRequest, context: Context
    ) -> webhook_pb2.Webhook:
        key = new_key()
        async with self._db.transaction() as conn:
            webhook = await store.get_webhook(conn, request.name, lock=True)
            webhook = await store.rotate_secret(conn, webhook, key)
        log.info("webhook secret rotated", webhook=webhook.name)
        return _to_message(webhook, key)

    async def TestWebhook(  # noqa: D102
        self, request: webhook_pb2.TestWebhookRequest, context: Context
    ) -> webhook_pb2.WebhookDelivery:
        async with self._db.transaction() as conn:
            webhook = await store.get_webhook(conn, request.name)
            keys = await store.list_keys(conn, webhook.id)
            time = await deliveries.get_time(conn)
        if webhook.disabled:
            raise FailedPrecondition(
                f"{webhook.name} is disabled, nothing is sent to it; enable it first",
                reason="WEBHOOK_DISABLED",
                metadata={"resource": webhook.name},
            )
        body = body_of_test(time, webhook.name)
        message = Message(id=new_id(), url=webhook.url, body=body, keys=keys, time=time)
        answer = await self._sender.send(message)
        async with self._db.transaction() as conn:
            if answer.is_gone:
                await store.disable_webhook(conn, webhook.id)
            delivery = await deliveries.insert_test(conn, webhook.id, message, answer)
        if delivery is None:
            raise not_found(webhook.name)
        return _to_delivery(delivery)

    async def ListWebhookDeliveries(  # noqa: D102
        self, request: webhook_pb2.ListWebhookDeliveriesRequest, context: Context
    ) -> webhook_pb2.ListWebhookDeliveriesResponse:
        query = f"deliveries of {request.parent}"
        key = decode_token(request.page_token, query)
        size = page_size(request.page_size)
        async with self._db.connection() as conn:
            webhook = await store.get_webhook(conn, request.parent)
            found = await deliveries.list_deliveries(
                conn, webhook.id, before=str(key[0]) if key else None, limit=size + 1
            )
        page = found[:size]
        return webhook_pb2.ListWebhookDeliveriesResponse(
            deliveries=[_to_delivery(delivery) for delivery in page],
            next_page_token=encode_token(query, page[-1].id) if len(found) > size else "",
        )


def _values(wanted: webhook_pb2.Webhook) -> dict[str, Any]:
    """Returns the fields of `_FIELDS`."""
    values = {field: getattr(wanted, field) for field in _FIELDS}
    return values | {"event_types": tuple(EventType(n) for n in sorted(wanted.event_types))}


def _fingerprint(wanted: webhook_pb2.Webhook) -> bytes:
    """Hashes what a creation asks for."""
    return hashlib.sha256(repr(_values(wanted)).encode()).digest()


def _check_etag(webhook: Webhook, etag: str) -> None:
    if etag and etag != webhook.etag:
        raise Aborted(
            f"{webhook.name} changed since etag {etag} was read; read it again and retry",
            reason="ETAG_MISMATCH",
            metadata={"resource": webhook.name, "etag": webhook.etag},
        )


def _to_message(webhook: Webhook, key: bytes | None = None) -> webhook_pb2.Webhook:
    """Makes the message of a webhook, with its secret where that may be shown."""
    return webhook_pb2.Webhook(
        name=webhook.name,
        display_name=webhook.display_name,
        url=webhook.url,
        event_types=[webhook_pb2.Webhook.EventType.ValueType(n) for n in webhook.event_types],
        disabled=webhook.disabled,
        secret=to_secret(key) if key else "",
        create_time=timestamp(webhook.create_time),
        update_time=timestamp(webhook.update_time),
        etag=webhook.etag,
    )


def _to_delivery(delivery: Delivery) -> webhook_pb2.WebhookDelivery:
    return webhook_pb2.WebhookDelivery(
        id=delivery.id,
        event_type=webhook_pb2.Webhook.EventType.ValueType(delivery.event_type),
        training=delivery.training,
        state=webhook_pb2.WebhookDelivery.State.Value(delivery.state),
        num_tries=delivery.num_tries,
        http_status=delivery.http_status,
        error=delivery.error,
        create_time=timestamp(delivery.create_time),
        last_try_time=timestamp(delivery.last_try_time),
        next_try_time=timestamp(delivery.next_try_time),
        test=delivery.event_type is EventType.TEST,
    )
