"""The whole stack as processes, started by `detflow up` on free ports."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from detflow.client import Client
from detflow.local.process import is_free
from detflow.local.running import owner_token

_PORTS = 5


def free_base_port() -> int:
    """Returns a port that is free, like the four after it.

    Of those that Linux gives to no connection by itself (32768 and above): another test's cannot
    take one before the stack listens.
    """
    while True:
        base = secrets.randbelow(20_000) + 12_000
        if all(is_free(base + number) for number in range(_PORTS)):
            return base


@dataclass(frozen=True)
class Done:
    """What a finished command printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Stack:
    """A running `detflow up`."""

    process: "subprocess.Popen[str]"
    data_dir: Path
    port: int

    def detflow(self, *arguments: str, seconds: float = 120.0) -> Done:
        """Runs a command against it and returns what it printed."""
        return detflow(self.data_dir, *arguments, seconds=seconds)

    @property
    def token(self) -> str:
        """Token of its owner."""
        return owner_token(self.data_dir)

    @property
    def headers(self) -> dict[str, str]:
        """What an HTTP request shows as its owner."""
        return {"authorization": f"Bearer {self.token}"}

    def client(self) -> Client:
        """Returns a client that calls as its owner."""
        return Client(f"127.0.0.1:{self.port}", environ={}, token=self.token)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def processes(self) -> list[psutil.Process]:
        """Returns the supervisor and everything below it."""
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]


def environment(data_dir: Path) -> dict[str, str]:
    """Returns the environment in which commands find the stack of `data_dir` by themselves."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DETFLOW_")}
    return {**kept, "DETFLOW_DATA_DIR": str(data_dir)}


def command(*arguments: str) -> Sequence[str]:
    """Returns the command line of `detflow`."""
    return [sys.executable, "-m", "detflow.cli", *arguments]


def detflow(data_dir: Path, *arguments: str, seconds: float = 120.0) -> Done:
    """Runs a `detflow` command to its end."""
    done = subprocess.run(
        command(*arguments),
        env=environment(data_dir),
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def start(data_dir: Path, port: int, settings: Mapping[str, str] | None = None) -> Stack:
    """Starts `detflow up` and waits until it says that it is ready."""
    process = subprocess.Popen(
        command("up", "--port", str(port), "--json"),
        env={**environment(data_dir), **(settings or {})},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    ready = process.stdout.readline()
    if not ready:
        process.stdout.close()
        process.wait()
    assert ready, "detflow up ended before it was ready"
    assert json.loads(ready)["address"] == f"127.0.0.1:{port}"
    return Stack(process, data_dir, port)


def end(stack: Stack, number: signal.Signals) -> None:
    """Ends a stack and checks that nothing of it is left."""
    everything = stack.processes()
    stack.process.send_signal(number)
    assert stack.process.stdout is not None
    stack.process.stdout.close()
    stack.process.wait(timeout=60)
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    for number_of_port in range(stack.port, stack.port + _PORTS):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", number_of_port)) != 0
