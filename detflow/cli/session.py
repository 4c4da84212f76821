"""What every command shares: how to print, which project, and the client."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from detflow.cli import output
from detflow.client import DEFAULT_ADDRESS, Client
from detflow.client.credentials import read_token
from detflow.client.projects import DEFAULT_PROJECT
from detflow.local.running import default_data_dir, running

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Project = Annotated[
    str, typer.Option("--project", help="Id of the project [default: default].", metavar="ID")
]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        help="host:port of detflow [default: the one that runs here, or 127.0.0.1:7100].",
        metavar="HOST:PORT",
    ),
]
TokenFile = Annotated[
    str,
    typer.Option(
        "--token-file",
        help="File with the token that says who is calling [default: $DETFLOW_TOKEN or"
        " $DETFLOW_TOKEN_FILE, or that of the detflow that runs here].",
        metavar="FILE",
    ),
]


class Session:
    """The options of one invocation, wherever on the line they stood.

    Attributes:
        json: Print JSON.
        project: Id of the project.
        address: host:port of detflow.
        token_file: File that holds the token; "" leaves that to the client.
    """

    def __init__(self) -> None:
        self.json = False
        self.project = ""
        self.address = ""
        self.token_file = ""

    def take(self, *, json: bool, project: str, address: str) -> None:
        """Takes in options; what stands nearer to the command wins."""
        self.json = self.json or json
        self.project = project or self.project
        self.address = address or self.address

    def settle(self) -> None:
        """Fills in what was not said."""
        self.project = self.project or DEFAULT_PROJECT
        if not self.address:
            found = running(default_data_dir())
            self.address = found.address if found and found.port else DEFAULT_ADDRESS

    @functools.cached_property
    def client(self) -> Client:
        """The client; closed when the command ends."""
        return Client(self.address, token=self._token())

    def _token(self) -> str | None:
        return read_token(self.token_file) if self.token_file else None

    def use(self, client: Client) -> None:
        """Uses a client that is open already; whoever opened it closes it."""
        self.address = client.address
        vars(self)["client"] = client

    def bar(self) -> output.Bar:
        """Returns the progress display: none in JSON, lines where the output is no terminal."""
        return output.Bar(silent=self.json)


def session(context: typer.Context, json: bool, project: str, address: str) -> Session:
    """Returns the session of a command, with its own options taken in."""
    found: Session = context.ensure_object(Session)
    found.take(json=json, project=project, address=address)
    found.settle()
    context.call_on_close(functools.partial(_close, found))
    return found


def _close(found: Session) -> None:
    if "client" in vars(found):
        found.client.close()


DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of everything detflow keeps [default: $DETFLOW_DATA_DIR or"
        " ~/.local/share/detflow].",
    ),
]
