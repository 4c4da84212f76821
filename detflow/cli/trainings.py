"""`detflow train`, `detflow trainings`, `detflow metrics` and `detflow models`."""

from collections.abc import Sequence
from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.follow import finish, follow, say_evaluations
from detflow.cli.session import Address, Json, Project, Session, session
from detflow.client.trainings import STOP_MODES
from detflow.v1 import trainer_pb2, training_pb2

app = typer.Typer(help="Models learning from a version.", rich_markup_mode=None)

_State = training_pb2.Training.State
_Name = Annotated[
    str,
    typer.Argument(
        metavar="TRAINING",
        help="Resource name, id, or the name of a version such as V_0 for its newest training.",
    ),
]
_Detach = Annotated[bool, typer.Option("--detach", help="Don't wait for the end.")]


def train(
    context: typer.Context,
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="Name such as V_0, id, resource name.")
    ],
    model: Annotated[
        str, typer.Option("--model", help="Id of the model, see `detflow models`.")
    ] = "yolov5s",
    batch: Annotated[int, typer.Option("--batch", help="Images per step.")] = 16,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the training split.")] = 200,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An advanced hyper-parameter; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    detach: _Detach = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Trains a model on a version, showing its progress."""
    s = session(context, json, project, address)
    found = s.client.versions.find(version, s.project)
    values = _values(settings or [], s.client.hyperparameters() if settings else [])
    training = s.client.trainings.start(
        found.name, model=model, batch_size=batch, epochs=epochs, hyperparameters=values
    )
    _go_on(s, training, detach)


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
        ("VERSION", "STATE", "MODEL", "EPOCHS", "RESOURCE"),
        (
            (
                names.get(training.name.split("/trainings/")[0], "-"),
                _State.Name(training.state),
                training.model,
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
        "model": found.model,
        "batch": f"{found.batch_size}",
        "epochs": f"{found.num_epochs_done} of {found.epochs}",
        "attempt": f"{found.attempt}",
        "settings": ", ".join(
            f"{name}={_text(value)}" for name, value in sorted(found.hyperparameters.items())
        ),
    }
    if found.HasField("failure"):
        fields["failure"] = found.failure.status.message
    output.say_fields(fields)


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
    detach: _Detach = False,
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
    detach: _Detach = False,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Goes on with a paused or failed training from its last checkpoint."""
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    _go_on(s, s.client.trainings.resume(name), detach)


def metrics(
    context: typer.Context,
    training: _Name,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows how good a training's model is on validation and test images, and its losses."""
    s = session(context, json, project, address)
    name = s.client.trainings.find(training, s.project).name
    evaluations = s.client.metrics.evaluations(name)
    series = s.client.metrics.series(name)
    if s.json:
        output.say_json(
            {
                "training": name,
                "evaluations": [output.as_dict(evaluation) for evaluation in evaluations],
                "series": [output.as_dict(one) for one in series],
            }
        )
        return
    say_evaluations(evaluations)
    output.say()
    output.say_table(
        ("EPOCH VALUE", "FIRST", "LAST", "EPOCHS"),
        (
            (one.name, f"{one.values[0]:.4g}", f"{one.values[-1]:.4g}", f"{len(one.epochs)}")
            for one in series
            if one.values
        ),
        empty="no epoch is finished yet",
    )


def models(
    context: typer.Context, json: Json = False, project: Project = "", address: Address = ""
) -> None:
    """Lists the models that can be trained."""
    s = session(context, json, project, address)
    found = s.client.models()
    if s.json:
        output.say_json({"models": [output.as_dict(model) for model in found]})
        return
    output.say_table(
        ("ID", "NAME", "INPUT", "PARAMETERS", "LICENCE"),
        (
            (
                model.name.removeprefix("models/"),
                model.display_name,
                f"{model.input_size_px} px",
                f"{model.num_parameters / 1e6:.1f} M",
                model.licence,
            )
            for model in found
        ),
        empty="no models",
    )


def _go_on(s: Session, training: training_pb2.Training, detach: bool) -> None:
    if not detach:
        finish(s, follow(s, training.name))
    elif s.json:
        output.say_json(training)
    else:
        output.say(f"{_State.Name(training.state)} {training.name}")
        output.say(f"watch it with `detflow trainings watch {training.name}`")


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


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
