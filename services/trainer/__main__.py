"""The trainer service: wiring only."""

from __future__ import annotations

from pathlib import Path

from detflow import channels
from detflow.server import Service, run
from detflow.v1.trainer_pb2_grpc import add_TrainerServiceServicer_to_server
from detflow.v1.version_pb2_grpc import VersionServiceStub
from services.trainer.consumer import consumers
from services.trainer.executors.local import LocalExecutor
from services.trainer.lease import LeaseDesk
from services.trainer.scheduler import Scheduler
from services.trainer.service import TrainerService


async def _main() -> None:
    async with Service("trainer", migrations=Path(__file__).parent / "migrations") as service:
        scheduler = Scheduler(
            db=service.db,
            bus=service.bus,
            objects=service.store,
            executor=LocalExecutor(service.settings),
        )
        async with channels.channel(service.settings.version_address) as versions:
            service.add(
                add_TrainerServiceServicer_to_server,
                TrainerService(service.db, service.watcher, VersionServiceStub(versions)),
            )
            await LeaseDesk(service.db, service.bus, scheduler.observe).start()
            for consumer in consumers(service.db, service.bus):
                service.spawn(consumer.run(), "consumer")
            service.spawn(scheduler.run(), "scheduler")
            service.on_drain(scheduler.drain)
            await service.serve()


def main() -> None:
    """Runs the service until SIGTERM."""
    run(_main)


if __name__ == "__main__":
    main()
