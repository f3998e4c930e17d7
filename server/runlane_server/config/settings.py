"""The settings of a server: one list, the fields of `Config`.

A field declares its type, default, help text and topic. From that come the flag, the environment
variable `RUNLANE_*`, the key of the TOML file, the validation of all three, and docs/settings.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import click

from runlane_server.agents.declaration import AgentDeclaration, declared_agents
from runlane_server.config.declaration import (
    Setting,
    Topic,
    declared_settings,
    setting,
    settings_of,
)
from runlane_server.config.option_types import (
    AddressType,
    AgentSlots,
    AgentSpec,
    Duration,
    HttpUrl,
    NetworkType,
    Permissions,
    Ratio,
    Size,
    StoreText,
    Variables,
)
from runlane_server.core.limits import Limits
from runlane_server.net.addresses import Address
from runlane_server.store.open import StoreUrl

_MAX_PART_BYTES = 3 << 20
"""A prompt, or an attachment, must fit into one gRPC message of 4 MiB with all its other fields."""

_MAX_WAITING_RUNS = 8000
"""The receipt of a cancel lists them all, with up to 280 bytes each, in one gRPC message."""

_MAX_RUN_OUTPUT = 128 << 20
"""The transcript of a run must fit into one value of a database: 1e9 bytes in SQLite, 1 GiB in
PostgreSQL. As JSON a control character takes six bytes."""

EVENT_LOOPS = ("auto", "asyncio", "uvloop")

SOCKET_MODES = ("0600", "0660", "0666")

LOG_FORMATS = ("auto", "json", "console")
LOG_LEVELS = ("debug", "info", "warning", "error")

MAX_PROGRESS_INTERVAL = 30.0
"""Seconds. Clients treat a stream as lost after 45 s of silence."""

_FILE = click.Path(dir_okay=False)
_SERVER_LIMIT = "the server's own limit"


@dataclass(frozen=True, slots=True)
class Config:
    """How a server is configured. Times are in seconds; a retention of 0 keeps data forever."""

    # --- Listening

    listen: Address = setting(
        Address("127.0.0.1", 50051),
        Topic.LISTENING,
        AddressType(),
        "Address to serve on: HOST:PORT or unix:PATH. Port 0 picks a free port and prints it.",
        metavar="ADDRESS",
    )
    socket_mode: str = setting(
        SOCKET_MODES[0],
        Topic.LISTENING,
        click.Choice(SOCKET_MODES),
        "File mode of the socket of unix:PATH: who can connect. 0600: the server's user; 0660: its "
        "group too; 0666: everyone.",
    )
    max_connections_per_address: int = setting(
        0,
        Topic.LISTENING,
        click.IntRange(min=0),
        "Maximum number of connections of one IP address to each process; an IPv6 address counts as"
        " its /64 network. The newest ones above it are closed within a second.",
        without="half of all connections",
    )
    processes: int = setting(
        1,
        Topic.LISTENING,
        click.IntRange(min=1),
        "Number of server processes that share the port, each a node. More than 1 requires a "
        "PostgreSQL store.",
    )
    event_loop: str = setting(
        "auto",
        Topic.LISTENING,
        click.Choice(EVENT_LOOPS),
        "Event loop to run on. auto: uvloop if its extra is installed, else asyncio.",
    )
    http: Address | None = setting(
        None,
        Topic.LISTENING,
        AddressType(unix=False, default_host="127.0.0.1"),
        "Address on this machine to serve HTTP on, JSON and server-sent events; the host defaults "
        "to 127.0.0.1. A process of its own serves it. Without --access callers need the token "
        "that the server prints. For other machines run runlane-web. Requires the extra 'web'.",
        metavar="[HOST:]PORT",
        without="no HTTP",
    )
    a2a: str = setting(
        "",
        Topic.LISTENING,
        click.STRING,
        "Serve the A2A protocol on --http; URL is that address as callers see it, such as "
        "http://127.0.0.1:8080. For a card, gRPC and other options of A2A run runlane-web. "
        "Requires the extra 'a2a'.",
        metavar="URL",
        without="no A2A",
    )
    harness: bool = setting(
        False,
        Topic.LISTENING,
        click.BOOL,
        "Serve runlane.harness.v1 for tests, which can hold runs at gates, move the clock and "
        "crash the server. Only on this machine; never in production.",
    )

    # --- Store

    store: str = setting(
        "sqlite:///runlane.db",
        Topic.STORE,
        StoreText(),
        "Store of sessions and runs: memory:, sqlite:///PATH or "
        "postgresql://USER@HOST/DB[?schema=NAME]. Set one with a password in RUNLANE_STORE or the "
        "--config file; on the command line it is refused.",
        metavar="URL",
    )

    # --- Agents

    agent: tuple[str, ...] = setting(
        (),
        Topic.AGENTS,
        AgentSpec(),
        "Agent that executes runs: echo, command:ARGV, command+json:ARGV, acp:ARGV, "
        "chat:PROVIDER:MODEL, MODULE:ATTRIBUTE, worker, or scripted. May be repeated, with a name "
        "for each; without one the name is 'default'. Runs that name no agent use 'default', or "
        "the first one.",
        metavar="[NAME=]AGENT",
        without="echo",
        repeatable=True,
    )
    agent_slots: tuple[str, ...] = setting(
        (),
        Topic.AGENTS,
        AgentSlots(),
        "Maximum number of active runs of one agent on this node. May be repeated. 0: accept its "
        "runs and execute none.",
        metavar="NAME=N",
        without="only --max-active-runs",
        repeatable=True,
    )
    agent_processes: int = setting(
        0,
        Topic.AGENTS,
        click.IntRange(min=0, max=64),
        "Number of processes of each agent that is Python: chat:PROVIDER:MODEL and "
        "MODULE:ATTRIBUTE. 0: such agents run in the server's own process.",
    )
    reload: bool = setting(
        False,
        Topic.AGENTS,
        click.BOOL,
        "Load MODULE:ATTRIBUTE agents again when their files change, for development. Runs under "
        "way continue with the code that they have.",
    )
    chat_instructions: str = setting(
        "",
        Topic.AGENTS,
        click.STRING,
        "Instructions for the language model of a chat agent, before each conversation.",
        metavar="TEXT",
        without="none",
    )
    chat_lenient_end: bool = setting(
        False,
        Topic.AGENTS,
        click.BOOL,
        "Accept answers of a language model that end without a finish reason. By default such an "
        "answer counts as cut off, and the run fails with PROVIDER_UNAVAILABLE.",
    )
    worker_lease: float = setting(
        30.0,
        Topic.AGENTS,
        Duration(zero=False),
        "How long a worker that has lost its connection keeps its run.",
    )

    # --- Programs

    command_env: tuple[str, ...] = setting(
        (),
        Topic.PROGRAMS,
        Variables(),
        "Variables to add to the environment of a program: names to copy from the server's, or one "
        "NAME=VALUE. May be repeated. PATH, LANG, LC_*, TZ and the ids of the run are always set. "
        "A value that is a secret by its name is refused on the command line.",
        metavar="NAME,...|NAME=VALUE",
        without="none",
        repeatable=True,
    )
    command_env_file: str | None = setting(
        None,
        Topic.PROGRAMS,
        _FILE,
        "File of further variables for programs, one NAME=VALUE a line, read at the start. Other "
        "users must not have access to it.",
        metavar="FILE",
        without="none",
    )
    command_dir: str | None = setting(
        None,
        Topic.PROGRAMS,
        click.Path(file_okay=False),
        "Directory in which each run of a program gets a private directory, removed after the run.",
        metavar="DIR",
        without="the directory for temporary files",
    )
    command_cwd: str | None = setting(
        None,
        Topic.PROGRAMS,
        click.Path(file_okay=False, exists=True),
        "Working directory of all programs. HOME and TMPDIR stay private.",
        metavar="DIR",
        without="the private directory of the run",
    )
    command_cpu: float = setting(
        0.0,
        Topic.PROGRAMS,
        Duration(),
        "Maximum CPU time of each process of a program, rounded up to whole seconds.",
        without=_SERVER_LIMIT,
    )
    command_memory: int = setting(
        0,
        Topic.PROGRAMS,
        Size(),
        "Maximum address space of each process of a program, in bytes or with a unit.",
        without=_SERVER_LIMIT,
    )
    command_files: int = setting(
        0,
        Topic.PROGRAMS,
        click.IntRange(min=0),
        "Maximum number of open files of each process of a program.",
        without=_SERVER_LIMIT,
    )
    command_processes: int = setting(
        0,
        Topic.PROGRAMS,
        click.IntRange(min=0),
        "Maximum number of processes and threads of the server's user in total, checked when a "
        "program starts another one. Has no effect for root.",
        without=_SERVER_LIMIT,
    )
    command_file_size: int = setting(
        0,
        Topic.PROGRAMS,
        Size(),
        "Maximum size of a file that a program writes, in bytes or with a unit.",
        without=_SERVER_LIMIT,
    )

    agent_state_dir: str | None = setting(
        None,
        Topic.PROGRAMS,
        click.Path(file_okay=False),
        "Directory in which each session gets a private directory as HOME and working directory of "
        "its programs, removed with the session.",
        metavar="DIR",
        without="the private directory of the run",
    )
    acp_permissions: str = setting(
        "deny",
        Topic.PROGRAMS,
        Permissions(),
        "Answers to ACP agents that ask for permission: allow, deny or ask (people), and "
        "KIND=ANSWER for kinds of tool calls such as read, edit or execute; separated by commas.",
        metavar="ANSWER,...",
    )
    acp_mode: str = setting(
        "",
        Topic.PROGRAMS,
        click.STRING,
        "Id of the mode in which ACP agents work.",
        metavar="MODE",
        without="the mode of the agent",
    )
    acp_auth: str = setting(
        "",
        Topic.PROGRAMS,
        click.STRING,
        "Id of the method with which ACP agents authenticate before a session.",
        metavar="METHOD",
        without="none",
    )

    # --- Limits

    limits: Limits = settings_of(
        Limits,
        max_active_runs=Setting(
            Topic.LIMITS,
            click.IntRange(min=0),
            "Maximum number of active runs on this node. 0: accept runs and execute none.",
        ),
        max_waiting_runs=Setting(
            Topic.LIMITS,
            click.IntRange(min=0, max=_MAX_WAITING_RUNS),
            "Maximum number of waiting runs of one session.",
        ),
        max_waiting_total=Setting(
            Topic.LIMITS,
            click.IntRange(min=1),
            "Maximum number of waiting runs on this node.",
        ),
        max_prompt_bytes=Setting(
            Topic.LIMITS,
            click.IntRange(min=1, max=_MAX_PART_BYTES),
            "Maximum size of a prompt, in bytes.",
        ),
        max_attachment_bytes=Setting(
            Topic.LIMITS,
            click.IntRange(min=0, max=_MAX_PART_BYTES),
            "Maximum size of all attachments of a run together, in bytes.",
        ),
        max_run_output=Setting(
            Topic.LIMITS,
            Size(least=1, most=_MAX_RUN_OUTPUT),
            "Maximum size of everything the agent emits for a run, in bytes or with a unit: text, "
            "reasoning, tool calls and their results. A run that exceeds it fails.",
        ),
        max_history=Setting(
            Topic.LIMITS,
            Size(least=1),
            "Maximum size of the transcript that an agent is given, in bytes or with a unit: the "
            "latest turns within it.",
        ),
        default_run_timeout=Setting(
            Topic.LIMITS,
            Duration(),
            "Maximum duration of one attempt of a run whose request has no timeout. 0: no limit.",
        ),
        max_run_time=Setting(
            Topic.LIMITS,
            Duration(),
            "Maximum duration of one attempt of any run; a longer timeout of a request is cut to "
            "it. 0: no limit.",
        ),
        cancel_grace=Setting(
            Topic.LIMITS,
            Duration(),
            "Time an agent has to return after a cancel.",
        ),
        ready_timeout=Setting(
            Topic.LIMITS,
            Duration(zero=False),
            "Time runs wait for the agent to become ready before they fail.",
        ),
    )
    progress_interval: float = setting(
        15.0,
        Topic.LIMITS,
        Duration(zero=False, longest=MAX_PROGRESS_INTERVAL),
        "Interval between progress marks on an idle subscription.",
    )

    # --- Access and TLS

    access: str | None = setting(
        None,
        Topic.ACCESS,
        _FILE,
        "Access file: a TOML file of callers and their roles. `token new` adds to it. The server "
        "reloads it when it changes.",
        metavar="FILE",
        without="full access for every caller",
    )
    tls_cert: str | None = setting(
        None,
        Topic.ACCESS,
        _FILE,
        "Certificate of the server with its chain, as PEM. The server reloads it when it changes.",
        metavar="FILE",
        without="no TLS",
    )
    tls_key: str | None = setting(
        None,
        Topic.ACCESS,
        _FILE,
        "Private key of --tls-cert, as PEM.",
        metavar="FILE",
    )
    tls_client_ca: str | None = setting(
        None,
        Topic.ACCESS,
        _FILE,
        "Require client certificates that are signed by one of these CA certificates, as PEM.",
        metavar="FILE",
    )
    node_tls_ca: str | None = setting(
        None,
        Topic.ACCESS,
        _FILE,
        "CA certificates, as PEM, that sign the certificates of other nodes of a shared store.",
        metavar="FILE",
        without="the roots that gRPC trusts",
    )
    insecure_anywhere: bool = setting(
        False,
        Topic.ACCESS,
        click.BOOL,
        "Accept callers from the network without authentication.",
    )
    require_question_digest: bool = setting(
        False,
        Topic.ACCESS,
        click.BOOL,
        "Refuse the answer to an approval that does not name the digest of the question: of its "
        "text, tool and exact arguments, as the person saw them.",
    )

    # --- Webhooks

    webhook_allow_network: tuple[str, ...] = setting(
        (),
        Topic.WEBHOOKS,
        NetworkType(),
        "Network to which webhooks may deliver although its addresses are not global, and over "
        "http too. May be repeated.",
        metavar="CIDR",
        without="global addresses over https only",
        repeatable=True,
    )
    webhook_unconfirmed: bool = setting(
        False,
        Topic.WEBHOOKS,
        click.BOOL,
        "Deliver to webhooks whose endpoint has not answered a challenge. Only where every tenant "
        "may send requests to any address.",
    )

    webhook_keys: str | None = setting(
        None,
        Topic.WEBHOOKS,
        _FILE,
        "File of keys that encrypt the secrets of webhooks in the store: base64 of 32 bytes, one a "
        "line, the current one first, read at the start. Other users must not have access to it. "
        "Requires the extra 'secrets'.",
        metavar="FILE",
        without="no encryption",
    )

    # --- Observability

    metrics_listen: Address | None = setting(
        None,
        Topic.OBSERVABILITY,
        AddressType(unix=False, default_host="127.0.0.1"),
        "Address of the page /metrics for Prometheus; the host defaults to 127.0.0.1. Several "
        "--processes use this port and the ones after it. Requires the extra 'metrics'.",
        metavar="[HOST:]PORT",
        without="no metrics",
    )
    otlp_endpoint: str | None = setting(
        None,
        Topic.OBSERVABILITY,
        HttpUrl(),
        "Collector to export one trace per run to, by OTLP over gRPC, such as "
        "http://127.0.0.1:4317. Requires the extra 'traces'.",
        metavar="URL",
        without="no traces",
    )
    trace_ratio: float = setting(
        1.0,
        Topic.OBSERVABILITY,
        Ratio(),
        "Fraction of runs to trace when the caller sends no traceparent.",
    )
    log_format: str = setting(
        "auto",
        Topic.OBSERVABILITY,
        click.Choice(LOG_FORMATS),
        "Format of the log on stderr. auto: console on a terminal, else json.",
    )
    log_level: str = setting(
        "info",
        Topic.OBSERVABILITY,
        click.Choice(LOG_LEVELS),
        "Lowest level to log.",
    )
    log_content: bool = setting(
        False,
        Topic.OBSERVABILITY,
        click.BOOL,
        "Log the messages of unexpected errors, which can contain parts of prompts.",
    )

    # --- Shutdown and retention

    drain_timeout: float = setting(
        30.0,
        Topic.SHUTDOWN,
        Duration(),
        "Time a shutdown waits for active runs.",
    )
    event_retention: float = setting(
        7 * 86400.0,
        Topic.SHUTDOWN,
        Duration(),
        "Time events are kept for subscriptions to resume from. 0: no limit.",
    )
    event_retention_bytes: int = setting(
        1 << 30,
        Topic.SHUTDOWN,
        click.IntRange(min=0),
        "Maximum size of the event log, in bytes; the oldest events of the tenants with the largest"
        " logs are removed. 0: no limit.",
    )
    session_retention: float = setting(
        0.0,
        Topic.SHUTDOWN,
        Duration(),
        "Time an idle session is kept after the last write to it. 0: forever.",
    )

    # --- Cluster

    node_address: Address | None = setting(
        None,
        Topic.CLUSTER,
        AddressType(unix=False),
        "Address at which other nodes of a shared store reach this node. Port 0: the port it "
        "listens on. Several --processes use this port and the ones after it.",
        metavar="HOST:PORT",
        without="the address it listens on; a free port for each of several --processes",
    )
    node_lease: float = setting(
        10.0,
        Topic.CLUSTER,
        Duration(zero=False),
        "Heartbeat timeout after which other nodes declare this node dead."
        " Its agents stop before, unless the database is down.",
    )

    @property
    def store_url(self) -> StoreUrl:
        """`store`, parsed. Raises SettingsError."""
        return StoreUrl.parse(self.store)

    @property
    def agents(self) -> tuple[AgentDeclaration, ...]:
        """`agent` and `agent_slots`, parsed. Raises SettingsError."""
        return declared_agents(self.agent, self.agent_slots)

    @classmethod
    def from_options(cls, **options: Any) -> Config:
        """The configuration that the options of the command line make."""
        limits = {limit.name: options.pop(limit.name) for limit in fields(Limits)}
        return cls(limits=Limits(**limits), **options)

    @classmethod
    def from_json(cls, text: str | bytes) -> Config:
        """The configuration that `to_json` wrote."""
        found = json.loads(text)
        return cls.from_options(**{one.name: one.from_json(found[one.name]) for one in SETTINGS})

    def to_json(self) -> str:
        """All settings on one line, for another process of the same version."""
        options = asdict(self)
        options |= {"listen": self.listen, "metrics_listen": self.metrics_listen, "http": self.http}
        options |= {"node_address": self.node_address, **options.pop("limits")}
        return json.dumps(options, default=str)


SETTINGS = tuple(declared_settings(Config))
"""All settings, in the order in which --help and docs/settings.md list them."""

RENAMED = {"workers": "processes"}
"""Former names of settings. A server that is given one names the new one and does not start."""
