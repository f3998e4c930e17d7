"""Input requests: the questions of an agent to people, and their answers (R40 to R45).

A lane keeps of a request only what its rules need, `OpenInput`. The request itself is in the store.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import NamedTuple

from runlane_server.core.model import Micros


class InputKind(StrEnum):
    """The kinds of an answer."""

    APPROVAL = "approval"  # of a tool call: yes or no, with other arguments if need be
    CHOICE = "choice"  # one of a list
    FORM = "form"  # an object that matches a JSON Schema
    TEXT = "text"


class InputState(StrEnum):
    """The state of an input request. It leaves OPEN once."""

    OPEN = "open"
    ANSWERED = "answered"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class Question(NamedTuple):
    """A question of an agent.

    `key` names the question within its run: the same key gets the same answer (R44). `tool_name`
    and `arguments_json` are for an approval, `choices` for a choice, `schema_json` for a form.
    `timeout` is the time after which it expires; `default_json` is the answer that then applies.
    Without it the run fails (R43).
    """

    key: str
    kind: InputKind
    text: str
    tool_name: str = ""
    arguments_json: str = ""
    choices: tuple[str, ...] = ()
    schema_json: str = ""
    timeout: Micros | None = None
    default_json: str | None = None

    @property
    def digest(self) -> str:
        """A digest of all that a person is shown; an answer may name it."""
        shown = [self.kind, self.text, self.tool_name, self.arguments_json]
        shown += [*self.choices, self.schema_json]
        return hashlib.blake2b(json.dumps(shown).encode(), digest_size=16).hexdigest()


class Answer(NamedTuple):
    """An answer, and the record of its origin.

    `by` is the name of the caller, empty on a server without access control; `how` is the way in
    which it was authenticated, `default` for the default answer of a request that expired; `peer`
    is the address that the call came from; `digest` is that of the question as it was shown.
    """

    answer_id: str
    value_json: str
    by: str
    how: str
    peer: str
    digest: str
    at: Micros


class InputRequest(NamedTuple):
    """A stored input request. `answer` is set if it was answered or its default answer applied."""

    input_request_id: str
    session_id: str
    run_id: str
    question: Question
    state: InputState
    requested_at: Micros
    expires_at: Micros | None
    closed_at: Micros | None = None
    answer: Answer | None = None


class OpenInput(NamedTuple):
    """The part of an open request that its lane needs."""

    input_request_id: str
    key: str
    default_json: str | None = None


class LateInput(NamedTuple):
    """A closed request whose event is still to be written."""

    state: InputState
    input_request_id: str
    key: str


class RunInput(NamedTuple):
    """The input requests of a run that has not ended, as its lane knows them.

    `asked` counts all requests of the run. `late` are closed requests whose events are still to be
    written: while an agent is emitting, only its supervisor knows the number of events. `expired`
    is the request whose expiry ends the run. A run is `parked` if no agent works for it; then
    `restarts`: it continues as a new attempt. `resumable`: its agent can start again and
    use the answers. `extra_attempts` are those that do not count (R37, R44). `used` is the time the
    attempt was active before it was parked, in microseconds; `checkpoint` is what the agent needs
    to go on. `asks` counts the commits that asked.
    """

    pending: tuple[OpenInput, ...] = ()
    asked: int = 0
    late: tuple[LateInput, ...] = ()
    expired: str = ""
    parked: bool = False
    restarts: bool = False
    resumable: bool = False
    extra_attempts: int = 0
    used: Micros = 0
    checkpoint: str = ""
    asks: int = 0

    @property
    def waits(self) -> bool:
        """Whether only an answer goes on with the run: a request is open, and no agent works."""
        return self.parked and bool(self.pending)


NO_INPUT = RunInput()


class InputChange(NamedTuple):
    """An input request after a transition; with the request itself if it is new."""

    input_request_id: str
    run_id: str
    state: InputState
    at: Micros
    request: InputRequest | None = None
    answer: Answer | None = None


class Park(NamedTuple):
    """An agent that has returned, and is called again when its questions are answered.

    With a checkpoint the attempt continues, and its output stays. Without one the agent starts
    again, as another attempt that does not count (R44).
    """

    checkpoint: str
    used: Micros


MAX_OPEN_INPUTS = 16
"""The open requests of one run."""

MAX_INPUTS = 1_000
"""The requests of one run, all attempts together."""
