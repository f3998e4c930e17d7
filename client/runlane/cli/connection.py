"""The global options: server address, TLS and token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import grpc
from click.core import ParameterSource

from runlane.cli.terminal import echo
from runlane.client import DEFAULT_TARGET, Client
from runlane.metadata import MetadataSource
from runlane.wire import RetryPolicy, Wire
from runlane.worker import Worker


class ServerType(click.ParamType[str]):
    """The address of a server: HOST:PORT, or another name that gRPC resolves."""

    name = "address"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the address."""
        if re.match(r"(unix|unix-abstract|dns|ipv4|ipv6|xds):", value):
            return value
        if "://" in value:
            self.fail(f"{value!r} is a URL; write HOST:PORT", param, ctx)
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})", value)
        if match is None or not 0 < int(match[2]) < 65536:
            self.fail(f"{value!r} is not HOST:PORT, such as {DEFAULT_TARGET}", param, ctx)
        return value


MadeT = TypeVar("MadeT")
CommandT = TypeVar("CommandT", bound=Callable[..., Any])

_FILE = click.Path(path_type=Path, dir_okay=False)


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of the global options."""

    server: str
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token: str | Callable[[], str] | None = None
    token_file: Path | None = None
    plaintext_token: bool = False

    @property
    def has_token(self) -> bool:
        """Whether calls carry a token."""
        return self.token is not None or self.token_file is not None

    def client(self, retry: RetryPolicy) -> Client:
        """Creates a client. Raises UsageError if options conflict."""
        return self._made(lambda access: Client(self.server, retry=retry, **access))

    def wire(self, retry: RetryPolicy) -> Wire:
        """Creates a channel without a token. Raises UsageError if options conflict."""
        return Wire(
            self.server,
            credentials=self._credentials(),
            metadata=MetadataSource({}),
            options=(),
            timeout=60.0,
            retry=retry,
        )

    def worker(self, agents: Mapping[str, Any], **options: Any) -> Worker:
        """Creates a worker. Raises UsageError if options conflict."""
        return self._made(lambda access: Worker(self.server, agents, **options, **access))

    def _made(self, make: Callable[[dict[str, Any]], MadeT]) -> MadeT:
        try:
            return make(
                {
                    "credentials": self._credentials(),
                    "token": self._token(),
                    "plaintext_token": self.plaintext_token,
                }
            )
        except ValueError as error:
            text = str(error).replace("plaintext_token=True", "--plaintext-token")
            raise click.UsageError(text.replace("credentials for TLS", "--tls")) from None

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if not (self.tls or self.tls_ca or self.tls_cert or self.tls_key):
            return None
        if (self.tls_cert is None) != (self.tls_key is None):
            raise click.UsageError("--tls-cert and --tls-key must be used together")
        files = (
            ("--tls-ca", self.tls_ca),
            ("--tls-key", self.tls_key),
            ("--tls-cert", self.tls_cert),
        )
        return grpc.ssl_channel_credentials(
            *(None if path is None else _read(option, path) for option, path in files)
        )

    def _token(self) -> str | Callable[[], str] | None:
        if self.token_file is None:
            return self.token
        read = partial(read_token, self.token_file)
        read()  # report a wrong path immediately
        return read


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise click.UsageError(f"{option}: {path}: {error.strerror}") from None


def read_token(path: Path, option: str = "--token-file") -> str:
    """Returns the token in a file. Raises UsageError if there is none."""
    token = _read(option, path).decode(errors="replace").strip()
    if not token:
        raise click.UsageError(f"{option}: {path} is empty")
    return token


def warn_of_token(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Warns if the value of an option is a secret that was given on the command line."""
    if ctx.get_parameter_source(param.name or "") is ParameterSource.COMMANDLINE:
        echo(
            "Warning: --token: other users of this machine can see the token; use --token-file or "
            "set RUNLANE_TOKEN",
            err=True,
        )
    return value


_OPTIONS = (
    click.option(
        "-S",
        "--server",
        type=ServerType(),
        metavar="HOST:PORT",
        envvar="RUNLANE_SERVER",
        show_envvar=True,
        default=DEFAULT_TARGET,
        show_default=True,
        help="Server address.",
    ),
    click.option(
        "--tls", is_flag=True, envvar="RUNLANE_TLS", show_envvar=True, help="Connect with TLS."
    ),
    click.option(
        "--tls-ca",
        type=_FILE,
        metavar="FILE",
        envvar="RUNLANE_TLS_CA",
        show_envvar=True,
        help="PEM file of the CA certificates to trust; implies --tls. Default: the CAs of gRPC.",
    ),
    click.option(
        "--tls-cert",
        type=_FILE,
        metavar="FILE",
        help="PEM file of the client certificate; implies --tls.",
    ),
    click.option(
        "--tls-key", type=_FILE, metavar="FILE", help="PEM file of the private key for --tls-cert."
    ),
    click.option(
        "--token",
        envvar="RUNLANE_TOKEN",
        hidden=True,  # for RUNLANE_TOKEN, and for those who used it before
        callback=warn_of_token,
    ),
    click.option(
        "--token-file",
        type=_FILE,
        metavar="FILE",
        envvar="RUNLANE_TOKEN_FILE",
        show_envvar=True,
        help="File with the bearer token, read again for each call. RUNLANE_TOKEN may have the "
        "token itself.",
    ),
    click.option(
        "--plaintext-token",
        is_flag=True,
        help="Allow sending the token to another machine without TLS.",
    ),
)


def options(command: CommandT) -> CommandT:
    """Adds the global options to a command; their names are the fields of `Settings`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
