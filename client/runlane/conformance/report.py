"""Formats results: a table with one row per rule, and JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from xml.etree import ElementTree as ET

from runlane.conformance.rules import RULES
from runlane.conformance.runner import Result, Verdict

_NOT_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def verdict_of(results: Sequence[Result]) -> Verdict:
    """Returns the verdict of a rule: failed if a case failed, skipped if all were skipped."""
    verdicts = {result.verdict for result in results}
    order = (Verdict.FAILED, Verdict.PASSED)
    return next((verdict for verdict in order if verdict in verdicts), Verdict.SKIPPED)


def row(results: Sequence[Result]) -> Iterator[str]:
    """Yields the row of a rule, followed by the failures of its cases."""
    rule = results[0].case.rule
    width = max(map(len, RULES.values()))
    verdict = verdict_of(results)
    yield f"{f'R{rule}':<4} {RULES[rule]:<{width}}  {verdict:<7}  {_counts(results)}"
    for result in results:
        if result.verdict is Verdict.FAILED:
            yield f"     {result.case.name}:"
            yield f"       {result.detail}"


def _counts(results: Sequence[Result]) -> str:
    run = sum(result.verdict is not Verdict.SKIPPED for result in results)
    reasons = dict.fromkeys(r.detail for r in results if r.verdict is Verdict.SKIPPED)
    cases = f"{run} case{'' if run == 1 else 's'}"
    skipped = len(results) - run
    return f"{cases}, {skipped} skipped: {'; '.join(reasons)}" if skipped else cases


def summary(results: Sequence[Result]) -> str:
    """Returns the last line of the table."""
    by_rule = groupby(results, key=lambda result: result.case.rule)
    verdicts = [verdict_of(list(group)) for _, group in by_rule]
    counts = (f"{verdicts.count(verdict)} {verdict}" for verdict in Verdict)
    seconds = sum(result.seconds for result in results)
    return f"{len(verdicts)} rules: {', '.join(counts)} ({len(results)} cases in {seconds:.1f} s)"


def junit(results: Sequence[Result]) -> bytes:
    """Formats the results as JUnit XML: one test per case, with the rule as its class."""
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
        detail = _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", result.detail)
        if result.verdict is Verdict.FAILED:
            ET.SubElement(test, "failure", message=detail).text = detail
        elif result.verdict is Verdict.SKIPPED:
            ET.SubElement(test, "skipped", message=detail)
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return b'<?xml version="1.0" encoding="utf-8"?>\n' + bytes(ET.tostring(root, encoding="utf-8"))
