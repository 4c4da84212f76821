"""A training worker as a child process, with the test in the trainer's place."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from detflow.store import ObjectStore
from detflow.v1.training_pb2 import TrainingProgress
from detflow.v1.worker_pb2 import LeaseRequest, LeaseResponse, WorkerRecord

TRAINING_ID = "t1"

# Makes every connection that is not to this machine fail, and writes it down.
_NO_NETWORK = """
import os, sys

def refuse(event, arguments):
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else "127.0.0.1"
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", None):
        with open(os.environ["CONNECTIONS_FILE"], "a") as file:
            print(event, host, file=file)
        raise OSError("no network in this test")

sys.addaudithook(refuse)
"""


@dataclass
class Worker:
    """One running worker and what it said so far."""

    process: asyncio.subprocess.Process
    folder: Path
    records: list[WorkerRecord] = field(default_factory=list)
    message_ids: list[str] = field(default_factory=list)
    progress: list[TrainingProgress] = field(default_factory=list)
    leases: list[LeaseRequest] = field(default_factory=list)
    reply: LeaseResponse = field(default_factory=LeaseResponse)
    said: asyncio.Condition = field(default_factory=asyncio.Condition)

    def parts(self, what: str) -> list[WorkerRecord]:
        """Returns the records of one kind, in order."""
        return [record for record in self.records if record.WhichOneof("what") == what]

    async def until(self, happened: Callable[[Worker], bool], seconds: float = 60.0) -> None:
        """Waits for something the worker says; fails if it ends before."""
        ended = asyncio.ensure_future(self.process.wait())
        try:
            async with asyncio.timeout(seconds), self.said:
                ended.add_done_callback(lambda _: asyncio.ensure_future(self._notify()))
                await self.said.wait_for(lambda: happened(self) or ended.done())
        finally:
            ended.cancel()
        assert happened(self), self.errors()

    async def exit_code(self, seconds: float = 90.0) -> int:
        """Waits for its end."""
        async with asyncio.timeout(seconds):
            return await self.process.wait()

    def errors(self) -> str:
        """Returns what it wrote to stderr."""
        return (self.folder / "stderr").read_text()

    def connections(self) -> str:
        """Returns the connections it tried to make to other machines."""
        path = self.folder / "connections"
        return path.read_text() if path.exists() else ""

    async def _notify(self) -> None:
        async with self.said:
            self.said.notify_all()


@asynccontextmanager
async def running_worker(
    spec: str,
    folder: Path,
    *,
    nats_url: str,
    store: ObjectStore,
    reply: LeaseResponse | None = None,
    variables: Mapping[str, str] = {},
    on_start: str = "",
    wrapper: Sequence[str] = (),
) -> AsyncIterator[Worker]:
    """Starts a worker and listens to it; kills it on leaving if it still runs.

    Args:
        spec: WorkerSpec as JSON.
        folder: New work folder of the attempt.
        nats_url: NATS, with its streams made.
        store: Where the bundle is.
        reply: Answer to its lease requests; may be changed later.
        variables: More of its environment.
        on_start: Python that it runs before anything else, e.g. to break something in it.
        wrapper: Command that runs the worker's.
    """
    site = _prepare(folder, spec, on_start)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DETFLOW_")},
        "DETFLOW_NATS_URL": nats_url,
        "DETFLOW_STORE_URL": store.url,
        "DETFLOW_DATA_DIR": str(folder.parent / "data"),
        "CONNECTIONS_FILE": str(folder / "connections"),
        **variables,
        "PYTHONPATH": os.pathsep.join((str(site), str(Path(__file__).parent.parent))),
    }
    client = await nats.connect(nats_url)
    try:
        with (folder / "stderr").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *wrapper,
                *(sys.executable, "-m", "services.trainer.worker", str(folder / "spec.json")),
                env=environment,
                cwd=folder,
                stdout=stderr,
                stderr=stderr,
            )
        worker = Worker(process, folder, reply=reply or LeaseResponse())
        await _listen(client, worker)
        try:
            yield worker
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    finally:
        await client.close()


def _prepare(folder: Path, spec: str, on_start: str) -> Path:
    """Writes the specification; returns a folder that cuts the network off when Python starts."""
    site = folder / "site"
    site.mkdir(parents=True)
    (folder / "spec.json").write_text(spec)
    (site / "sitecustomize.py").write_text(_NO_NETWORK + on_start)
    return site


async def _listen(client: Client, worker: Worker) -> None:
    async def on_record(message: Msg) -> None:
        async with worker.said:
            worker.records.append(WorkerRecord.FromString(message.data))
            worker.message_ids.append((message.headers or {})["Nats-Msg-Id"])
            worker.said.notify_all()

    async def on_progress(message: Msg) -> None:
        async with worker.said:
            worker.progress.append(TrainingProgress.FromString(message.data))
            worker.said.notify_all()

    async def on_lease(message: Msg) -> None:
        worker.leases.append(LeaseRequest.FromString(message.data))
        await message.respond(worker.reply.SerializeToString())

    await client.subscribe(f"detflow.records.{TRAINING_ID}.*", cb=on_record)
    await client.subscribe(f"detflow.progress.training.{TRAINING_ID}", cb=on_progress)
    await client.subscribe(f"detflow.lease.{TRAINING_ID}", cb=on_lease)
    await client.flush()
