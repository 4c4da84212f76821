"""The trainer service: wiring only."""

from __future__ import annotations

import contextlib
from pathlib import Path

from detflow import channels
from detflow.errors import InvalidArgument
from detflow.projects import Projects
from detflow.scratch import Scratch
from detflow.server import Service, run
from detflow.settings import Settings
from detflow.v1 import (
    export_pb2_grpc,
    project_pb2_grpc,
    trainer_pb2_grpc,
    version_pb2_grpc,
    weights_pb2_grpc,
)
from services.trainer import gauges, jobs, queued_preflights, trials
from services.trainer.attempt import Deadlines
from services.trainer.consumer import consumers
from services.trainer.executors import Executor
from services.trainer.executors.local import LocalExecutor
from services.trainer.export_service import ExportService
from services.trainer.exporter import Exporter, RunJob
from services.trainer.lease import LeaseDesk
from services.trainer.queued_preflights import QueuedPreflights
from services.trainer.quota import RunningQuotas
from services.trainer.retention import Ages, Retention
from services.trainer.scheduler import Scheduler
from services.trainer.service import TrainerService
from services.trainer.trials import Trials
from services.trainer.weights_service import WeightsService

MIGRATIONS = Path(__file__).parent / "migrations"


async def serve(
    service: Service,
    executor: Executor | None = None,
    deadlines: Deadlines | None = None,
    run_job: trials.RunJob = jobs.run_job,
    run_queued: queued_preflights.RunJob = jobs.run_job,
) -> None:
    """Serves trainings and carries them out until the process is told to stop."""
    async with service as s, channels.channel(s.settings.version_address, s.settings) as versions:
        projects = Projects(project_pb2_grpc.ProjectServiceStub(versions))
        executor = executor or await make_executor(s.settings)
        preflights = QueuedPreflights(
            db=s.db,
            bus=s.bus,
            settings=s.settings,
            executor=executor,
            deadlines=deadlines,
            run=run_queued,
        )
        quotas = RunningQuotas(s.db, projects)
        scheduler = Scheduler(
            db=s.db,
            bus=s.bus,
            objects=s.store,
            executor=executor,
            preflights=preflights,
            deadlines=deadlines,
        )
        s.add(
            trainer_pb2_grpc.add_TrainerServiceServicer_to_server,
            TrainerService(
                db=s.db,
                watcher=s.watcher,
                versions=version_pb2_grpc.VersionServiceStub(versions),
                projects=projects,
                executor=executor,
                quotas=quotas,
                ages=Ages.of(s.settings),
                trials=Trials(s.settings, run_job),
            ),
        )
        add_exports(s, deadlines)
        await LeaseDesk(s.db, s.bus, scheduler.observe).start()
        for consumer in consumers(s.db, s.bus):
            s.spawn(consumer.run(), "consumer")
        s.spawn(quotas.run(), "quotas")
        s.spawn(Retention(s.db, Ages.of(s.settings)).run(), "retention")
        s.spawn(scheduler.run(), "scheduler")
        s.figures(gauges.QUERIES, lambda: gauges.count_slots(executor))
        s.on_drain(scheduler.drain)
        with contextlib.closing(Scratch(s.settings.data_dir / "uploads")) as scratch:
            s.add(
                weights_pb2_grpc.add_WeightsServiceServicer_to_server,
                WeightsService(
                    db=s.db,
                    objects=s.store,
                    scratch=scratch,
                    projects=projects,
                    settings=s.settings,
                    run=run_job,
                ),
            )
            await s.serve()


async def make_executor(settings: Settings) -> Executor:
    """Makes what the settings name.

    Raises:
        InvalidArgument: BAD_SETTING or MISSING_SETTING.
        FailedPrecondition: NO_RAY.
    """
    if settings.executor == "local":
        return LocalExecutor(settings)
    if settings.executor != "ray":
        raise InvalidArgument(
            f"DETFLOW_EXECUTOR must be local or ray, not {settings.executor!r}",
            reason="BAD_SETTING",
        )
    from services.trainer.executors.ray import RayExecutor  # what needs Ray is imported with it

    executor = RayExecutor(settings)
    await executor.refresh()
    return executor


def add_exports(s: Service, deadlines: Deadlines | None = None, run: RunJob = jobs.run_job) -> None:
    """Adds what serves and makes exports."""
    s.add(
        export_pb2_grpc.add_ExportServiceServicer_to_server,
        ExportService(s.db, s.watcher, s.store),
    )
    exporter = Exporter(
        db=s.db, bus=s.bus, objects=s.store, settings=s.settings, deadlines=deadlines, run=run
    )
    s.spawn(exporter.run(), "exporter")
    s.on_drain(exporter.drain)


def main() -> None:
    """Runs the service with the settings of the environment."""
    run(lambda: serve(Service("trainer", migrations=MIGRATIONS)))


if __name__ == "__main__":
    main()
