"""Converts errors of pydantic-ai to `AgentError`.

The reasons are part of the interface:

    PROVIDER_AUTH           the key is missing, wrong, or lacks a permission
    PROVIDER_RATE_LIMITED   too many requests, or the quota is used up
    PROVIDER_UNAVAILABLE    unreachable, overloaded, failing, or an answer that was cut off
    PROVIDER_REJECTED       an invalid request: unknown model, a file that it does not take
    PROVIDER_CONTEXT_LENGTH the conversation is too long for the model
    PROVIDER_ERROR          any other error in an answer, or an answer that cannot be read
    MODEL_ERROR             an output of the model that the agent cannot use
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic_ai.exceptions import (
    AgentRunError,
    ModelAPIError,
    ModelAuthenticationError,
    ModelContextWindowExceededError,
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRateLimitError,
    ModelRequestRejectedError,
)

from runlane_server.agents.base import AgentError

MAX_MESSAGE_CHARS = 300

REJECTIONS = frozenset({"PROVIDER_REJECTED", "PROVIDER_CONTEXT_LENGTH"})
"""The reasons for which a request with less content may succeed."""

_SECRETS = ("_KEY", "_TOKEN", "_SECRET", "_PASSWORD")


def to_agent_error(exc: Exception) -> AgentError:
    """Converts an error; the message is one line, without secrets."""
    match exc:
        case ExceptionGroup():  # all models of a fallback failed; the last one was asked last
            return to_agent_error(exc.exceptions[-1])
        case ModelHTTPError():
            message = f"the provider answered {exc.status_code} for {exc.model_name}"
            reason = _reason_of(exc)
            # The body of an authentication error quotes a part of the key.
            detail = "" if reason == "PROVIDER_AUTH" else _detail(exc.body)
        case ModelAPIError():
            message, reason = f"the provider of {exc.model_name} failed", _reason_of(exc)
            detail = exc.message
        case AgentRunError():
            message, reason, detail = "the model failed", "MODEL_ERROR", exc.message
        case _:
            message, reason, detail = "the request could not be made", "MODEL_ERROR", str(exc)
    if isinstance(exc, ModelAPIError) and exc.retry_after is not None:
        message += f" (retry after {exc.retry_after:.0f} s)"
    return AgentError(_one_line(f"{message}: {detail}" if detail else message), reason=reason)


def _reason_of(exc: ModelAPIError) -> str:
    """The reason of an error of a provider: by its category, or else by its status."""
    match exc:
        case ModelAuthenticationError():
            return "PROVIDER_AUTH"
        case ModelRateLimitError() | ModelQuotaExceededError():
            return "PROVIDER_RATE_LIMITED"
        case ModelContextWindowExceededError():
            return "PROVIDER_CONTEXT_LENGTH"
        case ModelHTTPError(status_code=status):
            return _reason_of_status(status)
        case ModelRequestRejectedError():
            return "PROVIDER_REJECTED"
        case _:
            return "PROVIDER_ERROR" if exc.in_stream else "PROVIDER_UNAVAILABLE"


def _reason_of_status(status: int) -> str:
    if status in {401, 403}:
        return "PROVIDER_AUTH"
    if status in {402, 429}:
        return "PROVIDER_RATE_LIMITED"
    if status == 413:
        return "PROVIDER_CONTEXT_LENGTH"
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
