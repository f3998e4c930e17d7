"""What has to hold of the access_control, each as a probe that fails if a check is missing.

`test_access.py` runs them as they are; `test_access_mutants.py` removes a check after the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from rpc.probe_authentication import (
    bad_tokens,
    certificates,
    expired,
    jwt_algorithm,
    jwt_is_verified,
    jwt_remembered,
    nobody,
    nodes,
    probes_and_lists,
    roles,
)
from rpc.probe_base import Probe
from rpc.probe_open_calls import broken_file, expires_meanwhile, moved, revoked, slow_reader
from rpc.probe_tenants import cursors, feeds, lists, same_names, same_path, strangers

PROBES: Mapping[str, Probe] = {
    probe.__name__: probe
    for probe in (
        nobody,
        bad_tokens,
        expired,
        roles,
        certificates,
        nodes,
        probes_and_lists,
        jwt_is_verified,
        jwt_algorithm,
        jwt_remembered,
        strangers,
        same_names,
        lists,
        cursors,
        feeds,
        same_path,
        revoked,
        expires_meanwhile,
        moved,
        slow_reader,
        broken_file,
    )
}
