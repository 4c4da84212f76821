"""Points in time in messages."""

from __future__ import annotations

from datetime import datetime
from typing import overload

from google.protobuf.timestamp_pb2 import Timestamp


@overload
def timestamp(time: datetime) -> Timestamp: ...
@overload
def timestamp(time: datetime | None) -> Timestamp | None: ...
def timestamp(time: datetime | None) -> Timestamp | None:
    """Returns a time with its zone as messages hold it; None, which leaves a field unset, stays."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message
