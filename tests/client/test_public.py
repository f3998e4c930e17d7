"""The public names of the package."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import runlane
from runlane import types
from runlane.v1 import run_pb2, run_service_pb2, session_pb2


def test_all_lists_every_public_name() -> None:
    public = {
        name
        for name, value in vars(runlane).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    } - {"annotations"}
    assert set(runlane.__all__) == public
    assert runlane.__all__ == sorted(runlane.__all__)


def test_every_public_name_is_documented() -> None:
    for name in runlane.__all__:
        assert getattr(runlane, name).__doc__, name


def test_the_enums_are_those_of_the_interface() -> None:
    for ours, theirs, prefix in (
        (types.RunState, run_pb2.RunState, "RUN_STATE_"),
        (types.WhenBusy, run_pb2.WhenBusy, "WHEN_BUSY_"),
        (types.FinishReason, run_pb2.FinishReason, "FINISH_REASON_"),
        (types.Role, session_pb2.Role, "ROLE_"),
        (types.CancelScope, run_service_pb2.CancelScope, "CANCEL_SCOPE_"),
    ):
        names = {name.removeprefix(prefix) for name in theirs.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
        assert {member.name for member in ours} - {"UNKNOWN"} == names


def test_the_states_are_terminal_or_not() -> None:
    ended = {types.RunState.COMPLETED, types.RunState.CANCELLED, types.RunState.FAILED}
    assert {state for state in types.RunState if state.terminal} == ended
    assert set(types.NOT_TERMINAL) == set(types.RunState) - ended - {types.RunState.UNKNOWN}


def test_the_client_does_not_import_the_dependencies_of_the_command() -> None:
    code = (
        "import sys, runlane\n"
        "assert not {'click', 'rich', 'runlane_server', 'structlog'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
