"""`detflow purge`: what old trainings keep and nothing needs."""

import datetime
import re
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, session
from detflow.v1 import trainer_pb2

_KINDS = {
    trainer_pb2.PurgedArtifacts.CHECKPOINT: "checkpoints of paused and failed trainings",
    trainer_pb2.PurgedArtifacts.EXPORT: "exports",
}
_UNITS = {"h": "hours", "d": "days"}


def purge(
    context: typer.Context,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="Time since the end of a training or export: 30d or 12h [default: what the"
            " settings of the trainer say].",
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be deleted.")
    ] = False,
    all_projects: Annotated[
        bool, typer.Option("--all-projects", help="In all projects instead of one.")
    ] = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Deletes checkpoints of trainings that were paused or have failed, and exports, once old.

    Such a training begins anew when it is resumed. Weights, figures, datasets and versions stay.
    """
    s = session(context, json, project, address)
    purged = s.client.trainings.purge(
        "-" if all_projects else s.project,
        min_age=_age(older_than) if older_than else None,
        validate_only=dry_run,
    )
    if s.json:
        output.say_json({"artifacts": [output.as_dict(one) for one in purged]})
        return
    output.say_table(
        ("PROJECT", "WHAT", "NUMBER", "SIZE"),
        (
            (
                one.project.removeprefix("projects/"),
                _KINDS.get(one.kind, "-"),
                f"{one.num}",
                output.size(one.size_bytes),
            )
            for one in purged
        ),
        empty="nothing is old enough"
        + ("" if older_than else ": the settings keep everything, or --older-than says how old"),
    )
    if purged:
        output.say("would be deleted" if dry_run else "deleted")


def _age(text: str) -> datetime.timedelta:
    found = re.fullmatch(r"(\d{1,5})([hd])", text)
    if found is None:
        raise typer.BadParameter(f"--older-than must be like 30d or 12h, not {text!r}")
    return datetime.timedelta(**{_UNITS[found[2]]: int(found[1])})
