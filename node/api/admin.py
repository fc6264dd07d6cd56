"""``/mesh/admin/*``: tokens, keys, models, leave, revoke, takeover.  All of them need the admin key."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from aiohttp import web

from mesh.errors import RequestError
from mesh.types import ModelId
from node.api.context import API, CONTEXT, Api
from node.api.errors import json_response
from node.api.guard import need
from node.api.schemas import read_body, read_object
from node.api.service import Scope
from node.telemetry import get_logger

DAY_S = 86_400.0
MAX_TTL_S = 3650 * DAY_S
Answer = dict[str, Any]
Act = Callable[[Api, web.Request], Awaitable[Answer]]


class TokenBody(msgspec.Struct):
    ttl_s: float = DAY_S
    uses: int | None = 1
    """null: without limit."""


class KeyBody(msgspec.Struct):
    scopes: tuple[Literal["infer", "rag", "admin"], ...] = ("infer",)
    ttl_s: float | None = None
    name: str = ""


class ModelBody(msgspec.Struct):
    path: str
    name: str = ""


class NodeBody(msgspec.Struct):
    node: str


class NoBody(msgspec.Struct):
    pass


async def token_create(api: Api, request: web.Request) -> Answer:
    body = read_body(TokenBody, read_object(await request.read()))
    _check_ttl(body.ttl_s)
    if body.uses is not None and not 1 <= body.uses <= 1_000_000:
        raise RequestError("uses must be from 1 to 1000000, or null", param="uses", code="out_of_range")
    return await api.service.token_create(body.ttl_s, body.uses)


async def token_list(api: Api, request: web.Request) -> Answer:
    return _listing(await api.service.token_list())


async def token_revoke(api: Api, request: web.Request) -> Answer:
    return _removed(await api.service.token_revoke(_id(request)), "token")


async def key_create(api: Api, request: web.Request) -> Answer:
    body = read_body(KeyBody, read_object(await request.read()))
    if body.ttl_s is not None:
        _check_ttl(body.ttl_s)
    if not body.scopes:
        raise RequestError("scopes must not be empty", param="scopes", code="out_of_range")
    scopes: frozenset[Scope] = frozenset(body.scopes)
    return await api.service.key_create(scopes, body.ttl_s, body.name[:100])


async def key_list(api: Api, request: web.Request) -> Answer:
    return _listing(await api.service.key_list())


async def key_revoke(api: Api, request: web.Request) -> Answer:
    return _removed(await api.service.key_revoke(_id(request)), "key")


async def model_list(api: Api, request: web.Request) -> Answer:
    return _listing(await api.service.model_list())


async def model_add(api: Api, request: web.Request) -> Answer:
    body = read_body(ModelBody, read_object(await request.read()))
    return await api.service.model_add(body.path, body.name)


async def model_remove(api: Api, request: web.Request) -> Answer:
    return _removed(await api.service.model_remove(ModelId(_id(request))), "model")


async def leave(api: Api, request: web.Request) -> Answer:
    read_body(NoBody, read_object(await request.read()))
    return await api.service.leave()


async def revoke(api: Api, request: web.Request) -> Answer:
    return await api.service.revoke(read_body(NodeBody, read_object(await request.read())).node)


async def takeover(api: Api, request: web.Request) -> Answer:
    read_body(NoBody, read_object(await request.read()))
    return await api.service.takeover()


VERBS: list[tuple[str, str, Act]] = [
    ("GET", "/mesh/admin/tokens", token_list),
    ("POST", "/mesh/admin/tokens", token_create),
    ("DELETE", "/mesh/admin/tokens/{id}", token_revoke),
    ("GET", "/mesh/admin/keys", key_list),
    ("POST", "/mesh/admin/keys", key_create),
    ("DELETE", "/mesh/admin/keys/{id}", key_revoke),
    ("GET", "/mesh/admin/models", model_list),
    ("POST", "/mesh/admin/models", model_add),
    ("DELETE", "/mesh/admin/models/{id:.+}", model_remove),
    ("POST", "/mesh/admin/leave", leave),
    ("POST", "/mesh/admin/revoke", revoke),
    ("POST", "/mesh/admin/takeover", takeover),
]


def routes() -> list[web.RouteDef]:
    return [web.route(method, path, _guarded(act)) for method, path, act in VERBS]


def _guarded(act: Act) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        need(request[CONTEXT].caller, "admin")
        answer = await act(request.app[API], request)
        if request.method != "GET":
            get_logger("api").info("administration", verb=act.__name__)
        return json_response(answer)

    return handler


def _check_ttl(ttl_s: float) -> None:
    if not 1 <= ttl_s <= MAX_TTL_S:
        raise RequestError(
            f"ttl_s must be from 1 to {MAX_TTL_S:.0f} seconds (ten years), not {ttl_s:g}",
            param="ttl_s",
            code="out_of_range",
        )


def _id(request: web.Request) -> str:
    return request.match_info["id"]


def _listing(items: list[dict[str, Any]]) -> Answer:
    return {"object": "list", "data": items}


def _removed(found: bool, what: str) -> Answer:
    if not found:
        raise RequestError(f"no such {what}", code=f"{what}_not_found", status=404)
    return {"removed": True}
