"""The peer of the chat agent: requests to the endpoint with bare httpx, whose answers are decoded.

Run it as `python -m bench.chat_peer`. It takes a job and answers as a load generator does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx

from bench.pyload import mark, write

_DATA = "data: "


@dataclass(slots=True)
class _Answers:
    count: int = 0


async def _ask(client: httpx.AsyncClient, model: str, answers: _Answers) -> None:
    """Asks one question after another. Fails if an answer has no end."""
    question = {
        "model": model,
        "stream": True,
        "messages": [{"role": "user", "content": "hello"}],
    }
    while True:
        text, finish = "", None
        async with client.stream("POST", "/v1/chat/completions", json=question) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith(_DATA + "{"):
                    continue
                for choice in json.loads(line.removeprefix(_DATA))["choices"]:
                    text += choice["delta"].get("content") or ""
                    finish = choice["finish_reason"] or finish
        if not (text and finish):
            raise RuntimeError(f"the endpoint sent half an answer: {text!r}")
        answers.count += 1


async def _measure(job: dict[str, Any]) -> dict[str, Any]:
    answers = _Answers()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = f"http://{job['address']}"
    async with httpx.AsyncClient(base_url=url, limits=limits) as client:
        asking = [
            asyncio.create_task(_ask(client, job["model"], answers))
            for _ in range(job["concurrency"])
        ]
        await asyncio.wait(asking, timeout=job["warmup"], return_when=asyncio.FIRST_COMPLETED)
        before, begun = answers.count, time.perf_counter()
        mark("begin")
        ended, _ = await asyncio.wait(
            asking, timeout=job["seconds"], return_when=asyncio.FIRST_COMPLETED
        )
        elapsed, count = time.perf_counter() - begun, answers.count - before
        mark("end")
        for task in ended:
            await task  # only an error ends one
        for task in asking:
            task.cancel()
    return {"count": count, "seconds": elapsed, "errors": 0}


def main() -> None:
    """Measures a job, and waits for the harness to end this process."""
    result = asyncio.run(_measure(json.loads(sys.stdin.readline())))
    write({"result": result})
    sys.stdin.readline()


if __name__ == "__main__":
    main()
