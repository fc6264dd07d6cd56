"""A checked call to an HTTP response: whole, or as a stream."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from node.api.context import API, CONTEXT, Api, Context
from node.api.errors import error_object, json_response
from node.api.render import ChatRender, CompletionRender, Render
from node.api.responses import ResponseRender
from node.api.run import Call, Delta, Opened, Run
from node.api.sse import EventStream, Silence
from node.telemetry import get_logger


async def respond(request: web.Request, call: Call) -> web.StreamResponse:
    api, context = request.app[API], request[CONTEXT]
    async with Run(api, call, context.started) as run:
        if call.first.stream:
            return await _stream(request, api, context, run, call)
        return await _whole(context, run, call)


async def _whole(context: Context, run: Run, call: Call) -> web.Response:
    deltas: list[Delta] = []
    while not run.finished:
        for item in await run.take():
            if isinstance(item, Opened):
                _note_route(context, item)
                continue
            deltas.append(item)
            run.acknowledge(item)
    return json_response(make_render(call).whole(deltas, run))


async def _stream(request: web.Request, api: Api, context: Context, run: Run, call: Call) -> web.StreamResponse:
    """Headers go out once the first generation is open, so that a refusal still has its own HTTP status.

    One that waits in the queue for longer than a comment's time gets them then, and a refusal as an event.
    """
    silence = Silence(api.settings.keepalive_s, run.wake)
    render, stream = make_render(call), EventStream(silence)
    try:
        while not run.finished:
            items = await run.take()
            for item in items:
                if isinstance(item, Opened):
                    _note_route(context, item)
            if not stream.started:
                await stream.start(request)
            await stream.send([event for item in items for event in _events(render, item)])
            for item in items:
                if isinstance(item, Delta):
                    run.acknowledge(item)
            await stream.comment_if_due()
        await stream.send([(stream.last_id, chunk) for chunk in render.closing(run)])
    except ConnectionError:
        raise  # the client is gone: nobody to tell
    except Exception as error:
        if not stream.started:
            raise
        body = error_object(error)
        api.telemetry.failure.labels(body["code"]).inc()
        get_logger("api").warning(
            "stream failed", error=body["code"], why=type(error).__name__, exc_info=body["code"] == "internal_error"
        )
        await stream.send([(stream.last_id, render.failure(body))])
    finally:
        silence.stop()
    return await stream.finish(done=render.done)


def make_render(call: Call) -> Render:
    return {"chat": ChatRender, "completion": CompletionRender, "response": ResponseRender}[call.first.form](call)


def _events(render: Render, item: Opened | Delta) -> list[tuple[str, dict[str, Any]]]:
    """SSE events with ids ``choice:tokens:characters``: what the client has of that choice once it has the event."""
    if isinstance(item, Opened):
        return [(f"{item.choice}:0:0", chunk) for chunk in render.opening(item.choice)]
    return [(f"{item.choice}:{item.count}:{item.offset}", chunk) for chunk in render.chunks(item)]


def _note_route(context: Context, opened: Opened) -> None:
    if not context.route:
        context.route = opened.route
