"""Which agent a spec names. Nothing else knows how a spec is written."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field

from runlane_server.agents.base import Agent
from runlane_server.agents.command.agent import CommandAgent, CommandSettings, split_argv
from runlane_server.agents.custom import import_agent
from runlane_server.agents.echo import EchoAgent
from runlane_server.agents.scripted.agent import ScriptedAgent
from runlane_server.agents.scripted.latches import Latches
from runlane_server.core.errors import SettingsError, StartError

SPECS = """\
echo                       answers with the prompt; echo:delay=50ms waits between two words
command:<argv>             runs a program; the prompt on its stdin, the answer on its stdout
command+json:<argv>        the same, with the whole turn as JSON on its stdin
chat:<provider>:<model>    a language model, as in chat:openai:gpt-4o
<module>:<attribute>       your own: an async generator function, a pydantic_ai.Agent, or an object
                           with start, run and close
scripted                   does what its prompt says, for tests
"""
"""What a spec may be, for people."""

_NAMES = "echo, command:<argv>, command+json:<argv>, chat:<provider>:<model>, scripted"

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?")
_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What agents are told besides their spec.

    `command_kill_grace`: how long, in seconds, a program may take to end after SIGTERM; it must lie
    below the server's `--cancel-grace`. `command`: what programs are given. `chat_instructions`:
    what a language model is told before the conversation. `chat_max_retries`: how often a request
    to it is repeated. `gates`: those of scripted runs, for tests within the process.
    """

    command_kill_grace: float = 2.0
    command: CommandSettings = field(default_factory=CommandSettings)
    chat_instructions: str | None = None
    chat_max_retries: int = 2
    latches: Latches | None = None


DEFAULTS = AgentSettings()


def load_agent(spec: str, settings: AgentSettings = DEFAULTS) -> Agent:
    """The agent that a spec names (see `SPECS`). Raises StartError with one line that says why."""
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
        case "chat":
            return _chat(rest, settings)
        case "scripted" if not rest:
            return ScriptedAgent(settings.latches)
    if _MODULE.fullmatch(kind) and _MODULE.fullmatch(rest):
        return import_agent(kind, rest)
    raise SettingsError(f"there is no agent {spec!r}; there are {_NAMES}, and <module>:<attribute>")


def _delay(options: str) -> float:
    """The delay that the options of echo name, in seconds."""
    if not options:
        return 0.0
    name, _, value = options.partition("=")
    duration = _DURATION.fullmatch(value)
    if name != "delay" or duration is None:
        raise SettingsError(f"agent echo: cannot read {options!r}; write echo:delay=50ms")
    number = float(duration[1])
    return number / 1000 if duration[2] == "ms" else number


def _chat(model: str, settings: AgentSettings) -> Agent:
    if importlib.util.find_spec("pydantic_ai") is None:
        raise StartError("agent chat: it is not installed; run pip install 'runlane[server,chat]'")
    from runlane_server.agents.chat.agent import ChatAgent  # noqa: PLC0415 - an optional extra

    return ChatAgent.of_model(
        model,
        instructions=settings.chat_instructions,
        max_retries=settings.chat_max_retries,
    )
