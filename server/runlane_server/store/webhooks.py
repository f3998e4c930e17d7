"""Webhooks in a store: their records, the interface to them, and their encoding.

Deliveries read the event log. Its terminal events have positions; an input request has a place
between two of them, given by the event before it and a number (see `Place`). So both are in one
order, although a subscription to terminal events never sees the requests.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from runlane_server.core.errors import CorruptRecord
from runlane_server.core.input import InputRequest
from runlane_server.core.model import Micros, Run, RunComplete, RunState
from runlane_server.store.base import BEGINNING, Page, Position
from runlane_server.store.corrupt import EXPLANATION, decoded

RUN_ENDED = "run.ended"
INPUT_REQUESTED = "input.requested"
KINDS = (RUN_ENDED, INPUT_REQUESTED)

STANDARD = "standard"
A2A = "a2a"
FORMATS = (STANDARD, A2A)
"""The form of the bodies of deliveries."""

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Place(NamedTuple):
    """A place in the event log, input requests included.

    The terminal event at a position has that position and 0. The requests after it, and before the
    next terminal event, have the same position and 1, 2, 3, ...
    """

    position: Position
    number: int = 0


START = Place(BEGINNING)


class WebhookKey(NamedTuple):
    """A webhook."""

    tenant: str
    webhook_id: str


@dataclass(frozen=True, slots=True)
class WebhookFilter:
    """Selects events. An empty list or mapping selects all; every criterion must match."""

    session_ids: frozenset[str] = frozenset()
    session_prefixes: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    agents: frozenset[str] = frozenset()
    states: frozenset[RunState] = frozenset()
    kinds: frozenset[str] = frozenset()

    @property
    def reads_runs(self) -> bool:
        """Whether a match depends on the request of the run, which no event has."""
        return bool(self.labels or self.agents)

    def matches(self, kind: str, body: RunComplete | InputRequest) -> bool:
        """Whether it selects an event, as far as the event itself decides."""
        if self.kinds and kind not in self.kinds:
            return False
        if isinstance(body, RunComplete) and self.states and body.state not in self.states:
            return False
        if not (self.session_ids or self.session_prefixes):
            return True
        session_id = body.session_id
        return session_id in self.session_ids or session_id.startswith(self.session_prefixes)

    def matches_run(self, run: Run) -> bool:
        """Whether it selects events of a run by its agent and its labels."""
        if self.agents and run.agent not in self.agents:
            return False
        return all(run.metadata.get(name) == value for name, value in self.labels.items())


@dataclass(frozen=True, slots=True)
class Held:
    """A session whose events wait for a retry.

    `after` is the place before the event that failed; `failures` counts its attempts; the next one
    is at `due`. `since` is the time of the first failure.
    """

    session_id: str
    after: Place
    failures: int
    due: Micros
    since: Micros


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a webhook is, and its health.

    All events up to `cursor` were delivered, or do not match, or belong to a session in `held`.
    `failures` counts failed attempts since the last success. `given_up` counts events that were
    never delivered; `lost_before` is the time at which the log turned out to be compacted beyond
    the cursor. `disabled` is the reason why the server stopped to deliver; empty while it does not.
    `confirmed` is the URL that has answered a challenge.
    """

    cursor: Place = START
    held: tuple[Held, ...] = ()
    failures: int = 0
    failing_since: Micros | None = None
    next_attempt_at: Micros | None = None
    last_error: str = ""
    last_error_at: Micros | None = None
    last_success_at: Micros | None = None
    delivered: int = 0
    given_up: int = 0
    lost_before: Micros | None = None
    disabled: str = ""
    confirmed: str = ""


@dataclass(frozen=True, slots=True)
class OfRun:
    """The additional fields of a webhook of a single run.

    It delivers nothing but the events of `run_id`, and is deleted some time after its end. `name`
    is unique among the webhooks of the run. `headers` are JSON: further headers of each delivery,
    with their values, which are secret. `scheme` is that of the header Authorization among them.
    """

    run_id: str
    name: str
    format: str = STANDARD
    headers: str = ""
    scheme: str = ""


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook. `secrets` are the current one and, during a rotation, the one before it, which
    signs until `old_secret_until`. `revision` counts changes by callers; `fence` identifies the
    only one who may write `progress`. `of_run` is None for one that delivers the events of all
    runs."""

    key: WebhookKey
    url: str
    secrets: tuple[str, ...]
    wanted: WebhookFilter
    full: bool
    enabled: bool
    created_at: Micros
    updated_at: Micros
    revision: int = 1
    fence: int = 1
    old_secret_until: Micros | None = None
    progress: Progress = Progress()
    of_run: OfRun | None = None

    @property
    def run_id(self) -> str:
        """The only run whose events it delivers; empty: all runs."""
        return "" if self.of_run is None else self.of_run.run_id

    def matches(self, kind: str, body: RunComplete | InputRequest) -> bool:
        """Whether it delivers an event, as far as the event itself decides."""
        if self.of_run is not None and body.run_id != self.of_run.run_id:
            return False
        return self.wanted.matches(kind, body)


class Most(NamedTuple):
    """How many webhooks there may be: of a tenant, and of each of its runs. Those of runs do not
    count among the others."""

    of_tenant: int
    of_run: int


class Lease(NamedTuple):
    """A webhook that a node delivers for. One in excess is beyond its share among the nodes: it is
    to be released once the node has stopped to deliver for it."""

    key: WebhookKey
    revision: int
    fence: int
    is_excess: bool = False


@dataclass(frozen=True, slots=True)
class LoggedInput:
    """An input request at its place in the event log."""

    place: Place
    request: InputRequest


class WebhookStore(Protocol):
    """Webhooks, and the input requests of the event log.

    Every method may raise StoreUnavailable.
    """

    async def create(self, webhook: Webhook, *, most: Most) -> bool:
        """Stores a new webhook. Returns False if its tenant, or its run, has as many as it may, on
        all nodes; and if a webhook of a run exists."""

    async def get(self, key: WebhookKey) -> Webhook | None:
        """A webhook, or None."""

    async def list(
        self, tenant: str, *, after: int | None, limit: int, run_id: str = ""
    ) -> Page[Webhook, int]:
        """A page of a tenant's webhooks after a place, the latest created first; only those of
        `run_id`, if it is given."""

    async def replace(self, webhook: Webhook, *, resets: bool) -> bool:
        """Writes a webhook whose stored revision is `webhook.revision`, and raises that by 1.

        `progress` is written only with `resets`; then the fence is raised too, so that the node
        that delivers begins again from it. Returns False if the revision is another one.
        """

    async def delete(self, key: WebhookKey) -> bool:
        """Deletes a webhook. Returns False if there is none."""

    async def lease(self, node_id: str, seconds: float, limit: int) -> Sequence[Lease]:
        """The webhooks that a node delivers for, up to `limit`, from now for `seconds` seconds.

        It renews those that the node has, and takes over those that no other node has: new ones up
        to the node's share, and all whose lease has expired. A webhook gets a new fence with each
        new node.
        """

    async def release(self, node_id: str, keys: Collection[WebhookKey] | None = None) -> None:
        """Ends leases of a node, by default all."""

    async def save(self, key: WebhookKey, fence: int, progress: Progress) -> bool:
        """Writes the progress of a webhook. Returns False, and writes nothing, if the fence is
        another one or the webhook was deleted."""

    async def inputs(
        self,
        tenant: str,
        *,
        after: Place,
        upto: Position,
        limit: int,
        session_id: str | None = None,
    ) -> Sequence[LoggedInput]:
        """Input requests after a place and up to those behind the event at `upto`, in order."""

    async def last_input(self) -> Place:
        """The place of the last input request of all tenants; START without any."""


def with_revision(webhook: Webhook, *, resets: bool) -> Webhook:
    """A webhook after a change."""
    return replace(
        webhook, revision=webhook.revision + 1, fence=webhook.fence + 1 if resets else webhook.fence
    )


# Encoding


class WebhookTexts(NamedTuple):
    """The columns of a webhook that hold JSON."""

    settings: str
    secrets: str
    progress: str


def encode_webhook(webhook: Webhook) -> WebhookTexts:
    """Encodes a webhook, except for what has a column of its own."""
    wanted = webhook.wanted
    settings: dict[str, Any] = {
        "url": webhook.url,
        "full": webhook.full,
        "session_ids": sorted(wanted.session_ids),
        "session_prefixes": wanted.session_prefixes,
        "labels": dict(wanted.labels),
        "agents": sorted(wanted.agents),
        "states": sorted(wanted.states),
        "kinds": sorted(wanted.kinds),
    }
    secrets: dict[str, Any] = {
        "secrets": webhook.secrets,
        "old_until": webhook.old_secret_until,
    }
    if (of_run := webhook.of_run) is not None:
        # An older server finds no URL, and does not deliver the events of all runs to it.
        bound = [of_run.run_id, of_run.name, of_run.format, of_run.scheme]
        settings = {"of_run": bound, "settings": settings}
        secrets["headers"] = of_run.headers
    return WebhookTexts(_dumps(settings), _dumps(secrets), encode_progress(webhook.progress))


def encode_progress(progress: Progress) -> str:
    """Encodes the progress of a webhook."""
    fields = {name: getattr(progress, name) for name in progress.__match_args__}
    fields["held"] = [
        [it.session_id, *it.after, it.failures, it.due, it.since] for it in progress.held
    ]
    return _dumps(fields)


def decode_progress(text: str) -> Progress:
    """Decodes the result of `encode_progress`."""
    fields = json.loads(text)
    fields["cursor"] = Place(*fields["cursor"])
    fields["held"] = tuple(
        Held(session_id, Place(position, number), *rest)
        for session_id, position, number, *rest in fields["held"]
    )
    return Progress(**fields)


def decode_webhook(key: WebhookKey, row: Any) -> Webhook:
    """A webhook from its row; one that cannot be read delivers nothing, says so, and can be
    deleted."""
    return decoded(lambda: _webhook(key, row), lambda: _corrupt(key), "webhook", *key)


def _corrupt(key: WebhookKey) -> Webhook:
    return Webhook(
        key,
        url="",
        secrets=("",),
        wanted=WebhookFilter(),
        full=False,
        enabled=False,
        created_at=0,
        updated_at=0,
        revision=0,
        fence=0,
        progress=Progress(disabled=f"{CorruptRecord.reason}: {EXPLANATION}"),
    )


def _webhook(key: WebhookKey, row: Any) -> Webhook:
    settings, secrets = json.loads(row["settings"]), json.loads(row["secrets"])
    of_run = None
    if "of_run" in settings:
        of_run = _of_run(settings["of_run"], secrets["headers"])
        settings = settings["settings"]
    return Webhook(
        key,
        url=settings["url"],
        secrets=tuple(secrets["secrets"]),
        wanted=WebhookFilter(
            frozenset(settings["session_ids"]),
            tuple(settings["session_prefixes"]),
            MappingProxyType(settings["labels"]),
            frozenset(settings["agents"]),
            frozenset(map(RunState, settings["states"])),
            frozenset(settings["kinds"]),
        ),
        full=settings["full"],
        enabled=bool(row["enabled"]),
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        revision=row["revision"],
        fence=row["fence"],
        old_secret_until=secrets["old_until"],
        progress=decode_progress(row["progress"]),
        of_run=of_run,
    )


def _of_run(settings: Sequence[str], headers: str) -> OfRun:
    run_id, name, format_, scheme = settings
    return OfRun(run_id, name, format_, headers, scheme)
