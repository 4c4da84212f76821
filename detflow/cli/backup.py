"""`detflow backup`: for whoever runs the installation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer

from detflow.cli import output
from detflow.cli.session import DataDir, Json, Session
from detflow.local.running import StackError, default_data_dir, locked, running
from detflow.settings import Settings

if TYPE_CHECKING:
    from detflow.backup import Manifest, Progress, System

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True, help="Backs an installation up, and restores it into an empty one."
)

_Where = Annotated[
    str,
    typer.Argument(
        metavar="FOLDER|URL", help="Where backups are: a folder, s3://, gs:// or az://."
    ),
]
_Id = Annotated[str, typer.Option("--id", help="Which backup [default: the newest].", metavar="ID")]


@app.command()
def create(
    context: typer.Context, where: _Where, data_dir: DataDir = None, json: Json = False
) -> None:
    """Backs up database and objects; the installation may be running.

    It is the one of DETFLOW_DATABASE_URL and DETFLOW_STORE_URL where they are set, else that of the
    data folder. What earlier backups in the same folder have of the objects is not copied again.
    """
    backup = _library()
    with _system(data_dir) as system:
        made = _run(context, json, lambda report: backup.create(system, _url(where), report))
    _say(context, json, made, f"backup {made.id}")
    if made.num_lost:
        output.complain(
            f"{made.num_lost} objects were gone or damaged before, so that the backup lacks them:"
            f" {', '.join(made.lost[:3])}"
        )
        raise typer.Exit(1)


@app.command()
def restore(
    context: typer.Context,
    where: _Where,
    backup_id: _Id = "",
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Restores a backup into an installation that was never started; start it afterwards.

    That is the one of DETFLOW_DATABASE_URL, DETFLOW_STORE_URL and DETFLOW_NATS_URL where they are
    set, else the data folder.
    """
    backup = _library()
    with _system(data_dir, new=True) as system:
        made = _run(
            context, json, lambda report: backup.restore(system, _url(where), report, backup_id)
        )
    _say(context, json, made, f"restored {made.id}")


@app.command()
def verify(context: typer.Context, where: _Where, backup_id: _Id = "", json: Json = False) -> None:
    """Reads a backup whole and compares it with its checksums."""
    backup = _library()
    made, bad = _run(context, json, lambda report: backup.verify(_url(where), report, backup_id))
    if bad:
        output.complain(
            f"backup {made.id} is damaged: {len(bad)} files are gone or differ:"
            f" {', '.join(bad[:3])}"
        )
        raise typer.Exit(1)
    _say(context, json, made, f"verified {made.id}")


@app.command("list")
def list_(context: typer.Context, where: _Where, json: Json = False) -> None:
    """Lists the backups in a folder, oldest first."""
    found = asyncio.run(_library().list_backups(_url(where)))
    if _as_json(context, json):
        output.say_json({"backups": [_summary(one) for one in found]})
        return
    output.say_table(
        ("ID", "TIME", "RELEASE", "ROWS", "OBJECTS", "SIZE"),
        (
            (
                one.id,
                one.create_time[:19],
                one.release,
                str(one.num_rows),
                str(one.num_objects),
                output.size(one.num_bytes),
            )
            for one in found
        ),
        empty=f"no backups in {where}",
    )


def _library() -> Any:
    try:
        from detflow import backup
    except ImportError as error:
        raise StackError(
            f"{error.name} is not installed: pip install 'detflow[local]' makes backups"
        ) from error
    return backup


@contextlib.contextmanager
def _system(data_dir: Path | None, *, new: bool = False) -> Iterator[System]:
    """Yields the installation meant; an embedded Postgres that does not run, runs meanwhile.

    Raises:
        StackError: A restoration is asked for while the embedded stack runs.
        InvalidArgument: A setting is missing.
    """
    from detflow.backup import System

    settings = Settings.load()
    if data_dir is None and settings.database_url:
        settings.require("store_url", *(["nats_url"] if new else []))
        yield System(
            database_url=settings.database_url,
            store_url=settings.store_url,
            nats_url=settings.nats_url,
        )
        return
    folder = data_dir or default_data_dir()
    store_url = settings.store_url or (folder.resolve() / "store").as_uri()
    if not new and running(folder) is not None:
        yield System(database_url=_embedded_url(folder), store_url=store_url)
        return
    if not new and not (folder / "postgres" / "data").exists():
        raise StackError(f"there is no detflow in {folder}: say which with --data-dir")
    with locked(folder) as (folder, _):
        if new and (folder / "nats" / "jetstream").exists():
            raise StackError(f"detflow was started in {folder} before: restore into a new folder")
        with _embedded_postgres(folder) as url:
            yield System(database_url=url, store_url=store_url)


@contextlib.contextmanager
def _embedded_postgres(folder: Path) -> Iterator[str]:
    from detflow.local import postgres

    try:
        cluster = postgres.prepare(folder / "postgres")
        (folder / "logs").mkdir(exist_ok=True)
        process = cluster.start(folder / "logs" / "postgres.log")
    except postgres.PostgresError as error:
        raise StackError(str(error)) from error
    try:
        yield cluster.url()
    finally:
        process.send_signal(postgres.STOP_SIGNAL)
        process.wait(timeout=60)


def _embedded_url(folder: Path) -> str:
    from detflow.local import postgres

    directory = folder.resolve() / "postgres"
    port = int((directory / "port").read_text())
    return postgres.Cluster(directory=directory, port=port).url()


def _url(where: str) -> str:
    """Returns a folder or URL as a URL."""
    return where if urlsplit(where).scheme else Path(where).expanduser().resolve().as_uri()


def _run(
    context: typer.Context, json: bool, work: Callable[[Callable[[Progress], None]], Awaitable[T]]
) -> T:
    async def do() -> T:
        return await work(show)

    def show(now: Progress) -> None:
        left = f"{output.duration(now.eta_seconds)} left" if now.eta_seconds else ""
        bar.update(f"step {now.step}/{now.num_steps} {now.name}", now.percent, left)

    with output.Bar(silent=_as_json(context, json)) as bar:
        return asyncio.run(do())


def _say(context: typer.Context, json: bool, made: Manifest, what: str) -> None:
    if _as_json(context, json):
        output.say_json(_summary(made))
        return
    output.say(
        f"{what}: {made.num_rows} rows, {made.num_objects} objects, {output.size(made.num_bytes)},"
        f" as of {made.create_time[:19]}"
    )


def _summary(made: Manifest) -> dict[str, Any]:
    return {
        "id": made.id,
        "createTime": made.create_time,
        "release": made.release,
        "numRows": made.num_rows,
        "numObjects": made.num_objects,
        "sizeBytes": made.num_bytes,
        "lost": list(made.lost),
        "numLost": made.num_lost,
    }


def _as_json(context: typer.Context, json: bool) -> bool:
    return json or context.ensure_object(Session).json
