"""The TypeScript client under Node, against a real gateway."""

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2

from detflow import errors
from detflow.v1 import trainer_pb2, training_pb2
from tests.gateway_rig import Rig, running

SDK = Path(__file__).parents[2] / "sdk" / "typescript"
MODULES = SDK / "node_modules"


@pytest.fixture(scope="module")
def built() -> None:
    """Installs what package-lock.json names, if that has not been done, and builds the package."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    installed, lock = MODULES / ".package-lock.json", SDK / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        done = run("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
        if done.returncode:
            pytest.skip(f"npm ci failed: {done.stderr[-500:]}")
        installed.touch()
    done = run(str(MODULES / ".bin" / "tsc"))
    assert done.returncode == 0, done.stdout


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=SDK, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.usefixtures("built")
def test_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    done = run(str(Path(sys.executable).with_name("buf")), "generate", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    done = run("diff", "-r", str(tmp_path / "src" / "gen"), "src/gen")
    assert done.returncode == 0, f"run `npm run generate`: {done.stdout[:2000]}"


@pytest.mark.usefixtures("built")
async def test_client_works_under_node() -> None:
    async with running() as rig:
        rig.backend.replies |= {
            "ListModels": list_models,
            "GetTraining": get_training,
            "WatchTraining": Watches(rig).reply,
        }
        node = await asyncio.create_subprocess_exec(
            "node",
            "--test",
            "test/client.test.js",
            cwd=SDK,
            env={**os.environ, "DETFLOW_URL": f"http://127.0.0.1:{rig.port}"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(60):
            output, _ = await node.communicate()
    assert node.returncode == 0, output.decode()[-5000:]


async def list_models(_request: Any, _context: Any) -> Any:
    model = trainer_pb2.Model(display_name="YOLOv8n", num_parameters=3_000_000)
    return trainer_pb2.ListModelsResponse(models=[model])


async def get_training(request: Any, context: Any) -> Any:
    if request.name.endswith("/shown"):
        return training_pb2.Training(model=shown_in(context))
    if request.name.endswith("/failed"):
        training = training_pb2.Training(name=request.name)
        detail = AnyMessage()
        detail.Pack(error_details_pb2.ErrorInfo(reason="OUT_OF_MEMORY", domain="detflow"))
        training.failure.status.details.append(detail)
        return training
    raise errors.InvalidArgument(
        "that is wrong",
        reason="WRONG",
        metadata={"training": "t"},
        violations=[errors.Violation("name", "BAD", "say another")],
    )


def shown_in(context: Any) -> str:
    """Returns who a call says it is from."""
    return str(dict(context.invocation_metadata()).get("authorization", "nobody"))


class Watches:
    """Answers watches as the last part of their training's name says."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._cut: set[str] = set()

    async def reply(self, request: Any, context: Any) -> AsyncIterator[Any]:
        what = request.name.rpartition("/")[2]
        if what == "shown":
            yield trainer_pb2.WatchTrainingResponse(cursor=shown_in(context))
            return
        if what == "gone":
            raise errors.NotFound("there is no such training", reason="GONE")
        if what == "expired" and request.cursor:
            raise errors.OutOfRange("too old", reason="CURSOR_EXPIRED")
        if what == "t1":
            progress = training_pb2.TrainingProgress(epoch=3, percent=50)
            yield trainer_pb2.WatchTrainingResponse(cursor="0", progress=progress)
        if what.startswith("cut"):
            for number in range(int(request.cursor or 0) + 1, 5):
                yield state(number)
                if number in (2, 3) and f"{what}/{number}" not in self._cut:
                    self._cut.add(f"{what}/{number}")
                    await self._pass_on()
                    self._break_connections()
                    await asyncio.Event().wait()
        else:
            yield state(1)
            if what == "endless":
                await asyncio.Event().wait()

    async def _pass_on(self) -> None:
        """Lets the gateway pass on what was sent, in as many turns as these requests take."""
        for _ in range(20):
            await self._rig.http.get("/healthz")

    def _break_connections(self) -> None:
        for one in list(self._rig.server.server_state.connections):
            one.transport.abort()


def state(number: int) -> Any:
    training = training_pb2.Training(state=training_pb2.Training.RUNNING)
    return trainer_pb2.WatchTrainingResponse(cursor=str(number), training=training)
