"""Runs the gateway: `python -m gateway` or `detflow-gateway`."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import ssl
from collections.abc import Iterator

import prometheus_client
import uvicorn
import uvloop

from detflow import access, telemetry, tls
from detflow.errors import InvalidArgument
from detflow.settings import Settings
from gateway.app import Gateway
from gateway.backends import Backends
from gateway.protocol import MAX_CONNECTIONS, BoundedProtocol

log = telemetry.get_logger(__name__)

_NUM_FILES = 2 * MAX_CONNECTIONS  # a connection is one, and there are others


class Server(uvicorn.Server):
    """uvicorn that ends streams when it is told to stop, and then exits with 0.

    Args:
        gateway: The application.
        settings: How long running requests may go on, and the certificates of HTTPS.
        signals: Whether SIGTERM and SIGINT end it; otherwise set `should_exit`.

    Raises:
        InvalidArgument: The certificates cannot be used.
    """

    def __init__(self, gateway: Gateway, settings: Settings, *, signals: bool = True) -> None:
        tls.check_files(settings.tls_client_ca_file, settings.tls_cert_file, settings.tls_key_file)
        super().__init__(
            uvicorn.Config(
                gateway,
                http=BoundedProtocol,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(settings.drain_seconds),
                # Python takes TLS 1.2 and above.
                ssl_certfile=settings.tls_cert_file or None,
                ssl_keyfile=settings.tls_key_file or None,
                ssl_ca_certs=settings.tls_client_ca_file or None,
                ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca_file else ssl.CERT_NONE,
            )
        )
        self._gateway = gateway
        self._signals = (signal.SIGTERM, signal.SIGINT) if signals else ()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Begins to drain on SIGTERM and SIGINT; the second one stops at once."""
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in self._signals:
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the streams, then waits for the running requests."""
        self._gateway.draining.set()
        await super().shutdown(sockets)


def split_address(variable: str, text: str) -> tuple[str, int]:
    """Splits host:port, as a variable of the settings has it.

    Raises:
        InvalidArgument: It is something else.
    """
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdigit() and int(port) < 65536):
        raise InvalidArgument(f"{variable} must be host:port, not {text!r}", reason="BAD_SETTING")
    return host.strip("[]"), int(port)


def listen(host: str, port: int) -> socket.socket:
    """Opens the listening socket.

    Raises:
        InvalidArgument: The address is taken or is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY; without, every answer can wait 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise InvalidArgument(
            f"cannot listen on {host}:{port} ({error.strerror}); set DETFLOW_HTTP_LISTEN",
            reason="BAD_SETTING",
        ) from error
    return listening


def serve_metrics(address: str) -> None:
    """Serves the figures on a port of their own, as the services do.

    Raises:
        InvalidArgument: The address is taken or is not one of this machine.
    """
    host, port = split_address("DETFLOW_METRICS_LISTEN", address)
    try:
        prometheus_client.start_http_server(port, host)
    except OSError as error:
        raise InvalidArgument(
            f"cannot listen on {address} ({error.strerror}); set DETFLOW_METRICS_LISTEN",
            reason="BAD_SETTING",
        ) from error


def allow_files() -> None:
    """Lets the process have as many files open as its connections take, if the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _NUM_FILES if hard == resource.RLIM_INFINITY else min(_NUM_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _NUM_FILES:
        log.warning("few files may be open; raise ulimit -n", limit=wanted, wanted=_NUM_FILES)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    access.check_settings(settings)
    allow_files()
    host, port = split_address("DETFLOW_HTTP_LISTEN", settings.http_listen)
    with listen(host, port) as listening:
        backends = Backends.connect(settings)
        gateway = Gateway(backends, settings)
        server = Server(gateway, settings)
        if settings.metrics_listen:
            serve_metrics(settings.metrics_listen)
        log.info("gateway listens", host=host, port=listening.getsockname()[1])
        try:
            await server.serve(sockets=[listening])
        finally:
            await gateway.close()
            await backends.close()
        log.info("gateway stopped")


def main() -> None:
    """Entry point."""
    try:
        settings = Settings.load()
        telemetry.configure("gateway", settings)
        uvloop.run(serve(settings))
    except InvalidArgument as error:
        raise SystemExit(error.message) from error


if __name__ == "__main__":
    main()
