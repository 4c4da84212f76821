"""Sessions of browsers, which the version service keeps: the gateway asks it as a service."""

from __future__ import annotations

import grpc.aio

from detflow import channels
from detflow.errors import NotFound
from detflow.v1 import access_pb2, access_pb2_grpc

_SECONDS = 10.0


class Sessions:
    """Begins and ends sessions.

    Args:
        channel: To the version service.
        service_token: What the services of this installation show each other.
    """

    def __init__(self, channel: grpc.aio.Channel, service_token: str) -> None:
        self._stub: access_pb2_grpc.AccessServiceAsyncStub = access_pb2_grpc.AccessServiceStub(
            channel
        )
        self._token = (("authorization", f"Bearer {service_token}"),) if service_token else ()

    async def begin(
        self, request: access_pb2.CreateSessionRequest, request_id: str
    ) -> access_pb2.Session:
        """Begins a session for what proves who it is.

        Raises:
            DetflowError: What the version service says.
        """
        with channels.translate():
            return await self._stub.CreateSession(
                request, metadata=self._metadata(request_id), timeout=_SECONDS
            )

    async def end(self, token: str, request_id: str) -> None:
        """Ends a session, if it has not ended yet.

        Raises:
            DetflowError: The version service is away.
        """
        request = access_pb2.DeleteSessionRequest(token=token)
        try:
            with channels.translate():
                await self._stub.DeleteSession(
                    request, metadata=self._metadata(request_id), timeout=_SECONDS
                )
        except NotFound:
            return  # as it should be

    def _metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        return (*self._token, ("x-request-id", request_id))
