"""The messages between a server and the process of an agent, over the socket on the latter's stdin.

The server sends the settings as one line of JSON, later the line START, and DELETED with a tenant
and a session, as JSON, for a session that was deleted. The process answers
LOADED once the code of the agent is imported, and after START with READY once the agent is ready;
or with ERROR, an exit code and the reason, and exits. From then on it sends BEATs. When the socket
closes, the other side is gone.
"""

from __future__ import annotations

START = "start"
DELETED = "deleted"
LOADED = "loaded"
READY = "ready"
ERROR = "error"
BEAT = "beat"

BEAT_INTERVAL = 0.5
"""Seconds between two beats of the event loop of a process."""

SECRET_KEY = "runlane-agent-process"  # noqa: S105 - the name of a metadata key
"""The metadata key of the secret with which a process identifies itself."""
