#!/usr/bin/env python3
"""Writes the tables of limits.md from the settings and from the constants in the server's code.

python docs/limits_table.py            writes the page
python docs/limits_table.py --check    only reports whether it is fresh: exit code 1 if not
"""

from __future__ import annotations

from pathlib import Path

from generated import between, main

from runlane_server.access import jwts
from runlane_server.agents import json_parts, questions
from runlane_server.config.settings import MAX_PROGRESS_INTERVAL, SETTINGS
from runlane_server.core import artifact, lane, limits, model
from runlane_server.core import input as asking
from runlane_server.engine import (
    agent_output,
    agent_turn,
    coordinator,
    lane_cache,
    lanes,
    outbox,
    replay,
)
from runlane_server.feed import feed
from runlane_server.rpc import checks, endpoint, floods, page, runs
from runlane_server.store import batching
from runlane_server.store.postgres import writer as postgres_writer
from runlane_server.store.sqlite import writer as sqlite_writer
from runlane_server.telemetry import metrics_server
from runlane_server.webhooks import attempts, delivery, names, registry, sender

PAGE = Path(__file__).with_name("limits.md")

SET = {
    "max-active-runs": "further runs wait",
    "max-waiting-runs": "the accept is refused: QUEUE_FULL",
    "max-waiting-total": "the accept is refused: OVERLOADED",
    "max-prompt-bytes": "the accept is refused: PROMPT_TOO_LARGE",
    "max-attachment-bytes": "the accept is refused: PROMPT_TOO_LARGE",
    "max-run-output": "the run fails with OUTPUT_LIMIT; its output up to the limit is kept",
    "max-history": "the agent is given the latest turns",
    "default-run-timeout": "the run ends with RUN_TIMEOUT",
    "max-run-time": "the run ends with RUN_TIMEOUT",
    "cancel-grace": "the agent is fenced off; its output is discarded",
    "ready-timeout": "waiting runs fail with AGENT_NOT_READY",
    "event-retention": "older events are removed; a cursor before them gets CURSOR_COMPACTED",
    "event-retention-bytes": "the same, for the tenants with more than an equal share of it",
    "session-retention": "the session is removed",
    "command-memory": "the program's allocations fail",
    "command-file-size": "the run fails with COMMAND_LIMIT",
}
"""The settings that are limits, and what happens when they are reached."""


def size(count: int) -> str:
    """A number of bytes, with a unit."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count:,} bytes"


REFUSED = "the call is refused: INVALID_ARGUMENT"
TOO_LARGE = "the call is refused: PROMPT_TOO_LARGE"

CALLS = (
    ("id of a session or a run", size(checks.MAX_ID_BYTES), REFUSED),
    ("title of a session", size(checks.MAX_TITLE_BYTES), REFUSED),
    ("reason of a cancel", size(checks.MAX_REASON_BYTES), REFUSED),
    ("prompt and attachments of a run together", size(limits.MAX_INPUT_BYTES), TOO_LARGE),
    ("name or media type of an attachment", size(checks.MAX_NAME_BYTES), REFUSED),
    ("labels of a run or a session", f"{checks.MAX_LABELS}", REFUSED),
    (
        "key, value of a label",
        f"{size(checks.MAX_LABEL_KEY_BYTES)}, {size(checks.MAX_LABEL_VALUE_BYTES)}",
        REFUSED,
    ),
    ("attempts of a run", f"{checks.MAX_ATTEMPTS}", REFUSED),
    (
        "reasons of a retry policy, each reason",
        f"{checks.MAX_RETRY_REASONS}, {checks.MAX_RETRY_REASON_BYTES} bytes",
        REFUSED,
    ),
    ("timeout of a run, of WaitRun", f"{checks.MAX_DAYS} days", REFUSED),
    ("session ids, run ids, attachments, states in a request", f"{checks.MAX_ITEMS:,}", REFUSED),
    (
        "items of a page",
        f"{checks.MAX_ITEMS:,} and {size(page.PAGE_BYTES)}; {checks.DEFAULT_PAGE_SIZE} by default",
        "the list continues with a page token",
    ),
    (
        "runs of a page of CancelAll",
        f"{checks.MAX_CANCELLED:,}",
        "the receipt continues with a page token",
    ),
    (
        "receipt of CancelAll without pages",
        size(runs.PAGE_BYTES),
        "everything is cancelled; `omitted_runs` counts the rest",
    ),
    (
        "text of a RunComplete",
        size(model.MAX_COMPLETE_TEXT_BYTES),
        "cut, `text_truncated` is set; the transcript has all of it",
    ),
    (
        "webhooks of a tenant",
        f"{registry.MAX_OF_TENANT}",
        "CreateWebhook is refused: QUOTA_EXCEEDED",
    ),
    (
        "webhooks of single runs: of a tenant, of a run",
        f"{registry.MAX_FOR_RUNS:,}; {registry.MAX_OF_RUN}",
        "CreateWebhook is refused: QUOTA_EXCEEDED",
    ),
    (
        "sessions of a webhook that wait for a retry",
        f"{delivery.MAX_HELD:,}",
        "the webhook reads no further; its events wait in the log",
    ),
    (
        "deliveries of a webhook, of a tenant, of a node at a time",
        f"{attempts.CONCURRENCY}; {attempts.OF_TENANT}, fewer while many tenants deliver; "
        f"{attempts.OF_ALL:,}",
        "further ones wait",
    ),
    (
        "bytes of a connection without a call, in a second",
        size(floods.FLOOD_BYTES),
        "the connection is reset if it sends as much again",
    ),
    (
        "names of endpoints that are resolved at a time, of a tenant and of a node",
        f"{names.LOOKUPS_OF_TENANT}; {names.RESOLVERS}",
        f"further ones wait {names.WAIT_SECONDS:g} s, and again after {attempts.BUSY_SECONDS:g} s",
    ),
    (
        "the same, of all tenants with a name that took longer than a second to resolve, for a "
        "minute, and up to an hour if it happens again",
        f"1; {names.SLOW_RESOLVERS}",
        "the same",
    ),
    (
        "time of a delivery; head and body of an answer",
        f"{sender.TIMEOUT:g} s; {size(sender.MAX_ANSWER)} each",
        "the delivery failed; more of the body is not read",
    ),
    ("metadata of a call", size(endpoint.MAX_METADATA), "the call is refused by gRPC"),
    (
        "open calls and streams of a connection",
        f"{endpoint.MAX_CALLS:,}",
        "further calls wait in the client",
    ),
    (
        "connections of a process",
        f"half of its descriptors, at most {endpoint.MAX_CONNECTIONS:,}",
        "further ones are closed",
    ),
    (
        "connections to the metrics page",
        f"{metrics_server.MAX_CONNECTIONS}",
        "further ones are closed",
    ),
    (
        "connections of one IP address (IPv6: one /64 network) to a process",
        "half of these, or `--max-connections-per-address`",
        "the newest are closed within a second",
    ),
    (
        "time between two progress marks (`--progress-interval`)",
        f"{MAX_PROGRESS_INTERVAL:g} s",
        "the setting is refused",
    ),
)

AGENTS = (
    (
        "arguments of a tool call",
        size(agent_output.MAX_TOOL_BYTES),
        "the run fails with AGENT_ERROR",
    ),
    ("result of a tool", size(agent_output.MAX_TOOL_BYTES), "cut"),
    (
        "id of a tool call",
        f"{agent_output.MAX_CALL_ID_CHARS:,} characters",
        "the run fails with AGENT_ERROR",
    ),
    (
        "name of a tool or a model",
        f"{agent_output.MAX_NAME_CHARS:,} characters",
        "the run fails with AGENT_ERROR",
    ),
    (
        "open input requests of a run; all of them",
        f"{asking.MAX_OPEN_INPUTS}; {asking.MAX_INPUTS:,}",
        "the run fails with INPUT_LIMIT",
    ),
    (
        "questions of a tenant per time",
        "its quota `questions_per_second`",
        "the question is refused, with INPUT_RATE_LIMITED",
    ),
    (
        "question with its arguments or its schema",
        size(questions.MAX_QUESTION_BYTES),
        "the run fails with QUESTION_INVALID",
    ),
    ("answer", size(questions.MAX_ANSWER_BYTES), "the answer is refused: ANSWER_INVALID"),
    (
        "default answer",
        size(questions.MAX_DEFAULT_BYTES),
        "the run fails with QUESTION_INVALID",
    ),
    (
        "checkpoint of an agent that leaves while it waits",
        size(questions.MAX_CHECKPOINT_BYTES),
        "the run fails with AGENT_ERROR",
    ),
    (
        "content of an artifact, all pieces together",
        size(artifact.MAX_ARTIFACT_BYTES),
        "the run fails with AGENT_ERROR; pass larger content as a `uri`",
    ),
    (
        "name, media type, `uri` of an artifact",
        f"{agent_output.MAX_ARTIFACT_NAME_BYTES} bytes, {agent_output.MAX_ARTIFACT_NAME_BYTES}"
        f" bytes, {size(agent_output.MAX_URI_BYTES)}",
        "the run fails with AGENT_ERROR",
    ),
    (
        "id of an artifact, type of a custom event, key of a step",
        f"{agent_output.MAX_ID_BYTES} bytes",
        "the run fails with AGENT_ERROR",
    ),
    (
        "JSON of a custom event, of a result, of a step",
        f"{size(agent_output.MAX_JSON_BYTES)}; {json_parts.MAX_JSON_PARTS:,} lists and objects",
        "the run fails with AGENT_ERROR",
    ),
    ("message of an error", f"{agent_output.MAX_ERROR_CHARS:,} characters", "cut"),
    (
        "each part of a message, besides its content",
        size(outbox.PART_BYTES),
        "bounds the number of parts",
    ),
    (
        "output that is not stored yet",
        f"{outbox.OUTBOX_CHARS:,} characters and {outbox.OUTBOX_EVENTS:,} events",
        "the agent is paused until it is stored",
    ),
    ("text of one stored event", f"{outbox.DELTA_CHARS:,} characters", "split into several"),
    (
        "messages of one attempt",
        f"{lane.ATTEMPT_ORDINALS:,}",
        "never reached: the output limit comes first",
    ),
)

MEMORY = (
    ("terminal events of all tenants", size(feed.LOG_TAIL_BYTES)),
    ("live events of all runs that subscriptions follow", size(feed.RUN_TAIL_BYTES)),
    (
        "events read for one subscription at a time",
        f"{feed.PAGE_EVENTS} and {size(feed.PAGE_BYTES)}",
    ),
    (
        "events of one webhook that are read and not delivered",
        f"{delivery.WINDOW:,} and {size(delivery.WINDOW_BYTES)}",
    ),
    ("lanes of idle sessions in memory", f"{lane_cache.CAPACITY:,}"),
    (
        "prompts of waiting runs in memory",
        f"{lanes.CACHED_REQUESTS:,} of up to {lanes.CACHED_CHARS:,} characters",
    ),
    ("verified JSON Web Tokens in memory", f"{jwts.MAX_CACHED:,}"),
    ("output of agents in one transaction", size(batching.MAX_APPENDED)),
    ("other text of one SQLite transaction", size(sqlite_writer.MAX_BATCH_CHARS)),
    ("other rows of one PostgreSQL transaction", size(postgres_writer.MAX_BATCH_BYTES)),
    ("page of the history that is read for an agent", size(agent_turn.HISTORY_BYTES)),
    ("events read at a time to recover a run", size(replay.EVENTS_BYTES)),
    ("time after which a WaitRun call reads the run again", f"{coordinator.WAIT_SLICE:g} s"),
)


def settings() -> str:
    """The table of the settings."""
    by_key = {setting.key: setting for setting in SETTINGS}
    lines = ["| setting | default | when it is reached |", "|---|---|---|"]
    for key, effect in SET.items():
        setting = by_key[key]
        default = setting.without or f"`{setting.default_text}`"
        lines.append(f"| `{setting.flag}` | {default} | {effect} |")
    return "\n".join(lines)


def table(head: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    """A table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written(text: str) -> str:
    """The page with its tables."""
    head = ("what", "limit", "when it is reached")
    text = between(text, "settings", settings())
    text = between(text, "calls", table(head, CALLS))
    text = between(text, "agents", table(head, AGENTS))
    return between(text, "memory", table(("what", "limit"), MEMORY))


if __name__ == "__main__":
    main(PAGE, written, "The tables of the limits")
