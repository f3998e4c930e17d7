"""Scrapes: samples, rates and quantiles; invalid lines and failed endpoints."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from runlane.cli.app import runlane as command
from runlane.cli.exposition import Scrape, fetch, parse, quantile, rate
from runlane.cli.top import EndpointType

PAGE = """\
# HELP a_total How many.
# TYPE a_total counter
a_total{kind="x"} 3.0
a_total{kind="y",what="q\\"\\\\\\n,}"} 4 1395066363000
bare 1.5e+03

h_bucket{le="0.1"} 2
h_bucket{le="1.0"} 6
h_bucket{le="+Inf"} 8
age +Inf
no value at all
a_total{kind="z"} much
"""


def test_samples_by_name_and_labels() -> None:
    found = parse(PAGE, 1.0)
    assert found.total("a_total") == 7
    assert found.total("a_total", kind="x") == 3
    assert found.total("a_total", kind="z") is None
    assert found.total("b_total") is None
    assert found.total("bare") == 1500
    assert found.total("age") == float("inf")
    assert found.samples["a_total"][1].labels == {"kind": "y", "what": 'q"\\\n,}'}
    assert found.label("a_total", "kind") == "x"
    assert found.buckets("h") == {0.1: 2, 1.0: 6, float("inf"): 8}


@pytest.mark.parametrize(
    "line",
    [
        'a{x=" 1',
        "a{b} 1",
        "a 1_0",
        "a " + "9" * 400,
        'a{x="1", ="v"} 1',
        "a" * 2_000 + " 1",
        "# TYPE",
        "\x00",
    ],
)
def test_an_invalid_line_is_skipped(line: str) -> None:
    assert parse(f"{line}\nb 1\n", 1.0).samples.keys() == {"b"}


def test_rates_are_those_in_between() -> None:
    before, now = parse("a 10\n", 100.0), parse("a 25\n", 105.0)
    assert rate(before, now, "a") == 3
    assert rate(now, parse("a 10\n", 110.0), "a") == 2  # it was restarted
    assert rate(parse("", 100.0), now, "a") == 5  # it was never counted before
    assert rate(before, before, "a") is None
    assert rate(before, Scrape(105.0, error="gone"), "a") is None
    assert rate(Scrape(100.0, error="gone"), now, "a") is None


def histogram(*counts: int) -> Scrape:
    bounds = ("0.1", "1.0", "+Inf")
    lines = [f'h_bucket{{le="{le}"}} {n}' for le, n in zip(bounds, counts, strict=True)]
    return parse("\n".join(lines), 1.0)


@pytest.mark.parametrize(("share", "value"), [(0.25, 0.05), (0.5, 0.1), (0.75, 0.55), (1.0, 1.0)])
def test_quantiles_are_of_what_came_in_between(share: float, value: float) -> None:
    found = quantile(histogram(5, 5, 5), histogram(9, 13, 13), "h", share)
    assert found == pytest.approx(value)


def test_quantiles_where_little_is_known() -> None:
    assert quantile(histogram(5, 5, 5), histogram(5, 5, 5), "h", 0.5) is None
    assert quantile(histogram(0, 0, 0), histogram(0, 0, 2), "h", 0.5) == 1.0  # or more
    assert quantile(parse("", 0.0), parse("", 1.0), "h", 0.5) is None


async def test_a_failed_scrape_has_the_reason() -> None:
    found = await fetch("http://127.0.0.1:1/metrics")
    assert (found.error, found.samples) == ("Connection refused", {})


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("10.0.0.7:9464", "http://10.0.0.7:9464/metrics"),
        ("http://h:1/", "http://h:1/metrics"),
        ("https://h/other", "https://h/other"),
    ],
)
def test_an_endpoint_is_a_url_or_an_address(given: str, url: str) -> None:
    assert EndpointType().convert(given, None, None) == url


@pytest.mark.parametrize("given", ["file:///etc/passwd", "http://", "ftp://h/x"])
def test_an_invalid_endpoint_is_a_usage_error(given: str) -> None:
    result = CliRunner().invoke(command, ["top", "--metrics", given])
    assert result.exit_code == 2
    assert "is not a URL such as" in result.output
