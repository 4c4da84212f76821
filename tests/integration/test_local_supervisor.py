import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from detflow.local import stack as local_stack
from detflow.local.process import free_port
from detflow.local.running import Running, StackError, locked, running
from detflow.local.supervisor import Program, Supervisor


def marker(path: Path) -> Callable[[], Awaitable[bool]]:
    return lambda: asyncio.to_thread(path.exists)


def sleeper(path: Path, name: str = "sleeper") -> Program:
    code = f"import pathlib, signal; pathlib.Path({str(path)!r}).touch(); signal.pause()"
    return Program(name=name, command=[sys.executable, "-c", code], is_ready=marker(path))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.to_thread(os.sched_yield)


async def test_killed_program_is_started_again_and_stop_ends_it(tmp_path: Path) -> None:
    crashed = asyncio.Event()
    events: list[str] = []

    def on_event(text: str) -> None:
        events.append(text)
        crashed.set()

    supervisor = Supervisor(logs=tmp_path / "logs", directory=tmp_path, on_event=on_event)
    program = sleeper(tmp_path / "ready")
    await supervisor.start([program])
    first = supervisor.pids()["sleeper"]
    (tmp_path / "ready").unlink()
    os.kill(first, signal.SIGKILL)
    await asyncio.wait_for(crashed.wait(), 10)
    assert "sleeper ended (killed by SIGKILL)" in events[0]
    await until(program.is_ready)
    second = supervisor.pids()["sleeper"]
    assert second != first
    await supervisor.stop()
    assert not psutil.pid_exists(second)


async def test_program_that_cannot_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    supervisor = Supervisor(logs=tmp_path / "logs", directory=tmp_path)
    program = Program(
        name="broken",
        command=[sys.executable, "-c", "raise SystemExit('no such setting')"],
        is_ready=marker(tmp_path / "never"),
    )
    with pytest.raises(StackError, match=r"broken does not start.*no such setting"):
        await supervisor.start([sleeper(tmp_path / "ready"), program])
    pids = supervisor.pids()
    await supervisor.stop()
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


async def test_program_that_is_late_is_named(tmp_path: Path) -> None:
    supervisor = Supervisor(logs=tmp_path / "logs", directory=tmp_path)
    slow = Program(
        name="slow",
        command=[sys.executable, "-c", "import signal; signal.pause()"],
        is_ready=marker(tmp_path / "never"),
    )
    with pytest.raises(StackError, match="slow is not ready after 0 s"):
        await supervisor.start([slow], timeout_seconds=0.1)
    await supervisor.stop()


async def test_groups_stop_in_reverse_and_deaf_programs_are_killed(tmp_path: Path) -> None:
    lines: list[str] = []
    events: list[str] = []
    code = """
import signal, sys
def stop(number, frame):
    print('stopped', flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print('up', flush=True)
signal.pause()
"""
    deaf = code.replace("sys.exit()", "signal.pause()")

    def heard(name: str) -> Callable[[], Awaitable[bool]]:
        async def is_ready() -> bool:
            return f"{name} up" in lines

        return is_ready

    supervisor = Supervisor(
        logs=tmp_path / "logs",
        directory=tmp_path,
        on_line=lambda name, line: lines.append(f"{name} {line}"),
        on_event=events.append,
    )
    for name, text in (("first", code), ("second", deaf)):
        command = [sys.executable, "-c", text]
        await supervisor.start(
            [Program(name=name, command=command, is_ready=heard(name), stop_seconds=0.5)]
        )
    await supervisor.stop()
    assert lines == ["first up", "second up", "second stopped", "first stopped"]
    assert events == ["second did not stop in time: killed"]


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from detflow.local import nats, postgres, stack
from detflow.local.supervisor import Supervisor
async def main():
    data = pathlib.Path({str(tmp_path)!r})
    cluster = postgres.prepare(data / "postgres", fsync=False)
    server = nats.prepare(data / "nats")
    supervisor = Supervisor(logs=data / "logs", directory=data)
    await supervisor.start([stack._postgres(cluster), stack._nats(server)])
    print(*supervisor.pids().values(), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    for _ in range(2):  # the second start recovers from the first kill
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
            assert len(children) == 2
            children += [grandchild for child in children for grandchild in child.children()]
            parent.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


async def test_taken_port_is_named(tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(StackError, match=rf"port {port} is in use.*--port"):
            async with local_stack.stack(tmp_path, port=port):
                raise AssertionError("it must not start")
    assert running(tmp_path) is None


async def test_second_stack_on_a_folder_says_who_runs(tmp_path: Path) -> None:
    with locked(tmp_path) as (_, note):
        note(Running(pid=4711, port=7100, ready=True))
        assert running(tmp_path) == Running(pid=4711, port=7100, ready=True)
        with pytest.raises(StackError, match=r"runs already on .*pid 4711, http://127.0.0.1:7100"):
            async with local_stack.stack(tmp_path):
                raise AssertionError("it must not start")
    assert running(tmp_path) is None
