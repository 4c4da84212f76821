"""A Ray cluster of several nodes on this machine, each of them killable."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from detflow.local.process import free_port
from detflow.processes import dying_with_parent

_SECONDS = 90.0
_OBJECT_STORE_BYTES = 80_000_000


@dataclass
class Node:
    """A node: the command that started it, and all that it has started."""

    process: "subprocess.Popen[bytes]"
    temp_dir: Path

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Takes its power away: every process is gone at once, but for those of the jobs.

        A job's entrypoint is in a session of its own; on a machine that is lost from the network
        it would go on like here.
        """
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "services.trainer" not in " ".join(process.cmdline()):
                    process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends everything of it."""
        everything = self.processes()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=20)
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everything, timeout=10)


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        dashboard: Address of the Jobs API.
        client_address: Where clients of Ray connect.
        nodes: The head first.
    """

    port: int
    dashboard_port: int
    client_port: int
    folder: Path
    environment: Mapping[str, str]
    nodes: list[Node] = field(default_factory=list)
    num_started: int = 0

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def client_address(self) -> str:
        return f"ray://127.0.0.1:{self.client_port}"

    def add_node(self, *, num_cpus: int) -> Node:
        """Starts a node and waits until it is one of the cluster."""
        is_head, number = not self.nodes, self.num_started
        self.num_started += 1
        temp_dir = self.folder / str(number)
        common = (
            *("--num-cpus", str(num_cpus), "--num-gpus", "0", "--node-ip-address", "127.0.0.1"),
            *("--object-store-memory", str(_OBJECT_STORE_BYTES), "--temp-dir", str(temp_dir)),
            *("--dashboard-agent-listen-port", str(free_port())),
            *("--disable-usage-stats", "--block", "--log-color=false"),
        )
        head = (
            *("--head", "--port", str(self.port), "--include-dashboard", "true"),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)),
            *("--ray-client-server-port", str(self.client_port)),
        )
        role = head if is_head else ("--address", f"127.0.0.1:{self.port}")
        with (self.folder / f"node-{number}.log").open("wb") as log:
            process = subprocess.Popen(
                dying_with_parent([str(_binary()), "start", *role, *common], signal.SIGTERM),
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        node = Node(process, temp_dir)
        self.nodes.append(node)
        self._wait(len([one for one in self.nodes if one.process.poll() is None]))
        return node

    def lose(self) -> None:
        """Takes the power of all nodes away; the next that is added is the head of a new cluster.

        Those that have lost their head would end by themselves, but only after a minute.
        """
        while self.nodes:
            self.nodes.pop().kill()

    def _wait(self, num_nodes: int) -> None:
        """Waits until the API knows so many living nodes."""
        deadline = time.monotonic() + _SECONDS
        while self._num_alive() < num_nodes:
            logs = "".join(path.read_text() for path in self.folder.glob("node-*.log"))
            assert self.nodes[-1].process.poll() is None, logs
            assert time.monotonic() < deadline, logs
            time.sleep(0.2)

    def _num_alive(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.dashboard}/api/v0/nodes", timeout=5) as answer:
                return int(answer.read().count(b'"ALIVE"'))
        except OSError:
            return 0


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Makes a cluster without nodes; ends all of them on leaving."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets are made deep below it
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    made = Cluster(
        port=free_port(),
        dashboard_port=free_port(),
        client_port=free_port(),
        folder=folder,
        environment={
            **{name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            "PATH": path,
            "RAY_USAGE_STATS_ENABLED": "0",
            "TEST_PROCESS": str(os.getpid()),
        },
    )
    try:
        yield made
    finally:
        for node in reversed(made.nodes):
            node.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _binary() -> Path:
    return Path(sys.executable).parent / "ray"
