"""Answers of the gateway itself: its documents, its health, and tokens for browsers."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from google.protobuf.duration_pb2 import Duration
from starlette.responses import JSONResponse, Response

from runlane_web.decode import parse_object
from runlane_web.errors import invalid, shown
from runlane_web.grants import MAX_SECONDS, PURPOSES, Grants

TOKENS, TICKETS = "/v1/tokens", "/v1/tickets"

DOCUMENT = "/openapi.json"


@cache
def openapi() -> bytes:
    """The OpenAPI document."""
    return files("runlane_web").joinpath("openapi.json").read_bytes()


def document() -> Response:
    """Answers a request for the OpenAPI document."""
    return Response(openapi(), media_type="application/json")


def make(path: str, token: str, body: bytes, grants: Grants) -> Response:
    """Makes a token or a ticket for the holder of a token. Raises Refused."""
    fields = parse_object(body)
    if path == TICKETS:
        return _ticket(token, fields, grants)
    return _token(token, fields, grants)


def _ticket(token: str, fields: dict[str, Any], grants: Grants) -> Response:
    _only(fields, {"path"})
    path = _text(fields, "path")
    if not path.startswith("/v1/"):
        raise invalid("path", "must be the path of a stream, such as /v1/runs/RUN/events")
    return JSONResponse({"ticket": grants.make_ticket(token, path)})


def _token(token: str, fields: dict[str, Any], grants: Grants) -> Response:
    _only(fields, {"sessionId", "purpose", "ttl"})
    session_id, purpose = _text(fields, "sessionId"), _text(fields, "purpose")
    if purpose not in PURPOSES:
        raise invalid("purpose", f"must be one of {', '.join(PURPOSES)}")
    seconds = _seconds(fields)
    made = grants.make(token, purpose, session_id, seconds)
    return JSONResponse({"token": made, "ttl": f"{seconds:g}s"})


def _only(fields: dict[str, Any], known: set[str]) -> None:
    for name in fields:
        if name not in known:
            raise invalid(shown(name), "does not exist")


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value or len(value) > 1024:
        raise invalid(name, "must be a text of 1 to 1024 characters")
    return value


def _seconds(fields: dict[str, Any]) -> float:
    text = fields.get("ttl", "600s")
    duration = Duration()
    try:
        duration.FromJsonString(text)
    except (ValueError, TypeError, AttributeError):
        raise invalid("ttl", "must be a duration such as 600s") from None
    seconds = duration.ToTimedelta().total_seconds()
    if not 1 <= seconds <= MAX_SECONDS:
        raise invalid("ttl", f"must be from 1s to {MAX_SECONDS}s")
    return seconds
