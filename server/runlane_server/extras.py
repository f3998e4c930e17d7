"""The optional dependencies: which extra brings which, and the one line for one that is missing.

Importing this module needs nothing but the base install.
"""

from __future__ import annotations

from importlib import import_module

from runlane_server.core.errors import SettingsError

EXTRAS = {
    "aiosqlite": ("aiosqlite", "server"),
    "click": ("click", "server"),
    "grpc_health": ("grpcio-health-checking", "server"),
    "grpc_reflection": ("grpcio-reflection", "server"),
    "jsonschema": ("jsonschema", "server"),
    "referencing": ("referencing", "server"),
    "structlog": ("structlog", "server"),
    "typing_extensions": ("typing-extensions", "server"),
    "uuid_utils": ("uuid-utils", "server"),
    "asyncpg": ("asyncpg", "server,postgres"),
    "aiohttp": ("aiohttp", "server,chat"),
    "pydantic_ai": ("pydantic-ai", "server,chat"),
    "acp": ("agent-client-protocol", "server,acp"),
    "prometheus_client": ("prometheus-client", "server,metrics"),
    "opentelemetry": ("opentelemetry-proto", "server,traces"),
    "jwt": ("PyJWT", "server,jwt"),
    "cryptography": ("cryptography", "server,secrets"),
    "uvloop": ("uvloop", "server,uvloop"),
    "uvicorn": ("uvicorn", "server,web"),
    "starlette": ("starlette", "server,web"),
    "sse_starlette": ("sse-starlette", "server,web"),
    "a2a": ("a2a-sdk", "server,a2a"),
}
"""By top-level module: its package, and the extras to install."""


def require(module: str, needed_by: str) -> None:
    """Imports a module of an extra. Raises SettingsError, which begins with `needed_by`."""
    try:
        import_module(module)
    except ImportError as error:
        raise SettingsError(f"{needed_by}: {missing(error) or error}") from None


def missing(error: ImportError) -> str:
    """Says what is not installed, and how to install it; empty for other import errors."""
    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in EXTRAS:
        return ""
    package, extras = EXTRAS[name]
    return f"{package} is not installed; run: pip install 'runlane[{extras}]'"
