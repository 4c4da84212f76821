"""What schemathesis is told of detflow: `SCHEMATHESIS_HOOKS=tests.fuzz.conformance`.

Half of the ids in paths become ids of resources that there are (DETFLOW_FUZZ_NAMES, a JSON list of
resource names), since no generator finds any of them.
"""

import json
import os
import re
import zlib
from typing import Any

import schemathesis
from google.protobuf import json_format

from detflow.errors import InvalidArgument
from gateway.routes import bindings
from gateway.transcode import fill

_NAMES = [name.split("/") for name in json.loads(os.environ.get("DETFLOW_FUZZ_NAMES", "[]"))]
_BINDINGS = {one.rpc.name: one for one in bindings()}
_ID = re.compile(r"[a-z0-9-]{1,63}")


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> Any:
    """Puts ids of resources that there are into a path."""
    if not path_parameters or zlib.crc32(repr(path_parameters).encode()) % 2:
        return path_parameters
    given = {key: str(value) for key, value in path_parameters.items()}
    if not all(_ID.fullmatch(value) for value in given.values()):
        return path_parameters  # what is wrong stays wrong
    path = context.operation.path.rpartition("/")[2].partition(":")[0]
    segments = context.operation.path[len("/v1/") :].split("/")
    segments[-1] = path
    for name in _NAMES:
        pairs = list(zip(segments, name, strict=False))
        if len(name) <= len(segments) and all(a == b or a.startswith("{") for a, b in pairs):
            given |= {a[1:-1]: b for a, b in pairs if a.startswith("{")}
    return given


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """Leaves out wrong bodies that JSON in the style of protobuf has as another way to write.

    null stands for a field that is not there, and numbers for 64-bit integers, which are texts in
    the document because they are in every answer.
    """
    if case.meta is None or not case.meta.generation.mode.is_negative:
        return True
    binding = _BINDINGS.get(case.operation.definition.raw.get("operationId"))
    if binding is None or not binding.body or not isinstance(case.body, dict):
        return True
    message = binding.request()
    try:
        fill(message, case.body if binding.body == "*" else {binding.body: case.body})
    except InvalidArgument:
        return True
    read = message if binding.body == "*" else getattr(message, binding.body)
    return bool(json_format.MessageToDict(read) == case.body)
