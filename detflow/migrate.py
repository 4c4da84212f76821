"""Brings the schema of services up to date and ends: `python -m detflow.migrate version`.

Services do so by themselves when they start. Run it before where new replicas shall find the schema
ready, as the chart does: an error then stops the upgrade while the old replicas still serve. An
advisory lock makes it safe beside anything that runs.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from detflow import telemetry
from detflow.errors import DetflowError, InvalidArgument
from detflow.postgres import Database
from detflow.settings import Settings

log = telemetry.get_logger(__name__)


def folder_of(service: str) -> Path:
    """Returns the folder with a service's migrations.

    The services stand above this package and are not imported: their files lie beside it.

    Raises:
        InvalidArgument: There is no such service.
    """
    folder = Path(__file__).parents[1] / "services" / service / "migrations"
    if not folder.is_dir() or folder.parent.name != service:
        raise InvalidArgument(f"there is no service {service!r} that has a schema")
    return folder


async def migrate(service: str, settings: Settings) -> None:
    """Brings one schema up to date.

    Raises:
        InvalidArgument: There is no such service, or no DETFLOW_DATABASE_URL.
        Unavailable: Postgres is away.
    """
    folder = folder_of(service)
    settings.require("database_url")
    telemetry.configure(service, settings)
    db = await Database.connect(settings.database_url, service)
    try:
        await db.migrate(folder)
    finally:
        await db.close()
    log.info("schema is up to date")


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m detflow.migrate SERVICE")
    try:
        asyncio.run(migrate(sys.argv[1], Settings.load()))
    except DetflowError as error:
        raise SystemExit(error.message) from error


if __name__ == "__main__":
    main()
