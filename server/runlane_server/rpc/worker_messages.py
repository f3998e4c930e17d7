"""Conversion between the messages of workers and records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runlane.v1 import run_pb2
from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.agents.base import AgentError, AgentEvent, FoldedPrompt, Report
from runlane_server.agents.worker.messages import (
    Acked,
    Assigned,
    Down,
    Fenced,
    Joined,
    Stopped,
    Transcript,
)
from runlane_server.agents.worker.slot import Resumption
from runlane_server.core.errors import Unsupported
from runlane_server.core.model import (
    FinishReason,
    Message,
    ReasoningDelta,
    RunKey,
    TextDelta,
    ToolCall,
    ToolResult,
    Usage,
)
from runlane_server.rpc import convert
from runlane_server.rpc.checks import MAX_ID_BYTES, Checks
from runlane_server.rpc.transcript import Mark, lay_out
from runlane_server.store.base import Page

PROTOCOL_VERSION = 1

MAX_AGENTS = 100
"""Agents of an offer."""

MAX_EVENTS = 1000
"""Events of an emit."""

MAX_DELTA_CHARS = 1 << 16
"""Characters of a delta: one stored event."""

WINDOW = 4096
"""Events that may be on their way without an acknowledgement."""

# The reverse of `convert.FINISH_REASONS`, for the reasons that an agent may report.
_FINISH_REASONS: dict[int, FinishReason] = {
    value: reason
    for reason, value in convert.FINISH_REASONS.items()
    if reason in {FinishReason.STOP, FinishReason.LENGTH, FinishReason.CONTENT_FILTER}
}


# --- From a worker --------------------------------------------------------------------------------


def check_offer(offer: pb.WorkRequest.Offer) -> None:
    """Raises InvalidArgument, and Unsupported for another version of the protocol."""
    if offer.protocol_version != PROTOCOL_VERSION:
        raise Unsupported(
            f"offer.protocol_version: is {offer.protocol_version}; this server speaks version"
            f" {PROTOCOL_VERSION}"
        )
    checks = Checks()
    checks.count("offer.agents", offer.agents, MAX_AGENTS)
    if not offer.agents:
        checks.reject("offer.agents", "is empty; name the agents that the worker executes")
    if len(set(offer.agents)) < len(offer.agents):
        checks.reject("offer.agents", "names an agent twice")
    checks.size("offer.worker_id", offer.worker_id, MAX_ID_BYTES)
    checks.finish()


def resumption(resume: pb.WorkRequest.Resume, tenant: str) -> Resumption:
    """The attempt that a worker continues; its tenant is that of the caller if none is named."""
    checks = Checks()
    checks.run_id(resume.run_id)
    checks.between("offer.resume.attempt", resume.attempt, 1)
    checks.identifiers("offer.resume.folded_run_ids", resume.folded_run_ids)
    checks.size("offer.resume.fence", resume.fence, MAX_ID_BYTES)
    checks.finish()
    key = RunKey(resume.tenant or tenant, resume.run_id)
    return Resumption(key, resume.attempt, resume.fence, frozenset(resume.folded_run_ids))


def events(emit: pb.WorkRequest.Emit) -> tuple[int, Sequence[AgentEvent]]:
    """The number of the first event of an emit, and its events. Raises InvalidArgument."""
    checks = Checks()
    checks.between("emit.number", emit.number, 1)
    checks.count("emit.events", emit.events, MAX_EVENTS)
    if not emit.events:
        checks.reject("emit.events", "is empty")
    found = [_event(checks, f"emit.events[{n}]", sent) for n, sent in enumerate(emit.events)]
    checks.finish()
    return emit.number, found


def _event(checks: Checks, field: str, sent: pb.Event) -> AgentEvent:
    match sent.WhichOneof("event"):
        case "text_delta":
            return TextDelta(_delta(checks, f"{field}.text_delta", sent.text_delta))
        case "reasoning_delta":
            return ReasoningDelta(_delta(checks, f"{field}.reasoning_delta", sent.reasoning_delta))
        case "tool_call":
            call = sent.tool_call
            return ToolCall(call.tool_call_id, call.name, call.arguments_json)
        case "tool_result":
            result = sent.tool_result
            return ToolResult(result.tool_call_id, result.name, result.content, result.is_error)
        case _:
            checks.reject(field, "has no event, or one of a newer protocol version")
            return TextDelta("")


def _delta(checks: Checks, field: str, text: str) -> str:
    if not text:
        checks.reject(field, "is empty")
    elif len(text) > MAX_DELTA_CHARS:
        checks.reject(field, f"has {len(text)} characters; the limit is {MAX_DELTA_CHARS}")
    return text


def finish_report(finish: pb.WorkRequest.Finish) -> Report:
    """The report of a turn that completed. Raises InvalidArgument."""
    checks = Checks()
    reason = FinishReason.STOP
    if finish.finish_reason != run_pb2.FINISH_REASON_UNSPECIFIED:
        reason = checks.enum(
            "finish.finish_reason", finish.finish_reason, _FINISH_REASONS.get, reason
        )
    checks.finish()
    return _report(finish, reason)


def failure(fail: pb.WorkRequest.Fail) -> tuple[Report, AgentError]:
    """The report of a turn that failed, and its error."""
    message = fail.message or "the agent failed"
    return _report(fail, None), AgentError(message, reason=fail.reason or "AGENT_ERROR")


def _report(
    sent: pb.WorkRequest.Finish | pb.WorkRequest.Fail, reason: FinishReason | None
) -> Report:
    usage = sent.usage
    return Report(
        usage=Usage(
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.requests,
        )
        if sent.HasField("usage")
        else None,
        model=sent.model or None,
        finish_reason=reason,
    )


# --- To a worker ----------------------------------------------------------------------------------


def encode(message: Down) -> Iterator[pb.WorkResponse]:
    """The messages on the wire for a message."""
    match message:
        case Assigned():
            yield pb.WorkResponse(turn=_turn(message))
        case Acked(number, ended):
            yield pb.WorkResponse(acked=pb.WorkResponse.Acked(number=number, ended=ended))
        case Joined(number, prompts):
            yield from _joined(number, prompts)
        case Stopped():
            yield pb.WorkResponse(cancel=pb.WorkResponse.Cancel())
        case Fenced(why):
            yield pb.WorkResponse(fenced=pb.WorkResponse.Fenced(message=why))
        case Transcript(messages):
            yield from _transcript(messages)


def _turn(assigned: Assigned) -> pb.WorkResponse.Turn:
    turn = assigned.turn
    return pb.WorkResponse.Turn(
        run_id=turn.run_id,
        session_id=turn.session_id,
        tenant=turn.key.tenant,
        agent=assigned.agent,
        attempt=turn.attempt,
        fence=turn.fence,
        prompt=turn.prompt.text,
        attachments=map(convert.attachment, turn.prompt.attachments),
        metadata=turn.metadata,
        deadline=None if turn.deadline is None else convert.timestamp(turn.deadline),
        traceparent=turn.traceparent,
        window=WINDOW,
    )


def _joined(number: int, prompts: Sequence[FoldedPrompt]) -> Iterator[pb.WorkResponse]:
    """One message for each prompt, as a prompt may be as large as a message. Only the last one
    answers the request."""
    for n, one in enumerate(prompts, start=1):
        folded = pb.WorkResponse.FoldedPrompt(
            run_id=one.run_id,
            prompt=one.prompt.text,
            attachments=map(convert.attachment, one.prompt.attachments),
        )
        answers = number if n == len(prompts) else 0
        yield pb.WorkResponse(folded=pb.WorkResponse.Folded(number=answers, prompts=[folded]))
    if not prompts:
        yield pb.WorkResponse(folded=pb.WorkResponse.Folded(number=number))


def _transcript(messages: Sequence[Message]) -> Iterator[pb.WorkResponse]:
    """As many messages as the transcript needs."""
    left, mark = messages, None
    while True:
        layout = lay_out(Page(tuple(left), None), mark)
        last = layout.next is None
        yield pb.WorkResponse(history=pb.WorkResponse.History(messages=layout.messages, last=last))
        if layout.next is None:
            return
        mark = layout.next
        left = _after(messages, mark)


def _after(messages: Sequence[Message], mark: Mark) -> Sequence[Message]:
    return [one for one in messages if (one.turn, one.ordinal) > mark.read_after]
