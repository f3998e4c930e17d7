#!/usr/bin/env python3
"""Generates the OpenAPI document and the gRPC API configuration from the routes and the protos.

python docs/http_reference.py            write both
python docs/http_reference.py --check    exit with code 1 if one is stale; write nothing
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from api_reference import Comments, load_descriptors
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorSet

from runlane_web.decode import KEYS
from runlane_web.routes import ROUTES, Route

ROOT = Path(__file__).parents[1]
OPENAPI = ROOT / "server" / "runlane_web" / "openapi.json"
CONFIGURATION = ROOT / "proto" / "runlane" / "http.yaml"

_MESSAGES, _ENUMS, _SERVICES, _FIELD, _NESTED, _VALUE = 4, 5, 6, 2, 3, 2

_WELL_KNOWN = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {
        "type": "string",
        "pattern": r"^-?\d+(\.\d{1,9})?s$",
        "example": "1.5s",
    },
}

_SCALARS: dict[int, dict[str, Any]] = {
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: {"type": "string", "format": "byte"},
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_INT32: {"type": "integer", "format": "int32"},
    # JSON numbers lose digits beyond 2^53, so protobuf writes these as strings.
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number", "format": "double"},
}


class Descriptions:
    """The comments of the protos, by the full name of what they describe."""

    def __init__(self, files: FileDescriptorSet) -> None:
        self._texts: dict[str, str] = {}
        for file in files.file:
            comments = Comments(file)
            for n, message in enumerate(file.message_type):
                self._add(comments, file.package, message, (_MESSAGES, n))
            for n, enum in enumerate(file.enum_type):
                self._texts[f"{file.package}.{enum.name}"] = comments.of((_ENUMS, n))
            for n, service in enumerate(file.service):
                for m, method in enumerate(service.method):
                    name = f"{file.package}.{service.name}.{method.name}"
                    self._texts[name] = comments.of((_SERVICES, n, _FIELD, m))

    def _add(
        self, comments: Comments, parent: str, message: DescriptorProto, path: Sequence[int]
    ) -> None:
        name = f"{parent}.{message.name}"
        self._texts[name] = comments.of(path)
        for n, field in enumerate(message.field):
            self._texts[f"{name}.{field.name}"] = comments.of((*path, _FIELD, n))
        for n, nested in enumerate(message.nested_type):
            self._add(comments, name, nested, (*path, _NESTED, n))

    def of(self, name: str) -> str:
        """The comment of a message, field, enum or rpc."""
        return self._texts.get(name, "")


class Document:
    """The OpenAPI document, with the schemas that its routes need."""

    def __init__(self, descriptions: Descriptions) -> None:
        self._descriptions = descriptions
        self._schemas: dict[str, Any] = {}

    def render(self) -> str:
        """The document as JSON."""
        paths: dict[str, dict[str, Any]] = {}
        for route in ROUTES:
            paths.setdefault(route.path, {})[route.verb.lower()] = self._operation(route)
        document = {
            "openapi": "3.1.0",
            "info": {
                "title": "Runlane",
                "version": "v1",
                "description": "The services of a Runlane server over HTTP. JSON as protobuf maps "
                "it; errors are google.rpc.Status.",
            },
            "security": [{"bearer": []}],
            "paths": dict(sorted(paths.items())),
            "components": {
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
                "schemas": dict(sorted((self._schemas | {"Status": _STATUS}).items())),
            },
        }
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    def _operation(self, route: Route) -> dict[str, Any]:
        binding = "" if _is_canonical(route) else "_" + str(ROUTES.index(route))
        operation: dict[str, Any] = {
            "operationId": f"{route.rpc.containing_service.name}_{route.rpc.name}{binding}",
            "tags": [route.rpc.containing_service.name],
            "description": self._descriptions.of(route.rpc.full_name),
            "parameters": list(self._parameters(route)),
            "responses": {"200": self._success(route), "default": _ERROR},
        }
        if route.body:
            schema = self._reference(route.rpc.input_type)
            operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
        return operation

    def _parameters(self, route: Route) -> Iterator[dict[str, Any]]:
        for field in route.rpc.input_type.fields:
            in_path = field.name in route.variables
            if route.body and not in_path:
                continue
            yield {
                "name": field.name if in_path else field.json_name,
                "in": "path" if in_path else "query",
                "required": in_path,
                "description": self._descriptions.of(field.full_name),
                "schema": self._schema(field),
            }
        if (key := KEYS.get(route.rpc.name)) is not None:
            said = f"The {key.replace('_', ' ')}, for a caller that repeats a request."
            yield _header("Idempotency-Key", said)
        if route.streams:
            yield _header("Last-Event-ID", "The stream resumes after the event with this id.")

    def _success(self, route: Route) -> dict[str, Any]:
        schema = self._reference(route.rpc.output_type)
        if not route.streams:
            return {"description": "OK", "content": {"application/json": {"schema": schema}}}
        return {
            "description": f"Server-sent events; the data of each is a {route.rpc.output_type.name}"
            " in JSON, and its id is a position to resume from.",
            "content": {"text/event-stream": {"schema": schema}},
        }

    def _schema(self, field: FieldDescriptor) -> dict[str, Any]:
        message = field.message_type
        if message is not None and message.GetOptions().map_entry:
            value = self._schema(message.fields_by_name["value"])
            return {"type": "object", "additionalProperties": value}
        one = self._single(field)
        return {"type": "array", "items": one} if field.is_repeated else one

    def _single(self, field: FieldDescriptor) -> dict[str, Any]:
        if field.message_type is not None:
            return self._reference(field.message_type)
        if field.enum_type is not None:
            return self._enum(field.enum_type)
        return dict(_SCALARS[field.type])

    def _reference(self, message: Descriptor) -> dict[str, Any]:
        if message.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message.full_name])
        name = message.full_name.removeprefix("runlane.v1.")
        if name not in self._schemas:
            self._schemas[name] = {}  # messages may contain themselves
            self._schemas[name] = self._object(message)
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, message: Descriptor) -> dict[str, Any]:
        properties = {
            field.json_name: self._schema(field)
            | {"description": self._descriptions.of(field.full_name)}
            for field in message.fields
        }
        return {
            "type": "object",
            "description": self._descriptions.of(message.full_name),
            "properties": properties,
        }

    def _enum(self, enum: EnumDescriptor) -> dict[str, Any]:
        name = enum.full_name.removeprefix("runlane.v1.")
        self._schemas[name] = {
            "type": "string",
            "description": self._descriptions.of(enum.full_name),
            "enum": [value.name for value in enum.values],
        }
        return {"$ref": f"#/components/schemas/{name}"}


_STATUS = {
    "type": "object",
    "description": "google.rpc.Status: the error of a call.",
    "properties": {
        "code": {"type": "integer", "description": "The gRPC code."},
        "message": {"type": "string", "description": "For people; may change."},
        "details": {
            "type": "array",
            "description": "google.rpc.ErrorInfo with a stable reason, and others.",
            "items": {"type": "object", "properties": {"@type": {"type": "string"}}},
        },
    },
}

_ERROR = {
    "description": "An error.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Status"}}},
}


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}


def _is_canonical(route: Route) -> bool:
    return next(each for each in ROUTES if each.rpc is route.rpc) is route


def configuration() -> str:
    """The rules as a gRPC API configuration, which other gateways read."""
    lines = [
        "# The HTTP rules of the services (google.api.Service), for gateways that read them.",
        "# Generated by docs/http_reference.py from the routes; run `make docs` to update.",
        "type: google.api.Service",
        "config_version: 3",
        "http:",
        "  rules:",
    ]
    for route in filter(_is_canonical, ROUTES):
        lines.append(f"    - selector: {route.rpc.full_name}")
        lines += _rule(route, "      ")
        others = [each for each in ROUTES if each.rpc is route.rpc and each is not route]
        if others:
            lines.append("      additional_bindings:")
        for other in others:
            first, *rest = _rule(other, "          ")
            lines += ["        - " + first.strip(), *rest]
    return "\n".join(lines) + "\n"


def _rule(route: Route, indent: str) -> list[str]:
    rule = [f'{indent}{route.verb.lower()}: "{route.path}"']
    return [*rule, f'{indent}body: "*"'] if route.body else rule


def main() -> None:
    """Runs the command."""
    fresh = {
        OPENAPI: Document(Descriptions(load_descriptors())).render(),
        CONFIGURATION: configuration(),
    }
    for path, text in fresh.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} is stale: run docs/http_reference.py")


if __name__ == "__main__":
    main()
