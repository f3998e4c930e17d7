"""The agent card: what callers learn about the agent, and where they reach it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from email.utils import formatdate
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format
from starlette.requests import Request
from starlette.responses import Response

from runlane.client import Client
from runlane_a2a.parts import DEFAULT_MODES

WELL_KNOWN = "/.well-known/agent-card.json"

PREFIX = "/a2a"
"""The path below which everything else is served: JSON-RPC, and the paths of REST."""

JSON_RPC = f"{PREFIX}/jsonrpc"

VERSION = "1.0"
"""The version of A2A."""

MAX_AGE = 300
"""Seconds for which a card may be kept without asking again."""

_OURS = ("supportedInterfaces", "capabilities", "securitySchemes", "securityRequirements")
"""Members that the facade sets itself."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """The addresses of the facade, as callers see them.

    Attributes:
        url: The address of the gateway, such as `https://agents.example.com`.
        grpc: Host and port of the gRPC transport; empty: it is not served.
    """

    url: str
    grpc: str = ""


def parse_url(text: str) -> str:
    """Checks the address of a gateway. Raises ValueError."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be an address such as https://agents.example.com")
    return text.rstrip("/")


def make_card(addresses: Addresses, described: str = "") -> pb.AgentCard:
    """Makes the card.

    Args:
        addresses: The addresses of the facade.
        described: A card as JSON with name, description, skills and the like; empty: the default.

    Raises:
        ValueError: It is no card, or has members that the facade sets itself.
    """
    card = _default()
    if described:
        card = pb.AgentCard(version=version("runlane"))
        fields = _object(described)
        if taken := [name for name in _OURS if name in fields]:
            raise ValueError(f"{taken[0]} is set by the gateway; remove it")
        try:
            json_format.ParseDict(fields, card)
        except json_format.ParseError as error:
            raise ValueError(str(error)) from None
    if not card.default_input_modes:
        card.default_input_modes.extend(DEFAULT_MODES)
    if not card.default_output_modes:
        card.default_output_modes.extend(DEFAULT_MODES)
    if missing := [name for name in ("name", "description", "skills") if not getattr(card, name)]:
        raise ValueError(f"{missing[0]} is missing")
    _add_interfaces(card, addresses)
    card.capabilities.streaming = True
    card.capabilities.push_notifications = True
    card.capabilities.extended_agent_card = True
    card.security_schemes["bearer"].http_auth_security_scheme.scheme = "Bearer"
    card.security_requirements.add().schemes["bearer"].SetInParent()
    return card


class CardDocument:
    """The public card, with the headers that let callers keep it.

    Args:
        card: The card.
        changed: When it was made, in seconds since 1970.
    """

    def __init__(self, card: pb.AgentCard, changed: float) -> None:
        self._body = json_format.MessageToJson(card, indent=None).encode()
        self._headers = {
            "ETag": f'"{hashlib.sha256(self._body).hexdigest()[:32]}"',
            "Cache-Control": f"public, max-age={MAX_AGE}",
            "Last-Modified": formatdate(changed, usegmt=True),
        }

    def answer(self, request: Request) -> Response:
        """The answer to a request for the card."""
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if {"*", self._headers["ETag"], f"W/{self._headers['ETag']}"} & set(known):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers, media_type="application/json")


async def extended_card(card: pb.AgentCard, client: Client) -> pb.AgentCard:
    """The card for a caller that the server knows: its agents are skills too."""
    made = pb.AgentCard()
    made.CopyFrom(card)
    known = {skill.id for skill in card.skills}
    for agent in await client.list_agents():
        if agent.name not in known:
            made.skills.append(
                pb.AgentSkill(
                    id=agent.name,
                    name=agent.name,
                    description=f"The agent {agent.name} ({agent.kind}) of this server.",
                    tags=["agent", agent.kind],
                )
            )
    return made


def _default() -> pb.AgentCard:
    return pb.AgentCard(
        name="Runlane",
        description="An agent behind a Runlane server.",
        version=version("runlane"),
        skills=[
            pb.AgentSkill(
                id="chat",
                name="Chat",
                description="Answers messages; one context is one conversation.",
                tags=["chat"],
            )
        ],
    )


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON (line {error.lineno}: {error.msg})") from None
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004 - it is about a file
    return value


def _add_interfaces(card: pb.AgentCard, addresses: Addresses) -> None:
    bindings = [
        (f"{addresses.url}{JSON_RPC}", "JSONRPC"),
        (f"{addresses.url}{PREFIX}", "HTTP+JSON"),
    ]
    if addresses.grpc:
        bindings.append((addresses.grpc, "GRPC"))
    for url, binding in bindings:
        card.supported_interfaces.add(url=url, protocol_binding=binding, protocol_version=VERSION)
