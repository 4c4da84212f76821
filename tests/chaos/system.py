"""The system that is hurt: the stack as `detflow up` runs it, with faults planned for each process.

Services are forked by the nursery and run by the supervisor; their environment is changed between
two starts, so that each life of a process has faults of its own.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from detflow import faults
from detflow.local.process import is_free
from detflow.local.stack import stack
from detflow.local.supervisor import Program, Supervisor
from detflow.v1 import export_pb2_grpc
from services.trainer.attempt import Deadlines
from tests.chaos.nursery import ROOT, Nursery, open_nursery
from tests.chaos.proxy import Proxy
from tests.chaos.trainer_process import LEASE_SECONDS
from tests.deployment_rig import SERVICES, Deployment, eventually

PLAYER = "tests.chaos.player"
# The real supervisor waits up to ten seconds before it starts what has crashed again and again.
BACKOFF_SECONDS = 0.2
_ADDRESSES = {"postgres": "DETFLOW_DATABASE_URL", "nats": "DETFLOW_NATS_URL"}
_SETTINGS = {
    "DETFLOW_ACCESS": "open",
    "DETFLOW_LOG_LEVEL": "warning",
    "DETFLOW_NUM_CPU_SLOTS": "2",
    "DETFLOW_PREPROCESS_PROCESSES": "1",
    "PYTHONPATH": str(ROOT),
}


class Plans:
    """Which faults each service begins its next life with, and which have happened.

    Attributes:
        next: Asked for the plan of a service whenever it is started.
        now: What each began its life with.
    """

    def __init__(self) -> None:
        self.next: Callable[[str], str] = lambda name: ""
        self.now: dict[str, str] = dict.fromkeys(SERVICES, "")
        self._happened: dict[str, list[str]] = {name: [] for name in SERVICES}
        self._journals: dict[str, Path] = {}

    def begin(self, name: str, scratch: Path) -> str:
        """Returns the plan for a service that is about to start."""
        self._journals[name] = scratch / faults.JOURNAL
        self._collect(name)
        self.now[name] = self.next(name)
        return self.now[name]

    def happened(self, name: str) -> set[str]:
        """Returns which faults have happened in a service and its workers."""
        return set(self._happened[name])

    def points(self) -> Counter[str]:
        """Returns how often something happened at each place."""
        return Counter(fault.split(":")[0] for fault in self._all())

    def kills(self) -> Counter[str]:
        """Returns how many processes have killed themselves, by kind."""
        return Counter(
            "worker" if fault.startswith("spool.") else name
            for name, happened in self._happened.items()
            for fault in happened
            if ":kill:" in fault
        )

    def collect_all(self) -> None:
        """Takes over what was noted so far."""
        for name in self._journals:
            self._collect(name)

    def _collect(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._happened[name] += self._journals[name].read_text().splitlines()
            self._journals[name].unlink()  # so that it may happen again

    def _all(self) -> list[str]:
        return [fault for happened in self._happened.values() for fault in happened]


class System(Deployment):
    """A deployment whose services are forked.

    Attributes:
        plans: The faults.
        data_dir: Where everything is.
        programs: What is run, by name.
        urls: Database by service, past every proxy.
        nats_url: NATS, past every proxy.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        port: int,
        data_dir: Path,
        nursery: Nursery,
        plans: Plans,
        programs: Mapping[str, Program],
    ) -> None:
        super().__init__(supervisor, port)
        self.exports: Any = export_pb2_grpc.ExportServiceStub(self._channels[3])
        self.plans = plans
        self.data_dir = data_dir
        self.programs = programs
        told = {name: program.environment or {} for name, program in programs.items()}
        self.urls = {name: told[name]["DETFLOW_DATABASE_URL"] for name in SERVICES}
        self.nats_url = told["version"]["DETFLOW_NATS_URL"]
        self._nursery = nursery

    def process(self, name: str) -> psutil.Process:
        """Returns the process that is the service, or else the supervisor's own child.

        Raises:
            KeyError: It does not run at the moment.
        """
        if name not in (*SERVICES, "gateway"):
            return super().process(name)
        pid = self._nursery.pid(name)
        if pid is None:
            raise KeyError(name)
        return psutil.Process(pid)

    def running(self) -> list[psutil.Process]:
        """Returns the services and workers that run."""
        found = self.workers()
        for name in SERVICES:
            with contextlib.suppress(KeyError, psutil.NoSuchProcess):
                found.append(self.process(name))
        return found

    def worker(self) -> psutil.Process | None:
        return next(iter(self.workers()), None)

    def workers(self) -> list[psutil.Process]:
        """Returns the workers that run."""
        found = []
        with contextlib.suppress(KeyError, psutil.NoSuchProcess):
            for child in self.process("trainer").children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if PLAYER in " ".join(child.cmdline()):
                        found.append(child)
        return found

    async def until_serving(self) -> None:
        """Waits until everything is ready as the supervisor asks it."""
        for name in (*SERVICES, "gateway"):
            await eventually(self.programs[name].is_ready, bool)


@contextlib.asynccontextmanager
async def hurt(
    folder: Path,
    plans: Plans,
    networks: Mapping[str, Proxy] | None = None,
    lease_seconds: float = Deadlines().lease,
) -> AsyncIterator[System]:
    """Runs the system whose services fail as planned.

    Args:
        folder: Of everything it keeps.
        plans: Asked at each start of a service.
        networks: Stand between services and "postgres", "nats"; opened here.
        lease_seconds: After which a training whose trainer is silent goes to another.
    """
    # Below what the kernel gives to clients: one that calls a dead service would get its port.
    # Each test process begins elsewhere, so that two at once do not meet.
    first = 24_000 + os.getpid() % 1500 * 5
    port = next(p for p in range(first, 32_000, 5) if all(is_free(p + k) for k in range(5)))
    data_dir = folder / "data"
    known: dict[str, Program] = {}
    nursery = await open_nursery(folder)

    async def planned(program: Program) -> Program:
        if program.environment is None:
            return program
        name = program.name
        known[name] = program
        environment = {**program.environment, **_SETTINGS, LEASE_SECONDS: str(lease_seconds)}
        for network, proxy in (networks or {}).items():
            url = environment.get(_ADDRESSES[network], "")
            if port := urlsplit(url).port:
                await proxy.open(port)
                environment[_ADDRESSES[network]] = url.replace(f":{port}", f":{proxy.port}")

        def plan() -> None:
            if name in SERVICES:
                scratch = Path(environment["DETFLOW_DATA_DIR"])
                environment["DETFLOW_FAULTS"] = plans.begin(name, scratch)

        return dataclasses.replace(
            program, command=nursery.command(name), environment=environment, before_start=plan
        )

    def make(**arguments: Any) -> Supervisor:
        supervisor = Supervisor(**arguments)
        start = supervisor.start

        async def start_planned(programs: Sequence[Program], **options: Any) -> None:
            await start([await planned(program) for program in programs], **options)

        supervisor.start = start_planned  # type: ignore[method-assign]
        return supervisor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detflow.local.stack.Supervisor", make)
        patch.setattr("detflow.local.supervisor._MAX_BACKOFF_SECONDS", BACKOFF_SECONDS)
        try:
            # With fsync: without it a killed Postgres forgets what it has acknowledged.
            async with stack(data_dir, port=port) as supervisor:
                system = System(supervisor, port, data_dir, nursery, plans, known)
                try:
                    yield system
                finally:
                    await system.close()
        finally:
            await nursery.close()
            for proxy in (networks or {}).values():
                await proxy.close()
    plans.collect_all()
