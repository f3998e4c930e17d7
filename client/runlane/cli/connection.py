"""How the command reaches a server, and what it shows there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc

from runlane.client import DEFAULT_TARGET, Client
from runlane.wire import RetryPolicy

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the options before the subcommand say."""

    server: str
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: str | None = None
    token_file: Path | None = None
    plaintext_token: bool = False

    def client(self, retry: RetryPolicy) -> Client:
        """A client. Raises UsageError if the options do not go together."""
        try:
            return Client(
                self.server,
                credentials=self._credentials(),
                token=self._token(),
                plaintext_token=self.plaintext_token,
                retry=retry,
            )
        except ValueError as error:
            text = str(error).replace("plaintext_token=True", "--plaintext-token")
            raise click.UsageError(text.replace("credentials for TLS", "--tls")) from None

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not (self.tls or self.tls_ca or self.tls_cert or self.tls_key):
            return None
        if (self.tls_cert is None) != (self.tls_key is None):
            raise click.UsageError("--tls-cert and --tls-key belong together")
        read = [None if path is None else _read(path) for path in self._files()]
        return grpc.ssl_channel_credentials(*read)

    def _files(self) -> tuple[Path | None, ...]:
        return self.tls_ca, self.tls_key, self.tls_cert

    def _token(self) -> str | Callable[[], str] | None:
        if self.token_file is None:
            return self.token
        read = partial(_read_token, self.token_file)
        read()  # so that a wrong name is told at once
        return read


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise click.FileError(str(path), error.strerror) from None


def _read_token(path: Path) -> str:
    token = _read(path).decode(errors="replace").strip()
    if not token:
        raise click.UsageError(f"{path} holds no token")
    return token


_OPTIONS = (
    click.option(
        "-S",
        "--server",
        metavar="HOST:PORT",
        envvar="RUNLANE_SERVER",
        show_envvar=True,
        default=DEFAULT_TARGET,
        show_default=True,
        help="Where the server is.",
    ),
    click.option(
        "--tls", is_flag=True, envvar="RUNLANE_TLS", show_envvar=True, help="Connect by TLS."
    ),
    click.option(
        "--tls-ca",
        type=_FILE,
        metavar="FILE",
        envvar="RUNLANE_TLS_CA",
        show_envvar=True,
        help="Who vouches for the server, as PEM; implies --tls. Else those that gRPC trusts.",
    ),
    click.option("--tls-cert", type=_FILE, metavar="FILE", help="A certificate of yours, as PEM."),
    click.option("--tls-key", type=_FILE, metavar="FILE", help="Its private key."),
    click.option(
        "--token",
        metavar="TOKEN",
        envvar="RUNLANE_TOKEN",
        show_envvar=True,
        help="Says who you are. Others on this machine see the options of a command: rather use "
        "the variable, or a file.",
    ),
    click.option(
        "--token-file",
        type=_FILE,
        metavar="FILE",
        envvar="RUNLANE_TOKEN_FILE",
        show_envvar=True,
        help="The file of the token; it goes before --token.",
    ),
    click.option(
        "--plaintext-token",
        is_flag=True,
        help="Send the token without TLS to another machine, too.",
    ),
)


def options(command: CommandT) -> CommandT:
    """Gives a command all of these; its keyword arguments are those of `Settings`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
