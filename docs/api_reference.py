#!/usr/bin/env python3
"""Writes api.md: the reference of the interface, from the comments in the proto files.

python docs/api_reference.py            writes it
python docs/api_reference.py --check    only tells whether it is fresh: exit code 1 if not
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from generated import main
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

from runlane_server.access.permissions import NEEDS

PAGE = Path(__file__).with_name("api.md")
PROTO = Path(__file__).parents[1] / "proto"
PACKAGE = "runlane.v1"
HARNESS = "runlane.harness.v1"

# Numbers of fields in descriptor.proto, of which the paths of comments consist.
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELD, _NESTED, _NESTED_ENUM, _VALUE, _METHOD = 2, 3, 4, 2, 2

_SCALARS = {
    number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()
}

HEAD = """# API reference

<!-- Written by docs/api_reference.py from the proto files; `make docs` writes it anew. -->

The package is `runlane.v1`, in [`proto/runlane/v1`](../proto/runlane/v1). Server reflection and
`grpc.health.v1.Health` are served beside it.

## What is promised

- Within `v1` nothing is removed or renamed, no number is used again, no type changes, and what was
  accepted stays accepted; `buf breaking` compares with the last release before anything lands. A
  change that needs more is `runlane.v2`, and both are served for at least a year.
- New fields, values, events and rpcs come without notice: clients ignore what they do not know. A
  new value of an enum, or a new kind of event in a `oneof`, reads as unknown to a client that is
  older.
- An error has a `google.rpc.ErrorInfo` with domain `runlane` and a reason of `ErrorReason`, on
  whose meaning clients may rely; messages are for people and may change.
- Cursors, page tokens and ids are opaque. A cursor is good for as long as its events are kept, at
  any node of its store.
- For [`runlane.harness.v1`](#harnessservice), which is for tests, the same holds.
"""


class Comments:
    """The leading comments of a file, by the path of what they stand before."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._found: Mapping[tuple[int, ...], str] = {
            tuple(location.path): location.leading_comments
            for location in file.source_code_info.location
        }

    def of(self, path: Sequence[int]) -> str:
        """A comment as one paragraph."""
        return " ".join(self._found.get(tuple(path), "").split())


def described() -> FileDescriptorSet:
    """The proto files, with their comments."""
    buf = Path(sys.executable).with_name("buf")
    built = subprocess.run(  # noqa: S603 - the one of this environment
        [str(buf), "build", "--as-file-descriptor-set", "--output", "-"],
        cwd=PROTO,
        stdout=subprocess.PIPE,
        check=True,
    )
    return FileDescriptorSet.FromString(built.stdout)


def page(files: FileDescriptorSet) -> str:
    """The whole page."""
    parts = [HEAD, *_package(files, PACKAGE, "## Messages and enums")]
    parts += _package(files, HARNESS, "## Messages and enums of the harness")
    return "\n".join(parts)


def _package(files: FileDescriptorSet, package: str, title: str) -> list[str]:
    ours = sorted(
        (file for file in files.file if file.package == package), key=lambda file: file.name
    )
    services = [part for file in ours for part in _services(file)]
    types = [part for file in ours for part in _types(file)]
    return [*services, title, "", *sorted_by_title(types)]


def sorted_by_title(parts: Iterable[str]) -> list[str]:
    """Types by their names, as they are looked up."""
    return sorted(parts, key=lambda part: part.partition("\n")[0].lower())


def _services(file: FileDescriptorProto) -> Iterator[str]:
    comments = Comments(file)
    for n, service in enumerate(file.service):
        lines = [f"## {service.name}", "", comments.of((_SERVICES, n)), ""]
        for m, method in enumerate(service.method):
            lines += _method(
                f"{file.package}.{service.name}", method, comments.of((_SERVICES, n, _METHOD, m))
            )
        yield "\n".join(lines)


def _method(service: str, method: MethodDescriptorProto, comment: str) -> list[str]:
    stream = "stream of " if method.server_streaming else ""
    role = NEEDS[f"/{service}/{method.name}"].value
    return [
        f"### {method.name}",
        "",
        f"{_link(method.input_type)} → {stream}{_link(method.output_type)}; least role: `{role}`",
        "",
        comment,
        "",
    ]


def _types(file: FileDescriptorProto) -> Iterator[str]:
    comments = Comments(file)
    for n, enum in enumerate(file.enum_type):
        yield _enum(enum.name, enum, comments, (_ENUMS, n))
    for n, message in enumerate(file.message_type):
        yield from _message(message.name, message, comments, (_MESSAGES, n))


def _message(
    name: str, message: DescriptorProto, comments: Comments, path: tuple[int, ...]
) -> Iterator[str]:
    if message.options.map_entry:
        return
    lines = [f"### {name}", "", comments.of(path), ""]
    if message.field:
        lines += ["| field | type | |", "|---|---|---|"]
    for n, field in enumerate(message.field):
        comment = comments.of((*path, _FIELD, n))
        lines.append(f"| `{field.name}` = {field.number} | {_type(field, message)} | {comment} |")
    yield "\n".join([*lines, ""])
    for n, enum in enumerate(message.enum_type):
        yield _enum(f"{name}.{enum.name}", enum, comments, (*path, _NESTED_ENUM, n))
    for n, nested in enumerate(message.nested_type):
        yield from _message(f"{name}.{nested.name}", nested, comments, (*path, _NESTED, n))


def _enum(name: str, enum: EnumDescriptorProto, comments: Comments, path: tuple[int, ...]) -> str:
    rows = [
        f"| `{value.name}` = {value.number} | {comments.of((*path, _VALUE, n))} |"
        for n, value in enumerate(enum.value)
    ]
    return "\n".join(
        [f"### {name}", "", comments.of(path), "", "| value | |", "|---|---|", *rows, ""]
    )


def _type(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    entries = {entry.name: entry for entry in message.nested_type if entry.options.map_entry}
    entry = entries.get(field.type_name.rpartition(".")[2])
    if entry is not None:
        return f"map of {_single(entry.field[0])} to {_single(entry.field[1])}"
    single = _single(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"list of {single}"
    if field.proto3_optional:
        return f"{single}, optional"
    if field.HasField("oneof_index"):
        return f"{single}, one of `{message.oneof_decl[field.oneof_index].name}`"
    return single


def _single(field: FieldDescriptorProto) -> str:
    return _link(field.type_name) if field.type_name else f"`{_SCALARS[field.type]}`"


def _link(full_name: str) -> str:
    name = full_name.lstrip(".")
    ours = name.removeprefix(f"{PACKAGE}.").removeprefix(f"{HARNESS}.")
    if ours == name:
        return f"`{name}`"
    anchor = ours.lower().replace(".", "")
    return f"[{ours}](#{anchor})"


if __name__ == "__main__":
    main(PAGE, lambda _: page(described()).rstrip() + "\n", "The reference")
