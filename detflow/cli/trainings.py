"""`detflow trainings`."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.catalogue import text_of
from detflow.cli.follow import finish, follow
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.train import Detach, go_on, say_preflight
from detflow.client.trainings import STOP_MODES
from detflow.v1 import training_pb2

app = typer.Typer(help="Models learning from a version.", rich_markup_mode=None)

_State = training_pb2.Training.State
_Name = Annotated[
    str,
    typer.Argument(
        metavar="TRAINING",
        help="Resource name, id, or the name of a version such as V_0 for its newest training.",
    ),
]


@app.command("list")
def list_(
    context: typer.Context,
    version: Annotated[
        str, typer.Option("--version", help="Only those of this version.", metavar="VERSION")
    ] = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the trainings, newest first."""
    s = session(context, json, project, address)
    of_version = s.client.versions.find(version, s.project).name if version else ""
    trainings = s.client.trainings.list(s.project, version=of_version)
    if s.json:
        output.say_json({"trainings": [output.as_dict(training) for training in trainings]})
        return
    names = {v.name: v.display_name for v in s.client.versions.list(s.project, show_deleted=True)}
    output.say_table(
        ("VERSION", "STATE", "QUEUE", "PRIORITY", "MODEL", "BATCH", "EPOCHS", "RESOURCE"),
        (
            (
                names.get(training.name.split("/trainings/")[0], "-"),
                _State.Name(training.state),
                _place(training),
                f"{training.priority}",
                training.model,
                _batch(training),
                f"{training.num_epochs_done}/{training.epochs}",
                training.name,
            )
            for training in trainings
        ),
        empty=f"no trainings in project {s.project}: start one with `detflow train VERSION`",
    )


@app.command("show")
def show(
    context: typer.Context,
    training: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows a training: state, settings, attempts."""
    s = session(context, json, project, address)
    found = s.client.trainings.find(training, s.project)
    if s.json:
        output.say_json(found)
        return
    fields = {
        "training": found.name,
        "state": _State.Name(found.state),
        "priority": f"{found.priority}",
        "model": found.model,
        "batch": _batch(found),
        "epochs": f"{found.num_epochs_done} of {found.epochs}",
        "attempt": f"{found.attempt}",
        "settings": ", ".join(
            f"{name}={text_of(value)}" for name, value in sorted(found.hyperparameters.items())
        ),
    }
    if found.queue_position:
        fields["state"] += ", checked" if found.HasField("preflight") else ", not checked yet"
        fields["state"] += f", place {found.queue_position} in the queue"
        if found.wait_reason == training_pb2.Training.QUOTA:
            fields["state"] += ": the project runs as many as its quota allows"
    if found.HasField("warm_start"):
        fields["warm start"] = found.warm_start.training or found.warm_start.weights
    if found.HasField("resources"):
        fields["devices"] = (
            f"{found.resources.num_devices_per_node or 1} on each of"
            f" {found.resources.num_nodes or 1} machines"
        )
    if found.HasField("failure"):
        fields["failure"] = found.failure.status.message
    output.say_fields(fields)
    if found.preflight.checks:
        output.say()
        say_preflight(found.preflight)


@app.command("priority", context_settings={"ignore_unknown_options": True})
def priority(
    context: typer.Context,
    training: _Name,
    value: Annotated[int, typer.Argument(metavar="N", help="Higher waits less; -100 to 100.")],
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Changes the priority of a training that waits."""
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    updated = s.client.trainings.update(name, priority=value)
    if s.json:
        output.say_json(updated)
        return
    output.say(
        f"priority {updated.priority}"
        + (f", place {updated.queue_position} in the queue" if updated.queue_position else "")
    )


@app.command("watch")
def watch(
    context: typer.Context,
    training: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows the progress of a training to its end; with --json every message, one a line."""
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    if s.json:
        for message in s.client.trainings.watch(name):
            output.say_json(message, one_line=True)
        return
    finish(s, follow(s, name))


@app.command("stop")
def stop(
    context: typer.Context,
    training: _Name,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="pause (can be resumed), finish (after this epoch, and measured) or discard.",
        ),
    ] = "pause",
    detach: Detach = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Stops a training and waits until it has stopped."""
    if mode not in STOP_MODES:
        raise typer.BadParameter(f"--mode must be one of {', '.join(STOP_MODES)}, not {mode!r}")
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    stopped = s.client.trainings.stop(name, mode=mode)
    if not detach:
        stopped = follow(s, name)
    if s.json:
        output.say_json(stopped)
    else:
        output.say(f"{_State.Name(stopped.state)} after {stopped.num_epochs_done} epochs")


@app.command("resume")
def resume(
    context: typer.Context,
    training: _Name,
    detach: Detach = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Goes on with a paused or failed training from its last checkpoint."""
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    go_on(s, s.client.trainings.resume(name), detach)


def _place(training: training_pb2.Training) -> str:
    """Renders the place in the queue."""
    if not training.queue_position:
        return "-"
    held = training.wait_reason == training_pb2.Training.QUOTA
    return f"{training.queue_position}" + (" (quota)" if held else "")


def _batch(training: training_pb2.Training) -> str:
    """Renders the batch size, and that of a step where memory ran out."""
    if 0 < training.step_batch_size < training.batch_size:
        return f"{training.batch_size} in steps of {training.step_batch_size}"
    return f"{training.batch_size}"
