"""`detflow train`: starts a training, or only tries it."""

import os
from collections.abc import Sequence
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.datasets import rate
from detflow.cli.follow import finish, follow
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.errors import NotFound
from detflow.v1 import common_pb2, trainer_pb2, training_pb2

_State = training_pb2.Training.State
Detach = Annotated[bool, typer.Option("--detach", help="Don't wait for the end.")]


def train(
    context: typer.Context,
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="Name such as V_0, id, resource name.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Id of the model, see `detflow models` [default: that of --warm-start, where it"
            " says so, else yolov5s].",
        ),
    ] = "",
    batch: Annotated[int, typer.Option("--batch", help="Images per step.")] = 16,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the training split.")] = 200,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An advanced hyper-parameter, see `detflow hyperparameters`; repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    warm_start: Annotated[
        str,
        typer.Option(
            "--warm-start",
            help="Weights to begin with: of a training, uploaded ones, or a file.",
            metavar="TRAINING|WEIGHTS|FILE",
        ),
    ] = "",
    priority: Annotated[
        int, typer.Option("--priority", help="Higher waits less; -100 to 100.")
    ] = 0,
    devices: Annotated[
        int, typer.Option("--devices", help="GPUs (without any: processes) per machine.", min=1)
    ] = 1,
    nodes: Annotated[
        int, typer.Option("--nodes", help="Machines; more than one needs Ray.", min=1)
    ] = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Only try it on the real data; train nothing.")
    ] = False,
    detach: Detach = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Trains a model on a version, showing its progress."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    values = _values(settings or [], s.client.hyperparameters() if settings else [])
    weights = _weights(s, warm_start) if warm_start else ""
    if check and not s.json:
        output.say("trying it on the real data, which takes up to some minutes")
    training = s.client.trainings.start(
        found.name,
        model=model,
        batch_size=batch,
        epochs=epochs,
        hyperparameters=values,
        priority=priority,
        warm_start=weights,
        num_nodes=nodes if nodes > 1 else 0,
        num_devices=devices if devices > 1 else 0,
        validate_only=check,
    )
    if not check:
        go_on(s, training, detach)
    elif s.json:
        output.say_json(training)
    else:
        say_preflight(training.preflight)


def go_on(s: Session, training: training_pb2.Training, detach: bool) -> None:
    """Follows a training that was queued to its end, unless the user does not want to wait."""
    if not detach:
        finish(s, follow(s, training.name))
    elif s.json:
        output.say_json(training)
    else:
        output.say(f"{_State.Name(training.state)} {training.name}")
        output.say(f"watch it with `detflow trainings watch {training.name}`")


def say_preflight(preflight: training_pb2.Preflight) -> None:
    """Prints what was tried and what the training is expected to take."""
    output.say_table(
        ("CHECK", "TOOK", "FOUND"),
        ((check.name, f"{check.seconds:.1f} s", check.detail) for check in preflight.checks),
        empty="nothing was tried",
    )
    output.say()
    fields = {"device": preflight.device or "-"}
    if preflight.memory_bytes:  # of a device to come it is not known
        fields["memory"] = output.size(preflight.memory_bytes)
    fields["disk"] = output.size(preflight.disk_bytes)
    if preflight.step_seconds:
        fields["step"] = f"{preflight.step_seconds:.3g} s"
        fields["whole training"] = f"about {output.duration(preflight.total_seconds)}"
    output.say_fields(fields)


def _weights(s: Session, text: str) -> str:
    """Returns the resource name of the weights that `--warm-start` means.

    A file is uploaded, unless the project has the same bytes already.
    """
    if text.startswith("projects/"):
        return text
    if os.path.isfile(text):
        with s.bar() as bar:

            def show(progress: common_pb2.Progress) -> None:
                bar.update(progress.stage, progress.percent, rate(progress))

            return s.client.weights.ensure(text, project=s.project, progress=show).name
    try:
        return s.client.weights.find(text, s.project).name
    except NotFound:
        pass
    try:
        return s.client.trainings.find(text, s.project).name
    except NotFound as error:
        raise NotFound(
            f"--warm-start {text!r} is no file and names no weights and no training in project"
            f" {s.project}: see `detflow weights list` and `detflow trainings list`",
            metadata=error.metadata,
        ) from error


def _values(
    settings: Sequence[str], schema: Sequence[trainer_pb2.Hyperparameter]
) -> dict[str, float | bool | str]:
    """Types `key=value` settings by the schema; the service refuses what it does not know."""
    types = {entry.name: entry.type for entry in schema}
    values: dict[str, float | bool | str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--set {setting!r} is not KEY=VALUE")
        values[key] = _value(key, text, types.get(key))
    return values


def _value(key: str, text: str, kind: int | None) -> float | bool | str:
    if kind in (trainer_pb2.Hyperparameter.INTEGER, trainer_pb2.Hyperparameter.NUMBER):
        try:
            return float(text)
        except ValueError:
            raise typer.BadParameter(f"--set {key} must be a number, not {text!r}") from None
    if kind == trainer_pb2.Hyperparameter.BOOLEAN:
        if text.lower() not in ("true", "false"):
            raise typer.BadParameter(f"--set {key} must be true or false, not {text!r}")
        return text.lower() == "true"
    return text
