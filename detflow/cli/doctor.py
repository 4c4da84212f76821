"""`detflow doctor`."""

import asyncio
import dataclasses
import os
from pathlib import Path

import typer

from detflow.cli import output
from detflow.cli.session import DataDir, Json, Session
from detflow.errors import InvalidArgument
from detflow.local.process import secret
from detflow.local.running import BASE_PORT, Running, StackError, default_data_dir, running
from detflow.settings import Settings


def doctor(context: typer.Context, data_dir: DataDir = None, json: Json = False) -> None:
    """Checks what detflow depends on here, and says what to do; exit code 1 if something fails.

    It checks the process whose DETFLOW_* variables are set, else the stack that runs here.
    """
    try:
        from detflow import doctor as checks
    except ImportError as error:
        raise StackError(
            f"{error.name} is not installed: detflow doctor is part of what services need, such as"
            " pip install 'detflow[server]'"
        ) from error
    json = json or context.ensure_object(Session).json
    folder = data_dir or default_data_dir()
    found = running(folder)
    try:
        settings = Settings.load()
    except InvalidArgument as error:
        findings = [checks.Finding("settings", checks.State.FAIL, error.message)]
    else:
        if found is not None and not settings.database_url:
            settings = _of_stack(settings, folder.resolve(), found)
        findings = asyncio.run(checks.examine(settings))
    failed = any(one.state is checks.State.FAIL for one in findings)
    if json:
        output.say_json(
            {"ok": not failed, "findings": [dataclasses.asdict(one) for one in findings]}
        )
    else:
        rows = []
        for one in findings:
            rows.append((one.state.value, one.check, one.found))
            if one.remedy:
                rows.append(("", "", f"-> {one.remedy}"))
        output.say_table(("", "check", "found"), rows, empty="")
    if failed:
        raise typer.Exit(1)


def _of_stack(settings: Settings, folder: Path, found: Running) -> Settings:
    """Returns the settings of the processes of a running stack."""
    port = found.port or BASE_PORT
    addresses = [f"127.0.0.1:{port + number}" for number in range(5)]
    postgres, nats = folder / "postgres", folder / "nats"
    database_port, nats_port = ((one / "port").read_text().strip() for one in (postgres, nats))
    return dataclasses.replace(
        settings,
        database_url=f"postgresql://version:{secret(postgres / 'version.password')}"
        f"@127.0.0.1:{database_port}/detflow",
        nats_url=f"nats://{secret(nats / 'token')}@127.0.0.1:{nats_port}",
        store_url=os.environ.get("DETFLOW_STORE_URL") or (folder / "store").as_uri(),
        data_dir=folder,
        http_listen=addresses[0],
        version_address=addresses[1],
        preprocess_address=addresses[2],
        trainer_address=addresses[3],
        metrics_address=addresses[4],
    )
