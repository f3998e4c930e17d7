"""Converts errors of pydantic-ai to `AgentError`.

The reasons are part of the interface:

    PROVIDER_AUTH           the key is missing, wrong, or lacks a permission
    PROVIDER_RATE_LIMITED   too many requests, or the quota is used up
    PROVIDER_UNAVAILABLE    unreachable, overloaded, or an internal error of the provider
    PROVIDER_REJECTED       an invalid request: unknown model, too long, not allowed
    PROVIDER_ERROR          any other error in an answer
    MODEL_ERROR             an output of the model that the agent cannot use
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic_ai.exceptions import AgentRunError, ModelAPIError, ModelHTTPError

from runlane_server.agents.base import AgentError

MAX_MESSAGE_CHARS = 300

_SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")


def to_agent_error(exc: Exception) -> AgentError:
    """Converts an error; the message is one line, without secrets."""
    match exc:
        case ModelHTTPError():
            message = f"the provider answered {exc.status_code} for {exc.model_name}"
            reason = _reason_of_status(exc.status_code)
            # The body of an authentication error quotes a part of the key.
            detail = "" if reason == "PROVIDER_AUTH" else _detail(exc.body)
        case ModelAPIError():
            message = f"the provider of {exc.model_name} failed"
            reason = "PROVIDER_ERROR" if exc.in_stream else "PROVIDER_UNAVAILABLE"
            detail = exc.message
        case AgentRunError():
            message, reason, detail = "the model failed", "MODEL_ERROR", exc.message
        case _:
            message, reason, detail = "the request could not be made", "MODEL_ERROR", str(exc)
    return AgentError(_one_line(f"{message}: {detail}" if detail else message), reason=reason)


def _reason_of_status(status: int) -> str:
    if status in {401, 403}:
        return "PROVIDER_AUTH"
    if status == 429:
        return "PROVIDER_RATE_LIMITED"
    if status >= 500 or status == 408:
        return "PROVIDER_UNAVAILABLE"
    return "PROVIDER_REJECTED"


def _detail(body: object) -> str:
    """The message in the body of an error: `{"message": ...}`, possibly inside `"error"`."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        message = inner.get("message") if isinstance(inner, Mapping) else inner
        return message if isinstance(message, str) else ""
    return body if isinstance(body, str) else ""


def _one_line(text: str) -> str:
    for name, value in os.environ.items():
        if name.endswith(_SECRETS) and len(value) >= 8:
            text = text.replace(value, "***")
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE_CHARS else text[: MAX_MESSAGE_CHARS - 1] + "…"
