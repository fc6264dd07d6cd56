"""State, probes, metrics, tokenizing, cancelling: the paths that generate nothing."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from mesh.errors import RequestError
from node.api.context import API, CONTEXT
from node.api.errors import json_response
from node.api.guard import need
from node.api.openai import chat_text, find_model
from node.api.schemas import DetokenizeBody, TokenizeBody, read_body, read_object
from node.telemetry import CONTENT_TYPE
from node.text.tokenizer import LONG_TEXT, encode_off_loop, off_loop

MAX_TOKENIZE_CHARS = 1_000_000
"""Past any context that is served; counting the tokens of more costs seconds and hundreds of megabytes."""


async def health(request: web.Request) -> web.Response:
    """The process lives and its loop turns."""
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Whether every placed model can be served now; a node on a minority's side can, and says that it is degraded."""
    service = request.app[API].service
    good, why = service.ready()
    degraded = service.degraded or None
    if good:
        return json_response({"ready": True, "degraded": degraded})
    error = {"message": why or "not ready", "type": "server_error", "param": None, "code": "not_ready"}
    response = json_response({"ready": False, "degraded": degraded, "why": why, "error": error}, status=503)
    response.headers["Retry-After"] = "1"
    return response


async def version(request: web.Request) -> web.Response:
    return json_response({"version": request.app[API].service.version})


async def metrics(request: web.Request) -> web.Response:
    api = request.app[API]
    api.telemetry.running.set(api.gate.running)
    for priority, count in api.gate.waiting_by_class().items():
        api.telemetry.waiting.labels(priority).set(count)
    for priority, limit in api.gate.limits().items():
        api.telemetry.limit.labels(priority).set(limit)
    return web.Response(body=api.telemetry.render(), headers={"Content-Type": CONTENT_TYPE})


async def status(request: web.Request) -> web.Response:
    return json_response(request.app[API].service.status())


async def cancel_session(request: web.Request) -> web.Response:
    """DELETE /v1/sessions/{id}: ends the session wherever in the mesh it runs."""
    api, context = request.app[API], request[CONTEXT]
    need(context.caller, "infer")
    session = request.match_info["id"]
    context.session = session if session.isascii() and session.isprintable() else ""
    if not await api.service.cancel(session, context.caller):
        raise RequestError("no such session of yours is running", code="session_not_found", status=404)
    return json_response({"id": session, "object": "session", "cancelled": True})


async def tokenize(request: web.Request) -> web.Response:
    api = request.app[API]
    body = read_body(TokenizeBody, read_object(await request.read()))
    model = find_model(api, body.model)
    tokenizer = await api.service.tokenizer(model.id)
    if body.messages is not None:
        text, special = await chat_text(tokenizer, body.messages, body), bool(body.add_special_tokens)
    elif body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
    else:
        raise RequestError("prompt or messages is needed", param="prompt", code="invalid_request")
    if len(text) > MAX_TOKENIZE_CHARS:
        raise RequestError(
            f"{len(text)} characters are more than the {MAX_TOKENIZE_CHARS} that are tokenized at once",
            param="prompt" if body.messages is None else "messages",
            code="context_length_exceeded",
        )
    ids = await encode_off_loop(tokenizer, text, special=special)
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.max_context, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = await off_loop(
            len(ids) > LONG_TEXT, lambda: [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
        )
    return json_response(answer)


async def detokenize(request: web.Request) -> web.Response:
    api = request.app[API]
    body = read_body(DetokenizeBody, read_object(await request.read()))
    model = find_model(api, body.model)
    if any(not 0 <= token < model.vocab_size for token in body.tokens):
        raise RequestError(f"tokens must be ids below {model.vocab_size}", param="tokens", code="invalid_token")
    tokenizer = await api.service.tokenizer(model.id)
    text = await off_loop(len(body.tokens) > LONG_TEXT, lambda: tokenizer.decode(body.tokens, special=True))
    return json_response({"prompt": text})


async def tokenizer_info(request: web.Request) -> web.Response:
    api = request.app[API]
    model = find_model(api, request.query.get("model"))
    tokenizer = await api.service.tokenizer(model.id)
    return json_response(
        {
            "model": model.id,
            "vocab_size": tokenizer.size,
            "eos_token_ids": list(tokenizer.eos_ids),
            "has_chat_template": tokenizer.has_chat_template,
            "max_model_len": model.max_context,
        }
    )


async def not_built(request: web.Request) -> web.Response:
    """Paths of OpenAI's API that this version does not have, by name rather than as an unknown path."""
    raise RequestError(f"{request.path} is not supported by this version", code="not_supported", status=501)
