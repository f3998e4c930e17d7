"""Webhooks: records of their settings and their health."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

from google.protobuf.timestamp_pb2 import Timestamp

from runlane.types import NO_LABELS, RunState
from runlane.v1 import run_pb2
from runlane.v1 import webhook_service_pb2 as pb


class WebhookEventKind(StrEnum):
    """A kind of event that is delivered."""

    RUN_ENDED = "run.ended"
    INPUT_REQUESTED = "input.requested"
    UNKNOWN = "unknown"


class WebhookFormat(StrEnum):
    """The form of the bodies of deliveries."""

    STANDARD = "standard"
    A2A = "a2a"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class WebhookRun:
    """Binds a webhook to a single run.

    Attributes:
        run_id: The run. It need not be accepted yet, but must be within an hour.
        name: A name that is unique among the webhooks of the run.
        format: The form of the bodies of deliveries.
        authorization: The header Authorization of each delivery. The server returns only its
            scheme.
        notification_token: The header X-A2A-Notification-Token of each delivery. The server does
            not return it.
    """

    run_id: str
    name: str = ""
    format: WebhookFormat = WebhookFormat.STANDARD
    authorization: str = field(default="", repr=False)
    notification_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class WebhookFilter:
    """Selects events. Each criterion that is given must match.

    Attributes:
        session_ids: Sessions.
        session_id_prefixes: Beginnings of session ids; an event matches by either of the two.
        labels: Labels that the run has, with these values.
        agents: Agents that execute the run.
        states: Terminal states of the run; input requests match any.
        kinds: Kinds of events.
    """

    session_ids: tuple[str, ...] = ()
    session_id_prefixes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: NO_LABELS)
    agents: tuple[str, ...] = ()
    states: tuple[RunState, ...] = ()
    kinds: tuple[WebhookEventKind, ...] = ()


@dataclass(frozen=True, slots=True)
class WebhookHealth:
    """How the deliveries of a webhook are doing.

    Attributes:
        disabled_reason: Why the server stopped to deliver; empty while it delivers.
        cursor: The place in the event log up to which everything was delivered, does not match, or
            waits for a retry.
        held_sessions: Sessions whose events wait for a retry.
        failures: Failed attempts since the last success.
        failing_since: The first of them.
        next_attempt_at: The earliest next attempt, if the webhook fails as a whole.
        last_error: The last failure.
        last_error_at: When.
        last_success_at: The last delivery that arrived.
        delivered: Deliveries that arrived.
        given_up: Events that were given up after three days, while others arrived.
        compacted_at: When events were found to be removed before they were delivered.
        confirmed: Whether the endpoint has answered the challenge for its URL.
    """

    disabled_reason: str
    cursor: str
    held_sessions: int
    failures: int
    failing_since: datetime | None
    next_attempt_at: datetime | None
    last_error: str
    last_error_at: datetime | None
    last_success_at: datetime | None
    delivered: int
    given_up: int
    compacted_at: datetime | None
    confirmed: bool


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook.

    Attributes:
        webhook_id: The id.
        url: The URL that deliveries are posted to.
        filter: The events to deliver.
        full: Whether deliveries have the whole event, and not only ids and states.
        enabled: Whether it delivers.
        etag: Changes with each update.
        created_at: When it was created.
        updated_at: When a caller last changed it.
        old_secret_expires_at: Until when the previous secret signs as well.
        health: How its deliveries are doing.
        run: The run whose events it delivers; None: those of all runs.
    """

    webhook_id: str
    url: str
    filter: WebhookFilter
    full: bool
    enabled: bool
    etag: str
    created_at: datetime
    updated_at: datetime
    old_secret_expires_at: datetime | None
    health: WebhookHealth
    run: WebhookRun | None = None


@dataclass(frozen=True, slots=True)
class WebhookSecret:
    """A webhook and its new secret, which no later call returns."""

    webhook: Webhook
    secret: str


_KIND_NUMBERS = {
    WebhookEventKind.RUN_ENDED: pb.WEBHOOK_EVENT_KIND_RUN_ENDED,
    WebhookEventKind.INPUT_REQUESTED: pb.WEBHOOK_EVENT_KIND_INPUT_REQUESTED,
}
_KINDS = {number: kind for kind, number in _KIND_NUMBERS.items()}


_FORMAT_NUMBERS = {
    WebhookFormat.STANDARD: pb.WEBHOOK_FORMAT_STANDARD,
    WebhookFormat.A2A: pb.WEBHOOK_FORMAT_A2A,
}
_FORMATS = {number: name for name, number in _FORMAT_NUMBERS.items()}


def to_run(run: WebhookRun) -> pb.WebhookRun:
    """Converts what binds a webhook to a run."""
    return pb.WebhookRun(
        run_id=run.run_id,
        name=run.name,
        format=_FORMAT_NUMBERS[WebhookFormat(run.format)],
        authorization=run.authorization,
        notification_token=run.notification_token,
    )


def _run(message: pb.WebhookRun) -> WebhookRun:
    form = _FORMATS.get(message.format, WebhookFormat.UNKNOWN)
    return WebhookRun(message.run_id, message.name, form, message.authorization)


def to_filter(wanted: WebhookFilter) -> pb.WebhookFilter:
    """Converts a filter. Raises ValueError for an unknown state or kind, and TypeError."""
    return pb.WebhookFilter(
        session_ids=_texts("session_ids", wanted.session_ids),
        session_id_prefixes=_texts("session_id_prefixes", wanted.session_id_prefixes),
        labels=wanted.labels,
        agents=_texts("agents", wanted.agents),
        states=[run_pb2.RunState.Value(f"RUN_STATE_{state.upper()}") for state in wanted.states],
        kinds=[_KIND_NUMBERS[WebhookEventKind(kind)] for kind in wanted.kinds],
    )


def _texts(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str):
        raise TypeError(f"{name}: expected a list, not a str; pass [{values!r}]")
    return list(values)


def _filter(message: pb.WebhookFilter) -> WebhookFilter:
    names = {number: name for name, number in run_pb2.RunState.items()}
    states = [names[state].removeprefix("RUN_STATE_").lower() for state in message.states]
    return WebhookFilter(
        session_ids=tuple(message.session_ids),
        session_id_prefixes=tuple(message.session_id_prefixes),
        labels=dict(message.labels),
        agents=tuple(message.agents),
        states=tuple(RunState(state) for state in states),
        kinds=tuple(_KINDS.get(kind, WebhookEventKind.UNKNOWN) for kind in message.kinds),
    )


def webhook(message: pb.Webhook) -> Webhook:
    """Converts a webhook."""
    health = message.health
    return Webhook(
        webhook_id=message.webhook_id,
        url=message.url,
        filter=_filter(message.filter),
        full=message.full,
        enabled=message.enabled,
        etag=message.etag,
        created_at=message.created_at.ToDatetime(UTC),
        updated_at=message.updated_at.ToDatetime(UTC),
        old_secret_expires_at=_time(message.old_secret_expires_at),
        health=WebhookHealth(
            disabled_reason=health.disabled_reason,
            cursor=health.cursor,
            held_sessions=health.held_sessions,
            failures=health.failures,
            failing_since=_time(health.failing_since),
            next_attempt_at=_time(health.next_attempt_at),
            last_error=health.last_error,
            last_error_at=_time(health.last_error_at),
            last_success_at=_time(health.last_success_at),
            delivered=health.delivered,
            given_up=health.given_up,
            compacted_at=_time(health.compacted_at),
            confirmed=health.confirmed,
        ),
        run=_run(message.run) if message.HasField("run") else None,
    )


def _time(timestamp: Timestamp) -> datetime | None:
    """The time, or None if it is not set: no webhook is as old as 1970."""
    return timestamp.ToDatetime(UTC) if timestamp.seconds else None
