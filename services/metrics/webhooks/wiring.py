"""What of the metrics service is about webhooks, put together."""

from __future__ import annotations

from detflow import channels, server
from detflow.consumer import Consumer
from detflow.events import EVENTS_STREAM
from detflow.projects import Projects
from detflow.tasks import Bell
from detflow.v1 import events_pb2
from detflow.v1.project_pb2_grpc import ProjectServiceStub
from detflow.v1.webhook_pb2_grpc import add_WebhookServiceServicer_to_server
from services.metrics.webhooks.consumer import CONSUMER, SUBJECTS, WebhookEvents
from services.metrics.webhooks.deliverer import Deliverer
from services.metrics.webhooks.hosts import AllowedHosts
from services.metrics.webhooks.sender import Sender
from services.metrics.webhooks.service import WebhookService


def wire(service: server.Service) -> None:
    """Adds webhooks to the metrics service.

    Raises:
        InvalidArgument: BAD_SETTING, DETFLOW_WEBHOOK_HOSTS.
    """
    allowed = AllowedHosts.parse(service.settings.webhook_hosts)
    due, sender = Bell(), Sender(allowed)
    version = channels.channel(service.settings.version_address, service.settings)
    service.on_drain(lambda: version.close(None))
    consumer = Consumer(
        service.bus,
        service.db,
        name=CONSUMER,
        stream=EVENTS_STREAM,
        subjects=SUBJECTS,
        decode=events_pb2.Event.FromString,
        handle=WebhookEvents(due).handle,
    )
    service.spawn(consumer.run(), "webhook consumer")
    service.spawn(Deliverer(service.db, sender, due).run(), "webhook deliverer")
    service.add(
        add_WebhookServiceServicer_to_server,
        WebhookService(
            db=service.db,
            projects=Projects(ProjectServiceStub(version)),
            allowed=allowed,
            sender=sender,
            due=due,
        ),
    )
