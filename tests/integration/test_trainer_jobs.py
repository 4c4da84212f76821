"""Jobs: child processes of the trainer that succeed, fail, die, are cancelled or shut in."""

import asyncio
import os
import signal
import sys
import textwrap
from pathlib import Path

import pytest

from detflow.errors import Aborted, DetflowError, FailedPrecondition
from detflow.settings import Settings
from detflow.v1.common_pb2 import Progress
from detflow.v1.worker_pb2 import InspectJob, JobSpec
from services.trainer.jobs import remove_leftovers, run_job
from tests.trainer_rig import eventually

SPEC = JobSpec(inspect=InspectJob(path="/nowhere"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", store_url=f"file://{tmp_path / 'store'}")


def job(folder: Path, code: str) -> tuple[str, ...]:
    """A program that runs `code` as the job, with `say` for its messages."""
    path = folder / "job.py"
    head = """
        import os, signal, sys, time
        from detflow.errors import FailedPrecondition, failure
        from detflow.v1.common_pb2 import Progress
        from detflow.v1.weights_pb2 import Weights
        from detflow.v1.worker_pb2 import JobMessage
        from detflow import sandbox
        from services.trainer.worker import jobs
        say = jobs._take_stdout()
    """
    path.write_text(textwrap.dedent(head) + textwrap.dedent(code))
    return (sys.executable, str(path))


def is_gone(settings: Settings) -> bool:
    return not list((settings.data_dir / "jobs").glob("*"))


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


async def test_result_and_progress_come_back_whatever_libraries_print(
    settings: Settings, tmp_path: Path
) -> None:
    command = job(
        tmp_path,
        """
        say(JobMessage(progress=Progress(stage="load", percent=10)))
        print("a library is chatty")
        os.write(1, b"in C too ")
        say(JobMessage(progress=Progress(stage="check", percent=90)))
        say(JobMessage(weights=Weights(model="yolov8n", class_names=["고양이"] * 20000)))
        """,
    )
    heard: list[Progress] = []
    message = await run_job(SPEC, settings=settings, command=command, on_progress=heard.append)
    assert [one.stage for one in heard] == ["load", "check"]
    assert message.weights.model == "yolov8n"
    assert list(message.weights.class_names) == ["고양이"] * 20000
    assert is_gone(settings)


async def test_failure_is_raised_as_it_was_stored(settings: Settings, tmp_path: Path) -> None:
    command = job(
        tmp_path,
        """
        say(JobMessage(failure=failure(FailedPrecondition("no such thing", reason="NOTHING"))))
        sys.exit(1)
        """,
    )
    with pytest.raises(FailedPrecondition, match="no such thing") as raised:
        await run_job(SPEC, settings=settings, command=command)
    assert raised.value.reason == "NOTHING"
    assert is_gone(settings)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "out of memory"),
        ("sys.exit(3)", "exited with 3"),
        ("", "exited with 0"),
    ],
)
async def test_job_that_dies_is_told_with_its_last_lines(
    settings: Settings, tmp_path: Path, end: str, words: str
) -> None:
    command = job(tmp_path, f"print('the last thing I saw', file=sys.stderr, flush=True)\n{end}")
    with pytest.raises(Aborted, match="the last thing I saw") as raised:
        await run_job(SPEC, settings=settings, command=command)
    assert raised.value.reason == "JOB_DIED"
    assert words in raised.value.message
    assert is_gone(settings)


async def test_program_that_does_not_start_leaves_nothing(settings: Settings) -> None:
    with pytest.raises(Aborted, match="without a result"):
        await run_job(SPEC, settings=settings, command=("/no/such/program",))
    assert is_gone(settings)


async def test_cancelled_job_ends_with_its_children_and_its_folder(
    settings: Settings, tmp_path: Path
) -> None:
    command = job(
        tmp_path,
        """
        child = os.fork()
        if not child:
            signal.pause()
        open("scratch", "w").write("x")
        say(JobMessage(progress=Progress(stage=f"{os.getpid()} {child}")))
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(1.5) or sys.exit(1))
        while True:
            signal.pause()
        """,
    )
    heard: asyncio.Queue[Progress] = asyncio.Queue()
    task = asyncio.create_task(
        run_job(SPEC, settings=settings, command=command, on_progress=heard.put_nowait)
    )
    pids = [int(pid) for pid in (await heard.get()).stage.split()]
    task.cancel()
    await asyncio.wait([task], timeout=0.1)
    task.cancel()  # whoever cancels may be impatient
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(is_running(pid) for pid in pids)
    assert is_gone(settings)


async def test_job_dies_with_a_killed_trainer_and_its_folder_is_removed_by_the_next(
    settings: Settings, tmp_path: Path
) -> None:
    # The sandbox changes who the process is, which must not keep it from dying.
    command = job(
        tmp_path,
        """
        sandbox.enter()
        say(JobMessage(progress=Progress(stage=str(os.getpid()))))
        while True:
            signal.pause()
        """,
    )
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        textwrap.dedent(f"""
        import asyncio
        from pathlib import Path
        from detflow.settings import Settings
        from detflow.v1.worker_pb2 import InspectJob, JobSpec
        from services.trainer.jobs import run_job
        settings = Settings(data_dir=Path({str(settings.data_dir)!r}))
        spec = JobSpec(inspect=InspectJob(path="/nowhere"))
        say = lambda progress: print("job", progress.stage, flush=True)
        asyncio.run(run_job(spec, settings=settings, command={command!r}, on_progress=say))
        """)
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(trainer), stdout=asyncio.subprocess.PIPE, env={**os.environ}
    )
    assert process.stdout is not None
    async for line in process.stdout:
        if line.startswith(b"job"):
            break
    pid = int(line.split()[1])
    remove_leftovers(settings)
    assert not is_gone(settings), "the folder of a living trainer's job was taken"
    process.send_signal(signal.SIGKILL)
    await process.wait()

    async def gone() -> bool:
        return not is_running(pid)

    await eventually(gone)
    remove_leftovers(settings)
    assert is_gone(settings)


async def test_job_in_the_background_stands_behind_everything_else(
    settings: Settings, tmp_path: Path
) -> None:
    command = job(
        tmp_path,
        """
        child = os.fork()
        if not child:
            signal.pause()
        while os.getpriority(os.PRIO_PROCESS, child) < 19 or ended_first() != "1000":
            pass
        gpus = os.environ["CUDA_VISIBLE_DEVICES"]
        say(JobMessage(weights=Weights(model=gpus, class_names=[os.environ["OMP_NUM_THREADS"]])))
        """.replace("ended_first()", "open('/proc/self/oom_score_adj').read().strip()"),
    )
    async with asyncio.timeout(20):
        message = await run_job(SPEC, settings=settings, command=command, background=True)
    assert (message.weights.model, list(message.weights.class_names)) == ("", ["1"])


async def test_job_that_is_ended_clears_up_what_it_has_stored_for_a_moment(
    settings: Settings, tmp_path: Path
) -> None:
    program, left = tmp_path / "job.py", tmp_path / "stored for a moment"
    program.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        from detflow.v1.common_pb2 import Progress
        from detflow.v1.worker_pb2 import JobMessage
        from services.trainer.worker import jobs

        class Job:
            def run(self, job, emit):
                open({str(left)!r}, "w").close()
                try:
                    emit(JobMessage(progress=Progress(stage="stored")))
                    signal.pause()
                finally:
                    os.unlink({str(left)!r})

        sys.modules["services.trainer.worker.inspect"] = Job()
        sys.exit(jobs.main(sys.argv[1:]))
        """)
    )
    stored = asyncio.Event()
    task = asyncio.create_task(
        run_job(
            SPEC,
            settings=settings,
            command=(sys.executable, str(program)),
            on_progress=lambda _: stored.set(),
        )
    )
    async with asyncio.timeout(30):
        await stored.wait()
        assert left.exists()
        task.cancel()
        await asyncio.wait([task])
    assert not left.exists()


async def test_sandboxed_job_reaches_nothing(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    command = job(
        tmp_path,
        """
        import socket, subprocess, threading
        print("sandbox:", sandbox.enter(memory_bytes=1 << 30), file=sys.stderr)
        assert sys.argv[2] == "--sandbox"

        def tried(what):
            try:
                what()
            except (OSError, MemoryError) as error:
                return type(error).__name__
            return "did it"

        def write():
            with open("file", "w") as file:
                file.write("x")

        tries = {
            "socket": lambda: socket.create_connection(("127.0.0.1", 1)),
            "fork": os.fork,
            "program": lambda: subprocess.run(["/bin/true"]),
            "kill": lambda: os.kill(os.getppid(), 0),
            "write": write,
            "memory": lambda: bytearray(2 << 30),
        }
        for name, what in tries.items():
            say(JobMessage(progress=Progress(stage=f"{name}: {tried(what)}")))
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        secrets = [name for name in os.environ if "SECRET" in name or name.endswith("_URL")]
        say(JobMessage(weights=Weights(class_names=secrets)))
        """,
    )
    heard: list[str] = []
    message = await run_job(
        SPEC,
        settings=settings,
        command=command,
        sandbox=True,
        on_progress=lambda progress: heard.append(progress.stage),
    )
    assert heard == [
        "socket: PermissionError",
        "fork: PermissionError",
        "program: PermissionError",
        "kill: PermissionError",
        "write: OSError",
        "memory: MemoryError",
    ]
    assert list(message.weights.class_names) == []


async def test_sandboxed_job_can_read_tensors_within_its_memory(
    settings: Settings, tmp_path: Path
) -> None:
    command = job(
        tmp_path,
        """
        sandbox.enter()
        import io, torch
        file = io.BytesIO()
        torch.save({"weight": torch.ones(3, 3)}, file)
        file.seek(0)
        weight = torch.load(file, weights_only=True)["weight"]
        pixels = torch.nn.functional.conv2d(torch.rand(1, 3, 64, 64), weight.expand(1, 3, 3, 3))
        try:
            torch.zeros(2 << 30)
        except RuntimeError as error:
            say(JobMessage(weights=Weights(model=str(error), num_tensors=pixels.shape[2])))
        """,
    )
    message = await run_job(SPEC, settings=settings, command=command, sandbox=True)
    assert message.weights.num_tensors == 62
    assert "memory" in message.weights.model


async def test_job_module_stores_what_it_fails_with(settings: Settings) -> None:
    missing = JobSpec()
    missing.export.key = "exports/e/model.onnx"
    with pytest.raises(DetflowError) as raised:
        await run_job(missing, settings=settings)
    assert raised.value.reason != "JOB_DIED"
    assert is_gone(settings)
