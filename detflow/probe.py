"""Asks a process of detflow whether it can do its work: `python -m detflow.probe ADDRESS [NAME]`.

For health checks of containers. It ends with 0 if the process answers that it serves, else with 1
and the reason on stderr. ADDRESS is host:port of a gRPC service, or a URL of the gateway such as
http://127.0.0.1:7100/readyz. Where DETFLOW_TLS_CA_FILE is set a service is asked over TLS, with the
certificate of DETFLOW_TLS_CERT_FILE; NAME is then the host that the service's own is for, if that
is not the host of ADDRESS.
"""

from __future__ import annotations

import http.client
import ssl
import sys
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from detflow import channels, tls
from detflow.errors import DetflowError, InvalidArgument, Unavailable
from detflow.settings import Settings

_SECONDS = 3.0


def ask_service(address: str, settings: Settings, name: str = "") -> None:
    """Asks a gRPC service by the health protocol, which needs no token.

    Raises:
        Unavailable: It does not answer, or answers that it does not serve.
        InvalidArgument: A file of TLS cannot be used.
    """
    trusted = channels.credentials(settings)
    if trusted is None:
        channel = grpc.insecure_channel(address)
    else:
        options = (("grpc.ssl_target_name_override", name),) if name else ()
        channel = grpc.secure_channel(address, trusted, options=options)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_SECONDS, wait_for_ready=True
            )
        except grpc.RpcError as error:
            raise Unavailable(f"{address} does not answer: {error}") from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        raise Unavailable(f"{address} says {state}: its log says what it waits for")


def ask_gateway(url: str, settings: Settings) -> None:
    """Asks the gateway over HTTP or HTTPS.

    Raises:
        Unavailable: It does not answer with 200.
        InvalidArgument: The URL is none of http, or a file of TLS cannot be used.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidArgument(f"{url!r} must be http://host:port/path", reason="BAD_ADDRESS")
    connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=_SECONDS)
    if parts.scheme == "https":
        tls.check_files(settings.tls_ca_file, settings.tls_cert_file, settings.tls_key_file)
        context = ssl.create_default_context(cafile=settings.tls_ca_file or None)
        if settings.tls_cert_file:
            context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port or 443, timeout=_SECONDS, context=context
        )
    try:
        connection.request("GET", parts.path or "/readyz")
        answer = connection.getresponse()
        body = answer.read(1000).decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"{url} does not answer: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise Unavailable(f"{url} answers {answer.status}: {body}")


def main() -> None:
    """Entry point."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit("usage: python -m detflow.probe HOST:PORT [NAME] | http://HOST:PORT/PATH")
    target, *name = sys.argv[1:]
    try:
        if "://" in target:
            ask_gateway(target, Settings.load())
        else:
            ask_service(target, Settings.load(), *name)
    except DetflowError as error:
        raise SystemExit(error.message) from error


if __name__ == "__main__":
    main()
