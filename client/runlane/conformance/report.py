"""What came of it: a table rule by rule, and JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from xml.etree import ElementTree as ET

from runlane.conformance.play import Result, Verdict, verdict_of
from runlane.conformance.rules import RULES

_NOT_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def row(results: Sequence[Result]) -> Iterator[str]:
    """The line of the table for a rule, by the results of its cases; below it what was wrong."""
    rule = results[0].case.rule
    width = max(map(len, RULES.values()))
    verdict = verdict_of(results)
    yield f"{f'R{rule}':<4} {RULES[rule]:<{width}}  {verdict:<7}  {_counts(results)}"
    for result in results:
        if result.verdict is Verdict.FAILED:
            yield f"     {result.case.name}:"
            yield f"       {result.told}"


def _counts(found: Sequence[Result]) -> str:
    passed = sum(result.verdict is not Verdict.SKIPPED for result in found)
    reasons = dict.fromkeys(r.told for r in found if r.verdict is Verdict.SKIPPED)
    cases = f"{passed} case{'' if passed == 1 else 's'}"
    left_out = len(found) - passed
    return f"{cases}, {left_out} left out: {'; '.join(reasons)}" if left_out else cases


def summary(results: Sequence[Result]) -> str:
    """The last line of the table."""
    by_rule = groupby(results, key=lambda result: result.case.rule)
    verdicts = [verdict_of(list(group)) for _, group in by_rule]
    counts = (f"{verdicts.count(verdict)} {verdict}" for verdict in Verdict)
    seconds = sum(result.seconds for result in results)
    return f"{len(verdicts)} rules: {', '.join(counts)} ({len(results)} cases in {seconds:.1f} s)"


def junit(results: Sequence[Result]) -> bytes:
    """The results as JUnit XML: a test for each case, its class named for the rule."""
    suite = ET.Element(
        "testsuite",
        name="runlane-conformance",
        tests=str(len(results)),
        failures=str(sum(result.verdict is Verdict.FAILED for result in results)),
        skipped=str(sum(result.verdict is Verdict.SKIPPED for result in results)),
        errors="0",
        time=f"{sum(result.seconds for result in results):.3f}",
    )
    for result in results:
        rule = result.case.rule
        test = ET.SubElement(
            suite,
            "testcase",
            classname=f"R{rule:02}. {RULES[rule]}",
            name=result.case.name,
            time=f"{result.seconds:.3f}",
        )
        told = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", result.told)
        if result.verdict is Verdict.FAILED:
            ET.SubElement(test, "failure", message=told).text = told
        elif result.verdict is Verdict.SKIPPED:
            ET.SubElement(test, "skipped", message=told)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + bytes(ET.tostring(root, encoding="utf-8"))
