"""Conversion between the messages of workers and records; `worker_events` has what agents emit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runlane.worker.v1 import worker_service_pb2 as pb
from runlane_server.agents.base import FoldedPrompt
from runlane_server.agents.worker.messages import (
    Acked,
    Answered,
    Assigned,
    Down,
    Fenced,
    FoundStep,
    Joined,
    Parked,
    Stopped,
    Transcript,
)
from runlane_server.agents.worker.slot import Resumption
from runlane_server.core.errors import Unsupported
from runlane_server.core.input import InputRequest
from runlane_server.core.model import Message, RunKey
from runlane_server.rpc import convert, inputs
from runlane_server.rpc.checks import MAX_ID_BYTES, Checks
from runlane_server.rpc.transcript import Mark, lay_out
from runlane_server.store.base import Page

PROTOCOL_VERSION = 1

MAX_AGENTS = 100
"""Agents of an offer."""

WINDOW = 4096
"""Events that may be on their way without an acknowledgement."""

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
        case Answered(requests):
            answers = [_answer(one) for one in requests]
            yield pb.WorkResponse(answers=pb.WorkResponse.Answers(answers=answers))
        case Parked():
            yield pb.WorkResponse(parked=pb.WorkResponse.Parked())
        case FoundStep(key, result):
            yield pb.WorkResponse(step=pb.WorkResponse.Step(key=key, result=result))


def _answer(request: InputRequest) -> pb.WorkResponse.Answer:
    found = inputs.input_request(request)
    return pb.WorkResponse.Answer(key=found.key, answer=found.answer)


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
        origin=None if turn.origin is None else convert.origin(turn.origin),
        checkpoint=turn.checkpoint,
        stored=turn.stored,
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
