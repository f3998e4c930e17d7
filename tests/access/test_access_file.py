"""The access file: valid content, errors with their line, edits, reload, and authentication."""

from __future__ import annotations

import json
import stat
import threading
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from runlane_server.access import editing, entries, failure_log, tokens
from runlane_server.access.access_file import AccessFile
from runlane_server.access.caller import AuthenticationFailed, Caller, Credentials, Role
from runlane_server.access.control import AccessControl
from runlane_server.access.editing import CannotEdit
from runlane_server.access.entries import BadEntry, parse
from runlane_server.access.failure_log import FailureLog
from runlane_server.access.jwts import MAX_CACHED, JwtVerifier
from runlane_server.access.permissions import REQUIRED_ROLES, is_allowed
from runlane_server.cli.main import command
from runlane_server.core.errors import PermissionDenied, StartError, Unauthenticated
from support.callers import AUDIENCE, ISSUER, rsa_key, signed, signing_key
from support.certificates import private_pem, public_pem
from support.descriptors import no_descriptors

TOKEN = (
    '[[token]]\nname = "ci"\ntenant = "acme"\nrole = "run"\n'
    f'id = "{"a" * 16}"\nsha256 = "{"0" * 64}"\n'
)
JWT = (
    '[jwt]\njwks = "keys.json"\nalgorithms = ["ES256"]\nissuer = "i"\naudience = "a"\n'
    'tenant = "acme"\nrole_claim = "may"\n'
)


def bearer(text: str) -> Credentials:
    return Credentials({"authorization": f"Bearer {text}"})


def test_a_file_is_parsed_into_callers_and_settings() -> None:
    text = (
        f"{TOKEN}expires = 2030-01-02T03:04:05+02:00\n"
        '[[certificate]]\nsubject = "dns=job.acme.example"\ntenant = "acme"\nrole = "read"\n'
        f'{JWT}leeway = 5\nroles = {{ boss = "admin" }}\ntenants = {{ x = "acme" }}\n'
    )
    found = parse(text, Path("/etc/runlane"))
    (token,) = found.tokens
    assert token.caller == Caller("acme", Role.RUN, "ci")
    assert token.expires == datetime(2030, 1, 2, 1, 4, 5, tzinfo=UTC).timestamp()
    assert found.certificates["dns=job.acme.example"].role is Role.READ
    assert found.jwt is not None
    assert found.jwt.keys == Path("/etc/runlane/keys.json")
    assert (found.jwt.leeway, found.jwt.roles) == (5.0, {"boss": Role.ADMIN})


@pytest.mark.parametrize(
    ("subject", "typed"),
    [
        ("spiffe://acme/job", "uri=spiffe://acme/job"),
        ("job.acme.example", "dns=job.acme.example"),
        ("job", "cn=job"),
        ("ops@acme.example", "cn=ops@acme.example"),
        ("dns=job", "dns=job"),
        ("uri=urn:job", "uri=urn:job"),
    ],
)
def test_a_subject_without_a_type_gets_one(subject: str, typed: str) -> None:
    text = f'[[certificate]]\nsubject = "{subject}"\ntenant = "acme"\nrole = "read"\n'
    assert list(parse(text).certificates) == [typed]


def test_a_caller_may_be_limited_to_some_agents() -> None:
    certificate = '[[certificate]]\nsubject = "cn=x"\ntenant = "acme"\nrole = "run"\n'
    limit = 'agents = ["coder", "b"]\n'
    found = parse(f"{TOKEN}{limit}{certificate}{limit}{JWT}{limit}")
    assert found.jwt is not None
    callers = (found.tokens[0].caller, *found.certificates.values())
    limits = [*(caller.agents for caller in callers), found.jwt.agents]
    assert limits == [frozenset({"coder", "b"})] * 3
    assert parse(TOKEN).tokens[0].caller.agents is None
    assert parse(f"{TOKEN}agents = []\n").tokens[0].caller.agents == frozenset()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[token]", "line 1"),
        (TOKEN.replace('"acme"', '"../x"'), "line 3: 'tenant' must be 1 to 64 letters"),
        (TOKEN.replace('"acme"', f'"{"x" * 65}"'), "line 3: 'tenant' must be"),
        (
            TOKEN.replace('"run"', '"owner"'),
            "line 4: 'role' must be read, answer, run, operator, webhooks, work or admin",
        ),
        (TOKEN.replace('role = "run"\n', ""), "line 1: 'role' is missing"),
        (TOKEN.replace("0" * 64, "0" * 63), "line 6: 'sha256' must be 64"),
        (TOKEN.replace("a" * 16, "A" * 16), "line 5: 'id' must be an id"),
        (
            TOKEN + "\n# it\n" + TOKEN.replace("a" * 16, "b" * 16),
            "line 10: 'name' 'ci' is used twice",
        ),
        (TOKEN + TOKEN.replace('"ci"', '"cd"'), f"line 11: 'id' '{'a' * 16}' is used twice"),
        (TOKEN + "expires = 2030-01-02T03:04:05\n", "line 7: 'expires' has no time zone"),
        (TOKEN + "expires = 7\n", "line 7: 'expires' must be a date"),
        (TOKEN + "secret = 'x'\n", "line 7: 'secret' is not a known key"),
        (TOKEN + 'agents = "coder"\n', "line 7: 'agents' must be a list"),
        (TOKEN + 'agents = ["Coder"]\n', "line 7: 'agents' must list names of agents"),
        (JWT + "agents = [1]\n", "line 8: 'agents' must list names of agents"),
        ('tokens = "x"\n', "'tokens' is not a known key"),
        ("token = 1\n", "'token' must be a list"),
        ("token = [1]\n", "[[token]] must be a table"),
        *(
            (
                f'[[certificate]]\nsubject = "{subject}"\ntenant = "a"\nrole = "run"\n',
                "line 2: 'subject' must be a name with its type",
            )
            for subject in ("", "ip=10.0.0.1", "cn=", "cn=a b", "cn=a\\u0000b", "dns=a\\u202eb")
        ),
        (JWT.replace('"ES256"', '"HS256"'), "line 3: 'algorithms' may contain only"),
        (JWT.replace('"ES256"', '"none"'), "line 3: 'algorithms' may contain only"),
        (JWT.replace('"ES256"', ""), "line 3: 'algorithms' must list"),
        (JWT.replace('issuer = "i"\n', ""), "'issuer' is missing"),
        (JWT.replace('audience = "a"\n', ""), "'audience' is missing"),
        (JWT + 'key = "x"\n', "line 2: 'jwks' or 'key'"),
        (JWT + 'tenant_claim = "x"\n', "'tenant' or 'tenant_claim'"),
        (JWT + 'role = "run"\n', "'role' or 'role_claim'"),
        (JWT + "leeway = 301\n", "line 8: 'leeway'"),
        (JWT + 'roles = { x = "owner" }\n', "line 8: 'roles' maps 'x'"),
    ],
)
def test_an_invalid_entry_is_reported_with_its_line(text: str, why: str) -> None:
    with pytest.raises(BadEntry) as raised:
        parse(text)
    assert why in str(raised.value)


# --- Edit -----------------------------------------------------------------------------------------


def test_a_new_token_is_returned_once_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    text = editing.add(path, "ci", tenant="acme", role=Role.RUN)
    content = path.read_text()
    secret = text.rpartition("_")[2]
    assert secret not in content
    assert tokens.hash_of(secret) in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    assert AccessFile(path).authenticate(bearer(text)) == Caller("acme", Role.RUN, "ci")


def test_an_edit_preserves_comments_layout_and_other_tables(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    before = (
        f"# mine\n{TOKEN}# about the certificate\n[[certificate]]  # it\n"
        'subject = "cn=x"\ntenant = "acme"\nrole = "read"\n'
    )
    path.write_text(before)
    path.chmod(0o644)
    editing.add(path, "new", tenant="t", role=Role.READ)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.read_text().startswith(before)
    editing.remove(path, "ci")
    assert "# mine\n# about the certificate\n[[certificate]]  # it\n" in path.read_text()
    editing.remove(path, "new")
    assert [token.caller.name for token in editing.tokens(path)] == []
    assert parse(path.read_text()).certificates


def test_a_removal_that_would_change_other_entries_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    # The first line that looks like a header is part of a string.
    text = f'[jwt]\nissuer = """\n[[token]]\n"""\n{JWT.removeprefix("[jwt]")}'.replace(
        'issuer = "i"\n', ""
    )
    text += TOKEN
    path.write_text(text)
    with pytest.raises(CannotEdit, match="by hand"):
        editing.remove(path, "ci")
    assert path.read_text() == text


def test_concurrent_edits_are_all_applied(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    names = [f"t{number}" for number in range(8)]
    threads = [
        threading.Thread(
            target=editing.add, args=(path, name), kwargs={"tenant": "t", "role": role}
        )
        for name, role in zip(names, [Role.RUN] * 8, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(token.caller.name for token in editing.tokens(path)) == names


def test_an_edit_keeps_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "access.toml"
    link.symlink_to(tmp_path / "real" / "file.toml")
    editing.add(link, "ci", tenant="t", role=Role.RUN)
    assert link.is_symlink()
    assert (tmp_path / "real" / "file.toml").exists()


def run(*arguments: str, **env: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, ["token", *arguments], env=env)
    return result.exit_code, result.output


def test_token_commands_create_list_and_revoke(tmp_path: Path) -> None:
    path = str(tmp_path / "access.toml")
    code, text = run("new", "ci", "--tenant", "acme", "--role", "run", "--access", path)
    assert code == 0
    assert len(text.splitlines()) == 1
    _, other = run("new", "me", "--role", "admin", "--expires", "30d", RUNLANE_ACCESS=path)
    access = AccessFile(Path(path))
    assert access.authenticate(bearer(text.strip())) == Caller("acme", Role.RUN, "ci")
    assert access.authenticate(bearer(other.strip())).tenant == "default"
    code, listed = run("list", "--access", path)
    assert [line.split("\t")[:3] for line in listed.splitlines()] == [
        ["ci", "acme", "run"],
        ["me", "default", "admin"],
    ]
    for secret in (text, other):
        assert secret.strip().rpartition("_")[2] not in listed
    assert run("revoke", "ci", "--access", path) == (0, "")
    assert access.refresh()
    with pytest.raises(Unauthenticated):
        access.authenticate(bearer(text.strip()))
    assert run("new", "me", "--role", "run", "--access", path)[0] == 1
    assert "there is no token 'ci'" in run("revoke", "ci", "--access", path)[1]
    for arguments in (
        ("new", "x y", "--role", "run"),
        ("new", "x", "--role", "run", "--tenant", "/"),
    ):
        assert "letters, digits" in run(*arguments, "--access", path)[1]
    assert "--access FILE is required" in run("list")[1]
    assert "No such file" in run("list", "--access", path + "x")[1]


# --- Reload ---------------------------------------------------------------------------------------


def test_an_invalid_file_is_logged_once_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    text = editing.add(path, "ci", tenant="acme", role=Role.RUN)
    access = AccessFile(path)
    before = path.read_text()
    path.write_text(before + "\n[[token]]\nname = 1\n")
    with capture_logs() as logs:
        assert [access.refresh() for _ in range(3)] == [False] * 3
    (line,) = logs
    assert line["log_level"] == "error"
    assert "line 9" in line["error"]
    access.authenticate(bearer(text))
    path.unlink()
    assert not access.refresh()
    access.authenticate(bearer(text))
    path.write_text(before)
    assert access.refresh()
    assert not access.refresh()


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_file_that_could_not_be_read_is_read_again(with_keys: bool, tmp_path: Path) -> None:
    """A change that is missed for lack of descriptors would keep a revoked token alive forever."""
    path, keys = tmp_path / "access.toml", tmp_path / "keys.json"
    text = editing.add(path, "ci", tenant="acme", role=Role.RUN)
    if with_keys:
        keys.write_text(json.dumps({"keys": [_jwk("one", signing_key())]}))
        path.write_text(path.read_text() + _jwt_entry('jwks = "keys.json"'))
    access = AccessFile(path)
    editing.remove(path, "ci")
    with capture_logs() as logs:
        with no_descriptors():
            assert [access.refresh() for _ in range(3)] == [False] * 3
        (line,) = logs
        assert "Too many open files" in line["error"]
        access.authenticate(bearer(text))
        assert access.refresh()
    with pytest.raises(Unauthenticated):
        access.authenticate(bearer(text))


def test_keys_that_could_not_be_read_are_read_again(tmp_path: Path) -> None:
    path, keys = tmp_path / "access.toml", tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [_jwk("one", signing_key())]}))
    path.write_text(_jwt_entry('jwks = "keys.json"'))
    access = AccessFile(path)
    access.authenticate(bearer(signed(headers={"kid": "one"})))
    keys.write_text(json.dumps({"keys": [_jwk("two", signing_key())]}))
    with no_descriptors():
        assert not access.refresh()
    assert access.refresh()
    with pytest.raises(Unauthenticated):
        access.authenticate(bearer(signed(headers={"kid": "one"})))


def test_keys_that_appear_later_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text("")
    access = AccessFile(path)
    path.write_text(_jwt_entry('jwks = "keys.json"'))
    assert not access.refresh()
    (tmp_path / "keys.json").write_text(json.dumps({"keys": [_jwk("one", signing_key())]}))
    assert access.refresh()
    assert access.authenticate(bearer(signed(headers={"kid": "one"}))).tenant == "acme"


def test_an_invalid_file_fails_the_start(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    with pytest.raises(StartError, match="No such file"):
        AccessFile(path)
    path.write_bytes(b"\xff")
    with pytest.raises(StartError, match="not UTF-8"):
        AccessFile(path)
    for keys, content in (("key", "x"), ("jwks", "x"), ("jwks", "{}"), ("jwks", '{"keys": []}')):
        (tmp_path / "keys").write_text(content)
        path.write_text(_jwt_entry(f'{keys} = "keys"'))
        with pytest.raises(StartError, match="keys"):
            AccessFile(path)


@pytest.mark.parametrize(
    ("other", "is_one"),
    [
        (("acme", "run", '["coder"]'), True),
        (("other", "run", '["coder"]'), False),
        (("acme", "operator", '["coder"]'), False),
        (("acme", "run", '["coder", "b"]'), False),
        (("acme", "run", "[]"), False),
        (("acme", "run", ""), False),
    ],
)
def test_the_names_of_a_certificate_must_mean_the_same(
    other: tuple[str, str, str], is_one: bool, tmp_path: Path
) -> None:
    text = ""
    for name, (tenant, role, agents) in (("a", ("acme", "run", '["coder"]')), ("b", other)):
        text += f'[[certificate]]\nsubject = "dns={name}"\ntenant = "{tenant}"\nrole = "{role}"\n'
        text += f"agents = {agents}\n" if agents else ""
    (tmp_path / "access.toml").write_text(text)
    access = AccessFile(tmp_path / "access.toml")
    for names in (["dns=a", "dns=b"], ["dns=b", "dns=a"]):
        if is_one:
            assert access.authenticate(Credentials(certificate=names)).agents == frozenset(
                {"coder"}
            )
        else:
            with pytest.raises(Unauthenticated):
                access.authenticate(Credentials(certificate=names))


# --- JSON Web Tokens ------------------------------------------------------------------------------


def _jwt_entry(keys: str, more: str = "") -> str:
    return (
        f'[jwt]\n{keys}\nalgorithms = ["ES256", "RS256"]\nissuer = "{ISSUER}"\n'
        f'audience = "{AUDIENCE}"\ntenant_claim = "org"\nrole_claim = "may"\n{more}'
    )


def _jwk(name: str, key: Any, **more: str) -> dict[str, Any]:
    kind = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
    made = jwt.get_algorithm_by_name(kind).to_jwk(key.public_key(), as_dict=True)
    return {**made, "kid": name, **more}


def _jwts(folder: Path, *keys: dict[str, Any], more: str = "") -> JwtVerifier:
    (folder / "keys.json").write_text(json.dumps({"keys": keys}))
    settings = parse(_jwt_entry('jwks = "keys.json"', more), folder).jwt
    assert settings is not None
    return JwtVerifier(settings)


def test_a_token_is_verified_with_the_key_it_names(tmp_path: Path) -> None:
    found = _jwts(
        tmp_path,
        _jwk("one", signing_key()),
        _jwk("two", rsa_key(), alg="RS256"),
        _jwk("three", ec.generate_private_key(ec.SECP256R1()), use="enc"),
        {"kty": "oct", "k": "AAAA", "kid": "four"},
        {"kty": "new", "kid": "five"},
    )
    rsa = private_pem(rsa_key())
    assert found.verify(signed(headers={"kid": "one"})).caller == Caller(
        "acme", Role.ADMIN, "alice"
    )
    assert found.verify(signed(rsa, "RS256", headers={"kid": "two"})).caller.tenant == "acme"
    for text in (
        signed(),
        signed(headers={"kid": "two"}),
        signed(rsa, "RS256", headers={"kid": "one"}),
        signed(headers={"kid": "three"}),
        signed(headers={"kid": "nine"}),
        signed("AAAA" * 8, "HS256", headers={"kid": "four"}),
    ):
        with pytest.raises(AuthenticationFailed):
            found.verify(text)


def test_claims_are_mapped_to_tenant_and_role(tmp_path: Path) -> None:
    more = 'roles = { boss = "admin", guest = "read" }\ntenants = { "Acme Inc." = "acme" }\n'
    found = _jwts(tmp_path, _jwk("one", signing_key()), more=more)
    for claims, role in (
        ({"org": "Acme Inc.", "may": "boss"}, Role.ADMIN),
        ({"org": "Acme Inc.", "may": ["guest"]}, Role.READ),
        ({"org": "Acme Inc.", "may": "admin"}, None),
        ({"org": "Acme Inc.", "may": []}, None),
        ({"org": "Acme Inc.", "may": 7}, None),
        ({"org": "acme", "may": "boss"}, None),
    ):
        text = signed(**claims)
        if role is None:
            with pytest.raises(AuthenticationFailed):
                found.verify(text)
        else:
            assert found.verify(text).caller == Caller("acme", role, "alice")


@pytest.mark.parametrize("role", Role)
def test_a_token_may_claim_each_role(role: Role, tmp_path: Path) -> None:
    found = _jwts(tmp_path, _jwk("one", signing_key()))
    for claimed in (role.value, [role.value]):
        assert found.verify(signed(may=claimed)).caller == Caller("acme", role, "alice")
    mapped = _jwts(tmp_path, _jwk("one", signing_key()), more=f'roles = {{ x = "{role.value}" }}\n')
    assert mapped.verify(signed(may="x")).caller == Caller("acme", role, "alice")


@pytest.mark.parametrize(("one", "other"), list(permutations(Role, 2)))
def test_a_token_that_claims_several_roles_has_the_rights_of_each(
    one: Role, other: Role, tmp_path: Path
) -> None:
    found = _jwts(tmp_path, _jwk("one", signing_key()))
    caller = found.verify(signed(may=[one.value, "no role", other.value])).caller
    control = AccessControl()
    for method in REQUIRED_ROLES:
        if is_allowed(one, method) or is_allowed(other, method):
            control.permit(caller, method)
        else:
            with pytest.raises(PermissionDenied, match=f"'{one.value}'.* may not call"):
                control.permit(caller, method)


def test_a_verified_token_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _jwts(tmp_path, _jwk("one", signing_key()))
    verified: list[str] = []
    verify = JwtVerifier._decode

    def counted(self: JwtVerifier, text: str) -> Any:
        verified.append(text)
        return verify(self, text)

    monkeypatch.setattr(JwtVerifier, "_decode", counted)
    texts = [signed(sub=str(number)) for number in range(3)]
    for text in texts * 2:
        found.verify(text)
    assert verified == texts
    monkeypatch.setattr("runlane_server.access.jwts.MAX_CACHED", 2)
    found.verify(signed(sub="new"))
    assert len(found._cache) <= MAX_CACHED
    assert len(found._cache) == 3


def test_a_missing_jwt_library_is_reported_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jwt", None)
    (tmp_path / "key.pem").write_bytes(public_pem(signing_key()))
    (tmp_path / "access.toml").write_text(_jwt_entry('key = "key.pem"'))
    with pytest.raises(StartError, match=r"pip install 'runlane\[server,jwt\]'"):
        AccessFile(tmp_path / "access.toml")


# --- The log --------------------------------------------------------------------------------------


def test_failed_authentications_are_logged_at_a_bounded_rate() -> None:
    now = [0.0]
    failures = FailureLog(lambda: now[0])
    with capture_logs() as logs:
        for _ in range(failure_log.LINES + 5):
            failures.record(AuthenticationFailed("reason"))
        assert len(logs) == failure_log.LINES
        now[0] += failure_log.WINDOW
        failures.record(AuthenticationFailed("reason"))
    assert logs[-1]["suppressed_before"] == 5


def test_an_invalid_token_is_not_logged(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    text = editing.add(path, "ci", tenant="acme", role=Role.RUN)
    access = AccessFile(path)
    secret = text.rpartition("_")[2]
    other = signed()
    with capture_logs() as logs:
        for each in (
            text[:-1] + "7",
            text[:-1] + "6",
            text + "a",
            other,
            f"rl_{'b' * 16}_{secret}",
        ):
            with pytest.raises(Unauthenticated):
                access.authenticate(bearer(each))
    assert len(logs) == 5
    assert secret[:-1] not in str(logs)
    assert other.split(".")[1] not in str(logs)


def test_every_type_of_value_has_a_name_for_errors() -> None:
    assert {str, int, list, dict, datetime} == set(entries._KINDS)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "1" * 5_000,
        JWT.replace('["ES256"]', '[["ES256"]]'),
        JWT.replace('["ES256"]', "[{ a = 1 }]"),
    ],
    ids=["deep", "a long number", "lists in a list", "tables in a list"],
)
def test_hostile_toml_is_an_invalid_entry(text: str) -> None:
    with pytest.raises(BadEntry):
        parse(text)
