"""Creates the agent that `--agent` specifies. The syntax of a spec is known only here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from runlane_server.agents.acp.policy import Policy
from runlane_server.agents.base import Agent
from runlane_server.agents.command.agent import CommandAgent
from runlane_server.agents.command.programs import CommandSettings, split_argv
from runlane_server.agents.custom import import_agent
from runlane_server.agents.echo import EchoAgent
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.agents.worker.agent import WorkerAgent
from runlane_server.agents.worker.workers import Workers
from runlane_server.core.errors import SettingsError
from runlane_server.extras import require

SPECS = """\
echo                       answers with the prompt; echo:delay=50ms pauses between two words
command:<argv>             a program that gets the prompt on stdin and answers on stdout
command+json:<argv>        the same, with the whole turn as JSON on stdin
acp:<argv>                 a program that speaks the Agent Client Protocol
chat:<provider>:<model>    a language model, such as chat:openai:gpt-4o
<module>:<attribute>       your own: a function, a pydantic_ai.Agent, or an object with start, run
                           and close
worker                     runs of this agent are executed by workers, in processes of their own
scripted                   follows the script in its prompt, for tests
"""
"""The forms of a spec, as help text."""

_NAMES = (
    "echo, command:<argv>, command+json:<argv>, acp:<argv>, chat:<provider>:<model>, worker, "
    "scripted"
)

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Settings of agents besides their spec.

    `command_kill_grace`: seconds between SIGTERM and SIGKILL for a program; it must be below the
    server's `--cancel-grace`. `command`: what programs get. `acp_policy`, `acp_mode`, `acp_auth`:
    see `acp.opening.AcpSettings`. `chat_instructions`: instructions for a language model, before
    the conversation. `chat_max_retries`: retries of a request to it.
    `chat_lenient_end`: whether its answers may end without a finish reason. `worker_lease`: seconds
    that a worker without a connection keeps its run. `reload`: whether MODULE:ATTRIBUTE is loaded
    again when its files change. `latches`: where scripted runs wait, for tests
    within the process.
    """

    command_kill_grace: float = 2.0
    command: CommandSettings = field(default_factory=CommandSettings)
    acp_policy: Policy = field(default_factory=Policy)
    acp_mode: str = ""
    acp_auth: str = ""
    chat_instructions: str | None = None
    chat_max_retries: int = 2
    chat_lenient_end: bool = False
    latches: Latches | None = None
    worker_lease: float = 30.0
    reload: bool = False


DEFAULTS = AgentSettings()


_KINDS = frozenset({"acp", "echo", "command", "command+json", "chat", "worker", "scripted"})


def agent_kind(spec: str) -> str:
    """The kind of agent of a spec; `python` for your own. It holds nothing secret."""
    kind = spec.strip().partition(":")[0]
    return kind if kind in _KINDS else "python"


def load_agent(spec: str, settings: AgentSettings = DEFAULTS) -> Agent:
    """Creates the agent of a spec (see `SPECS`). Raises StartError; its message is one line."""
    kind, _, rest = spec.strip().partition(":")
    match kind:
        case "echo":
            return EchoAgent(delay=_delay(rest))
        case "command" | "command+json":
            return CommandAgent(
                split_argv(rest),
                as_json=kind == "command+json",
                kill_grace=settings.command_kill_grace,
                settings=settings.command,
            )
        case "acp" | "chat":
            return _acp(rest, settings) if kind == "acp" else _chat(rest, settings)
        case "worker" if not rest:
            return WorkerAgent(Workers(settings.worker_lease))
        case "scripted" if not rest:
            return ScriptedAgent(settings.latches)
    if _MODULE.fullmatch(kind) and _MODULE.fullmatch(rest):
        return import_agent(
            kind, rest, lenient_end=settings.chat_lenient_end, reload=settings.reload
        )
    raise SettingsError(f"there is no agent {spec!r}; use one of {_NAMES}, <module>:<attribute>")


def _delay(options: str) -> float:
    """The delay in the options of echo, in seconds."""
    if not options:
        return 0.0
    name, _, value = options.partition("=")
    duration = _DURATION.fullmatch(value)
    if name != "delay" or duration is None:
        raise SettingsError(f"agent echo: cannot read {options!r}; write echo:delay=50ms")
    number = float(duration[1])
    return number / 1000 if duration[2] == "ms" else number


def _acp(command: str, settings: AgentSettings) -> Agent:
    require("acp", "agent acp")
    from runlane_server.agents.acp.agent import AcpAgent  # noqa: PLC0415 - an optional extra
    from runlane_server.agents.acp.opening import AcpSettings  # noqa: PLC0415

    return AcpAgent(
        split_argv(command, "acp"),
        kill_grace=settings.command_kill_grace,
        settings=AcpSettings(settings.acp_policy, settings.acp_mode, settings.acp_auth),
        command=settings.command,
    )


def _chat(model: str, settings: AgentSettings) -> Agent:
    require("pydantic_ai", "agent chat")
    require("aiohttp", "agent chat")
    from runlane_server.agents.chat.agent import ChatAgent  # noqa: PLC0415 - an optional extra

    return ChatAgent.of_model(
        model,
        instructions=settings.chat_instructions,
        max_retries=settings.chat_max_retries,
        lenient_end=settings.chat_lenient_end,
    )
