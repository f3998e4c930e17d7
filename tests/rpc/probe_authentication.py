"""Probes of access control: authentication and roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import (  # type: ignore[import-untyped]
    reflection_pb2,
    reflection_pb2_grpc,
)

from rpc.probe_base import MIN_ROLE, RIGHTS, RUNS, assert_unauthenticated
from runlane_server.access import control as control_module
from runlane_server.access.caller import Credentials
from runlane_server.access.node_keys import NodeKeys
from runlane_server.core.errors import Unauthenticated
from support.callers import (
    LIFETIME,
    METHODS,
    NODE_KEY,
    ROLES,
    World,
    guarded,
    outcome,
    request,
    rsa_key,
    signed,
    signing_key,
)
from support.certificates import private_pem, public_pem


async def anonymous(folder: Path) -> None:
    """Without credentials, no rpc is served, nor is reflection."""
    async with guarded(folder) as world:
        for method in METHODS:
            assert_unauthenticated(await world.ask(method, request(method)))
        stub = reflection_pb2_grpc.ServerReflectionStub(world.wire.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="*")
        try:
            await stub.ServerReflectionInfo(iter([asked])).read()
        except grpc.aio.AioRpcError as error:
            assert_unauthenticated(outcome(error))
        else:
            raise AssertionError("reflection was served")


async def bad_tokens(folder: Path) -> None:
    """Every invalid token gets the same error, at every rpc."""
    async with guarded(folder) as world:
        right, other = world.texts["admin"], world.texts["stranger"]
        wrong = (
            f"Bearer {right[:-1]}{'a' if right[-1] != 'a' else 'b'}",
            f"Bearer {right[:19]}{other[19:]}",
            f"Bearer rl_{'a' * 16}_{'a' * 52}",
            f"Bearer {right} ",
            f"Bearer {right}a",
            "Bearer ",
            "Bearer rl_",
            "Bearer nonsense",
            f"Basic {right}",
            right,
        )
        for method in METHODS:
            errors = set()
            for each in wrong:
                found = await world.ask(method, request(method), (("authorization", each),))
                assert_unauthenticated(found)
                errors.add(found.details)
            assert len(errors) == 1


async def expired(folder: Path) -> None:
    """A token is valid until it expires, and not after."""
    async with guarded(folder) as world:
        world.clock[0] += LIFETIME - 1
        for method in METHODS:
            if MIN_ROLE[method] == "read":
                found = await world.ask(method, request(method), world.shown("expiring"))
                assert found.code is StatusCode.OK, found
        world.clock[0] += 2
        for method in METHODS:
            assert_unauthenticated(
                await world.ask(method, request(method), world.shown("expiring"))
            )


async def roles(folder: Path) -> None:
    """Each role may call the methods in the table, and no others."""
    for role in ROLES:
        async with guarded(folder) as world:
            for method, least in MIN_ROLE.items():
                found = await world.ask(method, request(method), world.shown(role))
                if least in RIGHTS[role]:
                    denied = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
                    assert found.code not in denied, (role, method, found)
                else:
                    assert found.code is StatusCode.PERMISSION_DENIED, (role, method, found)
                    assert found.reason == "PERMISSION_DENIED"


async def certificates(folder: Path) -> None:
    """A listed name in a certificate authenticates, another does not; a token takes precedence."""
    async with guarded(folder) as world:
        job = Credentials(certificate=["dns=job.acme.example", "uri=spiffe://acme/job"])
        caller = world.access_control.authorize(RUNS + "RunAccepted", job)
        assert (caller.tenant, caller.role) == ("acme", "run")
        for shown in (
            Credentials(certificate=["uri=spiffe://acme/other"]),
            Credentials(certificate=["uri=SPIFFE://acme/job"]),
            Credentials(certificate=["dns=spiffe://acme/job"]),
            Credentials(certificate=["cn=spiffe://acme/job"]),
            Credentials({"authorization": "Bearer nonsense"}, ["uri=spiffe://acme/job"]),
        ):
            assert_refused(world, shown)


async def nodes(folder: Path) -> None:
    """Only a signature makes a caller a node: for one run of a tenant, at one node, for 30 s."""
    async with guarded(folder) as world:
        now = [world.clock[0]]
        here = world.wire.address

        def sign(address: str = here, tenant: str = "acme", run: str = "r-theirs") -> str:
            return NodeKeys([NODE_KEY], lambda: now[0]).sign(address, tenant, run)

        signed = sign()
        for method in METHODS:
            found = await world.ask(method, request(method), _header(signed))
            follows = method == RUNS + "SubscribeRun"
            expected = StatusCode.OK if follows else StatusCode.PERMISSION_DENIED
            assert found.code is expected, (method, found)
        follow = request(RUNS + "SubscribeRun")
        for text, code in (
            (sign(run="other"), StatusCode.PERMISSION_DENIED),
            (sign(tenant="other"), StatusCode.NOT_FOUND),
            (sign("127.0.0.1:1"), StatusCode.UNAUTHENTICATED),
            (signed.replace(b"acme".hex(), b"other".hex()), StatusCode.UNAUTHENTICATED),
            (signed.replace(b"r-theirs".hex(), b"r-other".hex()), StatusCode.UNAUTHENTICATED),
            (signed[:-1] + ("0" if signed[-1] != "0" else "1"), StatusCode.UNAUTHENTICATED),
            (NodeKeys(["other key"]).sign(here, "acme", "r-theirs"), StatusCode.UNAUTHENTICATED),
            (NODE_KEY.replace(" ", ""), StatusCode.UNAUTHENTICATED),
            ("rlnode_", StatusCode.UNAUTHENTICATED),
            ("rlnode_1_zz_zz_" + "0" * 64, StatusCode.UNAUTHENTICATED),
        ):
            found = await world.ask(RUNS + "SubscribeRun", follow, _header(text))
            assert found.code is code, (text, found)
        for seconds, code in ((29, StatusCode.OK), (31, StatusCode.UNAUTHENTICATED)):
            for sign_of in (1, -1):
                now[0] = world.clock[0] + sign_of * seconds
                found = await world.ask(RUNS + "SubscribeRun", follow, _header(sign()))
                assert found.code is code, (seconds * sign_of, found)
        # A server with an unshared store has no key, and so accepts no node at all.
        alone = control_module.AccessControl()
        assert_refused(world, bearer(NodeKeys([""]).sign("", "acme", "r-theirs")), alone)


async def health_and_reflection(folder: Path) -> None:
    """Health needs no credentials; reflection lists exactly the services that the probes cover."""
    async with guarded(folder) as world:
        health = health_pb2_grpc.HealthStub(world.wire.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        assert (await health.List(health_pb2.HealthListRequest())).statuses[""].status
        assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status
        stub = reflection_pb2_grpc.ServerReflectionStub(world.wire.channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="*")
        call = stub.ServerReflectionInfo(iter([asked]), metadata=world.shown("read"))
        served = {each.name for each in (await call.read()).list_services_response.service}
        assert served == {method.split("/")[1] for method in METHODS} | {
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


def assert_refused(
    world: World, shown: Credentials, access_control: control_module.AccessControl | None = None
) -> None:
    """Asserts that these credentials are refused."""
    try:
        caller = (access_control or world.access_control).authorize(RUNS + "GetRun", shown)
    except Unauthenticated:
        return
    raise AssertionError(f"authorized: {caller}")


async def jwt_is_verified(folder: Path) -> None:
    """A token of the issuer is accepted; one with a fault is not."""
    async with guarded(folder) as world:
        for method, least in MIN_ROLE.items():
            if least == "read":
                found = await world.ask(method, request(method), world.shown("jwt"))
                assert found.code is StatusCode.OK, found
        stranger = private_pem(ec.generate_private_key(ec.SECP256R1()))
        for fault in (
            {"key": stranger},
            {"iss": "https://other.example"},
            {"iss": None},
            {"aud": "other"},
            {"aud": None},
            {"exp": 1},
            {"exp": None},
            {"nbf": 1 << 40},
            {"org": None},
            {"org": ["acme"]},
            {"org": "../acme"},
            {"may": None},
            {"may": "owner"},
            {"headers": {"crit": ["x"]}},
            {"key": "", "algorithm": "none"},
        ):
            arguments: dict[str, Any] = fault
            assert_refused(world, bearer(signed(**arguments)))
        assert_unauthenticated(
            await world.ask(RUNS + "GetRun", request(RUNS + "GetRun"), _header(signed(aud="x")))
        )


async def jwt_algorithm(folder: Path) -> None:
    """A token signed with another algorithm than the allowed one is refused."""
    async with guarded(folder) as world:
        public = public_pem(signing_key())
        header = jwt.utils.base64url_encode(b'{"alg":"HS256","typ":"JWT"}')
        body = signed().split(".")[1].encode()
        forged = jwt.get_algorithm_by_name("HS256").sign(header + b"." + body, public)
        text = b".".join((header, body, jwt.utils.base64url_encode(forged))).decode()
        assert_refused(world, bearer(text))
        # An RSA key supports several algorithms, of which one is allowed.
        (folder / "issuer.pem").write_bytes(public_pem(rsa_key()))
        world.rewrite(('["ES256"]', '["RS256"]'))
        world.look()
        world.access_control.authorize(
            RUNS + "GetRun", bearer(signed(private_pem(rsa_key()), "RS256"))
        )
        for algorithm in ("RS384", "RS512", "PS256"):
            assert_refused(world, bearer(signed(private_pem(rsa_key()), algorithm)))


async def jwt_cached(folder: Path) -> None:
    """A cached token is refused after it has expired."""
    async with guarded(folder) as world:
        text = signed()
        world.access_control.authorize(RUNS + "GetRun", bearer(text))
        world.clock[0] += 3599
        world.access_control.authorize(RUNS + "GetRun", bearer(text))
        world.clock[0] += 3
        assert_refused(world, bearer(text))


def bearer(text: str) -> Credentials:
    """Credentials with a bearer token."""
    return Credentials(dict(_header(text)))


def _header(text: str) -> tuple[tuple[str, str]]:
    return (("authorization", f"Bearer {text}"),)
