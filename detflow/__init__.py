"""What the services share, and the client of detflow."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detflow.client import Client as Client
    from detflow.client.aio import AsyncClient as AsyncClient

# Every child process of detflow begins a new program, so gRPC need not survive a fork; its fork
# handlers can crash a child between fork and exec. It reads this when it is first imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Otherwise it prints a line for every handshake that fails, which the error says as well.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Imports the client when it is first used: the services import this package without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detflow.client import Client, aio

    return {"AsyncClient": aio.AsyncClient, "Client": Client}[name]
