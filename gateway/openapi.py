"""The OpenAPI 3.1 document, made from the same descriptors that route the requests.

Descriptions are the comments of the protos (descriptions.json, written by tools/descriptions.py),
limits come from the protovalidate rules and required fields from google.api.field_behavior, so
nothing is said twice.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from detflow import policy
from detflow.v1 import access_pb2
from gateway import conditions, credentials, download, examples, upload
from gateway.routes import ANY, Binding
from gateway.schemas import REF, WELL_KNOWN, Json, Schemas, has

_UPLOAD_HEADERS: Json = {
    "Upload-Offset": {"description": "committedBytes.", "schema": {"type": "integer"}},
    "Upload-Complete": {
        "description": "?1 if it is RECEIVED, else ?0.",
        "schema": {"type": "string"},
    },
}
_ERRORS = {
    "400": "The request is wrong, or the resource is in a state that does not allow it.",
    "401": "The token is missing or does not count.",
    "403": "The caller's role does not allow it, or it was sent by a page of another origin.",
    "404": "There is no such resource, or not for this caller.",
    "409": "It exists already, or somebody else changed it first.",
    "421": "The Host header names no host that this gateway answers to.",
    "429": "A limit is reached; Retry-After says when to come back, where that helps.",
    "431": "Path, query and headers are too long together.",
    "500": "The server failed, or stored data is damaged; details name the request id for the log.",
    "501": "The running service does not have this method; upgrade it.",
    "503": "A service is away, or too much is under way; Retry-After says when to come back.",
    "504": "The answer took too long.",
}
_BINARY: Json = {"schema": {"type": "string", "format": "binary"}}
_TEXT: Json = {"schema": {"type": "string"}}
_UPLOAD_OFFSET: Json = {
    "name": "Upload-Offset",
    "in": "header",
    "required": True,
    "description": "Place of the first byte: the upload's committedBytes. Another is 409, and the"
    " answer has the right one in the same header.",
    "schema": {"type": "integer", "format": "int64", "minimum": 0},
}
_ETAG: Json = {"description": "Changes with the content.", "schema": {"type": "string"}}
_IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Makes a retry safe, as `requestId` does: the same key gives the same answer.",
    "schema": {"type": "string", "minLength": 1, "maxLength": conditions.MAX_KEY_LENGTH},
}
_IF_MATCH: Json = {
    "name": "If-Match",
    "in": "header",
    "description": "ETag of what the caller saw, as `etag` is; if it is another by now, 412.",
    "schema": {"type": "string"},
}
_IF_NONE_MATCH: Json = {
    "name": "If-None-Match",
    "in": "header",
    "description": "ETag of what the caller has; if it is still the same, 304.",
    "schema": {"type": "string"},
}
_RANGE: Json = {
    "name": "Range",
    "in": "header",
    "description": "One range of bytes to send instead of all; several give the whole file.",
    "schema": {"type": "string"},
    "example": "bytes=1048576-",
}
_IF_RANGE: Json = {
    "name": "If-Range",
    "in": "header",
    "description": "ETag of the file of which the caller has a part; of another one all is sent.",
    "schema": {"type": "string"},
}
_CONTENT_RANGE: Json = {
    "description": "First and last byte that are sent, and the size of the file.",
    "schema": {"type": "string"},
}
_SECURITY: Json = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, the owner's token, or an ID token of the OIDC issuer.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": credentials.SESSION,
        "description": "A browser that is signed in; over HTTPS the name begins with __Host-. What"
        " changes something has to say where it comes from (Sec-Fetch-Site or Origin).",
    },
}
_ID_PATTERN = "^[a-z0-9-]{1,63}$"


def document(bindings: Iterable[Binding]) -> Json:
    """Builds the document for these routes."""
    all_bindings = list(bindings)
    texts = _load_descriptions()
    schemas = Schemas(texts)
    paths: dict[str, Json] = {}
    for binding in all_bindings:
        path, parameters = _path(binding)
        operation = _operation(binding, parameters, schemas, texts)
        examples.add(operation)
        paths.setdefault(path, {})[binding.http_method.lower()] = operation
    services = {
        b.rpc.containing_service.full_name: b.rpc.containing_service.name for b in all_bindings
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "detflow",
            "version": importlib.metadata.version("detflow"),
            "description": "Trains object-detection models and measures them honestly. JSON is "
            "protojson: camelCase names, enums by name, 64-bit integers as strings.",
            "license": {"name": "AGPL-3.0-or-later", "identifier": "AGPL-3.0-or-later"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": name, "description": texts.get(full, "")} for full, name in services.items()
        ],
        "paths": paths,
        "security": [{name: []} for name in _SECURITY],
        "components": {
            "schemas": dict(sorted(schemas.all().items())),
            "responses": _responses(),
            "securitySchemes": _SECURITY,
        },
    }


def _role_text(binding: Binding) -> str:
    """Says who may call, as the policy table has it."""
    rule = policy.RULES.get(binding.grpc_path)
    if rule is None or rule.services_only:
        return "Takes the token of the services."
    if rule.role == access_pb2.ROLE_UNSPECIFIED:
        return "Takes a token, whatever its role."
    where = "in the project" if rule.field else "in all projects"
    return f"Takes the role {access_pb2.Role.Name(rule.role)} {where}."


def _load_descriptions() -> dict[str, str]:
    file = Path(__file__).with_name("descriptions.json")
    texts: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return texts


def _path(binding: Binding) -> tuple[str, list[Json]]:
    """Writes a template as OpenAPI does: `*` becomes a parameter named after its collection."""
    template = binding.template
    parts: list[str] = []
    parameters: list[Json] = []
    for segment in template.segments:
        if segment == ANY:
            name = parts[-1].removesuffix("s")
            parts.append(f"{{{name}}}")
            parameters.append(
                {
                    "name": name,
                    "in": "path",
                    "required": True,
                    "schema": {"type": "string", "pattern": _ID_PATTERN},
                }
            )
        else:
            parts.append(segment)
    verb = f":{template.verb}" if template.verb else ""
    return f"/{'/'.join(parts)}{verb}", parameters


def _operation(
    binding: Binding, parameters: list[Json], schemas: Schemas, texts: dict[str, str]
) -> Json:
    rpc = binding.rpc
    text = texts.get(rpc.full_name, "")
    operation: Json = {
        "operationId": rpc.name,
        "tags": [rpc.containing_service.name],
        "summary": text.partition(". ")[0].rstrip("."),
        "description": f"{text} {_role_text(binding)}",
        "parameters": parameters + list(_query(binding, schemas, texts)),
        "responses": {code: {"$ref": f"#/components/responses/{code}"} for code in _ERRORS},
    }
    if rpc.client_streaming or binding.body:
        _add_body(operation, binding, schemas)
    _add_conditions(operation, binding)
    if binding.is_download:
        _add_file(operation, rpc.name)
        return operation
    result = schemas.message(rpc.output_type)
    if rpc.server_streaming:
        operation["description"] += (
            " Server-Sent Events: `id` is the cursor, `event` the field of the message that is set,"
            " `data` the message as JSON. Reconnect with Last-Event-ID (or `cursor`) to go on"
            " behind an event; an expired cursor is 400 with reason CURSOR_EXPIRED. `event: error`"
            " carries an error and ends the stream, `event: end` says that nothing will follow."
        )
        operation["parameters"].append(
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "Cursor of the last event seen; wins over `cursor`.",
                "schema": {"type": "string"},
            }
        )
        content: Json = {"text/event-stream": {"schema": result}}
    else:
        content = {"application/json": {"schema": result}}
    operation["responses"]["200"] = {
        "description": texts.get(rpc.output_type.full_name, "") or rpc.output_type.name,
        "content": content,
    }
    if rpc.output_type.full_name == upload.RESOURCE:
        operation["responses"]["200"]["headers"] = _UPLOAD_HEADERS
    if conditions.has_etag(binding):
        operation["responses"]["200"]["headers"] = {"ETag": _ETAG}
    return operation


def _add_conditions(operation: Json, binding: Binding) -> None:
    """Describes the headers that stand for fields of the request, and what comes of them."""
    if conditions.takes_key(binding):
        operation["parameters"].append(_IDEMPOTENCY_KEY)
    if conditions.takes_if_match(binding):
        operation["parameters"].append(_IF_MATCH)
        operation["responses"]["412"] = {"$ref": "#/components/responses/412"}
    if conditions.has_etag(binding) and binding.http_method == "GET":
        operation["parameters"].append(_IF_NONE_MATCH)
        operation["responses"]["304"] = {"description": "It has not changed."}


def _add_file(operation: Json, rpc: str) -> None:
    """Describes an answer that is a file."""
    kinds = download.CONTENT_TYPES_WITH_INFO.get(rpc, download.CONTENT_TYPES)
    file: Json = {
        "description": "The file itself. If it fails half way the connection is broken off.",
        "headers": {
            "Content-Disposition": {
                "description": "The name to save it under.",
                "schema": {"type": "string"},
            },
            "Content-Length": {
                "description": "Its size in bytes.",
                "schema": {"type": "integer"},
            },
        },
        "content": {kind: _file_content(kind) for kind in kinds},
    }
    operation["responses"]["200"] = file
    if rpc in download.IN_PARTS:
        file["headers"]["ETag"] = _ETAG
        file["headers"]["Accept-Ranges"] = {"description": "bytes", "schema": {"type": "string"}}
        part = {"description": "The bytes that Range asks for.", "content": file["content"]}
        part["headers"] = file["headers"] | {"Content-Range": _CONTENT_RANGE}
        operation["responses"]["206"] = part
        operation["responses"]["304"] = {"description": "It has not changed."}
        operation["responses"]["416"] = {"$ref": "#/components/responses/416"}
        operation["parameters"] += (_IF_NONE_MATCH, _RANGE, _IF_RANGE)


def _file_content(kind: str) -> Json:
    if kind == "application/json":
        return {"schema": {}}  # whatever the file holds
    return _TEXT if kind.startswith("text/") else _BINARY


def _add_body(operation: Json, binding: Binding, schemas: Schemas) -> None:
    rpc = binding.rpc
    if rpc.client_streaming:
        if upload.KINDS[rpc.name].is_resumable:
            operation["parameters"].append(dict(_UPLOAD_OFFSET))
        operation["description"] += " The body is streamed; the gateway never holds it whole."
        content = dict.fromkeys(upload.KINDS[rpc.name].content_types, _BINARY)
        operation["requestBody"] = {"required": True, "content": content}
    else:
        whole = binding.body == "*"
        from_path = {v.path for v in binding.template.variables}
        if whole:
            schema = schemas.message(rpc.input_type, without=from_path)
        else:
            field = rpc.input_type.fields_by_name[binding.body]
            assert field.message_type is not None
            is_part = binding.http_method == "PATCH"
            schema = (schemas.part if is_part else schemas.message)(field.message_type)
        operation["requestBody"] = {
            "required": not whole,
            "content": {"application/json": {"schema": schema}},
        }
    for code in ("408", "413", "415"):
        operation["responses"][code] = {"$ref": f"#/components/responses/{code}"}


def _query(binding: Binding, schemas: Schemas, texts: dict[str, str]) -> Iterator[Json]:
    if binding.body == "*" or binding.query is None:
        return
    message: Descriptor | None = binding.rpc.input_type
    if binding.query:
        message = binding.rpc.input_type.fields_by_name[binding.query].message_type
    assert message is not None
    inside = f"{binding.query}." if binding.query else ""
    taken = {v.path.removeprefix(inside).partition(".")[0] for v in binding.template.variables} | {
        binding.body
    }
    for name, field in _leaves(message, "", taken):
        # What a PATCH changes is read from its body where the mask is not given.
        is_mask = field.message_type is not None and field.message_type.name == "FieldMask"
        yield {
            "name": name,
            "in": "query",
            "required": has(field, field_behavior_pb2.REQUIRED) and not is_mask,
            "description": texts.get(field.full_name, ""),
            "schema": schemas.field(field),
        }


def _leaves(
    message: Descriptor, prefix: str, taken: Iterable[str] = ()
) -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        if field.name in taken:
            continue
        nested = field.message_type
        if nested is None or nested.full_name in WELL_KNOWN:
            yield prefix + field.json_name, field
        elif not field.is_repeated:
            yield from _leaves(nested, f"{prefix}{field.json_name}.")


def _responses() -> dict[str, Json]:
    texts = _ERRORS | {
        "408": "The body came too slowly.",
        "412": "It is not what the caller saw: read it again.",
        "413": "The body is too large.",
        "416": "The file has no such bytes; Content-Range says how many it has.",
        "415": "The body has the wrong type.",
    }
    content = {"application/json": {"schema": {"$ref": f"{REF}Error"}}}
    return {code: {"description": text, "content": content} for code, text in texts.items()}
