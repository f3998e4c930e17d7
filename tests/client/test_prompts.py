"""Whole prompts, and answers as they are sent."""

from __future__ import annotations

import json

import pytest

from runlane import Attachment, Client, Unsupported
from runlane.inputs import input_request, to_request
from runlane.v1 import input_pb2, run_pb2
from runlane.v1 import run_service_pb2 as pb
from support.peer import Peer, run


async def test_r46_the_whole_prompt_is_read_with_its_attachments(
    peer: Peer, client: Client
) -> None:
    files = [run_pb2.Attachment(name="f", mime_type="image/png", data=b"\0")]
    sent = run_pb2.RunPrompt(text="x" * 300, attachments=files)
    peer.scripts["GetRun"] = [(pb.GetRunResponse(run=run("r"), prompt=sent),)]
    prompt = await client.get_prompt("r")
    assert (prompt.run.run_id, prompt.text) == ("r", "x" * 300)
    assert prompt.attachments == (Attachment("f", b"\0", "image/png"),)
    assert peer.requests["GetRun"] == [pb.GetRunRequest(run_id="r", with_prompt=True)]


async def test_a_server_that_returns_no_prompts_is_too_old(peer: Peer, client: Client) -> None:
    peer.scripts["GetRun"] = [(pb.GetRunResponse(run=run("r")),)]
    with pytest.raises(Unsupported, match="upgrade"):
        await client.get_prompt("r")


def test_a_form_is_sent_without_escapes() -> None:
    asked = input_request(input_pb2.InputRequest(kind=input_pb2.INPUT_KIND_FORM))
    form = {"name": "漢字"}
    sent = to_request(asked, form, "a").form_json
    assert json.loads(sent) == form
    assert len(sent.encode()) < len(json.dumps(form))
