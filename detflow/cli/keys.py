"""`detflow keys`: create, list, update, delete."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.access import (
    AllProjects,
    RoleOption,
    check_role,
    parse_end,
    project_name,
    project_of,
    role_name,
)
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.version_words import time_of
from detflow.v1 import access_pb2

app = typer.Typer(help="API keys: tokens for programs.", rich_markup_mode=None)

_Key = Annotated[
    str, typer.Argument(metavar="KEY", help="Name, id or resource name of an API key.")
]
_Expires = Annotated[
    str,
    typer.Option(
        "--expires",
        metavar="WHEN",
        help="When it counts no more: 90d, 12h, a day such as 2027-01-31, or never.",
    ),
]


@app.command("create")
def create(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    role: RoleOption = "viewer",
    expires: _Expires = "90d",
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Creates an API key and prints its token, which is not shown again."""
    check_role(role)
    end = parse_end(expires)
    s = session(context, json, project, address)
    key = s.client.keys.create(name, role=role, project=project_of(s, all_projects), expires=end)
    if s.json:
        output.say_json(key)
        return
    output.say(f"created {output.printable(key.display_name)}")
    _say_key(key)
    output.say("keep the token now, it is not shown again: programs find it in DETFLOW_TOKEN")


@app.command("list")
def list_(
    context: typer.Context,
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the API keys of the project, oldest first."""
    s = session(context, json, project, address)
    where = project_of(s, all_projects)
    found = s.client.keys.list(where)
    if s.json:
        output.say_json({"apiKeys": [output.as_dict(key) for key in found]})
        return
    output.say_table(
        ("NAME", "ROLE", "UNTIL", "LAST USED", "CREATED", "BY", "ID"),
        (
            (
                key.display_name,
                role_name(key.role),
                _end_of(key),
                time_of(key.last_use_time) if key.HasField("last_use_time") else "never",
                time_of(key.create_time),
                key.creator,
                key.name.rsplit("/", 1)[-1],
            )
            for key in found
        ),
        empty=f"no API keys in {project_name(where)}: make one with `detflow keys create NAME`",
    )


@app.command("update")
def update(
    context: typer.Context,
    key: _Key,
    name: Annotated[str, typer.Option("--name", help="Another name.")] = "",
    role: RoleOption = "",
    expires: _Expires = "",
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Changes the name, the role or the end of an API key."""
    if role:
        check_role(role)
    end = parse_end(expires)
    s = session(context, json, project, address)
    found = s.client.keys.find(key, project_of(s, all_projects))
    changed = s.client.keys.update(
        found.name,
        display_name=name or None,
        role=role or None,
        expires=end,
        never_expires=expires == "never",
    )
    if s.json:
        output.say_json(changed)
    else:
        _say_key(changed)


@app.command("delete")
def delete(
    context: typer.Context,
    key: _Key,
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Deletes an API key: within ten seconds nobody is let in with it."""
    s = session(context, json, project, address)
    found = s.client.keys.find(key, project_of(s, all_projects))
    s.client.keys.delete(found.name)
    if s.json:
        output.say_json({"name": found.name})
    else:
        output.say(f"deleted {output.printable(found.display_name)}")


def _end_of(key: access_pb2.ApiKey) -> str:
    return time_of(key.expire_time) if key.HasField("expire_time") else "it is deleted"


def _say_key(key: access_pb2.ApiKey) -> None:
    fields = {
        "key": key.name,
        "name": key.display_name,
        "may": f"{role_name(key.role)} of {project_name(key.name)}",
        "until": _end_of(key),
    }
    output.say_fields(fields | ({"token": key.token} if key.token else {}))
