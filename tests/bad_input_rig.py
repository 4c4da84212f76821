"""One running stack that is asked for bad things by gRPC, by HTTP and on the command line.

Whatever the surface, what comes of it is an `Answer`, so that a table of cases can say once what is
expected of all three.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import httpx
from google.protobuf import json_format, message_factory
from google.protobuf.message import Message
from google.rpc import status_pb2

from detflow import channels
from detflow.cli import main
from detflow.cli.output import as_dict
from detflow.errors import DetflowError, from_status
from gateway.errors import HTTP_CODES
from gateway.routes import SERVICES, bindings
from tests.preprocess_samples import pack, yolo_files
from tests.stack_rig import Stack, environment

GRPC, HTTP, CLI = SURFACES = ("gRPC", "HTTP", "command line")
PROJECT = "bad-input"
MAX_UPLOAD_BYTES = 1 << 20
"""What the stack takes, so that too much is little."""

_BINDINGS = {binding.rpc.name: binding for binding in bindings()}
_PORTS = {
    descriptor.full_name: port
    for port, descriptors in enumerate(SERVICES.values(), 1)
    for descriptor in descriptors
}
_VARIABLE = re.compile(r"\{([a-z_.]+)(?:=[^}]+)?\}")
# What no caller may be answered with, whatever was sent.
_DEFECTS = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "UNIMPLEMENTED")


@dataclass(frozen=True)
class Answer:
    """What came of one thing that was sent.

    Attributes:
        code: Of google.rpc.Code by name; "" on the command line, which shows none.
        reason: Of the ErrorInfo; "" on the command line.
        found: Field and reason of each violation.
        text: Message, or all that was written on stderr.
        status: Of HTTP, or the exit code.
    """

    code: str
    reason: str
    found: tuple[tuple[str, str], ...]
    text: str
    status: int = 0


def of_error(error: DetflowError, status: int = 0) -> Answer:
    """Says what an error says; it must not be one of our own defects."""
    assert error.code.name not in _DEFECTS, error
    assert error.message and error.reason
    found = tuple((one.field, one.reason) for one in error.violations)
    return Answer(error.code.name, error.reason, found, error.message, status)


def of_response(response: httpx.Response) -> Answer:
    """Reads an error over HTTP, whose body must be a google.rpc.Status with its details."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    assert response.headers["content-type"].startswith("application/json")
    assert response.headers["x-content-type-options"] == "nosniff"
    error = response.json()["error"]
    assert error["code"] == response.status_code
    if response.status_code not in (HTTP_CODES[error["status"]], 413, 415):
        raise AssertionError(error)
    return of_json({**error, "code": error["status"]}, response.status_code)


def of_json(status: Mapping[str, Any], http: int = 0) -> Answer:
    """Reads a google.rpc.Status in JSON, its code as a name or a number."""
    code = status["code"]
    number = getattr(grpc.StatusCode, code).value[0] if isinstance(code, str) else code
    message = json_format.ParseDict({**status, "code": number}, status_pb2.Status(), True)
    return of_error(from_status(message), http)


class World:
    """A stack with something good in it.

    Attributes:
        good: Resource name of a dataset that must outlive everything.
        names: What "$key" stands for in requests and arguments.
    """

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.client = stack.client()
        self.http = httpx.Client(base_url=stack.url, headers=stack.headers, timeout=60)
        self._channels = [
            grpc.insecure_channel(f"127.0.0.1:{stack.port + n}", options=channels.OPTIONS)
            for n in range(1, len(SERVICES) + 1)
        ]
        self._pool = ThreadPoolExecutor(2)
        self._number = 0
        self.client.projects.create(PROJECT)
        self.client.projects.create("other")
        self.good = self.import_("good", pack(yolo_files(12))).name
        few = self.import_("few", pack(yolo_files(1))).name
        version = self.client.versions.wait(self.client.versions.create(self.good, name="one").name)
        failed = self.client.versions.create(few, name="failed").name
        with contextlib.suppress(DetflowError):
            self.client.versions.wait(failed)
        other = self.client.keys.create("k", role="editor", project="other")
        self.names = {
            "project": f"projects/{PROJECT}",
            "dataset": self.good,
            "version": version.name,
            "failed": failed,
            "stranger": other.token,
        }
        page = self.http.get(f"/v1/projects/{PROJECT}/versions?pageSize=1").json()["nextPageToken"]
        self.names |= {"next": page, "token": ("B" if page[0] == "A" else "A") + page[1:]}
        self.kept = self.state()

    def close(self) -> None:
        self._pool.shutdown()
        self.http.close()
        self.client.close()
        for channel in self._channels:
            channel.close()

    def import_(self, name: str, data: bytes, *, skip_invalid: bool = False) -> Any:
        """Imports an archive."""
        path = self.file(data, ".zip")
        return self.client.datasets.import_(
            path, project=PROJECT, name=name, skip_invalid=skip_invalid
        )

    def file(self, data: bytes, ending: str) -> Path:
        """Writes a new file."""
        self._number += 1
        path = self.folder / f"{self._number}{ending}"
        path.write_bytes(data)
        return path

    def state(self) -> dict[str, str]:
        """Returns what was good and must stay: resources by name."""
        dataset = self.client.datasets.get(self.good)
        versions = self.client.versions.list(PROJECT)
        kept = {one.name: one.display_name for one in versions}
        return {**kept, dataset.name: dataset.content_sha256}

    def filled(self, value: Any) -> Any:
        """Puts names in the place of "$key", in texts at any depth."""
        if isinstance(value, dict):
            return {key: self.filled(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.filled(one) for one in value]
        if isinstance(value, str):
            return re.sub(r"\$([a-z]+)", lambda found: self.names.get(found[1], found[0]), value)
        return value

    # --- one call

    def by_grpc(
        self, rpc: str, request: Mapping[str, Any] | Message, token: str | None = None
    ) -> Answer:
        """Calls a method, with the request or JSON for it."""
        descriptor = _BINDINGS[rpc].rpc
        message = request if isinstance(request, Message) else _message(rpc, self.filled(request))
        service = descriptor.containing_service.full_name
        answer_class = message_factory.GetMessageClass(descriptor.output_type)
        method = self._channels[_PORTS[service] - 1].unary_unary(
            f"/{service}/{rpc}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=answer_class.FromString,
        )
        shown = self.stack.token if token is None else token
        metadata = (("authorization", f"Bearer {shown}"),) if shown else ()
        try:
            with channels.translate():
                answered = method(message, metadata=metadata, timeout=60)
        except DetflowError as error:
            return of_error(error)
        raise AssertionError(f"{rpc} was carried out: {answered}")

    def by_http(self, rpc: str, request: Mapping[str, Any], token: str | None = None) -> Answer:
        """Sends the request that the annotation of the method describes."""
        binding = _BINDINGS[rpc]
        value = json_format.MessageToDict(_message(rpc, self.filled(request)))
        path = _VARIABLE.sub(lambda found: _take(value, found[1]), binding.template.text)
        body: Any = None
        if binding.body:
            body = value if binding.body == "*" else value.pop(_camel(binding.body), {})
        shown = self.stack.token if token is None else token
        response = httpx.request(
            binding.http_method.upper(),
            self.stack.url + path,
            params={} if binding.body == "*" else _flat(value),
            json=body,
            headers={"authorization": f"Bearer {shown}"} if shown else {},
            timeout=60,
        )
        return of_response(response)

    def by_cli(self, *arguments: str, environ: Mapping[str, str] | None = None) -> Answer:
        """Runs a command in this process; it must fail in one line, and what is wrong below it."""
        code, out, err = self.command(*arguments, environ=environ)
        assert code in (1, 2), (code, out, err)
        first, *others = err.splitlines()
        assert first.startswith("detflow: ") and "Traceback" not in err, err
        assert all(line.startswith("  ") for line in others), err
        assert not [word for word in _DEFECTS if re.search(rf"\b{word}\b", err)], err
        violations = (re.match(r"  (.*?): ([A-Z_]+): ", line) for line in others)
        found = tuple((one[1], one[2]) for one in violations if one)
        return Answer("", "", found, err, code)

    def command(
        self, *arguments: str, environ: Mapping[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Runs a command in this process; returns exit code, stdout and stderr."""
        assert threading.current_thread() is threading.main_thread()
        out, err = io.StringIO(), io.StringIO()
        variables = {**environment(self.stack.data_dir), **(environ or {})}
        with (
            mock.patch.dict("os.environ", variables, clear=True),
            mock.patch.object(
                sys, "argv", ["detflow", "--project", PROJECT, *self.filled(arguments)]
            ),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main()
            except SystemExit as exited:
                assert isinstance(exited.code, int)
                return exited.code, out.getvalue(), err.getvalue()
        raise AssertionError("a command ends with an exit code")

    # --- files

    def archive_by_grpc(self, data: bytes, name: str) -> Answer:
        """Imports an archive with the SDK."""
        return self._refused(lambda: self.import_(name, data))

    def archive_by_http(self, data: bytes, name: str) -> Answer:
        """Imports an archive; what it failed of stands on the dataset."""
        ended = self.import_by_http(data, name)
        if isinstance(ended, httpx.Response):
            return of_response(ended)
        assert ended["state"] == "FAILED", ended
        return of_json(ended["failure"]["status"])

    def import_by_http(self, data: bytes, name: str, **options: Any) -> Any:
        """Imports an archive and returns the dataset when that has ended, or a refusal."""
        sent = self.http.post(
            f"/v1/projects/{PROJECT}/uploads",
            content=data,
            headers={"content-type": "application/zip"},
        )
        if sent.is_error:
            return sent
        made = self.http.post(
            f"/v1/projects/{PROJECT}/datasets",
            json={"dataset": {"displayName": name}, "upload": sent.json()["name"], **options},
        )
        if made.is_error:
            return made
        path = f"/v1/{made.json()['name']}"
        with self.http.stream("GET", f"{path}:watch") as events:
            for _ in events.iter_lines():  # it ends with the import
                pass
        return self.http.get(path).json()

    def import_by_cli(self, data: bytes, name: str, *options: str) -> Any:
        """Imports an archive with a command that succeeds, and returns what it prints as JSON."""
        path = self.file(data, ".zip")
        code, out, err = self.command(
            "datasets", "import", str(path), "--name", name, "--json", *options
        )
        assert (code, err) == (0, ""), err
        return json.loads(out)

    def imported(self, data: bytes, name: str, *, skip_invalid: bool = False) -> list[Any]:
        """Imports a good archive by each surface; returns the datasets in JSON."""
        by_grpc = self.import_(f"{name} 1", data, skip_invalid=skip_invalid)
        by_http = self.import_by_http(data, f"{name} 2", skipInvalid=skip_invalid)
        options = ["--skip-invalid"] * skip_invalid
        return [as_dict(by_grpc), by_http, self.import_by_cli(data, f"{name} 3", *options)]

    def archive_by_cli(self, path: Path, name: str) -> Answer:
        """Imports an archive with a command."""
        return self.by_cli("datasets", "import", str(path), "--name", name)

    def weights_by_grpc(self, path: Path) -> Answer:
        """Uploads weights with the SDK."""
        return self._refused(lambda: self.client.weights.upload(path, project=PROJECT))

    def weights_by_http(self, data: bytes) -> Answer:
        """Uploads weights as a raw body."""
        return of_response(
            self.http.post(
                f"/v1/projects/{PROJECT}/weights",
                content=data,
                headers={"content-type": "application/octet-stream"},
            )
        )

    def weights_by_cli(self, path: Path) -> Answer:
        """Uploads weights with a command."""
        return self.by_cli("weights", "upload", str(path))

    def at_once(
        self, one: Callable[[], Answer], two: Callable[[], Answer], here: Callable[[], Answer]
    ) -> tuple[Answer, Answer, Answer]:
        """Does three things at the same time, the last in this thread."""
        first, second = self._pool.submit(one), self._pool.submit(two)
        third = here()
        return first.result(), second.result(), third

    def _refused(self, act: Callable[[], object]) -> Answer:
        try:
            made = act()
        except DetflowError as error:
            return of_error(error)
        raise AssertionError(f"it was taken: {made}")


@contextlib.contextmanager
def world(stack: Stack, folder: Path) -> Iterator[World]:
    """Fills a stack."""
    made = World(stack, folder)
    try:
        yield made
    finally:
        made.close()


def _message(rpc: str, request: Mapping[str, Any]) -> Any:
    made = message_factory.GetMessageClass(_BINDINGS[rpc].rpc.input_type)()
    return json_format.ParseDict(dict(request), made)


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.title() for other in others)


def _take(value: dict[str, Any], path: str) -> str:
    """Takes a field that stands in the path of a URL out of a request."""
    *above, last = path.split(".")
    for name in above:
        value = value[_camel(name)]
    return str(value.pop(_camel(last)))


def _flat(value: Mapping[str, Any]) -> dict[str, str]:
    """Renders the fields of a request as a query."""
    assert not any(isinstance(one, dict | list) for one in value.values())
    return {key: str(one) for key, one in value.items()}
