"""Entry point of the preprocess service."""

from datetime import timedelta
from pathlib import Path

from detflow import channels
from detflow.projects import Projects
from detflow.scratch import Scratch
from detflow.server import Service, run
from detflow.tasks import cancel_all
from detflow.v1 import project_pb2_grpc
from detflow.v1.dataset_pb2_grpc import add_DatasetServiceServicer_to_server
from detflow.v1.preprocess_pb2_grpc import add_PreprocessServiceServicer_to_server
from services.preprocess.archive import Limits
from services.preprocess.consumer import VersionEvents
from services.preprocess.garbage import GarbageCollector
from services.preprocess.gauges import QUERIES
from services.preprocess.importer import Importer
from services.preprocess.pipeline import Pipeline, ShardPool
from services.preprocess.pool import WorkerPool
from services.preprocess.preprocess_service import PreprocessService
from services.preprocess.quota import StorageQuota
from services.preprocess.ray_pool import RayPool
from services.preprocess.service import DatasetService
from services.preprocess.sources import Sources
from services.preprocess.uploads import Uploads

MIGRATIONS = Path(__file__).parent / "migrations"


async def serve(s: Service, limits: Limits, projects: Projects) -> None:
    """Serves until SIGTERM.

    Args:
        s: The connected service.
        limits: How much an archive may hold.
        projects: The projects there are.
    """
    scratch = Scratch(s.settings.data_dir / "preprocess")
    pool = WorkerPool(s.settings.preprocess_processes)
    sources = Sources(
        allowed=s.settings.import_urls,
        store_url=s.settings.store_url,
        limits=limits,
        max_bytes=s.settings.max_upload_bytes,
    )
    quota = StorageQuota(s.db, projects)
    importer = Importer(
        db=s.db,
        bus=s.bus,
        store=s.store,
        pool=pool,
        scratch=scratch,
        sources=sources,
        quota=quota,
        limits=limits,
    )
    shards: ShardPool = RayPool(s.settings) if s.settings.executor == "ray" else pool
    pipeline = Pipeline(
        db=s.db, bus=s.bus, store=s.store, pool=shards, scratch=scratch, quota=quota
    )
    s.add(
        add_DatasetServiceServicer_to_server,
        DatasetService(
            db=s.db,
            store=s.store,
            watcher=s.watcher,
            projects=projects,
            uploads=Uploads(
                db=s.db,
                store=s.store,
                projects=projects,
                quota=quota,
                max_bytes=s.settings.max_upload_bytes,
                lifetime=timedelta(hours=s.settings.upload_idle_hours),
            ),
            sources=sources,
            wake=importer.loop.bell.ring,
        ),
    )
    s.add(
        add_PreprocessServiceServicer_to_server,
        PreprocessService(
            db=s.db,
            store=s.store,
            pool=pool,
            scratch=scratch,
            quota=quota,
            watcher=s.watcher,
            created=pipeline.loop.bell,
        ),
    )
    s.spawn(VersionEvents(pipeline.loop.bell.ring).consumer(s.bus, s.db).run(), "consumer")
    s.figures(QUERIES)
    garbage = GarbageCollector(db=s.db, store=s.store)
    work = {
        s.spawn(importer.loop.run(), "importer"),
        s.spawn(pipeline.loop.run(), "pipeline"),
        s.spawn(garbage.loop.run(), "garbage"),
    }
    try:
        await s.serve()
    finally:  # claims are given back before the connections close
        await cancel_all(work)
        await pool.close()
        scratch.close()


async def start() -> None:
    """Connects and serves."""
    async with (
        Service("preprocess", migrations=MIGRATIONS) as s,
        channels.channel(s.settings.version_address, s.settings) as version,
    ):
        await serve(s, Limits(), Projects(project_pb2_grpc.ProjectServiceStub(version)))


def main() -> None:
    """Runs the process."""
    run(start)


if __name__ == "__main__":
    main()
