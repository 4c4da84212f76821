"""A request of every method, about resources of a project that the caller chooses."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

import detflow.v1
from buf.validate import validate_pb2
from detflow import policy

_TRAINING = "projects/{}/versions/v1/trainings/t1"
_WITHOUT_PATTERN = {
    "api_key.name": "projects/{}/apiKeys/k1",
    "member.name": "projects/{}/members/m1",
    "project.name": "projects/{}",
    "version.name": "projects/{}/versions/v1",
    "training.name": _TRAINING,
    "webhook.name": "projects/{}/webhooks/h1",
}
_MORE: dict[str, dict[str, Any]] = {
    "CreateApiKey": {"apiKey": {"displayName": "k", "role": "VIEWER"}},
    "CreateMember": {"member": {"user": "u@example.com", "role": "VIEWER"}},
    "UpdateMember": {"member": {"role": "VIEWER"}},
    "Authenticate": {"token": "x"},
    "CreateSession": {"ticket": "x"},
    "DeleteSession": {"token": "x"},
    "CreateProject": {"projectId": "made", "project": {"displayName": "Made"}},
    "UpdateProject": {"project": {"displayName": "Again"}, "updateMask": "displayName"},
    "CreateUpload": {"sizeBytes": "1"},
    "CreateDataset": {"dataset": {"displayName": "d"}, "upload": "projects/{}/uploads/u1"},
    "CreateVersion": {"version": {"dataset": "projects/{}/datasets/d1"}},
    "PreviewVersion": {"dataset": "projects/{}/datasets/d1"},
    "StartTraining": {"training": {"model": "yolov8n", "batchSize": 1, "epochs": 1}},
    "StopTraining": {"mode": "STOP_MODE_FINISH"},
    "CreateExport": {"export": {"format": "ONNX"}},
    "CreateWebhook": {
        "webhook": {"url": "https://example.com/", "eventTypes": ["TRAINING_COMPLETED"]}
    },
    "UpdateWebhook": {"webhook": {"disabled": True}},
    "DownloadChart": {"chart": "CONFUSION"},
    "DownloadTable": {"table": "CLASSES"},
    "UploadWeights": {"header": {"displayName": "w"}},
    "CompareTrainings": {"trainings": [_TRAINING, _TRAINING.replace("t1", "t2")]},
    "DownloadComparisonReport": {"trainings": [_TRAINING, _TRAINING.replace("t1", "t2")]},
}


@dataclass(frozen=True)
class Method:
    """A method of the contracts; `name` is as on the wire."""

    descriptor: MethodDescriptor

    @property
    def name(self) -> str:
        return f"/{self.descriptor.containing_service.full_name}/{self.descriptor.name}"

    @property
    def rule(self) -> policy.Rule:
        return policy.RULES[self.name]

    def request(self, project_id: str) -> Message:
        """Returns a request whose fields are valid, about something in a project."""
        message = message_factory.GetMessageClass(self.descriptor.input_type)()
        more = _MORE.get(self.descriptor.name, {})
        json_format.ParseDict(_fill(more, project_id), message)
        path = self.rule.field
        if path:
            *above, last = path.split(".")
            inner: Any = message
            for name in above:
                inner = getattr(inner, name)
            template = _WITHOUT_PATTERN.get(path) or _template(inner.DESCRIPTOR, last)
            setattr(inner, last, template.format(project_id))
        return message


def methods() -> Iterator[Method]:
    """Yields every method of every service of detflow.v1."""
    for module in pkgutil.iter_modules(detflow.v1.__path__):
        if module.name.endswith("_pb2"):
            loaded = importlib.import_module(f"detflow.v1.{module.name}")
            for service in loaded.DESCRIPTOR.services_by_name.values():
                yield from map(Method, service.methods)


def name_fields(message: Descriptor, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the paths of the fields whose rule is the name of a resource in a project."""
    for field in message.fields:
        if field.message_type is not None:
            if field.message_type.full_name not in above:
                inside = (*above, message.full_name)
                for path in name_fields(field.message_type, inside):
                    yield f"{field.name}.{path}"
        elif "projects/" in _pattern(field):
            yield field.name


def _pattern(field: FieldDescriptor) -> str:
    if field.type != FieldDescriptor.TYPE_STRING:
        return ""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    return str((rules.repeated.items if field.is_repeated else rules).string.pattern)


def _template(message: Descriptor, field: str) -> str:
    """Makes a name of what the rule of a field allows, with {} for the project."""
    pattern = _pattern(message.fields_by_name[field])
    name = re.sub(r"projects/(\(.*?\)|\[.*?\]\{.*?\})", "projects/{}", pattern.strip("^$"), count=1)
    name = re.sub(r"\[.*?\](\{.*?\}|\+)?", "1", name)
    name = re.sub(r"\((\w+)\|.*?\)", r"\1", name)
    assert re.fullmatch(pattern, name.format("p1")), (pattern, name)
    return name


def _fill(value: Any, project_id: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(one, project_id) for key, one in value.items()}
    if isinstance(value, list):
        return [_fill(one, project_id) for one in value]
    return value.format(project_id) if isinstance(value, str) else value
