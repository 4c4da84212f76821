"""`detflow up` and `detflow demo`."""

import asyncio
import os
import time
from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import DataDir, Json, Session
from detflow.client import Client
from detflow.errors import DetflowError
from detflow.local.running import BASE_PORT, StackError, default_data_dir, owner_token

_Port = Annotated[
    int,
    typer.Option(
        "--port", min=1, max=65531, help="Port of the gateway; the four after it are used too."
    ),
]


def up(
    context: typer.Context,
    data_dir: DataDir = None,
    port: _Port = BASE_PORT,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what the processes print.")
    ] = False,
    json: Json = False,
) -> None:
    """Runs everything on this machine until Ctrl-C: Postgres, NATS, the services, the gateway."""
    try:
        from detflow.local import stack
        from detflow.local.supervisor import Supervisor
    except ImportError as error:
        raise StackError(
            f"{error.name} is not installed: pip install 'detflow[local]' runs detflow here"
        ) from error
    as_json = json or context.ensure_object(Session).json
    folder = data_dir or default_data_dir()
    begin = time.monotonic()

    def on_ready(supervisor: Supervisor) -> None:
        seconds = time.monotonic() - begin
        if as_json:
            output.say_json(
                {"address": f"127.0.0.1:{port}", "pid": os.getpid(), "dataDir": str(folder)},
                one_line=True,
            )
            return
        path = _login_path(folder, port)
        output.say(f"detflow is ready after {seconds:.1f} s: http://127.0.0.1:{port}{path}")
        if path:
            output.say("it signs one browser in, within a minute; `detflow open` makes another")
        output.say(f"data and logs in {folder}; Ctrl-C stops it")

    def on_stop() -> None:
        if not as_json:
            output.say("stopping")

    if not as_json:
        output.say("starting Postgres, NATS, the services and the gateway")
    asyncio.run(
        stack.run(
            folder,
            port=port,
            on_ready=on_ready,
            on_stop=on_stop,
            on_line=(lambda name, line: output.say(f"{name:<10} | {line}")) if verbose else None,
            on_event=output.complain,
        )
    )


def _login_path(data_dir: Path, port: int) -> str:
    """Returns what signs a browser in, behind the console's address; "" if it cannot be made."""
    try:
        with Client(f"127.0.0.1:{port}", token=owner_token(data_dir)) as client:
            return client.access.login_link().path
    except DetflowError as error:
        output.complain(f"no link to sign in with: {error.message}")
        return ""


def demo(
    context: typer.Context,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running.")] = False,
    data_dir: DataDir = None,
    port: _Port = BASE_PORT,
    json: Json = False,
) -> None:
    """Does the whole job on generated images: import, version, training, metrics."""
    from detflow.cli.demo import run

    s = context.ensure_object(Session)
    s.take(json=json, project="", address="")
    run(s, data_dir or default_data_dir(), port=port, keep=keep)
