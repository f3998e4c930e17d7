"""Checks a configuration as a start would, without listening and without opening the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click

from runlane_server.config import Config
from runlane_server.core.errors import StartError
from runlane_server.extras import require
from runlane_server.process import processes
from runlane_server.process.app import event_loop_kind
from runlane_server.process.node import load_agents
from runlane_server.process.security import access_file, node_ca, security_problems, server_tls
from runlane_server.store.open import open_store
from runlane_server.telemetry import metrics_server, trace_export
from runlane_server.webhooks.secret_keys import SecretKeys

Check = Callable[[Config], object]


def problems_of(config: Config) -> Iterator[str]:
    """Each reason for which a server would not start with these settings, as one line.

    It imports the agent, and reads the files that the settings name.
    """
    yield from security_problems(config)
    for check in _CHECKS:
        try:
            check(config)
        except click.UsageError as error:
            yield error.format_message()
        except StartError as error:
            yield str(error)


def _processes(config: Config) -> None:
    if config.processes > 1:
        processes.check(config)


def _telemetry(config: Config) -> None:
    if config.metrics_listen is not None:
        require("prometheus_client", metrics_server.OPTION)
    if config.otlp_endpoint is not None:
        require("opentelemetry.proto", trace_export.OPTION)


_CHECKS: tuple[Check, ...] = (
    _processes,
    server_tls,
    access_file,
    node_ca,
    lambda config: open_store(config.store_url),
    load_agents,
    lambda config: SecretKeys.read(config.webhook_keys),
    lambda config: event_loop_kind(config.event_loop),
    _telemetry,
)
