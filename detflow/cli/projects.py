"""`detflow projects`: list, create, rename, quota."""

import re
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, session
from detflow.cli.version_words import time_of
from detflow.v1 import project_pb2

app = typer.Typer(help="Groups of datasets and versions.", rich_markup_mode=None)

_Id = Annotated[str, typer.Argument(metavar="ID", help="Id of a project.")]
_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@app.command("list")
def list_(context: typer.Context, json: Json = False, address: Address = "") -> None:
    """Lists the projects that you may see, oldest first."""
    s = session(context, json, "", address)
    found = s.client.projects.list()
    if s.json:
        output.say_json({"projects": [output.as_dict(project) for project in found]})
        return
    output.say_table(
        ("ID", "NAME", "CREATED", "LIMITS"),
        (
            (
                project.name.removeprefix("projects/"),
                project.display_name,
                time_of(project.create_time),
                _limits_of(project),
            )
            for project in found
        ),
        empty="no projects that you may see: `detflow whoami` says what you may do",
    )


@app.command("create")
def create(
    context: typer.Context,
    project_id: Annotated[
        str, typer.Argument(metavar="ID", help="Lower-case letters, digits and hyphens.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name shown to people [default: ID].")] = "",
    json: Json = False,
    address: Address = "",
) -> None:
    """Creates a project."""
    s = session(context, json, "", address)
    project = s.client.projects.create(project_id, display_name=name)
    if s.json:
        output.say_json(project)
    else:
        output.say(f"created {project.name}; name it with --project {project_id}")


@app.command("rename")
def rename(
    context: typer.Context,
    project_id: _Id,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name shown to people.")],
    json: Json = False,
    address: Address = "",
) -> None:
    """Gives a project another name; its id stays."""
    s = session(context, json, "", address)
    project = s.client.projects.update(project_id, display_name=name)
    if s.json:
        output.say_json(project)
    else:
        output.say(f"{project.name} is called {output.printable(project.display_name)}")


@app.command("quota")
def quota(
    context: typer.Context,
    project_id: _Id,
    storage: Annotated[
        str,
        typer.Option(
            "--max-storage",
            metavar="SIZE",
            help="Of its datasets, uploads and bundles, such as 500GB; 0 sets no limit.",
        ),
    ] = "",
    trainings: Annotated[
        int | None,
        typer.Option("--max-trainings", min=0, help="That run at once; 0 sets no limit."),
    ] = None,
    json: Json = False,
    address: Address = "",
) -> None:
    """Shows how much a project may take up, or says how much."""
    num_bytes = bytes_of(storage) if storage else None
    s = session(context, json, "", address)
    if num_bytes is None and trainings is None:
        project = s.client.projects.get(project_id)
    else:
        project = s.client.projects.update(
            project_id, max_storage_bytes=num_bytes, max_running_trainings=trainings
        )
    if s.json:
        output.say_json(project)
    else:
        output.say(f"{project.name}: {_limits_of(project)}")


def bytes_of(text: str) -> int:
    """Reads a size such as 500GB, in units of 1000, or in bytes.

    Raises:
        typer.BadParameter: It is none.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(kB|MB|GB|TB|)", text)
    if found is None:
        raise typer.BadParameter(f"--max-storage: {text!r} is no size such as 500GB or 1.5TB")
    return round(float(found[1]) * _UNITS[found[2]])


def _limits_of(project: project_pb2.Project) -> str:
    limits = []
    if num_bytes := project.quota.max_storage_bytes:
        limits.append(f"{output.size(num_bytes)} of data")
    if num_trainings := project.quota.max_running_trainings:
        limits.append(f"{num_trainings} running trainings")
    return ", ".join(limits) or "no limits"
