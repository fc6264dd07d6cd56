"""``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``: from a body to a ``Call``, and the model list."""

from __future__ import annotations

import hashlib
import secrets
import time
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from mesh.errors import RequestError
from mesh.types import ModelInfo, SamplingParams
from node.api import params
from node.api.context import API, CONTEXT, Api, Context
from node.api.errors import json_response
from node.api.guard import need
from node.api.messages import normalise
from node.api.responses import as_chat
from node.api.run import Call, Choice
from node.api.schemas import ChatBody, CompletionBody, GenerationBody, read_body, read_object
from node.api.service import Form, GenerationRequest
from node.api.sessions import answer, known_whole
from node.api.structured import structure_of
from node.text.tokenizer import LONG_TEXT, Tokenizer, encode_off_loop, off_loop

ID_PREFIXES: dict[Form, str] = {"chat": "chatcmpl-", "completion": "cmpl-", "response": "resp_"}
COMPLETION_TOKENS = 16
"""OpenAI's default of the completion form; a chat's is what fits."""
MAX_PROMPTS = 2_048
TEMPLATE_ARGUMENTS = 64
HEAD_CHARS = 16
"""Characters a token of the context that are encoded of a text longer than that, to see whether the rest need be.
Four are common; a vocabulary's longest word, which ``Tokenizer.least`` goes by, has a hundred."""


async def chat_completions(request: web.Request) -> web.StreamResponse:
    api, context = request.app[API], request[CONTEXT]
    need(context.caller, "infer")
    raw = await request.read()
    body = read_body(ChatBody, read_object(raw))
    model = find_model(api, body.model)
    tokenizer = await api.service.tokenizer(model.id)
    return await answer(request, await chat_call(api, context, request, raw, body, model, tokenizer))


async def responses(request: web.Request) -> web.StreamResponse:
    """``/v1/responses``: the same generation as a chat, said in other words."""
    api, context = request.app[API], request[CONTEXT]
    need(context.caller, "infer")
    raw = await request.read()
    body = as_chat(read_object(raw))
    model = find_model(api, body.model)
    tokenizer = await api.service.tokenizer(model.id)
    return await answer(request, await chat_call(api, context, request, raw, body, model, tokenizer, "response"))


async def completions(request: web.Request) -> web.StreamResponse:
    api, context = request.app[API], request[CONTEXT]
    need(context.caller, "infer")
    raw = await request.read()
    body = read_body(CompletionBody, read_object(raw))
    model = find_model(api, body.model)
    tokenizer = await api.service.tokenizer(model.id)
    return await answer(request, await completion_call(api, context, request, raw, body, model, tokenizer))


async def chat_call(
    api: Api,
    context: Context,
    request: web.Request,
    raw: bytes,
    body: ChatBody,
    model: ModelInfo,
    tokenizer: Tokenizer,
    form: Form = "chat",
) -> Call:
    """A chat as a ``Call``.  RequestError names whatever cannot be done."""
    logprobs = params.chat_logprobs(body.logprobs, body.top_logprobs)
    check = partial(api.service.check_grammar, model.id)
    structure = await structure_of(body.response_format, body.tools, body.tool_choice, check)
    resume = await _resumed(api, request, body, model, structure.grammar)
    sampling = _sampling(api, request, body, model, tokenizer, logprobs=logprobs, grammar=structure.grammar)
    text = await chat_text(tokenizer, body.messages, body, list(structure.tools))
    await _check_length(tokenizer, text, model, param="messages")
    ids = await encode_off_loop(tokenizer, text, special=False)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = params.fit(len(ids), wanted, api.settings.default_max_tokens, model, param=param)
    base = _base_request(context, request, raw, body, model, sampling, form, resume)
    requests = _choices(base, tuple(ids), limit, body.n or 1, first=0)
    choices = tuple(Choice(at, each) for at, each in enumerate(requests))
    return known_whole(Call(choices, len(ids), tokenizer, structure))


async def completion_call(
    api: Api,
    context: Context,
    request: web.Request,
    raw: bytes,
    body: CompletionBody,
    model: ModelInfo,
    tokenizer: Tokenizer,
) -> Call:
    """A completion of one or many prompts as a ``Call``; choices are numbered prompt by prompt."""
    logprobs = params.completion_logprobs(body.logprobs)
    check = partial(api.service.check_grammar, model.id)
    structure = await structure_of(body.response_format, None, None, check)
    resume = await _resumed(api, request, body, model, structure.grammar)
    n, echo = body.n or 1, bool(body.echo)
    prompts = params.prompts_of(body.prompt, model.vocab_size, max(1, MAX_PROMPTS // max(1, n)))
    sampling = _sampling(api, request, body, model, tokenizer, logprobs=logprobs, grammar=structure.grammar)
    base = _base_request(context, request, raw, body, model, sampling, "completion", resume)
    base = msgspec.structs.replace(base, echo=echo, prompt_logprobs=logprobs if echo else -1)
    nothing = body.max_tokens == 0 and echo  # score the prompt only: draw one token and do not show it
    for prompt in prompts:
        if isinstance(prompt, str):
            await _check_length(tokenizer, prompt, model, param="prompt")
    long = sum(map(len, prompts)) > LONG_TEXT
    choices: list[Choice] = []
    total = 0
    for prompt in prompts:
        ids = await _ids(tokenizer, prompt, long)
        total += len(ids)
        limit = params.fit(len(ids), 1 if nothing else body.max_tokens, COMPLETION_TOKENS, model, param="max_tokens")
        text = await _text(tokenizer, prompt, long) if echo else ""
        requests = _choices(base, ids, limit, n, first=len(choices))
        choices += [Choice(each.choice, each, text, nothing) for each in requests]
    return known_whole(Call(tuple(choices), total, tokenizer, structure))


async def _check_length(tokenizer: Tokenizer, text: str, model: ModelInfo, *, param: str) -> None:
    """RequestError for a text that cannot fit the context, at a cost that the context bounds, not the text."""
    params.check_length(tokenizer.least(text), text, model, param=param)
    head = text[: HEAD_CHARS * model.max_context]
    if len(head) < len(text):
        ids = await encode_off_loop(tokenizer, head, special=False)
        params.check_length(len(ids) // 2, head, model, param=param)  # half: the cut may have split what merges


async def _ids(tokenizer: Tokenizer, prompt: str | tuple[int, ...], long: bool) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        return prompt
    ids = await encode_off_loop(tokenizer, prompt, special=True, long=long)
    if not ids:
        raise RequestError("prompt must hold at least one token", param="prompt", code="invalid_prompt")
    return tuple(ids)


async def _text(tokenizer: Tokenizer, prompt: str | tuple[int, ...], long: bool) -> str:
    return prompt if isinstance(prompt, str) else await off_loop(long, lambda: tokenizer.decode(prompt))


async def chat_text(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], body: Any, tools: list[dict[str, Any]] | None = None
) -> str:
    """The prompt by the chat template; ``body`` has the template's switches (a chat's or a tokenize request's)."""
    extra, going_on = body.chat_template_kwargs or {}, bool(body.continue_final_message)
    if len(extra) > TEMPLATE_ARGUMENTS or RESERVED & extra.keys():
        raise RequestError(
            f"chat_template_kwargs may not hold {', '.join(sorted(RESERVED))}, nor over {TEMPLATE_ARGUMENTS} names",
            param="chat_template_kwargs",
            code="invalid_request",
        )
    add = not going_on if body.add_generation_prompt is None else body.add_generation_prompt
    if add and going_on:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
            code="invalid_request",
        )
    clean = normalise(messages)
    size = sum(len(message["content"]) for message in clean)

    def render() -> str:
        return tokenizer.chat(
            clean, tools=tools, add_generation_prompt=add, continue_final_message=going_on, extra=extra
        )

    return await off_loop(size > LONG_TEXT, render)


RESERVED = frozenset(
    {"self", "messages", "conversations", "sanitize_control_tokens",
     "tokenize", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "conversation",
     "return_dict", "return_tensors", "tokenizer_kwargs", "padding", "truncation", "max_length", "documents",
     "return_assistant_tokens_mask"}
)  # fmt: skip
"""Arguments of the template call that are not the template's variables."""


def _sampling(
    api: Api,
    request: web.Request,
    body: GenerationBody,
    model: ModelInfo,
    tokenizer: Tokenizer,
    *,
    logprobs: int,
    grammar: str,
) -> SamplingParams:
    seed = api.service.draw_seed(_idempotency_key(request)) if body.seed is None else body.seed
    return params.sampling_of(body, model, tokenizer.eos_ids, logprobs=logprobs, grammar=grammar, seed=seed)


def _base_request(
    context: Context,
    request: web.Request,
    raw: bytes,
    body: GenerationBody,
    model: ModelInfo,
    sampling: SamplingParams,
    form: Form,
    resume: tuple[int, ...],
) -> GenerationRequest:
    """What all choices share; prompt, max_tokens, seed and session differ."""
    extras, options = params.mesh_extras(body.mesh), body.stream_options
    context.session = secrets.token_hex(16)
    return GenerationRequest(
        session=context.session,
        request_id=context.request_id,
        model=model.id,
        prompt=(),
        sampling=sampling,
        stop=params.stops_of(body.stop),
        priority=extras.priority,
        timeout_s=extras.timeout_s,
        max_retries=extras.max_retries,
        balance=extras.balance,
        allowed_nodes=extras.allowed_nodes,
        max_layers=extras.max_layers,
        caller=context.caller.id,
        trace=context.trace,
        idempotency_key=_idempotency_key(request),
        body_hash=_hash(raw),
        form=form,
        return_tokens=extras.return_tokens,
        resume=resume,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        response_id=ID_PREFIXES[form] + context.session,
        created=int(time.time()),
        follows=request.headers.get("X-Mesh-Follows", "") == "1",
    )


async def _resumed(
    api: Api, request: web.Request, body: GenerationBody, model: ModelInfo, grammar: str
) -> tuple[int, ...]:
    """The tokens to go on after, once it is known that they can be of this request; how many may be depends on the
    prompt (``_choices``)."""
    tokens = params.resumed(body, model, keyed=bool(_idempotency_key(request)))
    if tokens and grammar:
        await api.service.check_grammar(model.id, grammar, tokens)
    return tokens


def _hash(raw: bytes) -> str:
    """What a repeat under the same idempotency key has in common with ``raw``: all but the tokens it resumes with."""
    body = read_object(raw)
    mesh = body.get("mesh")
    if isinstance(mesh, dict):
        mesh.pop("resume_tokens", None)
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()


def _choices(
    base: GenerationRequest, prompt: tuple[int, ...], max_tokens: int, n: int, *, first: int
) -> list[GenerationRequest]:
    """n choices of one prompt, each drawing with a seed of its own."""
    params.check_resumed(len(base.resume), max_tokens, first + n)
    made = []
    for at in range(n):
        seed = (base.sampling.seed + at) % 2**64
        sampling = msgspec.structs.replace(base.sampling, max_tokens=max_tokens, seed=seed)
        index = first + at
        session = base.session if index == 0 else f"{base.session}-{index}"
        made.append(msgspec.structs.replace(base, prompt=prompt, sampling=sampling, session=session, choice=index))
    return made


def _idempotency_key(request: web.Request) -> str:
    key = request.headers.get("Idempotency-Key", "")
    if len(key) > 255:
        raise RequestError("Idempotency-Key is longer than 255 characters", code="invalid_request")
    return key


def find_model(api: Api, name: str | None) -> ModelInfo:
    """The model of that name; where none is named, the only one there is."""
    models = api.service.models()
    if not models:
        raise RequestError(
            "the mesh serves no model yet; offer one with `python -m node model add PATH` at a node that has its files",
            param="model",
            code="model_not_found",
            status=404,
        )
    if not name:
        if len(models) == 1:
            return models[0]
        known = ", ".join(m.id for m in models[:10])
        raise RequestError(f"model is missing; there is: {known}", param="model", code="model_not_found")
    for model in models:
        if model.id == name:
            return model
    known = ", ".join(m.id for m in models[:10]) or "none"
    raise RequestError(
        f"the model {name[:100]!r} does not exist here; there is: {known}",
        param="model",
        code="model_not_found",
        status=404,
    )


async def list_models(request: web.Request) -> web.Response:
    api = request.app[API]
    return json_response({"object": "list", "data": [_model(api, model) for model in api.service.models()]})


async def show_model(request: web.Request) -> web.Response:
    api = request.app[API]
    return json_response(_model(api, find_model(api, request.match_info["id"])))


def _model(api: Api, model: ModelInfo) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": api.started,
        "owned_by": "mesh",
        "max_model_len": model.max_context,
        "root": model.id,
        "parent": None,
    }
