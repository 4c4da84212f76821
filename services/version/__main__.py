"""The version service: wiring only."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from pathlib import Path

from detflow import channels
from detflow.errors import InvalidArgument
from detflow.server import Service, run
from detflow.v1 import access_pb2_grpc, dataset_pb2_grpc, project_pb2_grpc, version_pb2_grpc
from services.version import audit_log, consumer, upkeep
from services.version.access_service import AccessService
from services.version.oidc import make_issuer
from services.version.projects import ProjectService
from services.version.purge import Purger
from services.version.service import VersionService
from services.version.tokens import Tokens

MIGRATIONS = Path(__file__).parent / "migrations"
_MAX_TRASH_DAYS = 36_500


async def serve(service: Service) -> None:
    """Serves projects, versions and access until the process is told to stop."""
    if service.settings.access == "required":
        service.settings.require("owner_token")
    issuer = make_issuer(service.settings)
    async with (
        service as s,
        contextlib.AsyncExitStack() as closing,
        channels.channel(s.settings.preprocess_address, s.settings) as preprocess,
    ):
        if issuer is not None:
            closing.push_async_callback(issuer.close)
        tokens = Tokens(s.db, s.settings.owner_token, issuer)
        s.identify = tokens.identify
        s.add(access_pb2_grpc.add_AccessServiceServicer_to_server, AccessService(s.db, tokens))
        datasets = dataset_pb2_grpc.DatasetServiceStub(preprocess)
        s.add(project_pb2_grpc.add_ProjectServiceServicer_to_server, ProjectService(s.db))
        s.add(
            version_pb2_grpc.add_VersionServiceServicer_to_server,
            VersionService(s.db, s.watcher, datasets, trash_time(s.settings.trash_days)),
        )
        s.spawn(consumer.projection(s.bus, s.db).run(), "projection")
        s.spawn(audit_log.consumer(s.bus, s.db).run(), "audit")
        s.spawn(Purger(s.db).run(), "purge")
        s.spawn(upkeep.run(s.db), "upkeep")
        await s.serve()


def trash_time(days: float) -> timedelta:
    """Reads how long deleted versions are kept.

    Raises:
        InvalidArgument: BAD_SETTING.
    """
    if not 0 <= days <= _MAX_TRASH_DAYS:
        raise InvalidArgument(
            f"DETFLOW_TRASH_DAYS must be 0 to {_MAX_TRASH_DAYS}, not {days}", reason="BAD_SETTING"
        )
    return timedelta(days=days)


def main() -> None:
    """Runs the service with the settings of the environment."""
    run(lambda: serve(Service("version", migrations=MIGRATIONS)))


if __name__ == "__main__":
    main()
