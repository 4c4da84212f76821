"""`detflow open` and `detflow whoami`, and what the commands about access share."""

import html
import os
import sys
import webbrowser
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Session, session
from detflow.cli.version_words import time_of
from detflow.client import Client
from detflow.client.access import ALL_PROJECTS, ROLES
from detflow.local.running import default_data_dir
from detflow.v1 import access_pb2

AllProjects = Annotated[
    bool, typer.Option("--all-projects", help="In all projects instead of one.")
]
RoleOption = Annotated[
    str, typer.Option("--role", metavar="ROLE", help=f"One of {', '.join(ROLES)}.")
]

_PAGE = """<!doctype html>
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}">
<title>detflow</title>
"""


def open_(
    context: typer.Context,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open it, or only print it.")
    ] = True,
    json: Json = False,
    address: Address = "",
) -> None:
    """Prints a link that signs one browser in to the console, once, and opens it if it can."""
    s = session(context, json, "", address)
    link = s.client.access.login_link()
    url = f"{console_of(s.client)}{link.path}"
    if s.json:
        output.say_json({"url": url, "expireTime": link.expire_time.ToJsonString()})
        return
    output.say(url)
    output.say(f"it signs one browser in, until {link.expire_time.ToDatetime():%H:%M:%S} UTC")
    if browser and sys.stdout.isatty() and _has_screen():
        show(url)


def whoami(context: typer.Context, json: Json = False, address: Address = "") -> None:
    """Says as whom commands are run, and what they may do."""
    s = session(context, json, "", address)
    principal = s.client.access.principal()
    if s.json:
        output.say_json(principal)
        return
    fields = {
        "who": principal.subject,
        "name": principal.display_name or "-",
        "kind": access_pb2.Principal.Kind.Name(principal.kind).lower().replace("_", " "),
        "may": ", ".join(
            f"{role_name(grant.role)} of {project_name(grant.project)}"
            for grant in principal.grants
        )
        or "nothing: ask an admin to make you a member",
    }
    if principal.HasField("expire_time"):
        fields["until"] = time_of(principal.expire_time)
    output.say_fields(fields)


def console_of(client: Client) -> str:
    """Returns the address of the console."""
    return client.address if "://" in client.address else f"http://{client.address}"


def role_name(role: access_pb2.Role.ValueType) -> str:
    """Says what a role is called on the command line."""
    return access_pb2.Role.Name(role).lower()


def project_name(project: str) -> str:
    """Says which project a resource name such as projects/p is of."""
    project_id = project.removeprefix("projects/").split("/")[0]
    return "all projects" if project_id == ALL_PROJECTS else f"project {project_id}"


def project_of(s: Session, all_projects: bool) -> str:
    """Returns the id of the project that is meant."""
    return ALL_PROJECTS if all_projects else s.project


def check_role(role: str) -> None:
    """Refuses what is no role.

    Raises:
        typer.BadParameter: It is none.
    """
    if role not in ROLES:
        raise typer.BadParameter(f"--role: {role!r} is none of {', '.join(ROLES)}")


def parse_end(text: str) -> datetime | timedelta | None:
    """Reads when something ends: 90d, 12h, a day such as 2027-01-31 (UTC), or never."""
    if text in ("", "never"):
        return None
    units = {"d": "days", "h": "hours"}
    if text[:-1].isdecimal() and text[-1] in units and len(text) < 8:
        return timedelta(**{units[text[-1]]: int(text[:-1])})
    try:
        day = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"--expires: {text!r} is neither a time such as 90d or 12h, nor a day such as"
            " 2027-01-31, nor never"
        ) from None
    return day if day.tzinfo else day.replace(tzinfo=UTC)


def _has_screen() -> bool:
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform == "darwin" or any(os.environ.get(name) for name in screens)


def show(url: str) -> None:
    """Opens a link by way of a file, since every user can read what programs are started with."""
    page = default_data_dir() / "open.html"
    page.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    page.unlink(missing_ok=True)
    handle = os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_PAGE.format(url=html.escape(url)))
    webbrowser.open(page.as_uri())
