"""Webhooks: addresses that are told when trainings of a project complete, fail or stop."""

import uuid
from collections.abc import Iterator, Sequence
from itertools import islice

from google.protobuf.field_mask_pb2 import FieldMask

from detflow.client.connection import Connection, pages
from detflow.client.projects import DEFAULT_PROJECT
from detflow.errors import InvalidArgument, NotFound
from detflow.v1 import webhook_pb2, webhook_pb2_grpc

EVENTS: dict[str, webhook_pb2.Webhook.EventType.ValueType] = {
    "completed": webhook_pb2.Webhook.TRAINING_COMPLETED,
    "failed": webhook_pb2.Webhook.TRAINING_FAILED,
    "stopped": webhook_pb2.Webhook.TRAINING_STOPPED,
}
"""What a webhook can be told of, by its short name."""
_TEST_SECONDS = 25.0  # the exchange with the receiver may take ten


class Webhooks:
    """Calls about webhooks."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = webhook_pb2_grpc.WebhookServiceStub(connection.channel("metrics"))

    def create(
        self,
        url: str,
        *,
        project: str = DEFAULT_PROJECT,
        name: str = "",
        events: Sequence[str] = (),
    ) -> webhook_pb2.Webhook:
        """Creates a webhook; `secret` of the answer signs its messages and is not shown again.

        Args:
            url: http or https address that is posted to.
            project: Id of the project whose trainings it is told of.
            name: Name shown to people; by default the host of the URL.
            events: Of "completed", "failed" and "stopped"; empty means all.

        Raises:
            InvalidArgument: The URL or an event is none, or the host is not allowed.
        """
        webhook = webhook_pb2.Webhook(display_name=name, url=url, event_types=_types_of(events))
        request = webhook_pb2.CreateWebhookRequest(
            parent=f"projects/{project}", webhook=webhook, request_id=str(uuid.uuid4())
        )
        return self._connection.call(self._stub.CreateWebhook, request)

    def get(self, name: str) -> webhook_pb2.Webhook:
        """Gets a webhook by its resource name.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such webhook.
        """
        request = webhook_pb2.GetWebhookRequest(name=name)
        return self._connection.call(self._stub.GetWebhook, request)

    def list(self, project: str = DEFAULT_PROJECT) -> Sequence[webhook_pb2.Webhook]:
        """Lists the webhooks of a project, newest first.

        Args:
            project: Id of the project.
        """
        return [*self._iterate(project)]

    def find(self, text: str, project: str = DEFAULT_PROJECT) -> webhook_pb2.Webhook:
        """Gets a webhook by resource name, id or display name; the newest if several have it.

        Args:
            text: What names it.
            project: Id of the project.

        Raises:
            NotFound: There is none.
        """
        if text.startswith("projects/"):
            return self.get(text)
        for webhook in self._iterate(project):
            if text in (webhook.display_name, webhook.name.rsplit("/", 1)[-1]):
                return webhook
        raise NotFound(
            f"no webhook {text!r} in project {project}: see `detflow webhooks list`",
            metadata={"webhook": text},
        )

    def update(
        self,
        name: str,
        *,
        display_name: str | None = None,
        url: str | None = None,
        events: Sequence[str] | None = None,
        disabled: bool | None = None,
        etag: str = "",
    ) -> webhook_pb2.Webhook:
        """Changes what is given; no events means all of them.

        Args:
            name: Resource name.
            display_name: Name shown to people.
            url: http or https address.
            events: Of "completed", "failed" and "stopped".
            disabled: Whether nothing is sent.
            etag: That of what was read, to fail if it has changed since.

        Raises:
            Aborted: ETAG_MISMATCH, somebody else has changed it since `etag` was read.
        """
        changes = {
            "display_name": display_name,
            "url": url,
            "event_types": None if events is None else _types_of(events),
            "disabled": disabled,
        }
        given = {field: value for field, value in changes.items() if value is not None}
        if not given:
            raise InvalidArgument(
                "nothing to change: give a name, a url, events or disabled", reason="NO_CHANGE"
            )
        webhook = webhook_pb2.Webhook(name=name, etag=etag, **given)  # type: ignore[arg-type]
        request = webhook_pb2.UpdateWebhookRequest(
            webhook=webhook, update_mask=FieldMask(paths=[*given])
        )
        return self._connection.call(self._stub.UpdateWebhook, request)

    def delete(self, name: str) -> None:
        """Deletes a webhook with its deliveries; what was to be sent is not.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such webhook.
        """
        request = webhook_pb2.DeleteWebhookRequest(name=name)
        self._connection.call(self._stub.DeleteWebhook, request)

    def rotate_secret(self, name: str) -> webhook_pb2.Webhook:
        """Makes a new secret, which the answer holds; the old one signs beside it for a day.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such webhook.
        """
        request = webhook_pb2.RotateWebhookSecretRequest(name=name)
        return self._connection.call(self._stub.RotateWebhookSecret, request)

    def test(self, name: str) -> webhook_pb2.WebhookDelivery:
        """Sends a message of no consequence, once, and returns how it went.

        Args:
            name: Resource name.

        Raises:
            NotFound: There is no such webhook.
        """
        request = webhook_pb2.TestWebhookRequest(name=name)
        return self._connection.call(self._stub.TestWebhook, request, seconds=_TEST_SECONDS)

    def deliveries(
        self, name: str, *, limit: int | None = None
    ) -> Sequence[webhook_pb2.WebhookDelivery]:
        """Lists the deliveries of a webhook of the last 30 days, newest first.

        Args:
            name: Resource name.
            limit: How many at most; None means all.

        Raises:
            NotFound: There is no such webhook.
        """
        size = min(limit or 1000, 1000)

        def fetch(token: str) -> tuple[Sequence[webhook_pb2.WebhookDelivery], str]:
            request = webhook_pb2.ListWebhookDeliveriesRequest(
                parent=name, page_size=size, page_token=token
            )
            response = self._connection.call(self._stub.ListWebhookDeliveries, request)
            return response.deliveries, response.next_page_token

        return [*islice(pages(fetch), limit)]

    def _iterate(self, project: str) -> Iterator[webhook_pb2.Webhook]:
        def fetch(token: str) -> tuple[Sequence[webhook_pb2.Webhook], str]:
            request = webhook_pb2.ListWebhooksRequest(
                parent=f"projects/{project}", page_size=1000, page_token=token
            )
            response = self._connection.call(self._stub.ListWebhooks, request)
            return response.webhooks, response.next_page_token

        return pages(fetch)


def _types_of(events: Sequence[str]) -> list[webhook_pb2.Webhook.EventType.ValueType]:
    unknown = [event for event in events if event not in EVENTS]
    if unknown:
        raise InvalidArgument(
            f"event {unknown[0]!r} is none of {', '.join(EVENTS)}", reason="UNKNOWN_EVENT"
        )
    return sorted({EVENTS[event] for event in events})
