"""The options of `runlane-web`."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
import grpc

from runlane.client import DEFAULT_TARGET
from runlane.metadata import MetadataSource
from runlane.targets import is_local
from runlane.wire import Wire
from runlane_web.a2a_options import a2a_options, make_a2a_door, take_a2a
from runlane_web.ag_ui_door import AgUiDoor
from runlane_web.entry import Door
from runlane_web.gateway import Gateway, Limits
from runlane_web.guard import Policy, host_names
from runlane_web.listen import ListenType, is_loopback
from runlane_web.serving import Address, new_token, serve
from runlane_web.upstream import RETRY

_FILE = click.Path(path_type=Path, dir_okay=False)
_ORIGIN = re.compile(r"https?://[^/\s?#]+")


@dataclass(frozen=True, slots=True)
class Options:
    """The values of the options, as given."""

    server: str
    listen: tuple[str, int]
    tls: bool
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    plaintext_token: bool
    own_token: bool
    own_token_file: Path | None
    allowed_host: tuple[str, ...]
    allowed_origin: tuple[str, ...]
    max_streams: int
    plaintext: bool
    until_eof: bool
    show_token: bool
    token_on_stdin: bool
    listen_fd: tuple[int, ...]

    def gateway(self, token: str, doors: Sequence[Door] = ()) -> Gateway:
        """Makes the gateway. Raises UsageError if options conflict."""
        secure = self.tls or self.tls_ca is not None
        if not secure and not self.plaintext_token and not is_local(self.server):
            raise click.UsageError(
                f"--server: tokens would be sent unencrypted to {self.server}; "
                "set --tls or --plaintext-token"
            )
        wire = Wire(
            self.server,
            credentials=self._credentials() if secure else None,
            metadata=MetadataSource({}),
            options=(),
            timeout=60.0,
            retry=RETRY,
        )
        for origin in self.allowed_origin:
            if _ORIGIN.fullmatch(origin) is None:
                raise click.UsageError(
                    f"--allowed-origin: {origin!r} is not an origin such as https://app.example.com"
                )
        policy = Policy(self._hosts(), frozenset(self.allowed_origin), token)
        return Gateway(wire, policy, Limits(streams=self.max_streams), doors)

    def address(self) -> Address:
        """The address to listen on. Raises UsageError if others could read the tokens."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise click.UsageError("--tls-cert and --tls-key must be used together")
        host, port = self.listen
        if self.tls_cert is None and not self.plaintext and not is_loopback(host):
            raise click.UsageError(
                f"--listen: tokens would travel unencrypted to {host}; set --tls-cert and "
                "--tls-key, or --plaintext behind a proxy that ends TLS"
            )
        return Address(host, port, _text(self.tls_cert), _text(self.tls_key))

    def token(self) -> tuple[str, bool]:
        """The gateway's own token, empty if callers send theirs; and whether to print it.

        Raises UsageError.
        """
        if self.own_token_file is not None:
            return _strong("--own-token-file", _read_secret(self.own_token_file)), False
        if not self.own_token:
            return "", False
        if self.token_on_stdin:
            return _strong("stdin", _line_of_stdin()), self.show_token
        given = os.environ.get("RUNLANE_WEB_TOKEN", "").strip()
        if given:
            return _strong("RUNLANE_WEB_TOKEN", given), False
        return new_token(), True

    def _credentials(self) -> grpc.ChannelCredentials:
        try:
            ca = self.tls_ca.read_bytes() if self.tls_ca else None
        except OSError as error:
            raise click.UsageError(f"--tls-ca: {self.tls_ca}: {error.strerror}") from None
        return grpc.ssl_channel_credentials(ca)

    def _hosts(self) -> frozenset[str]:
        host = self.listen[0]
        if _is_wildcard(host) and not self.allowed_host:
            raise click.UsageError(
                f"--allowed-host: name the hosts under which {host} is reached, "
                "such as runlane.example.com"
            )
        return host_names(host, self.allowed_host)


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _read_secret(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        text = path.read_text().strip()
    except OSError as error:
        raise click.UsageError(f"--own-token-file: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise click.UsageError(f"--own-token-file: {path}: is not UTF-8") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise click.UsageError(f"--own-token-file: {path}: others may read it; chmod 600 it")
    return text


def _strong(source: str, token: str) -> str:
    if len(token) < 20 or not token.isascii() or not token.isprintable() or " " in token:
        raise click.UsageError(f"{source}: must be 20 or more printable characters without spaces")
    return token


def _line_of_stdin() -> str:
    """The first line of stdin; what follows stays there."""
    line = b""
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace")


def _end_with_stdin() -> None:
    """Ends this process when the one that started it is gone."""
    with suppress(OSError):
        while os.read(0, 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-S",
    "--server",
    metavar="HOST:PORT",
    envvar="RUNLANE_SERVER",
    show_envvar=True,
    default=DEFAULT_TARGET,
    show_default=True,
    help="Address of the Runlane server; unix:PATH for a socket.",
)
@click.option(
    "--listen",
    type=ListenType(),
    metavar="HOST:PORT",
    envvar="RUNLANE_WEB_LISTEN",
    show_envvar=True,
    default="127.0.0.1:8080",
    show_default=True,
    help="Address to listen on. Port 0 takes a free one and prints it.",
)
@click.option("--tls", is_flag=True, help="Connect to the server with TLS.")
@click.option("--tls-ca", type=_FILE, metavar="FILE", help="CA of the server; implies --tls.")
@click.option("--tls-cert", type=_FILE, metavar="FILE", help="PEM file of the own certificate.")
@click.option("--tls-key", type=_FILE, metavar="FILE", help="PEM file of its private key.")
@click.option(
    "--plaintext-token",
    is_flag=True,
    help="Allow sending tokens to a server on another machine without TLS.",
)
@click.option(
    "--plaintext",
    is_flag=True,
    help="Allow listening without TLS on an address that other machines reach, behind a proxy.",
)
@click.option(
    "--own-token",
    is_flag=True,
    help="For a server without access control: callers must send a token of the gateway's own, "
    "from RUNLANE_WEB_TOKEN, or a new one that is printed.",
)
@click.option(
    "--own-token-file",
    type=_FILE,
    metavar="FILE",
    help="The same, with the token in a file that only its owner may read.",
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="A name under which the gateway is reached, besides the one it listens on. Repeatable.",
)
@click.option(
    "--allowed-origin",
    multiple=True,
    metavar="ORIGIN",
    help="An origin of web pages that may call, such as https://app.example.com. Repeatable.",
)
@click.option(
    "--max-streams",
    type=click.IntRange(min=1),
    default=Limits().streams,
    show_default=True,
    help="Maximum number of open streams and waiting calls.",
)
@click.option("--show-token", is_flag=True, hidden=True, help="Print the token of stdin.")
@click.option("--token-on-stdin", is_flag=True, hidden=True, help="Take the token from stdin.")
@click.option(
    "--listen-fd", type=int, multiple=True, hidden=True, help="Sockets that listen there."
)
@click.option("--until-eof", is_flag=True, hidden=True, help="End when stdin is closed.")
@a2a_options
def web(**values: object) -> None:
    """Serves a Runlane server over HTTP: JSON, and server-sent events."""
    a2a = take_a2a(values)
    options = Options(**values)  # type: ignore[arg-type]
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    token, is_shown = options.token()
    address = options.address()
    doors: list[Door] = [AgUiDoor()]
    if a2a is not None:
        doors.append(make_a2a_door(a2a, address, plaintext=options.plaintext))
    gateway = options.gateway(token, doors)

    def ready(bound: Address) -> None:
        click.echo(f"runlane-web listening on {bound.url}")
        if is_shown:
            # What stands behind the `#` is never sent.
            click.echo(f"console: {bound.url}/#token={token}")
        sys.stdout.flush()

    if options.until_eof:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        serve(gateway, address, ready, options.listen_fd)
    except OSError as error:
        raise click.ClickException(f"--listen: {address.url}: {error.strerror}") from None
