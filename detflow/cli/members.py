"""`detflow members`: add, list, set, remove."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.access import (
    AllProjects,
    RoleOption,
    check_role,
    project_name,
    project_of,
    role_name,
)
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.version_words import time_of

app = typer.Typer(help="People who have a role in a project.", rich_markup_mode=None)

_User = Annotated[
    str, typer.Argument(metavar="USER", help="E-mail address, or subject at the OIDC issuer.")
]


@app.command("add")
def add(
    context: typer.Context,
    user: _User,
    role: RoleOption = "viewer",
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Gives a person a role in the project."""
    check_role(role)
    s = session(context, json, project, address)
    member = s.client.members.create(user, role=role, project=project_of(s, all_projects))
    if s.json:
        output.say_json(member)
    else:
        output.say(
            f"{output.printable(member.user)} is {role_name(member.role)} of"
            f" {project_name(member.name)}"
        )


@app.command("list")
def list_(
    context: typer.Context,
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the members of the project, oldest first."""
    s = session(context, json, project, address)
    where = project_of(s, all_projects)
    found = s.client.members.list(where)
    if s.json:
        output.say_json({"members": [output.as_dict(member) for member in found]})
        return
    output.say_table(
        ("USER", "ROLE", "SINCE", "BY"),
        ((m.user, role_name(m.role), time_of(m.create_time), m.creator) for m in found),
        empty=f"no members of {project_name(where)}: add one with `detflow members add USER`",
    )


@app.command("set")
def set_(
    context: typer.Context,
    user: _User,
    role: RoleOption,
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Gives a member another role."""
    check_role(role)
    s = session(context, json, project, address)
    found = s.client.members.find(user, project_of(s, all_projects))
    member = s.client.members.update(found.name, role=role)
    if s.json:
        output.say_json(member)
    else:
        output.say(
            f"{output.printable(member.user)} is now {role_name(member.role)} of"
            f" {project_name(member.name)}"
        )


@app.command("remove")
def remove(
    context: typer.Context,
    user: _User,
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Takes a person's role in the project away; it counts within ten seconds."""
    s = session(context, json, project, address)
    found = s.client.members.find(user, project_of(s, all_projects))
    s.client.members.delete(found.name)
    if s.json:
        output.say_json({"name": found.name})
    else:
        output.say(
            f"{output.printable(found.user)} is no member of {project_name(found.name)} any more"
        )
