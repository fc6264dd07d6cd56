"""Streams that outlive the connection they began on: resuming by event id, and repeating by idempotency key."""

from __future__ import annotations

from typing import cast

import msgspec
from aiohttp import web

from mesh.errors import RequestError
from node.api.context import API, CONTEXT, Api, Context
from node.api.guard import need
from node.api.respond import Cursor, parse_event_ids, respond
from node.api.run import Call, Choice
from node.api.service import Generation
from node.api.structured import Structure, ToolMode

PATIENCE_S = 3.0
"""How long a session may have no owner while a client asks for it: its holders notice and adopt meanwhile."""


def known_whole(call: Call) -> Call:
    """``call`` with what another node needs to give the whole answer written into each of its requests."""
    facts = {
        "choices": len(call.choices),
        "prompt_tokens": call.prompt_tokens,
        "tool_mode": call.structure.mode,
        "tool_names": call.structure.names,
    }
    made = (
        msgspec.structs.replace(each, request=msgspec.structs.replace(each.request, discard=each.discard, **facts))
        for each in call.choices
    )
    return msgspec.structs.replace(call, choices=tuple(made))


async def answer(request: web.Request, call: Call) -> web.StreamResponse:
    """A new request, or under an idempotency key that is known the one that runs (or ran) already.

    With ``Last-Event-ID`` only the rest is sent, for a client whose session was lost with all that knew it: the tokens
    before are those that it resumes with, or the same ones drawn again under the same key and seed.
    """
    api, context, first = request.app[API], request[CONTEXT], call.first
    has = parse_event_ids(request.headers.get("Last-Event-ID", "")) if first.idempotency_key or first.resume else {}
    cursor = Cursor(has, call)
    if not first.idempotency_key:
        return await respond(request, call, cursor=cursor)
    session = await api.service.claim(first)
    call = _rerun(call) if has else call
    if session == first.session:
        return await respond(request, call, cursor=cursor)
    context.session = session
    attached: dict[int, Generation] = {}
    try:
        call = await _attach_known(api, context, call, session, attached)
    except BaseException:
        await _release(attached)
        raise
    return await respond(request, call, attached, cursor)


def _rerun(call: Call) -> Call:
    """``call`` for a client that has some of it: whatever of it runs no more is run again whole."""
    choices = (
        msgspec.structs.replace(each, request=msgspec.structs.replace(each.request, rerun=True))
        for each in call.choices
    )
    return msgspec.structs.replace(call, choices=tuple(choices))


async def _attach_known(api: Api, context: Context, call: Call, session: str, attached: dict[int, Generation]) -> Call:
    """``call`` with what its choices are already under ``session``; those that run are added to ``attached``."""
    choices = []
    for each in call.choices:
        name = session if each.index == 0 else f"{session}-{each.index}"
        reader = await api.service.attach(name, context.caller, 0.0 if attached or each.index else PATIENCE_S)
        if reader is not None:
            attached[each.index] = reader
            # The answer's id and time are those of the first time; how it is streamed is asked anew.
            asked = each.request
            again = {"include_usage": asked.include_usage, "return_tokens": asked.return_tokens}
            made = msgspec.structs.replace(reader.request, stream=asked.stream, **again)
        else:
            made = msgspec.structs.replace(each.request, session=name)
        choices.append(msgspec.structs.replace(each, request=made))
    return msgspec.structs.replace(call, choices=tuple(choices))


async def session_events(request: web.Request) -> web.StreamResponse:
    """GET /v1/sessions/{id}/events: the stream from after ``Last-Event-ID`` on, at any node."""
    api, context = request.app[API], request[CONTEXT]
    need(context.caller, "infer")
    has = parse_event_ids(request.headers.get("Last-Event-ID", ""))
    session = request.match_info["id"]
    context.session = session if session.isascii() and session.isprintable() else ""
    attached: dict[int, Generation] = {}
    try:
        await _attach_all(api, context, session, attached)
        call = await _call_of(api, attached)
        cursor = Cursor(has, call)
    except BaseException:
        await _release(attached)
        raise
    return await respond(request, call, attached, cursor)


async def _attach_all(api: Api, context: Context, session: str, attached: dict[int, Generation]) -> None:
    first = await api.service.attach(session, context.caller, PATIENCE_S)
    if first is None:
        raise RequestError("no such session of yours is known", code="session_not_found", status=404)
    attached[0] = first
    for index in range(1, first.request.choices):
        reader = await api.service.attach(f"{session}-{index}", context.caller, 0.0)
        if reader is None:
            raise RequestError(
                f"choice {index} of this session was not begun or is lost: repeat the request with its Idempotency-Key",
                code="session_incomplete",
                status=404,
            )
        attached[index] = reader


async def _release(attached: dict[int, Generation]) -> None:
    for reader in attached.values():
        await reader.cancel("disconnected")


async def _call_of(api: Api, attached: dict[int, Generation]) -> Call:
    """The call as it was made, from its journals alone."""
    first = attached[0].request
    tokenizer = await api.service.tokenizer(first.model)
    choices = []
    for index, reader in attached.items():
        asked = msgspec.structs.replace(reader.request, stream=True)
        echoed = tokenizer.decode(asked.prompt) if asked.echo else ""
        choices.append(Choice(index, asked, echoed, asked.discard))
    tools = tuple({"function": {"name": name}} for name in first.tool_names)
    structure = Structure(tools=tools, mode=cast(ToolMode, first.tool_mode))
    return Call(tuple(choices), first.prompt_tokens, tokenizer, structure)
