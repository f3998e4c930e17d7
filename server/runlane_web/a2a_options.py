"""The options of `runlane-web` for A2A. Their modules are imported where one is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc

from runlane_web.entry import Door
from runlane_web.listen import ListenType, is_loopback
from runlane_web.serving import Address

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class A2AOptions:
    """The values of the options, as given."""

    a2a: str
    a2a_card: Path | None
    a2a_grpc: tuple[str, int] | None
    a2a_grpc_url: str
    a2a_agent: str
    a2a_metadata: tuple[str, ...]
    a2a_max_hops: int


_OPTIONS = (
    click.option(
        "--a2a",
        metavar="URL",
        envvar="RUNLANE_WEB_A2A",
        show_envvar=True,
        help="Serve A2A; URL is the address of this gateway as callers see it, such as "
        "https://agents.example.com.",
    ),
    click.option(
        "--a2a-card",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Agent card as JSON: name, description, skills and the like.",
    ),
    click.option(
        "--a2a-grpc",
        type=ListenType(),
        metavar="HOST:PORT",
        help="Serve A2A over gRPC too, at this address.",
    ),
    click.option(
        "--a2a-grpc-url",
        metavar="HOST:PORT",
        default="",
        help="That address as callers see it; default: --a2a-grpc.",
    ),
    click.option(
        "--a2a-agent",
        metavar="NAME",
        default="",
        help="Agent of A2A tasks; default: the session's, or the server's.",
    ),
    click.option(
        "--a2a-metadata",
        multiple=True,
        metavar="KEY",
        help="Key of the metadata of messages that becomes a label of the run. Repeatable.",
    ),
    click.option(
        "--a2a-max-hops",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Maximum number of agents that a message may have passed.",
    ),
)


def a2a_options(command: CommandT) -> CommandT:
    """Adds the options to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_a2a(values: dict[str, Any]) -> A2AOptions | None:
    """Takes the values of these options out of others; None if A2A is not served.

    Raises UsageError.
    """
    taken = {each.name: values.pop(each.name) for each in fields(A2AOptions)}
    if taken["a2a"]:
        return A2AOptions(**taken)
    for name in ("a2a_card", "a2a_grpc", "a2a_grpc_url", "a2a_agent", "a2a_metadata"):
        if taken[name]:
            raise click.UsageError(f"--{name.replace('_', '-')}: needs --a2a")
    return None


def make_a2a_door(options: A2AOptions, address: Address, *, plaintext: bool) -> Door:
    """Makes the door. Raises UsageError.

    Args:
        options: The options.
        address: The address of the gateway, whose certificate gRPC takes too.
        plaintext: True if gRPC may listen without TLS where other machines reach it.
    """
    try:
        from runlane_a2a.card import Addresses, make_card, parse_url  # noqa: PLC0415 - of an extra
        from runlane_a2a.door import A2ADoor, GrpcListen  # noqa: PLC0415
        from runlane_a2a.settings import Settings  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "a2a":
            raise
        raise click.UsageError(
            "--a2a: a2a-sdk is not installed; install the extra: pip install 'runlane[a2a]'"
        ) from None

    listen = None
    if options.a2a_grpc is not None:
        listen = GrpcListen(_grpc_address(options, address, plaintext), _credentials(address))
    try:
        url = parse_url(options.a2a)
    except ValueError as error:
        raise click.UsageError(f"--a2a: {options.a2a!r} {error}") from None
    grpc_url = options.a2a_grpc_url or (listen.address if listen else "")
    try:
        card = make_card(Addresses(url, grpc_url), _read_card(options.a2a_card))
    except ValueError as error:
        raise click.UsageError(f"--a2a-card: {options.a2a_card}: {error}") from None
    settings = Settings(
        agent=options.a2a_agent,
        metadata=frozenset(options.a2a_metadata),
        max_hops=options.a2a_max_hops,
    )
    return A2ADoor(card, settings, listen)


def _grpc_address(options: A2AOptions, address: Address, plaintext: bool) -> str:
    assert options.a2a_grpc is not None  # noqa: S101 - checked by the caller
    host, port = options.a2a_grpc
    if port == 0 and not options.a2a_grpc_url:
        raise click.UsageError("--a2a-grpc: the card names the port, which must not be 0")
    if address.tls_cert is None and not plaintext and not is_loopback(host):
        raise click.UsageError(
            f"--a2a-grpc: tokens would travel unencrypted to {host}; set --tls-cert and "
            "--tls-key, or --plaintext behind a proxy that ends TLS"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _credentials(address: Address) -> grpc.ServerCredentials | None:
    if address.tls_cert is None or address.tls_key is None:
        return None
    try:
        key, certificate = Path(address.tls_key).read_bytes(), Path(address.tls_cert).read_bytes()
    except OSError as error:
        raise click.UsageError(f"--tls-cert: {error.filename}: {error.strerror}") from None
    return grpc.ssl_server_credentials([(key, certificate)])


def _read_card(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text()
    except OSError as error:
        raise click.UsageError(f"--a2a-card: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"--a2a-card: {path}: is not UTF-8") from None
