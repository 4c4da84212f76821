"""`detflow models` and `detflow hyperparameters`: what can be chosen."""

import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, session
from detflow.v1 import trainer_pb2

_Entry = trainer_pb2.Hyperparameter


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
        ("ID", "NAME", "FAMILY", "INPUT", "PARAMETERS", "LICENCE"),
        (
            (
                model.name.removeprefix("models/"),
                model.display_name,
                model.family,
                f"{model.input_size_px} px",
                f"{model.num_parameters / 1e6:.1f} M",
                model.licence,
            )
            for model in found
        ),
        empty="no models",
    )


def hyperparameters(
    context: typer.Context,
    family: Annotated[
        str,
        typer.Option("--family", help="Only those of this family, see `detflow models`."),
    ] = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists the advanced hyper-parameters, in Korean or English: type, range, default, help."""
    s = session(context, json, project, address)
    schema = s.client.hyperparameters(family)
    if s.json:
        output.say_json({"hyperparameters": [output.as_dict(entry) for entry in schema]})
        return
    korean = language(os.environ) == "ko"
    output.say_table(
        ("이름", "종류", "범위", "기본값", "설명")
        if korean
        else ("NAME", "TYPE", "RANGE", "DEFAULT", "HELP"),
        (
            (
                entry.name,
                _Entry.Type.Name(entry.type).lower(),
                _range(entry),
                _default(entry),
                entry.help_ko if korean else entry.help_en,
            )
            for entry in schema
        ),
        empty="no hyper-parameters",
    )


def language(environ: Mapping[str, str]) -> str:
    """Returns "ko" or "en", as the locale's variables say."""
    locale = environ.get("LC_ALL") or environ.get("LC_MESSAGES") or environ.get("LANG") or ""
    return "ko" if locale.lower().startswith("ko") else "en"


def text_of(value: object) -> str:
    """Renders a value as `--set` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def _range(entry: _Entry) -> str:
    if entry.type == _Entry.CHOICE:
        return ", ".join(entry.choices)
    if entry.type == _Entry.BOOLEAN:
        return "true, false"
    ranges = [_bounds(entry)]
    ranges += [
        f"{family}: {_bounds(allowed)}" for family, allowed in sorted(entry.family_ranges.items())
    ]
    return "; ".join(ranges)


def _bounds(allowed: Any) -> str:
    step = f" by {allowed.multiple_of}" if allowed.multiple_of > 1 else ""
    return f"{text_of(allowed.minimum)}..{text_of(allowed.maximum)}{step}"


def _default(entry: _Entry) -> str:
    """Renders the default, by family where they differ."""
    families: dict[str, list[str]] = {}
    for family, value in sorted(entry.defaults.items()):
        kind = value.WhichOneof("kind")
        families.setdefault(text_of(getattr(value, kind)) if kind else "-", []).append(family)
    if len(families) < 2:
        return "".join(families) or "-"
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in families.items())
