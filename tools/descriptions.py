"""Writes gateway/descriptions.json: the comments of the protos by full name, for /openapi.json.

Stubs carry no comments, so they are taken from a descriptor set with source info. `--check` fails
if the committed file differs.
"""

from __future__ import annotations

import importlib.resources
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "gateway" / "descriptions.json"

# Field numbers of the children in descriptor messages, as SourceCodeInfo.Location.path has them.
_FILE = {4: "message_type", 5: "enum_type", 6: "service"}
_MESSAGE = {2: "field", 3: "nested_type", 4: "enum_type", 8: "oneof_decl"}
_ENUM = {2: "value"}
_SERVICE = {2: "method"}
_CHILDREN: dict[type[Any], dict[int, str]] = {
    descriptor_pb2.FileDescriptorProto: _FILE,
    descriptor_pb2.DescriptorProto: _MESSAGE,
    descriptor_pb2.EnumDescriptorProto: _ENUM,
    descriptor_pb2.ServiceDescriptorProto: _SERVICE,
}


def main() -> int:
    """Writes or checks the file; returns the exit code."""
    text = json.dumps(dict(sorted(_comments())), indent=1, ensure_ascii=False) + "\n"
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") != text:
            print(f"{TARGET} does not fit the protos: run python tools/descriptions.py")
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


def _comments() -> Iterator[tuple[str, str]]:
    files = sorted((ROOT / "protos" / "detflow" / "v1").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set.binpb"
        code = protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'protos'}",
                f"-I{ROOT / 'protos' / 'third_party'}",
                f"-I{importlib.resources.files('grpc_tools') / '_proto'}",
                "--include_source_info",
                f"--descriptor_set_out={out}",
                *map(str, files),
            ]
        )
        if code:
            raise SystemExit(code)
        descriptors = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    for file in descriptors.file:
        for location in file.source_code_info.location:
            text = location.leading_comments.strip()
            name = _full_name(file, list(location.path)) if text else None
            if name:
                yield name, " ".join(line.strip() for line in text.splitlines())


def _full_name(file: descriptor_pb2.FileDescriptorProto, path: list[int]) -> str | None:
    """Name of the element a path leads to, e.g. detflow.v1.Version.name; None for inner parts."""
    node: Any = file
    names = [file.package]
    for number, index in zip(path[::2], path[1::2], strict=False):
        child = _CHILDREN.get(type(node), {}).get(number)
        if child is None:
            return None
        node = getattr(node, child)[index]
        names.append(node.name)
    return ".".join(names) if path and len(path) % 2 == 0 else None


if __name__ == "__main__":
    sys.exit(main())
