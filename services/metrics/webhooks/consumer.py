"""When a training comes to rest, a message is queued for every webhook that wants to know."""

from __future__ import annotations

from datetime import UTC, datetime

from detflow.consumer import AfterCommit
from detflow.events import Delivered
from detflow.names import project_of
from detflow.postgres import Connection
from detflow.tasks import Bell
from detflow.v1 import events_pb2
from services.metrics import store as metrics_store
from services.metrics.domain import TrainingState
from services.metrics.webhooks import delivery_store as deliveries
from services.metrics.webhooks import store
from services.metrics.webhooks.body import body_of_training
from services.metrics.webhooks.domain import event_of

CONSUMER = "metrics-webhook"
SUBJECTS = ("detflow.v1.training.*.state_changed",)


class WebhookEvents:
    """Queues messages, once for each change of state, in whatever order the events come.

    Args:
        due: Rung when there is something to send.
    """

    def __init__(self, due: Bell) -> None:
        self._due = due

    async def handle(
        self, conn: Connection, delivered: Delivered[events_pb2.Event]
    ) -> AfterCommit | None:
        """Applies one event in the caller's transaction."""
        reported = delivered.message.training
        event_type = event_of(TrainingState(reported.state))
        if event_type is None:
            return None
        time = delivered.carrier.get("ce-time", "")
        happened = datetime.fromisoformat(time) if time else datetime.now(UTC)
        project_id = project_of(delivered.name)
        wanting = await store.lock_wanting(conn, project_id, event_type, happened)
        if not wanting:
            return None
        # Deliveries go with the row of their training, and that with a purge of the version.
        training = await metrics_store.lock_training(
            conn, training_id=delivered.resource_id, project_id=project_id, name=delivered.name
        )
        if training is None:
            return None
        evaluations = await metrics_store.list_evaluations(conn, training)
        await deliveries.insert_deliveries(
            conn,
            wanting,
            event_type=event_type,
            training_id=training.id,
            revision=reported.revision,
            body=body_of_training(
                event_type,
                happened,
                delivered.name,
                reported,
                [e for e in evaluations if e.attempt == reported.attempt],
            ),
        )
        return self._due.ring
