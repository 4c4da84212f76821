"""What a webhook and its deliveries are, which event tells what, and when to try again."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from services.metrics.domain import TrainingState

SCHEDULE_SECONDS = (5.0, 30.0, 120.0, 600.0, 3600.0, 6 * 3600.0, 12 * 3600.0)
"""Pauses between the tries of a delivery: eight tries within 20 hours."""
_MAX_PAUSE_SECONDS = 12 * 3600.0
_JITTER = 0.2


class EventType(enum.IntEnum):
    """What a delivery tells; numbers as in detflow.v1.Webhook.EventType."""

    TEST = 0
    TRAINING_COMPLETED = 1
    TRAINING_FAILED = 2
    TRAINING_STOPPED = 3

    @property
    def text(self) -> str:
        """As it stands in the body, e.g. training.completed."""
        return "webhook.test" if self is EventType.TEST else self.name.lower().replace("_", ".")


_EVENTS = {
    TrainingState.SUCCEEDED: EventType.TRAINING_COMPLETED,
    TrainingState.FAILED: EventType.TRAINING_FAILED,
    TrainingState.STOPPED: EventType.TRAINING_STOPPED,
    TrainingState.PAUSED: EventType.TRAINING_STOPPED,
}


def event_of(state: TrainingState) -> EventType | None:
    """Returns what a training tells by reaching a state; None for a state on the way."""
    return _EVENTS.get(state)


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """An address that is told of what happens.

    Attributes:
        id: Last segment of the name.
        project_id: Project whose trainings it is told of.
        display_name: Name shown to people.
        url: http or https address that is posted to.
        event_types: What it is told of; empty means everything.
        disabled: Nothing is sent to it.
        revision: Increases with every change, from 1.
        request_sha256: Hash of what its creation asked for.
        create_time: When it was created.
        update_time: When it was changed last.
    """

    id: str
    project_id: str
    display_name: str
    url: str
    event_types: tuple[EventType, ...]
    disabled: bool
    revision: int
    request_sha256: bytes
    create_time: datetime
    update_time: datetime

    @property
    def name(self) -> str:
        """Resource name."""
        return f"projects/{self.project_id}/webhooks/{self.id}"

    @property
    def etag(self) -> str:
        """Entity tag of this revision (AIP-154, quoted as in RFC 7232)."""
        return f'"{self.revision:x}"'


class DeliveryState(enum.StrEnum):
    """Where a delivery stands: PENDING -> DELIVERED | FAILED."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    FAILED = "FAILED"


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One message to a webhook, and what became of it.

    Attributes:
        id: The header webhook-id.
        event_type: What it tells.
        training: Resource name; "" in a test.
        state: Where it stands.
        num_tries: Tries so far.
        http_status: Status of the last answer; 0 without one.
        error: Why the last try failed.
        create_time: When it came to be.
        last_try_time: When the last try began.
        next_try_time: When the next is due.
    """

    id: str
    event_type: EventType
    training: str
    state: DeliveryState
    num_tries: int
    http_status: int
    error: str
    create_time: datetime
    last_try_time: datetime | None
    next_try_time: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What is posted.

    Attributes:
        id: The header webhook-id.
        url: Where to.
        body: JSON.
        keys: That sign it, the newest first.
        time: When it is sent, by the database's clock.
    """

    id: str
    url: str = field(repr=False)  # some receivers put a password into it
    body: bytes
    keys: Sequence[bytes] = field(repr=False)
    time: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Due:
    """A delivery that this process is to send now.

    Attributes:
        webhook: Resource name of the webhook.
        webhook_id: Its id.
        message: What to post.
        num_tries: Which try this is, from 1.
        lease: Token of who sends it.
    """

    webhook: str
    webhook_id: str
    message: Message
    num_tries: int
    lease: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """How a try went.

    Attributes:
        status: HTTP status; 0 if there was no answer.
        error: What went wrong, for a person; "" if it was taken.
        retry_seconds: How long the receiver asks to be left alone; 0 if it does not.
    """

    status: int
    error: str
    retry_seconds: float = 0.0

    @property
    def is_taken(self) -> bool:
        """The receiver has the message."""
        return 200 <= self.status < 300

    @property
    def is_gone(self) -> bool:
        """The receiver wants no message any more."""
        return self.status == 410


def pause_seconds(
    schedule: Sequence[float], num_tries: int, answer: Answer, chance: float
) -> float | None:
    """Returns how long to wait after a failed try, or None to give up.

    Args:
        schedule: Pauses after the first try, the second, ...
        num_tries: Tries so far.
        answer: How the last one went: it may ask for more time, up to 12 hours, but not for less.
        chance: 0..1; spreads what failed together.
    """
    if answer.is_gone or num_tries > len(schedule):
        return None
    pause = schedule[num_tries - 1] * (1.0 + _JITTER * chance)
    return max(pause, min(answer.retry_seconds, _MAX_PAUSE_SECONDS))
