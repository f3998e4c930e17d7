"""What can be set: every option as a flag, as `RUNLANE_*` in the environment, and in a TOML file.

A flag goes before the environment, that before the file, and that before the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from runlane_server.config.command_options import COMMAND
from runlane_server.config.entrance_options import ACCESS, ENTRANCE
from runlane_server.config.option_types import Address, Duration, HttpUrl, Ratio
from runlane_server.core.limits import Limits

_LARGEST_PART = 3 << 20
"""A prompt, or an attachment, has to fit into one message of gRPC's 4 MiB with its surroundings."""

EVENT_LOOPS = ("auto", "asyncio", "uvloop")

LOG_FORMATS = ("auto", "json", "console")
LOG_LEVELS = ("debug", "info", "warning", "error")

MAX_PROGRESS_INTERVAL = 30.0
"""Clients take a stream for lost that was silent for 45 s."""

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Config:
    """How a server is set. Times are in seconds; a retention of 0 keeps things for ever."""

    listen: str = "127.0.0.1:50051"
    processes: int = 1
    node_address: str | None = None
    access: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    node_tls_ca: str | None = None
    insecure_anywhere: bool = False
    metrics_listen: str | None = None
    otlp_endpoint: str | None = None
    trace_ratio: float = 1.0
    store: str = "sqlite:///runlane.db"
    agent: str = "echo"
    command_env: tuple[str, ...] = ()
    command_dir: str | None = None
    command_cwd: str | None = None
    command_cpu: float = 0.0
    command_memory: int = 0
    command_files: int = 0
    command_processes: int = 0
    command_file_size: int = 0
    chat_instructions: str = ""
    limits: Limits = field(default_factory=Limits)
    progress_interval: float = 15.0
    drain_timeout: float = 30.0
    event_retention: float = 7 * 86400.0
    event_retention_bytes: int = 1 << 30
    session_retention: float = 0.0
    node_lease: float = 10.0
    event_loop: str = "auto"
    log_format: str = "auto"
    log_level: str = "info"
    log_content: bool = False
    harness: bool = False

    @classmethod
    def of(cls, **options: Any) -> Config:
        """The settings that the options of the command stand for."""
        limits = {limit.name: options.pop(limit.name) for limit in fields(Limits)}
        variables = tuple(options.pop("command_env"))  # which is a list, where it comes by JSON
        return cls(limits=Limits(**limits), command_env=variables, **options)


def _read_file(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Makes what is in the file the defaults of the command."""
    if value is None:
        return
    try:
        found = tomllib.loads(value.read_text(encoding="utf-8"))
    except OSError as error:
        raise click.BadParameter(f"{value}: {error.strerror}", ctx, param) from error
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{value}: {error}", ctx, param) from error
    ctx.default_map = {key.replace("-", "_"): _as_text(value) for key, value in found.items()}
    if isinstance(lines := ctx.default_map.get("command_env"), str):
        ctx.default_map["command_env"] = lines.splitlines()
    for key, setting in found.items():
        if key.replace("-", "_") not in _SETTINGS:
            raise click.BadParameter(f"{value}: there is no setting {key!r}", ctx, param)
        kinds = "a text or a number"
        fits = isinstance(setting, str | int | float) and not isinstance(setting, bool)
        if key.replace("-", "_") in _SWITCHES:
            kinds, fits = "true or false", isinstance(setting, bool)
        if not fits:
            raise click.BadParameter(f"{value}: {key!r} has to be {kinds}", ctx, param)


def _as_text(value: Any) -> Any:
    """A number with a point as a text, as it comes by a flag: a bare one is no length of time."""
    return str(value) if isinstance(value, float) else value


_DEFAULT = Config()
_DEFAULT_LIMITS = _DEFAULT.limits

_SETTINGS = {one.name for one in (*fields(Config), *fields(Limits))} - {"limits"}
"""What may be in a file, for whichever command reads it."""

_SWITCHES = {one.name for one in fields(Config) if one.type == "bool"}

_FILE = click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_read_file,
    metavar="FILE",
    help="A TOML file with any of the server's settings, named as the flags are.",
)

_STORE = click.option(
    "--store",
    default=_DEFAULT.store,
    metavar="URL",
    help="sqlite:///PATH, postgresql://USER@HOST/DATABASE[?schema=NAME], or memory: .",
)

_OPTIONS = (
    _FILE,
    click.option(
        "--listen",
        type=Address(),
        default=_DEFAULT.listen,
        metavar="ADDRESS",
        help="HOST:PORT, or unix:PATH. Port 0 takes a free one and prints it.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        default=_DEFAULT.processes,
        help="How many processes serve, each a node. More than 1 need a store they can share.",
    ),
    click.option(
        "--node-address",
        type=Address(unix=False),
        default=_DEFAULT.node_address,
        metavar="HOST:PORT",
        help="Where the other nodes of a shared store reach this one; port 0 is the one it listens "
        "on. With several processes it is the first one's, and each has the next port.",
        show_default="where it listens; a free port for each process",
    ),
    click.option(
        "--metrics-listen",
        type=Address(unix=False, host="127.0.0.1"),
        default=_DEFAULT.metrics_listen,
        metavar="[HOST:]PORT",
        help="Where Prometheus finds /metrics; without a host on this machine only. With several "
        "processes "
        "it is the first one's, and each has the next port. Needs the extra 'metrics'.",
        show_default="nowhere",
    ),
    click.option(
        "--otlp-endpoint",
        type=HttpUrl(),
        default=_DEFAULT.otlp_endpoint,
        metavar="URL",
        help="The collector that runs are told to as traces, by OTLP over gRPC, such as "
        "http://127.0.0.1:4317. Needs the extra 'traces'.",
        show_default="none",
    ),
    click.option(
        "--trace-ratio",
        type=Ratio(),
        default=_DEFAULT.trace_ratio,
        help="The share of the runs that are told whose caller is in no trace.",
    ),
    *ENTRANCE,
    _STORE,
    click.option(
        "--agent",
        default=_DEFAULT.agent,
        metavar="AGENT",
        help="echo, scripted, command:ARGV, chat:PROVIDER:MODEL, or MODULE:ATTRIBUTE.",
    ),
    *COMMAND,
    click.option(
        "--chat-instructions",
        default=_DEFAULT.chat_instructions,
        metavar="TEXT",
        help="What a language model is told before each conversation.",
    ),
    click.option(
        "--max-active-runs",
        type=click.IntRange(min=0),
        default=_DEFAULT_LIMITS.max_active_runs,
        help="How many runs are active at a time. With 0 the node accepts and runs nothing.",
    ),
    click.option(
        "--max-waiting-runs",
        type=click.IntRange(min=0),
        default=_DEFAULT_LIMITS.max_waiting_runs,
        help="How many runs may wait in one session.",
    ),
    click.option(
        "--max-waiting-total",
        type=click.IntRange(min=1),
        default=_DEFAULT_LIMITS.max_waiting_total,
        help="How many runs may wait on the node.",
    ),
    click.option(
        "--max-prompt-bytes",
        type=click.IntRange(min=1, max=_LARGEST_PART),
        default=_DEFAULT_LIMITS.max_prompt_bytes,
        help="How large a prompt may be.",
    ),
    click.option(
        "--max-attachment-bytes",
        type=click.IntRange(min=0, max=_LARGEST_PART),
        default=_DEFAULT_LIMITS.max_attachment_bytes,
        help="How large the attachments of a run may be together.",
    ),
    click.option(
        "--cancel-grace",
        type=Duration(),
        default=_DEFAULT_LIMITS.cancel_grace,
        help="How long an agent has to return after a cancel.",
    ),
    click.option(
        "--ready-timeout",
        type=Duration(zero=False),
        default=_DEFAULT_LIMITS.ready_timeout,
        help="How long runs wait for the agent to get ready before they fail.",
    ),
    click.option(
        "--progress-interval",
        type=Duration(zero=False, longest=MAX_PROGRESS_INTERVAL),
        default=_DEFAULT.progress_interval,
        help="After how long an idle subscription gets a progress mark.",
    ),
    click.option(
        "--drain-timeout",
        type=Duration(),
        default=_DEFAULT.drain_timeout,
        help="How long a shutdown waits for the active runs.",
    ),
    click.option(
        "--event-retention",
        type=Duration(),
        default=_DEFAULT.event_retention,
        help="How long subscriptions can go back. 0: without limit.",
    ),
    click.option(
        "--event-retention-bytes",
        type=click.IntRange(min=0),
        default=_DEFAULT.event_retention_bytes,
        help="How large the event log may grow before its oldest events go. 0: without limit.",
    ),
    click.option(
        "--session-retention",
        type=Duration(),
        default=_DEFAULT.session_retention,
        help="How long an idle session is kept after the last write to it. 0: for ever.",
    ),
    click.option(
        "--node-lease",
        type=Duration(zero=False),
        default=_DEFAULT.node_lease,
        help="After how long a silence the others take a node for lost; its agents stop before.",
    ),
    click.option(
        "--event-loop",
        type=click.Choice(EVENT_LOOPS),
        default=_DEFAULT.event_loop,
        help="What drives the server; auto: uvloop, the quicker one, if its extra is installed.",
    ),
    click.option("--log-format", type=click.Choice(LOG_FORMATS), default=_DEFAULT.log_format),
    click.option("--log-level", type=click.Choice(LOG_LEVELS), default=_DEFAULT.log_level),
    click.option(
        "--log-content",
        is_flag=True,
        help="Has the log tell what unexpected errors say: it may be part of a prompt.",
    ),
    click.option(
        "--harness",
        is_flag=True,
        help="Serves runlane.harness.v1 too: tests hold runs at gates, move the clock, and have "
        "the server crash. On this machine only, and never in production.",
    ),
)


def options(command: Command) -> Command:
    """Gives a command all options; its keyword arguments are those of `Config.of`."""
    return _with(command, _OPTIONS)


def store_options(command: Command) -> Command:
    """Gives a command what names a store, and nothing else: the keyword argument `store`."""
    return _with(command, (_FILE, _STORE))


def access_options(command: Command) -> Command:
    """Gives a command what names an access file: the keyword argument `access`."""
    return _with(command, (_FILE, ACCESS))


def _with(command: Command, given: Sequence[Callable[[Command], Command]]) -> Command:
    for option in reversed(given):
        command = option(command)
    return command
