"""Hosts, origins, keys, scopes, and the administrative verbs."""

from __future__ import annotations

import pytest

from mesh.errors import ConfigError
from node.api.guard import Guard, check_bind, is_loopback
from tests.fakes import FakeService
from tests.node.api.conftest import Http, chat_body, serve

ADMIN = {"Authorization": "Bearer mk-admin"}


async def test_foreign_hosts_and_origins(http: Http) -> None:
    port = http.server.port
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "[::1", ""):
        status, body = await http.get("/v1/models", Host=host)
        assert (status, body["error"]["code"]) == (403, "host_not_allowed"), host
    for host in ("localhost", f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "192.168.1.7:80", "LOCALHOST"):
        assert (await http.get("/v1/models", Host=host))[0] == 200, host
    for origin in ("https://evil.example", "null", "http://localhost:1", "file://"):
        status, body = await http.get("/v1/models", Origin=origin)
        assert (status, body["error"]["code"]) == (403, "origin_not_allowed"), origin
    assert (await http.get("/v1/models", Origin=f"http://127.0.0.1:{port}"))[0] == 200


async def test_named_hosts_and_origins(service: FakeService) -> None:
    async for http in serve(service, names=("ann.lan",), origins=("https://chat.example",)):
        assert (await http.get("/health", Host="Ann.LAN:9000"))[0] == 200
        assert (await http.get("/health", Origin="https://chat.example"))[0] == 200


async def test_a_loopback_door_needs_no_key_and_ignores_placeholders(http: Http) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-placeholder"}, {"Authorization": "Bearer "}):
        status, _, _ = await http.post("/v1/chat/completions", chat_body(), **headers)
        assert status == 200
    assert {g.request.caller for g in http.service.opened} == {"anonymous"}


async def test_a_public_door_needs_a_key(service: FakeService) -> None:
    async for http in serve(service, host="0.0.0.0"):
        for headers in ({}, {"Authorization": "Bearer mk-wrong"}, {"Authorization": "Basic bWstYWRtaW4="}):
            status, body, _ = await http.post("/v1/chat/completions", chat_body(), **headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert (await http.get("/mesh/status", **headers))[0] == 401
            assert (await http.get("/health", **headers))[0] == 200
        status, _, _ = await http.post("/v1/chat/completions", chat_body(), Authorization="Bearer mk-infer")
        assert (status, service.opened[0].request.caller) == (200, "k1")
        status, body, _ = await http.post("/v1/chat/completions", chat_body(), Authorization="Bearer mk-rag")
        assert (status, body["error"]["code"]) == (403, "insufficient_scope")


async def test_a_session_belongs_to_its_key(http: Http) -> None:
    http.service.hold_after = 1
    headers = {"Authorization": "Bearer mk-infer"}
    async with http.session.post("/v1/chat/completions", json=chat_body(stream=True), headers=headers) as answer:
        session = answer.headers["x-mesh-session"]
        async with http.session.delete(f"/v1/sessions/{session}") as other:
            assert other.status == 404
        async with http.session.delete(f"/v1/sessions/{session}", headers=headers) as own:
            assert own.status == 200
        await answer.read()


@pytest.mark.parametrize("key", ["", "mk-infer", "mk-wrong"])
async def test_administration_needs_the_admin_key(http: Http, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for method, path in (
        ("GET", "/mesh/admin/tokens"),
        ("POST", "/mesh/admin/leave"),
        ("DELETE", "/mesh/admin/keys/x"),
    ):
        async with http.session.request(
            method, path, headers={**headers, "Content-Type": "application/json"}, data=b"{}"
        ) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")
    assert not http.service.calls


async def test_the_verbs(http: Http) -> None:
    async def post(path: str, body: object) -> tuple[int, dict[str, object]]:
        status, answer, _ = await http.post(f"/mesh/admin/{path}", body, **ADMIN)
        return status, answer

    assert (await post("tokens", {}))[1]["command"] == "python -m node join t"
    await post("tokens", {"ttl_s": 60, "uses": None})
    assert http.service.calls == [("token_create", 86400.0, 1), ("token_create", 60.0, None)]
    assert (await http.get("/mesh/admin/tokens", **ADMIN))[1]["data"] == [{"id": "t1"}]
    assert (await post("keys", {"scopes": ["infer", "rag"], "name": "lab"}))[1]["key"] == "mk-x"
    assert http.service.calls[-1] == ("key_create", frozenset({"infer", "rag"}), None, "lab")
    assert (await post("revoke", {"node": "bob"}))[1] == {"revoked": "bob"}
    assert (await post("takeover", {}))[1] == {"term": 2}
    assert (await post("models", {"path": "/m", "name": "m"}))[1] == {"id": "m"}
    assert (await post("leave", {}))[1] == {"leaving": True}
    for path, status in (
        ("tokens/t1", 200),
        ("tokens/t9", 404),
        ("keys/x", 200),
        ("models/demo", 200),
        ("models/a/b", 404),
    ):
        async with http.session.delete(f"/mesh/admin/{path}", headers=ADMIN) as answer:
            assert answer.status == status


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("tokens", {"ttl_s": 0}, "ttl_s"), ("tokens", {"uses": 0}, "uses"), ("keys", {"scopes": ["root"]}, "scopes"),
     ("keys", {"scopes": []}, "scopes"), ("revoke", {}, "node"), ("models", {}, "path")],
)  # fmt: skip
async def test_bad_verbs(http: Http, path: str, body: object, param: str) -> None:
    status, answer, _ = await http.post(f"/mesh/admin/{path}", body, **ADMIN)
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("ttl", ["Infinity", "-Infinity", "NaN", "1e999", "-5", "0.5", "1e12"])
async def test_a_lifetime_is_a_finite_number_of_seconds(http: Http, ttl: str) -> None:
    for path in ("tokens", "keys"):
        headers = {**ADMIN, "Content-Type": "application/json"}
        body = f'{{"ttl_s": {ttl}}}'.encode()
        async with http.session.post(f"/mesh/admin/{path}", data=body, headers=headers) as answer:
            error = (await answer.json())["error"]
        assert (answer.status, error["param"], error["code"]) == (400, "ttl_s", "out_of_range")
        assert error["message"].startswith("ttl_s must be")
        assert "e+" not in error["message"] or ttl == "1e12"


def test_which_addresses_are_this_machines_own() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "ann.lan", "")))
    assert Guard("127.0.0.1").keyless
    assert not Guard("0.0.0.0").keyless


def test_a_public_address_without_keys_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--api 0\.0\.0\.0.*key create"):
        check_bind("0.0.0.0", has_keys=False)
    check_bind("0.0.0.0", has_keys=True)
    check_bind("127.0.0.1", has_keys=False)
