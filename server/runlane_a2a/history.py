"""The messages that a task exchanged with its callers."""

from __future__ import annotations

from a2a.types import a2a_pb2 as pb

from runlane.client import Client
from runlane.types import Attachment, Message, Role, Text
from runlane_a2a.parts import attachment_part, text_part
from runlane_a2a.questions import answer_message, question_message
from runlane_a2a.task_view import TaskView


async def history_of(client: Client, view: TaskView, length: int | None) -> list[pb.Message]:
    """Returns the last `length` messages of a task; None: all.

    They are the prompt, and the questions of the agent with their answers. The output of the agent
    stands in the artifacts.
    """
    if length == 0:
        return []
    pager = client.list_messages(view.context_id, run_id=view.task_id)
    found = [_prompt(each, view) async for each in pager if each.role is Role.USER]
    if view.asked:
        found += await _questions(client, view)
    return found if length is None else found[-length:]


async def _questions(client: Client, view: TaskView) -> list[pb.Message]:
    pager = client.list_input_requests(run_id=view.task_id)
    requests = [request async for request in pager]
    found: list[pb.Message] = []
    for request in sorted(requests, key=lambda each: each.requested_at):
        if request.input_request_id in view.open:
            continue  # it is the message of the status
        found.append(question_message(request))
        answer = answer_message(request)
        if answer is not None:
            found.append(answer)
    return found


def _prompt(message: Message, view: TaskView) -> pb.Message:
    parts = [
        text_part(part.text) if isinstance(part, Text) else attachment_part(part)
        for part in message.parts
        if isinstance(part, Text | Attachment)
    ]
    return pb.Message(
        message_id=message.message_id,
        context_id=view.context_id,
        task_id=view.task_id,
        role=pb.ROLE_USER,
        parts=parts,
    )
