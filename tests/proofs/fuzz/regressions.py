"""Inputs that once crashed a target, by target."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf import any_pb2
from google.rpc import status_pb2  # type: ignore[import-untyped]

from proofs.fuzz import frames


def _detail(kind: str, value: bytes) -> bytes:
    """A google.rpc.Status with one detail of any value."""
    packed = any_pb2.Any(type_url=f"type.googleapis.com/google.rpc.{kind}", value=value)
    data: bytes = status_pb2.Status(code=10, details=[packed]).SerializeToString()
    return data


PARSED: Sequence[tuple[str, bytes]] = (
    ("rich-error", _detail("ErrorInfo", b"\x0a\xff\xff")),
    ("rich-error", _detail("RetryInfo", b"\x0a\x0a\x08" + b"\xff" * 8 + b"\x7f")),
    ("postgres-url", b"////d]]d]]"),
    ("exposition", b'h_bucket{le="x"} 1\nh_bucket{le="+Inf"} 3\n'),
    ("jwt-claims", b'{"exp":' + b"9" * 400 + b',"iss":"i","aud":"a","t":"acme","r":"x"}'),
    (
        "script",
        b'[{"tool_call":{"id":"1","name":"n","arguments":{"a":' + b"[" * 987 + b"]" * 987 + b"}}}]",
    ),
)

NOT_UTF8_PATH = frames.OPENING + frames.call().replace(b"/runlane.v1", b"/run\xecane.v1")
"""grpc.aio (1.85) decodes the path in its accept loop, and its server would end."""
