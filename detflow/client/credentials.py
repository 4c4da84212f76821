"""How a client shows who it is and whom it trusts: tokens and TLS."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from detflow import tls
from detflow.access import is_local
from detflow.channels import OPTIONS
from detflow.errors import InvalidArgument
from detflow.local.running import default_data_dir, owner_token, running

_TLS_TROUBLE = (
    (
        "certificate has expired",
        True,
        "its certificate has expired; whoever runs it has to renew it",
    ),
    (
        "Hostname Verification Check failed",
        True,
        "its certificate is for another name; call it by the name in its certificate",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        True,
        "the authority of its certificate is not trusted; name the file with that authority in"
        " DETFLOW_TLS_CA_FILE",
    ),
    ("WRONG_VERSION_NUMBER", True, "it has no TLS; leave https:// away"),
    (
        "Socket closed",
        True,
        "it takes no client without a certificate that counts; name yours in DETFLOW_TLS_CERT_FILE"
        " and DETFLOW_TLS_KEY_FILE",
    ),
    ("Socket closed", False, "it hangs up; if it has TLS, say https:// before its address"),
)
"""What stands in gRPC's words, whether the client speaks TLS, and what that means."""
_Continuation = Callable[[grpc.ClientCallDetails, Any], Any]


class Credentials:
    """Opens channels that show a token, over TLS or not.

    Args:
        address: host:port of the gateway.
        is_secure: Whether its services are spoken to over TLS.
        environ: Where the variables below are read.
        token: Token to show, "" for none; None takes DETFLOW_TOKEN, or what is in the file that
            DETFLOW_TOKEN_FILE names, or that of the stack which runs here at this very address.
        ca_file: PEM file with the authorities that are trusted; "" takes DETFLOW_TLS_CA_FILE.
        cert_file: PEM file with the client's certificate, where servers ask for one; "" takes
            DETFLOW_TLS_CERT_FILE.
        key_file: PEM file with its key; "" takes DETFLOW_TLS_KEY_FILE.

    Attributes:
        has_token: Whether there is a token to show.
        is_starting: Whether the stack that runs here at this address is not ready yet; until then
            another program may be at its ports, which is shown nothing.

    Raises:
        InvalidArgument: The token cannot be one, or a file is not what it should be.
    """

    def __init__(
        self,
        address: str,
        is_secure: bool,
        environ: Mapping[str, str],
        *,
        token: str | None,
        ca_file: str,
        cert_file: str,
        key_file: str,
    ) -> None:
        self._tls: grpc.ChannelCredentials | None = None
        if is_secure:
            self._tls = tls.client_credentials(
                ca_file=ca_file or environ.get("DETFLOW_TLS_CA_FILE", ""),
                cert_file=cert_file or environ.get("DETFLOW_TLS_CERT_FILE", ""),
                key_file=key_file or environ.get("DETFLOW_TLS_KEY_FILE", ""),
            )
        elif ca_file or cert_file or key_file:
            raise InvalidArgument(
                f"certificates are for TLS: say https://{address}", reason="NOT_TLS"
            )
        self._may_be_insecure = environ.get("DETFLOW_INSECURE") == "1"
        # The token of the stack that runs here is sent to its own services and to nobody else. At
        # another address of this machine, even by the name localhost, somebody else may listen.
        self._own: frozenset[str] | None = None
        self.is_starting = False
        if token is None:
            token = _of_environment(environ)
            if not token and not is_secure:
                token = self._of_local_stack(address, environ)
        if not re.fullmatch(r"[\x21-\x7e]*", token):
            raise InvalidArgument(
                "the token holds a space or a character that none has: give it as it was printed",
                reason="BAD_TOKEN",
            )
        self._token = token
        self.has_token = bool(token)

    def channel(self, target: str) -> grpc.Channel:
        """Opens a channel that shows the token with every call; it connects with the first.

        Args:
            target: host:port of a service.

        Raises:
            InvalidArgument: The token would go over the network for everybody to read.
        """
        if self._tls is not None:
            channel = grpc.secure_channel(target, self._tls, options=OPTIONS)
        else:
            channel = grpc.insecure_channel(target, options=OPTIONS)
        if not self._token:
            return channel
        if self._own is not None:
            if target not in self._own:
                return channel
        elif self._tls is None and not self._may_be_insecure and not is_local(target):
            raise InvalidArgument(
                f"a token is not sent to {target} without TLS, where others could read it: say"
                " https://, or set DETFLOW_INSECURE=1 if nobody else is on this network",
                reason="INSECURE",
            )
        return grpc.intercept_channel(channel, _Bearer(self._token))

    def explain(self, error: grpc.RpcError) -> str:
        """Says what about TLS keeps a server from being reached, and the remedy; "" if nothing."""
        call: Any = error  # an RpcError is also its call
        details = call.details() or ""
        if not details.startswith("failed to connect"):
            return ""
        found = (
            why
            for sign, is_secure, why in _TLS_TROUBLE
            if sign in details and is_secure == (self._tls is not None)
        )
        return next(found, "")

    def _of_local_stack(self, address: str, environ: Mapping[str, str]) -> str:
        data_dir = default_data_dir(environ)
        found = running(data_dir)
        if found is None or address != found.address:
            return ""
        if not found.ready:
            self.is_starting = True
            return ""
        self._own = frozenset(f"127.0.0.1:{found.port + number}" for number in range(1, 5))
        return owner_token(data_dir)


def _of_environment(environ: Mapping[str, str]) -> str:
    if not environ.get("DETFLOW_TOKEN") and (path := environ.get("DETFLOW_TOKEN_FILE")):
        return read_token(path)
    return environ.get("DETFLOW_TOKEN", "").strip()


def read_token(path: str) -> str:
    """Reads the token in a file.

    Raises:
        InvalidArgument: The file cannot be read, or is empty.
    """
    try:
        # What is no text is refused with the other tokens that are none.
        token = Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise InvalidArgument(
            f"cannot read the token in {path}: {error.strerror}", reason="BAD_TOKEN"
        ) from error
    if not token:
        raise InvalidArgument(f"{path} is empty: it should hold a token", reason="BAD_TOKEN")
    return token


class _Details(NamedTuple):
    """A call as the interceptors of gRPC hand it on."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Adds a token to the metadata of every call."""

    def __init__(self, token: str) -> None:
        self._entry = ("authorization", f"Bearer {token}")

    def _go_on(self, continuation: _Continuation, details: Any, request: Any) -> Any:
        return continuation(self._with_token(details), request)

    intercept_unary_unary: Any = _go_on
    intercept_unary_stream: Any = _go_on
    intercept_stream_unary: Any = _go_on
    intercept_stream_stream: Any = _go_on

    def _with_token(self, details: Any) -> Any:
        return _Details(
            details.method,
            details.timeout,
            (*(details.metadata or ()), self._entry),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )
