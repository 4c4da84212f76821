"""The routes of the gateway, read from the `google.api.http` annotations of the descriptors.

The annotation is the only place a route is written. A template is literals, `*` and
`{field=pattern}`, with an optional `:verb` behind its last segment. Literals win over wildcards,
and a verb is never part of a wildcard.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from google.api import annotations_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from detflow.v1 import (
    access_pb2,
    analysis_pb2,
    comparison_pb2,
    dataset_pb2,
    export_pb2,
    inference_pb2,
    metrics_pb2,
    prediction_pb2,
    preprocess_pb2,
    project_pb2,
    report_pb2,
    trainer_pb2,
    version_pb2,
    webhook_pb2,
    weights_pb2,
)

SERVICES: dict[str, tuple[ServiceDescriptor, ...]] = {
    "version": (
        project_pb2.DESCRIPTOR.services_by_name["ProjectService"],
        version_pb2.DESCRIPTOR.services_by_name["VersionService"],
        access_pb2.DESCRIPTOR.services_by_name["AccessService"],
    ),
    "preprocess": (
        dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"],
        preprocess_pb2.DESCRIPTOR.services_by_name["PreprocessService"],
    ),
    "trainer": (
        trainer_pb2.DESCRIPTOR.services_by_name["TrainerService"],
        export_pb2.DESCRIPTOR.services_by_name["ExportService"],
        weights_pb2.DESCRIPTOR.services_by_name["WeightsService"],
    ),
    "metrics": (
        metrics_pb2.DESCRIPTOR.services_by_name["MetricsService"],
        analysis_pb2.DESCRIPTOR.services_by_name["AnalysisService"],
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
        prediction_pb2.DESCRIPTOR.services_by_name["PredictionService"],
        comparison_pb2.DESCRIPTOR.services_by_name["ComparisonService"],
        report_pb2.DESCRIPTOR.services_by_name["ReportService"],
        webhook_pb2.DESCRIPTOR.services_by_name["WebhookService"],
    ),
}
"""Which process serves which gRPC services."""

METHODS = ("get", "put", "post", "delete", "patch")
ANY = "*"
UPLOADS = {
    "UploadArchive": ("post", "/v1/{parent=projects/*}/uploads"),
    "WriteUpload": ("patch", "/v1/{start.name=projects/*/uploads/*}"),
    "UploadWeights": ("post", "/v1/{header.parent=projects/*}/weights"),
    "PredictImage": (
        "post",
        "/v1/{header.training=projects/*/versions/*/trainings/*}:predict",
    ),
}
"""The routes without an annotation, which cannot describe a raw body (see the protos)."""
GRPC_ONLY = ("MetricsService.ReadMetricColumns", "PredictionService.PredictImages")
"""What has no route of its own: columns of binary numbers, for which there are the same series as
JSON, and a stream both ways, for which there is one request per image."""
INTERNAL = (
    "AccessService.Authenticate",
    "AccessService.CreateSession",
    "AccessService.DeleteSession",
)
"""What services and gateway ask each other: nobody reaches it over HTTP, by any protocol."""
RAW = "google.api.HttpBody"
"""What an RPC streams that answers with a raw body."""
_VARIABLE = re.compile(r"\{([a-z0-9_.]+)(?:=([^{}]+))?\}")
# What a path part may never hold once decoded: separators, one more layer of encoding, controls.
_UNSAFE = re.compile(r"[/\\%\x00-\x1f\x7f]")


class UnsafePath(ValueError):
    """The path has a part that no resource name can have."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A field of the request that is taken from the path: segments[start:end] joined by "/"."""

    path: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed path template; a segment is a literal or `ANY`."""

    text: str
    segments: tuple[str, ...]
    verb: str
    variables: tuple[Variable, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """One HTTP method and path that stand for one RPC.

    Attributes:
        service: Key into SERVICES.
        body: "*" for the whole request, the name of a field, or "" for no body.
    """

    service: str
    rpc: MethodDescriptor
    http_method: str
    template: Template
    body: str
    request: type[Message] = field(repr=False)
    response: type[Message] = field(repr=False)

    @property
    def grpc_path(self) -> str:
        """Path of the RPC on the wire."""
        return f"/{self.rpc.containing_service.full_name}/{self.rpc.name}"

    @property
    def is_download(self) -> bool:
        """Whether the answer is a raw body."""
        return self.rpc.server_streaming and self.rpc.output_type.full_name == RAW

    @property
    def is_event_stream(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.rpc.server_streaming and not self.is_download

    @property
    def query(self) -> str | None:
        """Where query parameters go: "" for the request, a field of it, or None for nowhere.

        Of an upload they go beside the path variable, if that is in a message of its own; where
        the bytes of a PATCH belong is said by a header.
        """
        if not self.rpc.client_streaming:
            return ""
        if self.http_method == "PATCH":
            return None
        return self.template.variables[0].path.rpartition(".")[0] or None


def parse_template(text: str) -> Template:
    """Parses a path template such as `/v1/{name=projects/*}:stop`.

    Raises:
        ValueError: The template uses something detflow has no need of, e.g. `**`.
    """
    variables: list[Variable] = []
    segments: list[str] = []
    rest, verb = text.removeprefix("/"), ""
    head, colon, tail = rest.rpartition(":")
    if colon and "/" not in tail and "}" not in tail:
        rest, verb = head, tail
    position = 0
    while position < len(rest):
        match = _VARIABLE.match(rest, position)
        if match:
            parts = (match[2] or ANY).split("/")
            variables.append(Variable(match[1], len(segments), len(segments) + len(parts)))
            position = match.end()
        else:
            end = rest.find("/", position)
            end = len(rest) if end < 0 else end
            parts = [rest[position:end]]
            position = end
        segments += parts
        if position < len(rest):
            if rest[position] != "/":
                raise ValueError(f"{text}: a variable must end at a segment's end")
            position += 1
    for segment in segments:
        if segment != ANY and not re.fullmatch(r"[A-Za-z0-9_.-]+", segment):
            raise ValueError(f"{text}: cannot route the segment {segment!r}")
    return Template(text, tuple(segments), verb, tuple(variables))


def bindings() -> Iterator[Binding]:
    """All RPCs that have a route, in the order of the protos."""
    for service, descriptors in SERVICES.items():
        for descriptor in descriptors:
            for rpc in descriptor.methods:
                if rpc.name in UPLOADS:
                    yield _bind(service, rpc, *UPLOADS[rpc.name], "")
                rule = rpc.GetOptions().Extensions[annotations_pb2.http]
                for one in (rule, *rule.additional_bindings):
                    http_method = one.WhichOneof("pattern")
                    if http_method in METHODS:
                        yield _bind(service, rpc, http_method, getattr(one, http_method), one.body)


def rpcs() -> Iterator[Binding]:
    """All RPCs under their names, as the Connect protocol calls them."""
    for service, descriptors in SERVICES.items():
        for descriptor in descriptors:
            for rpc in descriptor.methods:
                if f"{descriptor.name}.{rpc.name}" not in INTERNAL:
                    yield _bind(service, rpc, "post", f"/{descriptor.full_name}/{rpc.name}", "*")


def _bind(service: str, rpc: MethodDescriptor, http_method: str, path: str, body: str) -> Binding:
    return Binding(
        service=service,
        rpc=rpc,
        http_method=http_method.upper(),
        template=parse_template(path),
        body=body,
        request=message_factory.GetMessageClass(rpc.input_type),
        response=message_factory.GetMessageClass(rpc.output_type),
    )


@dataclass(slots=True)
class _Node:
    literals: dict[str, _Node] = field(default_factory=dict)
    wildcard: _Node | None = None
    ends: dict[str, dict[str, Binding]] = field(default_factory=dict)
    """By verb, then by HTTP method."""


@dataclass(frozen=True, slots=True)
class Match:
    """Where a path leads.

    Attributes:
        binding: The route, or None if the path exists but not with this method.
        values: Path variables in the order of the template.
        allowed: HTTP methods of this path, sorted.
    """

    binding: Binding | None
    values: tuple[str, ...]
    allowed: tuple[str, ...]


class Router:
    """Finds the binding of a raw (still percent-encoded) path."""

    def __init__(self, all_bindings: Iterable[Binding]) -> None:
        self._root = _Node()
        for binding in all_bindings:
            node = self._root
            for segment in binding.template.segments:
                if segment == ANY:
                    node.wildcard = node.wildcard or _Node()
                    node = node.wildcard
                else:
                    node = node.literals.setdefault(segment, _Node())
            by_method = node.ends.setdefault(binding.template.verb, {})
            if binding.http_method in by_method:
                raise ValueError(f"two RPCs for {binding.http_method} {binding.template.text}")
            by_method[binding.http_method] = binding
            if binding.http_method == "GET" and not binding.is_event_stream:
                by_method["HEAD"] = binding

    def find(self, http_method: str, raw_path: bytes) -> Match | None:
        """Returns where a path leads, or None if there is no such path.

        Raises:
            UnsafePath: A part holds an (encoded) separator, is empty or dots only, or is not UTF-8.
        """
        head, colon, tail = raw_path.rpartition(b":")
        path, verb = (head, tail) if colon and b"/" not in tail else (raw_path, b"")
        segments = [_decode(part) for part in path[1:].split(b"/")]
        allowed: set[str] = set()
        for ends in _ends(self._root, segments, 0):
            by_method = ends.get(verb.decode("latin-1"))
            if by_method is None:
                continue
            binding = by_method.get(http_method)
            if binding is not None:
                values = tuple(
                    "/".join(segments[v.start : v.end]) for v in binding.template.variables
                )
                return Match(binding, values, (http_method,))
            allowed.update(by_method)
        return Match(None, (), tuple(sorted(allowed))) if allowed else None


def _ends(node: _Node, segments: list[str], depth: int) -> Iterator[dict[str, dict[str, Binding]]]:
    if depth == len(segments):
        if node.ends:
            yield node.ends
        return
    literal = node.literals.get(segments[depth])
    if literal is not None:
        yield from _ends(literal, segments, depth + 1)
    if node.wildcard is not None:
        yield from _ends(node.wildcard, segments, depth + 1)


def _decode(part: bytes) -> str:
    try:
        text = unquote_to_bytes(part).decode() if b"%" in part else part.decode()
    except UnicodeDecodeError as error:
        raise UnsafePath("not UTF-8") from error
    if not text.strip(". ") or _UNSAFE.search(text):
        raise UnsafePath("no resource has such a name")
    return text
