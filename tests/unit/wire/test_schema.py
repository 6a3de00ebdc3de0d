"""The generated modules are those of trunk.proto, and run under the protobuf versions we accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from fedsea.wire import trunk_pb2

SOURCE = Path(__file__).parents[3] / "src"
SCHEMA = SOURCE / "fedsea" / "wire" / "trunk.proto"


def test_generated_for_protobuf_6():
    """The generated code asks for protobuf 6.31, so it runs on 6.31 and later, below 7."""
    text = SCHEMA.with_name("trunk_pb2.py").read_text(encoding="utf-8")
    assert "Protobuf Python Version: 6.31." in text


def test_fields_are_those_of_the_schema():
    """Names and numbers of all fields and enum values, read from the text, without a compiler."""
    text = re.sub(r"//.*", "", SCHEMA.read_text(encoding="utf-8"))
    written = {(name, int(number)) for name, number in re.findall(r"\b(\w+) = (\d+);", text)}
    described = FileDescriptorProto.FromString(trunk_pb2.DESCRIPTOR.serialized_pb)
    generated = {(f.name, f.number) for message in described.message_type for f in message.field}
    generated |= {(v.name, v.number) for enum in described.enum_type for v in enum.value}
    assert generated == written


def test_regenerating_gives_the_committed_modules(tmp_path):
    """The compiler makes the same descriptor, and with the same compiler the same files."""
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    arguments = [
        "protoc",
        f"-I{SOURCE}",
        f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}",
        f"--descriptor_set_out={tmp_path / 'set.bin'}",
        str(SCHEMA),
    ]
    assert protoc.main(arguments) == 0
    (made,) = FileDescriptorSet.FromString((tmp_path / "set.bin").read_bytes()).file
    committed = FileDescriptorProto.FromString(trunk_pb2.DESCRIPTOR.serialized_pb)
    for descriptor in (made, committed):
        for message in (*descriptor.message_type,):
            for each in message.field:
                each.ClearField("json_name")
    assert made == committed
    for name in ("trunk_pb2.py", "trunk_pb2.pyi"):
        old = SCHEMA.with_name(name).read_text(encoding="utf-8")
        new = (tmp_path / "fedsea" / "wire" / name).read_text(encoding="utf-8")
        if _version(old) == _version(new):
            assert old == new


def _version(generated: str) -> str | None:
    found = re.search(r"Protobuf Python Version: (\S+)", generated)
    return found and found.group(1)


def test_names_of_the_service():
    """Generated stubs of any language call what the transport serves."""
    service = trunk_pb2.DESCRIPTOR.services_by_name["Trunk"]
    assert service.full_name == "fedsea.v1.Trunk"
    assert [method.name for method in service.methods] == ["Describe", "Session", "Attest"]
