"""`runlane-conformance` passes over every store, and fails the right rule for a planted fault."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from proofs.conformance.fault import Fault
from proofs.conformance.faults import FAULTS
from proofs.conformance.worker_faults import WORKER_FAULTS
from runlane.conformance import (
    cases,  # noqa: F401 - registers the cases
)
from runlane.conformance.rules import CASES, RULES, Need
from runlane_server.testing.server import LocalServer
from support.server import ServerProcess, serving

FLAGS = (
    *("--harness", "--agent", "scripted", "--agent", "echo=echo"),
    *("--agent", "single=scripted", "--agent-slots", "single=1"),
    *("--agent", "worked=worker"),
    *("--webhook-allow-network", "127.0.0.0/8"),
)

SERVED = ("--worker-agent", "worked")


class Report:
    """The exit code, output and JUnit file of the command."""

    def __init__(self, code: int, output: str, junit: Path) -> None:
        self.code = code
        self.output = output
        self.verdicts = {
            int(line.split()[0][1:]): verdict
            for line in output.splitlines()
            if line.startswith("R")
            for verdict in ("passed", "failed", "skipped")
            if f"  {verdict} " in line
        }
        # The file is our own.
        self.junit = ET.parse(junit).getroot() if junit.exists() else None  # noqa: S314


async def conformance(folder: Path, *arguments: str) -> Report:
    junit = folder / "conformance.xml"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from runlane.conformance.app import main; main()"),
        *arguments,
        *("--junit", str(junit)),
        stdout=PIPE,
        stderr=PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return Report(process.returncode, output.decode() + errors.decode(), junit)


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in CASES} == set(RULES) == {*range(1, 49), 50, 51, 52, 55}
    names = [(case.rule, case.name) for case in CASES]
    assert len(set(names)) == len(names)
    assert all(name and not name.endswith(".") for _, name in names)


@pytest.mark.stores("memory", "sqlite")
async def test_a_correct_server_passes_every_rule(
    tmp_path: Path, served_store: None, store_kind: str
) -> None:
    flags = ("--store", "memory:") if store_kind == "memory" else ()
    async with serving(tmp_path, *FLAGS, *flags) as server:
        report = await conformance(tmp_path, server.address, *SERVED)
    print(report.output)
    assert report.code == 0, report.output
    skipped_rules = {"memory": {17, 36, 44}, "postgresql": {43}}.get(store_kind, set())
    expected = {rule: "skipped" if rule in skipped_rules else "passed" for rule in RULES}
    assert report.verdicts == expected
    assert report.junit is not None
    tests = report.junit.findall(".//testcase")
    lacks = {"memory": Need.DURABLE, "postgresql": Need.STORE_CLOCK}.get(store_kind)
    skipped = [case for case in CASES if lacks in case.needs]
    assert len(tests) == len(CASES)
    assert len(report.junit.findall(".//skipped")) == len(skipped)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
async def test_a_planted_fault_fails_exactly_its_rules(tmp_path: Path, fault: Fault) -> None:
    folder = fault.build(tmp_path / "faulty")
    store = "sqlite:///faulty.db" if fault.durable else "memory:"
    server = ServerProcess(
        tmp_path,
        *(*FLAGS, "--store", store),
        env={"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    sound = [rule for rule in fault.sound if rule not in fault.rules]
    asked = [f"--rule={rule}" for rule in (*fault.rules, *sound)]
    try:
        await server.start()
        report = await conformance(tmp_path, server.address, "--timeout", "3", *SERVED, *asked)
    finally:
        await server.kill()
    expected = dict.fromkeys(sound, "passed") | dict.fromkeys(fault.rules, "failed")
    assert report.verdicts == expected, report.output
    assert report.code == 1
    assert report.junit is not None
    failed = report.junit.findall(".//failure/..")
    assert {int(test.attrib["classname"][1:3]) for test in failed} == set(fault.rules)
    assert any(test.attrib["name"].startswith(fault.case) for test in failed), report.output


def test_every_case_about_workers_finds_a_fault() -> None:
    names = {case.name for case in CASES if Need.WORKER in case.needs}
    starts = tuple(fault.case for fault in WORKER_FAULTS)
    assert not {name for name in names if not name.startswith(starts)}
    assert all(any(name.startswith(start) for name in names) for start in starts if start)


async def test_an_unusable_server_or_an_unknown_rule_exits_with_2(tmp_path: Path) -> None:
    async with LocalServer() as plain, LocalServer(harness=True) as echo:
        for address, why in (
            (plain.address, "start it with --harness --agent scripted"),
            (echo.address, "start it with --agent scripted"),
            (f"unix:{tmp_path}/nobody", "cannot reach"),
        ):
            report = await conformance(tmp_path, address, "--timeout", "0.2")
            assert (report.code, report.output.count("\n")) == (2, 1)
            assert why in report.output
    report = await conformance(tmp_path / "nowhere")
    assert (report.code, "nowhere" in report.output) == (2, True)
    for wrong in ("0", "R49", "5-2", "all"):
        report = await conformance(tmp_path, "--rule", wrong)
        assert report.code == 2
        assert repr(wrong) in report.output


async def test_a_server_in_the_test_process_passes(tmp_path: Path) -> None:
    async with LocalServer("scripted", harness=True) as server:
        report = await conformance(tmp_path, server.address, "--rule", "10-17", "--rule", "R30")
    assert report.code == 0, report.output
    assert report.verdicts[30] == report.verdicts[17] == "skipped"
    assert "the server cannot restart its process" in report.output
