"""The files of the console, as a browser gets them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from starlette.responses import Response

PAGE = "/"
FOLDER = "/console/"

_TYPES = MappingProxyType(
    {
        "html": "text/html",
        "js": "text/javascript",
        "css": "text/css",
        "svg": "image/svg+xml",
    }
)

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        # Trusted types without a policy: no code can turn text into HTML or into a script.
        "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; object-src 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
)


@cache
def _assets() -> Mapping[str, tuple[bytes, str]]:
    """The content and the type of each file, by its path."""
    found: dict[str, tuple[bytes, str]] = {}
    for file in files("runlane_web").joinpath("console").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = PAGE if file.name == "index.html" else FOLDER + file.name
            found[path] = (file.read_bytes(), kind)
    return MappingProxyType(found)


def asset(path: str) -> Response | None:
    """Answers a request for a file of the console; None if the path is none."""
    found = _assets().get(path)
    if found is None:
        return None
    content, kind = found
    return Response(content, headers=dict(HEADERS), media_type=kind)


def paths() -> list[str]:
    """The paths of all files."""
    return sorted(_assets())
