"""`detflow webhooks`: create, list, show, update, delete, rotate-secret, test, deliveries."""

from typing import Annotated

import typer

from detflow.cli import output
from detflow.cli.session import Address, Json, Project, session
from detflow.cli.version_words import time_of
from detflow.client.webhooks import EVENTS
from detflow.v1 import webhook_pb2

app = typer.Typer(
    help="Addresses that are told when a training completes, fails or stops.",
    rich_markup_mode=None,
)

_Webhook = Annotated[
    str, typer.Argument(metavar="WEBHOOK", help="Name, id or resource name of a webhook.")
]
_On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="EVENTS",
        help="Of completed, failed and stopped, separated by commas; 'all' [default: all].",
    ),
]
_Name = Annotated[str, typer.Option("--name", help="Name shown to people [default: the host].")]
_State = webhook_pb2.WebhookDelivery.State


@app.command("create")
def create(
    context: typer.Context,
    url: Annotated[str, typer.Argument(metavar="URL", help="http or https address to post to.")],
    name: _Name = "",
    on: _On = "",
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Creates a webhook and prints its secret, which is not shown again."""
    events = _parse_events(on)
    s = session(context, json, project, address)
    webhook = s.client.webhooks.create(url, project=s.project, name=name, events=events)
    if s.json:
        output.say_json(webhook)
        return
    output.say(f"created {output.printable(webhook.display_name)}")
    _say_webhook(webhook)
    output.say(
        "the receiver checks messages with the secret: keep it now; see whether one arrives with"
        f" `detflow webhooks test {webhook.name}`"
    )


@app.command("list")
def list_(
    context: typer.Context, json: Json = False, project: Project = "", address: Address = ""
) -> None:
    """Lists the webhooks of the project, newest first."""
    s = session(context, json, project, address)
    found = s.client.webhooks.list(s.project)
    if s.json:
        output.say_json({"webhooks": [output.as_dict(webhook) for webhook in found]})
        return
    output.say_table(
        ("NAME", "TOLD OF", "STATE", "URL", "RESOURCE"),
        ((w.display_name, _events_of(w), _state_of(w), w.url, w.name) for w in found),
        empty=f"no webhooks in project {s.project}: make one with `detflow webhooks create URL`",
    )


@app.command("show")
def show(
    context: typer.Context,
    webhook: _Webhook,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Shows a webhook."""
    s = session(context, json, project, address)
    found = s.client.webhooks.find(webhook, s.project)
    if s.json:
        output.say_json(found)
    else:
        _say_webhook(found)


@app.command("update")
def update(
    context: typer.Context,
    webhook: _Webhook,
    url: Annotated[str, typer.Option("--url", help="Another address.")] = "",
    name: Annotated[str, typer.Option("--name", help="Another name.")] = "",
    on: _On = "",
    enable: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Send to it, or do not.")
    ] = None,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Changes the address, the name, what it is told of, and whether anything is sent."""
    events = _parse_events(on)
    s = session(context, json, project, address)
    found = s.client.webhooks.find(webhook, s.project)
    changed = s.client.webhooks.update(
        found.name,
        display_name=name or None,
        url=url or None,
        events=events if on else None,
        disabled=None if enable is None else not enable,
        etag=found.etag,
    )
    if s.json:
        output.say_json(changed)
    else:
        _say_webhook(changed)


@app.command("delete")
def delete(
    context: typer.Context,
    webhook: _Webhook,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Deletes a webhook; what was still to be sent is not."""
    s = session(context, json, project, address)
    found = s.client.webhooks.find(webhook, s.project)
    s.client.webhooks.delete(found.name)
    if s.json:
        output.say_json({"name": found.name})
    else:
        output.say(f"deleted {output.printable(found.display_name)}")


@app.command("rotate-secret")
def rotate_secret(
    context: typer.Context,
    webhook: _Webhook,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Makes a new secret; the old one signs beside it for 24 hours."""
    s = session(context, json, project, address)
    found = s.client.webhooks.find(webhook, s.project)
    rotated = s.client.webhooks.rotate_secret(found.name)
    if s.json:
        output.say_json(rotated)
    else:
        output.say_fields({"secret": rotated.secret})
        output.say("it is not shown again; the old one signs beside it for 24 hours")


@app.command("test")
def test(
    context: typer.Context,
    webhook: _Webhook,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Sends a message of no consequence; exits with 1 if it is not taken."""
    s = session(context, json, project, address)
    found = s.client.webhooks.find(webhook, s.project)
    delivery = s.client.webhooks.test(found.name)
    if s.json:
        output.say_json(delivery)
    elif delivery.state == _State.DELIVERED:
        output.say(f"{output.printable(found.display_name)} answered {delivery.http_status}")
    else:
        output.complain(f"{found.display_name}: {delivery.error}")
    if delivery.state != _State.DELIVERED:
        raise typer.Exit(1)


@app.command("deliveries")
def deliveries(
    context: typer.Context,
    webhook: _Webhook,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Most to show.")] = 50,
    json: Json = False,
    project: Project = "",
    address: Address = "",
) -> None:
    """Lists what was sent to a webhook in the last 30 days, newest first."""
    s = session(context, json, project, address)
    found = s.client.webhooks.find(webhook, s.project)
    sent = s.client.webhooks.deliveries(found.name, limit=limit)
    if s.json:
        output.say_json({"deliveries": [output.as_dict(delivery) for delivery in sent]})
        return
    output.say_table(
        ("TIME", "EVENT", "STATE", "TRIES", "ANSWER", "NEXT TRY", "TRAINING", "ID", "ERROR"),
        (
            (
                time_of(delivery.create_time),
                _event_of(delivery),
                _State.Name(delivery.state).lower(),
                f"{delivery.num_tries}",
                f"{delivery.http_status or '-'}",
                time_of(delivery.next_try_time) if delivery.HasField("next_try_time") else "-",
                delivery.training or "-",
                delivery.id,
                delivery.error,
            )
            for delivery in sent
        ),
        empty="nothing was sent yet: `detflow webhooks test WEBHOOK` sends something",
    )


def _parse_events(text: str) -> list[str]:
    events = [part.strip() for part in text.split(",") if part.strip()]
    if events == ["all"]:
        return []
    unknown = [event for event in events if event not in EVENTS]
    if unknown:
        raise typer.BadParameter(f"--on: {unknown[0]!r} is none of {', '.join(EVENTS)}")
    return events


def _events_of(webhook: webhook_pb2.Webhook) -> str:
    names = [name for name, number in EVENTS.items() if number in webhook.event_types]
    return ", ".join(names) or "all"


def _event_of(delivery: webhook_pb2.WebhookDelivery) -> str:
    if delivery.test:
        return "test"
    names = {number: name for name, number in EVENTS.items()}
    return names.get(delivery.event_type, "-")


def _state_of(webhook: webhook_pb2.Webhook) -> str:
    return "disabled" if webhook.disabled else "enabled"


def _say_webhook(webhook: webhook_pb2.Webhook) -> None:
    fields = {
        "webhook": webhook.name,
        "name": webhook.display_name,
        "url": webhook.url,
        "told of": _events_of(webhook),
        "state": _state_of(webhook),
        "created": time_of(webhook.create_time),
    }
    output.say_fields(fields | ({"secret": webhook.secret} if webhook.secret else {}))
