"""Other doors of a gateway, such as A2A: they answer paths of their own, behind the same checks."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from starlette.requests import Request
from starlette.types import Send

from runlane.wire import Wire


class Entry(Protocol):
    """The checks of a gateway for a door before it serves a request."""

    def token(self, authorization: str | None) -> str:
        """Returns the token of a caller; that of a grant is not enough. Raises Refused."""
        ...

    async def check(self, token: str) -> None:
        """Returns if the server accepts a token. Raises Refused, RunlaneError."""
        ...

    async def body(self, request: Request, token: str, limit: int) -> bytes:
        """Reads a body, within limits of size and time. Raises Refused, RunlaneError."""
        ...

    async def wires(self, token: str) -> tuple[Wire, Wire]:
        """Returns the channels of calls and of streams with the caller's token.

        Raises Refused, RunlaneError.
        """
        ...

    def place(self, token: str) -> AbstractAsyncContextManager[None]:
        """Takes a place for a stream or a waiting call. Raises Refused."""
        ...


class Door(Protocol):
    """A door of a gateway."""

    def serves(self, path: str) -> bool:
        """Returns True if the path is the door's."""
        ...

    async def serve(self, request: Request, path: str, send: Send, entry: Entry) -> None:
        """Answers a request. Raises Refused, RunlaneError before it has begun to answer."""
        ...

    async def start(self, entry: Entry) -> None:
        """Starts what the door serves besides HTTP."""
        ...

    async def stop(self) -> None:
        """Ends it."""
        ...
