"""`detflow audit`: who changed what, or tried to."""

from typing import Annotated

import typer
from google.rpc import code_pb2

from detflow.cli import output
from detflow.cli.access import AllProjects, project_name, project_of
from detflow.cli.session import Address, Json, Project, session
from detflow.v1 import access_pb2


def audit(
    context: typer.Context,
    subject: Annotated[
        str, typer.Option("--subject", help="Only of this one, as the list shows it.")
    ] = "",
    resource: Annotated[
        str, typer.Option("--resource", help="Only on this resource and what is below it.")
    ] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most to show.")] = 50,
    all_projects: AllProjects = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists who changed what in the project, or tried to, newest first."""
    s = session(context, json, project, address)
    where = project_of(s, all_projects)
    entries = s.client.audit.list(where, subject=subject, resource=resource, limit=limit)
    if s.json:
        output.say_json({"auditEntries": [output.as_dict(entry) for entry in entries]})
        return
    output.say_table(
        ("TIME", "WHO", "WHAT", "ON", "OUTCOME", "FROM"),
        (
            (
                f"{entry.create_time.ToDatetime():%Y-%m-%d %H:%M:%S}",
                entry.subject,
                entry.method.rsplit("/", 1)[-1],
                entry.resource or "-",
                _outcome_of(entry),
                entry.peer,
            )
            for entry in entries
        ),
        empty=f"nothing was changed in {project_name(where)}",
    )


def _outcome_of(entry: access_pb2.AuditEntry) -> str:
    """Says how a call ended."""
    if not entry.done:
        return "not known"
    return "done" if entry.code == 0 else code_pb2.Code.Name(entry.code)
