"""The version service: wiring only."""

from __future__ import annotations

from pathlib import Path

from detflow import channels
from detflow.server import Service, run
from detflow.v1 import dataset_pb2_grpc, project_pb2_grpc, version_pb2_grpc
from services.version import consumer
from services.version.projects import ProjectService
from services.version.service import VersionService

MIGRATIONS = Path(__file__).parent / "migrations"


async def serve(service: Service) -> None:
    """Serves projects and versions until the process is told to stop."""
    async with service as s, channels.channel(s.settings.preprocess_address) as preprocess:
        datasets = dataset_pb2_grpc.DatasetServiceStub(preprocess)
        s.add(project_pb2_grpc.add_ProjectServiceServicer_to_server, ProjectService(s.db))
        s.add(
            version_pb2_grpc.add_VersionServiceServicer_to_server,
            VersionService(s.db, s.watcher, datasets),
        )
        s.spawn(consumer.projection(s.bus, s.db).run(), "projection")
        await s.serve()


def main() -> None:
    """Runs the service with the settings of the environment."""
    run(lambda: serve(Service("version", migrations=MIGRATIONS)))


if __name__ == "__main__":
    main()
