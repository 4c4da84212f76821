"""Answers the workers' lease requests: go on, stop, or leave because another has taken over."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from detflow import telemetry
from detflow.errors import Unavailable
from detflow.events import Bus
from detflow.postgres import Database
from detflow.v1.training_pb2 import StopMode
from detflow.v1.worker_pb2 import LeaseRequest, LeaseResponse
from services.trainer import store
from services.trainer.domain import ATTEMPTING

log = telemetry.get_logger(__name__)

_SUBJECT = "detflow.lease.*"
_QUEUE = "trainer"


class LeaseDesk:
    """Subscribes to lease requests.

    One trainer process answers each request from the database. Every process hears every request,
    because only the one that carries out the attempt watches its progress. The lease itself is
    renewed by that process as long as the worker is its living child: silence on NATS alone ends
    no training.

    Args:
        observe: Called with training id and request.
    """

    def __init__(
        self, db: Database, bus: Bus, observe: Callable[[str, LeaseRequest], None]
    ) -> None:
        self._db = db
        self._bus = bus
        self._observe_request = observe

    async def start(self) -> None:
        """Subscribes; the subscriptions outlive reconnects."""
        await self._bus.subscribe(_SUBJECT, self._answer, queue=_QUEUE)
        await self._bus.subscribe(_SUBJECT, self._observe)

    async def _answer(self, msg: Msg) -> None:
        training_id = _training_id(msg)
        try:
            request = LeaseRequest.FromString(msg.data)
            async with self._db.connection() as conn:
                training = await store.get_training(conn, training_id)
        except DecodeError:
            log.warning("lease request is not readable", training=training_id)
            return
        except Unavailable as error:
            # No answer: the worker carries on and asks again.
            log.warning("lease request not answered", training=training_id, error=str(error))
            return
        response = LeaseResponse()
        if (
            training is None
            or training.attempt != request.attempt
            or training.state not in ATTEMPTING
        ):
            response.fenced = True
            log.info("worker fenced", training=training_id, attempt=request.attempt)
        elif training.stop_mode:
            response.stop_mode = StopMode.Value(f"STOP_MODE_{training.stop_mode}")
        await msg.respond(response.SerializeToString())

    async def _observe(self, msg: Msg) -> None:
        try:
            request = LeaseRequest.FromString(msg.data)
        except DecodeError:
            return  # logged by the process that answers
        self._observe_request(_training_id(msg), request)


def _training_id(msg: Msg) -> str:
    return str(msg.subject).rsplit(".", 1)[1]
