"""The bodies of deliveries to webhooks: `type`, `timestamp` and `data`, as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict

from runlane_server.core.input import InputRequest
from runlane_server.core.model import Micros, RunComplete
from runlane_server.rpc import convert
from runlane_server.rpc.a2a_payload import status_update
from runlane_server.rpc.inputs import input_request
from runlane_server.store.webhooks import (
    A2A,
    INPUT_REQUESTED,
    RUN_ENDED,
    Place,
    Webhook,
    WebhookKey,
)

_dumps = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_STATES = {state: f"RUN_STATE_{state.name}" for state in convert.RUN_STATES}


class WebhookPayload:
    """Encodes deliveries. Enums, times and whole messages have protobuf's JSON mapping, as over
    HTTP."""

    def __init__(self, store_id: bytes) -> None:
        self._key = store_id

    def message_id(self, key: WebhookKey, place: Place) -> str:
        """The id of an event for a webhook. It hides the place, which counts all tenants' runs."""
        name = "\0".join((*key, str(place.position), str(place.number)))
        return f"msg_{hashlib.blake2b(name.encode(), key=self._key, digest_size=16).hexdigest()}"

    def event(self, body: RunComplete | InputRequest, webhook: Webhook) -> bytes:
        """The body of a delivery: ids and states, or the whole message; or what A2A defines."""
        if webhook.of_run is not None and webhook.of_run.format == A2A:
            return _dumps({"statusUpdate": status_update(body)}).encode()
        full = webhook.full
        if isinstance(body, RunComplete):
            data = _whole(convert.run_complete(body)) if full else _end(body)
            return _body(RUN_ENDED, body.ended_at, data)
        data = _whole(input_request(body)) if full else _question(body)
        return _body(INPUT_REQUESTED, body.requested_at, data)

    def challenge(self, value: str, at: Micros) -> bytes:
        """The body of a challenge: the answer must contain the value."""
        return _body("webhook.challenge", at, {"challenge": value})


def _body(kind: str, at: Micros, data: Mapping[str, Any]) -> bytes:
    timestamp = convert.timestamp(at).ToJsonString()
    return _dumps({"type": kind, "timestamp": timestamp, "data": data}).encode()


def _whole(message: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = MessageToDict(message)
    return found


def _end(complete: RunComplete) -> Mapping[str, Any]:
    error = complete.error
    return {
        "sessionId": complete.session_id,
        "runId": complete.run_id,
        "acceptSeq": str(complete.accept_seq),
        "state": _STATES[complete.state],
        **({} if error is None else {"errorReason": error.reason}),
    }


def _question(request: InputRequest) -> Mapping[str, Any]:
    return {
        "sessionId": request.session_id,
        "runId": request.run_id,
        "inputRequestId": request.input_request_id,
        "kind": f"INPUT_KIND_{request.question.kind.name}",
        "state": f"INPUT_STATE_{request.state.name}",
    }
