"""What an in-process caller holds while a run is being accepted, and gets when it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from runlane_server.core.errors import EmptyPrompt, PromptTooLarge, RunlaneError
from runlane_server.core.limits import Limits
from runlane_server.core.model import Micros, Prompt, Run, SessionKey
from runlane_server.store.base import Position


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An accepted run, and a place in the event log just before all its events."""

    run: Run
    position: Position


class AcceptedRun:
    """A reservation: an accept that has begun and is not durable yet (R6).

    From `begin_accepted` on the session is busy, and a cancel covers the run to come. `close` gives
    the reservation up if `run_accepted` has not used it; it may be called any number of times.

    `began_at` is when it began. With a `refusal` nothing is reserved: it is for `run_accepted` to
    raise, unless the run is there already. `over` is called once, when it is used or given up.
    """

    def __init__(
        self,
        key: SessionKey,
        run_id: str,
        token: str,
        release: Callable[[AcceptedRun], None],
        *,
        began_at: Micros,
        over: Callable[[], None],
        refusal: RunlaneError | None = None,
    ) -> None:
        self.key = key
        self.run_id = run_id
        self.token = token
        self.began_at = began_at
        self.refusal = refusal
        self._over = over
        self._release: Callable[[AcceptedRun], None] | None = release

    @property
    def session_id(self) -> str:
        """The session."""
        return self.key.session_id

    @property
    def closed(self) -> bool:
        """Whether it was used or given up."""
        return self._release is None

    def use(self) -> None:
        """Marks it as used: the run that is being accepted takes its place."""
        if self._release is not None:
            self._release = None
            self._over()

    def close(self) -> None:
        """Gives the reservation up, if it was not used."""
        if self._release is not None:
            release, self._release = self._release, None
            self._over()
            release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_prompt(prompt: Prompt, limits: Limits) -> None:
    """Raises EmptyPrompt (R2) and PromptTooLarge."""
    text = any(isinstance(a.content, str) and a.content.strip() for a in prompt.attachments)
    if not (prompt.text.strip() or text):
        raise EmptyPrompt.of("prompt", "is empty, and there is no text attachment")
    size, most = len(prompt.text.encode()), limits.max_prompt_bytes
    if size > most:
        raise PromptTooLarge.of("prompt", f"has {size} bytes; {most} is the most")
    size = sum(attachment.size for attachment in prompt.attachments)
    most = limits.max_attachment_bytes
    if size > most:
        raise PromptTooLarge.of("attachments", f"have {size} bytes together; {most} is the most")
