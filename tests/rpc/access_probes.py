"""The probes of access control. A probe fails if the check that it covers is missing.

`test_access.py` runs them; `test_access_mutants.py` removes one check at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

from rpc.probe_authentication import (
    anonymous,
    bad_tokens,
    certificates,
    expired,
    health_and_reflection,
    jwt_algorithm,
    jwt_cached,
    jwt_is_verified,
    nodes,
    roles,
)
from rpc.probe_base import Probe
from rpc.probe_open_calls import broken_file, expires_meanwhile, moved, revoked, slow_reader
from rpc.probe_tenants import agents, cursors, feeds, lists, same_names, same_path, strangers

PROBES: Mapping[str, Probe] = {
    probe.__name__: probe
    for probe in (
        anonymous,
        bad_tokens,
        expired,
        roles,
        certificates,
        nodes,
        health_and_reflection,
        jwt_is_verified,
        jwt_algorithm,
        jwt_cached,
        strangers,
        same_names,
        lists,
        cursors,
        agents,
        feeds,
        same_path,
        revoked,
        expires_meanwhile,
        moved,
        slow_reader,
        broken_file,
    )
}
