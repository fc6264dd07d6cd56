"""A checked call to an HTTP response: whole, or as a stream."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from mesh.errors import RequestError
from node.api.context import API, CONTEXT, Api, Context
from node.api.errors import error_object, json_response
from node.api.render import ChatRender, CompletionRender, Render
from node.api.responses import ResponseRender
from node.api.run import Call, Delta, Opened, Run
from node.api.service import Generation
from node.api.sse import EventStream, Silence
from node.telemetry import get_logger


async def respond(
    request: web.Request, call: Call, attached: dict[int, Generation] | None = None, cursor: Cursor | None = None
) -> web.StreamResponse:
    """``attached``: choices that run already; ``cursor``: knows what the client has of the stream."""
    api, context = request.app[API], request[CONTEXT]
    async with Run(api, call, context.started, attached) as run:
        if call.first.stream:
            return await _stream(request, api, context, run, call, cursor or Cursor({}, call))
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


async def _stream(
    request: web.Request, api: Api, context: Context, run: Run, call: Call, cursor: Cursor
) -> web.StreamResponse:
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
            await stream.send([event for item in items for event in cursor.events(render, item)])
            for item in items:
                if isinstance(item, Delta):
                    run.acknowledge(item)
            await stream.comment_if_due()
        cursor.check_end()
        stream.last_id = cursor.last
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


Has = dict[int, tuple[int, int]]
"""Choice -> (tokens, number) of the last event of it that a client has."""


class Cursor:
    """Names events ``choice:tokens:characters``, what the client has of that choice once it has the event, and where
    several have the same, all but the first ``...:number``.  Drops those that the client has: made again from the
    journal, at whichever node, they are the same."""

    def __init__(self, has: Has, call: Call) -> None:
        """RequestError when the client has events of choices that ``call`` has not."""
        if has and max(has) >= len(call.choices):
            raise _bad_event_id(f"this stream has no choice {max(has)}")
        self._has = has
        self._at: Has = {}
        self.last = ""
        """Id of the newest event, whether it was sent or dropped."""

    def events(self, render: Render, item: Opened | Delta) -> list[tuple[str, dict[str, Any]]]:
        if isinstance(item, Opened):
            return self._named(item.choice, 0, 0, render.opening(item.choice))
        return self._named(item.choice, item.count, item.offset, render.chunks(item))

    def _named(
        self, choice: int, tokens: int, offset: int, chunks: list[dict[str, Any]]
    ) -> list[tuple[str, dict[str, Any]]]:
        made = []
        for chunk in chunks:
            before, number = self._at.get(choice, (-1, 0))
            number = number + 1 if before == tokens else 0
            self._at[choice] = (tokens, number)
            self.last = f"{choice}:{tokens}:{offset}" + (f":{number}" if number else "")
            if (tokens, number) > self._has.get(choice, (-1, 0)):
                made.append((self.last, chunk))
        return made

    def check_end(self) -> None:
        """RequestError when the client has events that this stream, now at its end, did not have."""
        for choice, had in self._has.items():
            tokens, number = self._at.get(choice, (-1, 0))
            if had > (tokens, number):
                raise _bad_event_id(f"choice {choice} of this stream ends with {tokens} tokens, before {had[0]}")


def _bad_event_id(why: str) -> RequestError:
    return RequestError(
        f"Last-Event-ID: {why}; ids are choice:tokens:characters, at most one for each choice",
        param="Last-Event-ID",
        code="invalid_event_id",
    )


def parse_event_ids(text: str) -> Has:
    """``Last-Event-ID``: an id of this stream, or one for each choice, separated by commas.  Empty: from the start."""
    has: Has = {}
    for one in filter(None, (part.strip() for part in text.split(","))):
        parts = one.split(":")
        if not (3 <= len(parts) <= 4 and all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)):
            raise _bad_event_id(f"{one[:40]!r} is no id")
        choice, tokens, _, number = map(int, [*parts, "0"][:4])
        has[choice] = max(has.get(choice, (-1, 0)), (tokens, number))
    return has


def _note_route(context: Context, opened: Opened) -> None:
    if not context.route:
        context.route = opened.route
