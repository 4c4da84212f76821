"""The vendored rule schema is the one that the validating library has built in."""

from collections.abc import Iterator

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from protovalidate._gen.buf.validate import validate_pb as library

from buf.validate import validate_pb2 as vendored


def fields(file: FileDescriptorProto) -> Iterator[FieldDescriptorProto]:
    yield from file.extension
    waiting: list[DescriptorProto] = list(file.message_type)
    while waiting:
        message = waiting.pop()
        yield from message.field
        waiting += message.nested_type


def test_vendored_validate_proto_equals_the_library_s_descriptor() -> None:
    ours = FileDescriptorProto()
    vendored.DESCRIPTOR.CopyToProto(ours)
    theirs = FileDescriptorProto.FromString(library._DESC.proto.to_binary())
    for file in (ours, theirs):
        for field in fields(file):
            field.ClearField("json_name")  # some compilers write the default one out
    assert ours == theirs
