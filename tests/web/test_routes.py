"""The routes: every rpc has one, and the same result as over gRPC."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import httpx2
import pytest
from google.protobuf import json_format
from grpc import StatusCode

from runlane_web.errors import HTTP_CODES, Refused
from runlane_web.guard import Policy
from runlane_web.routes import ROUTES, find
from support.callers import OF_TENANTS, ROLES, guarded, request
from support.door import canonical, door, reason

CALLERS = (None, *ROLES, "stranger")

READS = [method for method in OF_TENANTS if method.rpartition("/")[2].startswith(("Get", "List"))]


def test_every_rpc_has_a_route() -> None:
    assert {route.method for route in ROUTES} == set(OF_TENANTS)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.verb} {route.path}")
def test_a_route_is_found_by_its_own_path(route: object) -> None:
    verb, path = route.verb, route.path  # type: ignore[attr-defined]
    found = find(verb, re.sub(r"\{\w+\}", "x", path))
    assert found.route is route


@pytest.mark.parametrize(
    ("path", "session_id"),
    [
        ("/v1/sessions/a%2Fb", "a/b"),
        ("/v1/sessions/a%3Acancel", "a:cancel"),
        ("/v1/sessions/a:b", "a:b"),
        ("/v1/sessions/%C3%A9", "é"),
        ("/v1/sessions/%2e%2e", ".."),
        ("/v1/sessions/..", ".."),
    ],
)
def test_an_id_in_a_path_is_taken_as_it_was_encoded(path: str, session_id: str) -> None:
    assert find("GET", path).fields == {"session_id": session_id}


@pytest.mark.parametrize(
    "path", ["", "/", "/v1", "/v1/runs/", "/v1//runs", "//v1/runs", "/V1/runs"]
)
def test_other_paths_are_not_found(path: str) -> None:
    with pytest.raises(Refused, match="path: is not served here"):
        find("GET", path)


def test_a_path_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(Refused, match="session_id: is not UTF-8"):
        find("GET", "/v1/sessions/%FF")


@pytest.mark.parametrize("method", OF_TENANTS)
async def test_access_is_the_same_as_over_grpc(method: str, tmp_path: Path) -> None:
    """Two servers get the same calls of the same callers, one over gRPC and one over HTTP."""
    (grpc_folder := tmp_path / "grpc").mkdir()
    (http_folder := tmp_path / "http").mkdir()
    async with (
        guarded(grpc_folder) as over_grpc,
        guarded(http_folder) as over_http,
        door(over_http.wire.address, Policy()) as opened,
    ):
        for who in CALLERS:
            expected = await over_grpc.ask(method, request(method), over_grpc.shown(who))
            token = None if who is None else over_http.texts[who]
            got = await opened.ask(method, request(method), token)
            if expected.code is StatusCode.OK:
                assert got.status_code == 200, (who, got.text)
                continue
            assert got.status_code == HTTP_CODES[expected.code.value[0]], (who, got.text)
            assert reason(got) == expected.reason, (who, got.text)


@pytest.mark.parametrize("method", READS)
async def test_a_read_answers_the_same_as_over_grpc(method: str, tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        expected = await world.ask(method, request(method), world.shown("admin"))
        got = await opened.ask(method, request(method), world.texts["admin"])
        assert got.json() == json_format.MessageToDict(expected.answer)


@pytest.mark.parametrize("method", READS)
async def test_every_route_of_an_rpc_answers_the_same(method: str, tmp_path: Path) -> None:
    async with guarded(tmp_path) as world, door(world.wire.address, Policy()) as opened:
        answers: list[httpx2.Response] = [
            await opened.ask(method, request(method), world.texts["admin"], route)
            for route in ROUTES
            if route.method == method
        ]
        assert {each.text for each in answers} == {answers[0].text}
        assert answers[0].status_code == 200


def test_the_openapi_document_has_every_route_and_every_reference() -> None:
    text = files("runlane_web").joinpath("openapi.json").read_text()
    document = json.loads(text)
    described = {
        (verb.upper(), path) for path, verbs in document["paths"].items() for verb in verbs
    }
    assert described == {(route.verb, route.path) for route in ROUTES}
    schemas = set(document["components"]["schemas"])
    used = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert used == schemas


def test_the_first_route_of_an_rpc_is_its_canonical_one() -> None:
    for route in ROUTES:
        assert canonical(route.method).rpc is route.rpc
