"""Starts services in a moment: a process that has imported them forks one whenever it is asked.

A suite that kills hundreds of services would spend its time importing them again. What is forked is
a process as any other: it has its own id, which is killed, and dies with the nursery. The command
that the supervisor runs instead of the service is a few lines that ask for it, and end as it ends.

`python -m tests.chaos.nursery SOCKET` is the nursery.
"""

import asyncio
import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

from detflow.processes import dying_with_parent

ROOT = Path(__file__).parent.parent.parent
MODULES = {
    "version": "services.version.__main__",
    "preprocess": "services.preprocess.__main__",
    "trainer": "tests.chaos.trainer_process",
    "metrics": "services.metrics.__main__",
    "gateway": "gateway.__main__",
}
_PR_SET_PDEATHSIG = 1
# Asks for a service, passes SIGTERM on to it and ends with its exit code, or by the same signal.
_ASK = """
import json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
told = json.dumps({"name": sys.argv[2], "environment": dict(os.environ), "folder": os.getcwd()})
socket.send_fds(link, [len(told).to_bytes(4, "big")], [1, 2])
link.sendall(told.encode())
pid = int.from_bytes(link.recv(4, socket.MSG_WAITALL), "big")
def end(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
signal.signal(signal.SIGTERM, end)
os.close(1), os.close(2)
code = int.from_bytes(link.recv(4, socket.MSG_WAITALL) or b"\\0\\0\\0\\1", "big", signed=True)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@dataclass(frozen=True)
class Nursery:
    """A running nursery."""

    process: asyncio.subprocess.Process
    address: Path

    def command(self, name: str) -> list[str]:
        """Returns what runs a service as long as the service itself does."""
        return [sys.executable, "-I", "-S", "-c", _ASK, str(self.address), name]

    def pid(self, name: str) -> int | None:
        """Returns the process id of a service that was forked last, if it has not ended."""
        try:
            pid = int(self.address.with_name(f"{name}.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return pid if psutil.pid_exists(pid) else None

    async def close(self) -> None:
        """Ends it, with what it has forked."""
        self.process.kill()
        await self.process.wait()


async def open_nursery(folder: Path) -> Nursery:
    """Starts a nursery and waits until it has imported everything."""
    address = folder / "nursery"
    process = await asyncio.create_subprocess_exec(
        *dying_with_parent([sys.executable, "-m", "tests.chaos.nursery", str(address)]),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return Nursery(process, address)


class _Children:
    """What was forked, and who wants to know of its end."""

    def __init__(self, address: Path) -> None:
        self._folder = address.parent
        self._by_link: dict[socket.socket, tuple[int, str]] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(64)
        self._wake, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        signal.set_wakeup_fd(self._waking.fileno())
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._fork(self._listener.accept()[0])
                elif key.fileobj is self._wake:
                    self._wake.recv(4096)
                    self._reap()
                else:
                    self._abandon(key.fileobj)

    def _fork(self, link: socket.socket) -> None:
        size, fds, _, _ = socket.recv_fds(link, 4, 2)
        told = json.loads(link.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for one in (self._listener, self._wake, self._waking, link, *self._by_link):
                one.close()
            _become(told["name"], told["environment"], told["folder"], fds)
        for fd in fds:
            os.close(fd)
        (self._folder / f"{told['name']}.pid").write_text(str(pid))
        link.sendall(pid.to_bytes(4, "big"))
        self._by_link[link] = pid, told["name"]
        self._selector.register(link, selectors.EVENT_READ)

    def _reap(self) -> None:
        for link, (pid, _) in list(self._by_link.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                self._forget(link, code)

    def _abandon(self, link: Any) -> None:
        """Kills what nobody asks for any more: the supervisor has killed its command."""
        pid, _ = self._by_link[link]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._forget(link, 0)

    def _forget(self, link: socket.socket, code: int) -> None:
        self._selector.unregister(link)
        del self._by_link[link]
        try:
            link.sendall(code.to_bytes(4, "big", signed=True))
        except OSError:
            pass  # it was killed
        link.close()


def _become(name: str, environment: Mapping[str, str], folder: str, fds: list[int]) -> NoReturn:
    """Turns this forked process into a service."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        for number, fd in enumerate(fds, 1):
            os.dup2(fd, number)
            os.close(fd)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv[:] = [name]
        importlib.import_module(MODULES[name]).main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Imports the services, says so and forks them."""
    for module in MODULES.values():
        importlib.import_module(module)
    children = _Children(Path(sys.argv[1]))
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    children.serve()


if __name__ == "__main__":
    main()
