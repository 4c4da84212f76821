"""Embedded nats-server with JetStream: loopback only, a token in a file only its owner can read."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from detflow.local.process import remembered_port, secret
from detflow.processes import dying_with_parent


class NatsError(Exception):
    """The embedded nats-server could not be found or started."""


def binary() -> Path:
    """Returns the path of nats-server, which its package puts beside the Python interpreter."""
    beside = Path(sys.executable).parent / "nats-server"
    found = beside if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise NatsError("nats-server is not installed: pip install 'detflow[local]'")
    return Path(found)


@dataclass(frozen=True, kw_only=True)
class NatsServer:
    """A nats-server whose configuration and streams live in `directory`, ready to be started."""

    directory: Path
    port: int

    @property
    def url(self) -> str:
        """Its address, with the token."""
        return f"nats://{secret(self.directory / 'token')}@127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Returns the command that runs the server in the foreground."""
        return [str(binary()), "--config", str(self.directory / "nats.conf")]

    def is_ready(self) -> bool:
        """Tells whether the server greets clients; it does so once its streams are recovered."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                return connection.recv(5) == b"INFO "
        except OSError:
            return False

    def start(self, log: Path, timeout_seconds: float = 30.0) -> subprocess.Popen[bytes]:
        """Starts the server and waits until it is ready; for callers without an event loop."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                dying_with_parent(self.command(), signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_seconds
        while not self.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise NatsError(f"nats-server did not start, see {log}")
            time.sleep(0.02)
        return process


def prepare(directory: Path, *, port: int = 0) -> NatsServer:
    """Writes the configuration of a nats-server into `directory`.

    Port 0 keeps the port it had, or takes a free one.
    """
    directory = directory.resolve()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    server = NatsServer(directory=directory, port=port or remembered_port(directory / "port"))
    configuration = {
        "listen": f"127.0.0.1:{server.port}",
        "server_name": "detflow-local",
        "authorization": {"token": secret(directory / "token")},
        "jetstream": {"store_dir": str(directory), "sync_interval": "2m"},
        "max_payload": 1048576,
    }
    path = directory / "nats.conf"
    path.touch(mode=0o600)
    # The configuration format of nats-server is a superset of JSON.
    path.write_text(json.dumps(configuration, indent=2))
    return server
