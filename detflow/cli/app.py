"""The commands and their groups."""

import typer

from detflow.cli import (
    access,
    audit,
    backup,
    catalogue,
    compare,
    datasets,
    doctor,
    exports,
    keys,
    members,
    metrics,
    predict,
    projects,
    report,
    results,
    retention,
    stack,
    train,
    trainings,
    versions,
    webhooks,
    weights,
)
from detflow.cli.session import Address, Json, Project, Session, TokenFile

app = typer.Typer(
    name="detflow",
    help="Train object-detection models on this machine and measure them honestly.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    context: typer.Context,
    json: Json = False,
    project: Project = "",
    address: Address = "",
    token_file: TokenFile = "",
) -> None:
    """Train object-detection models on this machine and measure them honestly."""
    session = context.ensure_object(Session)
    session.take(json=json, project=project, address=address)
    session.token_file = token_file


app.command("up")(stack.up)
app.command("demo")(stack.demo)
app.command("doctor")(doctor.doctor)
app.command("open")(access.open_)
app.command("whoami")(access.whoami)
app.add_typer(projects.app, name="projects")
app.add_typer(datasets.app, name="datasets")
app.add_typer(versions.app, name="versions")
app.command("train")(train.train)
app.add_typer(trainings.app, name="trainings")
app.command("metrics")(metrics.metrics)
app.command("compare")(compare.compare)
app.command("results")(results.results)
app.command("report")(report.report)
app.command("chart")(report.chart)
app.command("table")(report.table)
app.command("predict")(predict.predict)
app.command("export")(exports.export)
app.add_typer(exports.app, name="exports")
app.add_typer(weights.app, name="weights")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(keys.app, name="keys")
app.add_typer(members.app, name="members")
app.command("audit")(audit.audit)
app.add_typer(backup.app, name="backup")
app.command("purge")(retention.purge)
app.command("models")(catalogue.models)
app.command("hyperparameters")(catalogue.hyperparameters)
