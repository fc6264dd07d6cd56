"""From a checked body to what the mesh needs: sampling, limits, stops, extras.  Every range is written here."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from mesh.errors import RequestError
from mesh.types import ModelInfo, Priority, SamplingParams
from node.api.schemas import GenerationBody, MeshOptions

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1_000
MAX_LOGPROBS = 20
MAX_BIASES = 1_024
MAX_TIMEOUT_S = 86_400.0
MAX_RETRIES = 100
MAX_LAYERS = 100_000
"""A limit that is above a model's layers limits nothing; one beyond 64 bits could not be passed on."""
RESUME = "mesh.resume_tokens"
BALANCES = ("round_robin", "least_connections", "weighted", "memory", "latency", "prefix_affinity")

RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 1_000_000),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 10),
    "n": (1, MAX_CHOICES),
    "min_tokens": (0, 10_000_000),
}


class MeshExtras(msgspec.Struct, frozen=True):
    """The request's ``mesh`` field with its defaults."""

    priority: Priority = "normal"
    timeout_s: float = 600.0
    max_retries: int = 8
    balance: str = ""
    allowed_nodes: tuple[str, ...] = ()
    max_layers: int = 0
    """0: not limited, which a request says by leaving it out."""
    return_tokens: bool = False


def sampling_of(
    body: GenerationBody, model: ModelInfo, eos_ids: tuple[int, ...], *, logprobs: int, grammar: str, seed: int
) -> SamplingParams:
    """How to draw, but for ``max_tokens``, which depends on the prompt (``fit``).  RequestError names what is off."""
    check_ranges(body)
    if grammar:
        _check_end(body)
    stop_ids = () if body.ignore_eos else eos_ids
    top_p = 1.0 if body.top_p is None else body.top_p
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=top_p or 1.0,
        top_k=1 if top_p == 0 else max(0, body.top_k or 0),  # a nucleus of nothing is its one most likely token
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_bias(body.logit_bias or {}, model),
        seed=seed % 2**64,
        stop_token_ids=tuple(dict.fromkeys((*stop_ids, *_token_ids(body.stop_token_ids, model, "stop_token_ids")))),
        min_tokens=body.min_tokens or 0,
        logprobs=logprobs,
        grammar=grammar,
    )


def _check_end(body: GenerationBody) -> None:
    """A text with a grammar ends where the grammar says."""
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name):
            raise RequestError(
                f"{name} cannot be combined with structured output: once the text is complete nothing may follow",
                param=name,
                code="invalid_request",
            )


def check_ranges(body: GenerationBody) -> None:
    """Ranges of all plain numbers; best_of can only ask for what n gives anyway."""
    for name, (low, high) in RANGES.items():
        value = getattr(body, name)
        if value is not None and not low <= value <= high:
            given = f"{value:g}" if isinstance(value, float) else str(value)[:40]
            raise RequestError(f"{name} must be from {low:g} to {high:g}, not {given}", param=name, code="out_of_range")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported", param="best_of", code="unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options", code="invalid_request")
    if body.mesh is not None and body.mesh.return_tokens and not body.stream:
        raise RequestError("mesh.return_tokens needs stream: true", param="mesh.return_tokens", code="invalid_request")


def _bias(wanted: dict[str, float], model: ModelInfo) -> dict[int, float]:
    if len(wanted) > MAX_BIASES:
        raise RequestError(f"logit_bias may name {MAX_BIASES} tokens at most", param="logit_bias", code="out_of_range")
    bias: dict[int, float] = {}
    for key, value in wanted.items():
        if not key.isdecimal() or len(key) > 10 or int(key) >= model.vocab_size:
            raise RequestError(
                f"logit_bias: {key[:40]!r} is no token id below {model.vocab_size}",
                param="logit_bias",
                code="invalid_token",
            )
        if not -100 <= value <= 100:
            raise RequestError(
                f"logit_bias must be from -100 to 100, not {value:g}", param="logit_bias", code="out_of_range"
            )
        bias[int(key)] = value
    return bias


def _token_ids(ids: list[int] | None, model: ModelInfo, param: str) -> tuple[int, ...]:
    for token in ids or ():
        if not 0 <= token < model.vocab_size:
            raise RequestError(
                f"{param}: {token} is no token id below {model.vocab_size}", param=param, code="invalid_token"
            )
    return tuple(ids or ())


def resumed(body: GenerationBody, model: ModelInfo, *, keyed: bool) -> tuple[int, ...]:
    """``mesh.resume_tokens``, but for their number, which ``check_resumed`` looks at.  ``keyed``: the seed follows from
    an idempotency key."""
    tokens = _token_ids(body.mesh.resume_tokens if body.mesh else None, model, RESUME)
    if tokens and body.seed is None and body.temperature != 0 and not keyed:
        raise RequestError(
            f"{RESUME} needs the seed (or the Idempotency-Key) that they were drawn with: with another one the text "
            "would not go on as it did",
            param="seed",
            code="invalid_request",
        )
    return tokens


def check_resumed(tokens: int, max_tokens: int, choices: int) -> None:
    """RequestError where so many resumed tokens cannot be those of one choice of ``max_tokens``."""
    if tokens and choices > 1:
        raise RequestError(
            f"{RESUME} goes on with one choice of one prompt: ask for each on its own",
            param=RESUME,
            code="out_of_range",
        )
    if tokens > max_tokens:
        raise RequestError(
            f"{RESUME} holds {tokens} tokens, which count towards max_tokens, and that is {max_tokens}",
            param=RESUME,
            code="out_of_range",
        )


def stops_of(stop: str | list[str] | None) -> tuple[str, ...]:
    """Stop strings as a tuple, empty ones refused (they would stop everything)."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop may hold {MAX_STOPS} strings at most", param="stop", code="out_of_range")
    if any(not s or len(s) > MAX_STOP_CHARS for s in stops):
        raise RequestError(
            f"a stop string must have 1 to {MAX_STOP_CHARS} characters", param="stop", code="out_of_range"
        )
    return stops


def fit(prompt: int, wanted: int | None, default: int, model: ModelInfo, *, param: str) -> int:
    """max_tokens for a prompt of so many tokens: as wanted, or the default cut to what fits the context."""
    if wanted is not None and wanted < 1:
        raise RequestError(f"{param} must be at least 1, not {wanted}", param=param, code="out_of_range")
    room = model.max_context - prompt
    if room < (wanted or 1):
        asked = f" and {wanted} in the completion" if wanted is not None else ""
        raise RequestError(
            f"this model's maximum context length is {model.max_context} tokens; you asked for {prompt} tokens "
            f"in the prompt{asked}; shorten one of them",
            param="messages" if param == "max_completion_tokens" else param,
            code="context_length_exceeded",
        )
    return wanted if wanted is not None else min(room, default)


def check_length(least: int, text: str, model: ModelInfo, *, param: str) -> None:
    """RequestError where ``text``, of at least so many tokens, cannot fit the context."""
    if least > model.max_context:
        raise RequestError(
            f"this model's maximum context length is {model.max_context} tokens; {len(text)} characters are at least "
            f"{least}; shorten {param}",
            param=param,
            code="context_length_exceeded",
        )


def mesh_extras(options: MeshOptions | None, headers_priority: Priority = "normal") -> MeshExtras:
    """The ``mesh`` field, checked."""
    if options is None:
        return MeshExtras(priority=headers_priority)
    timeout = 600.0 if options.timeout is None else options.timeout
    retries = 8 if options.max_retries is None else options.max_retries
    if not (math.isfinite(timeout) and 0 < timeout <= MAX_TIMEOUT_S):
        raise RequestError(
            f"mesh.timeout must be above 0 and at most {MAX_TIMEOUT_S:g} s", param="mesh.timeout", code="out_of_range"
        )
    if not 0 <= retries <= MAX_RETRIES:
        raise RequestError(
            f"mesh.max_retries must be from 0 to {MAX_RETRIES}", param="mesh.max_retries", code="out_of_range"
        )
    if options.balance is not None and options.balance not in BALANCES:
        raise RequestError(
            f"mesh.balance must be one of {', '.join(BALANCES)}", param="mesh.balance", code="unknown_policy"
        )
    nodes = tuple(options.allowed_nodes or ())
    if options.allowed_nodes == [] or len(nodes) > 1_000 or any(not n or len(n) > 200 for n in nodes):
        raise RequestError(
            "mesh.allowed_nodes: names of 1 to 1000 nodes", param="mesh.allowed_nodes", code="out_of_range"
        )
    limit = options.max_layers
    if limit is not None and not 1 <= limit <= MAX_LAYERS:
        raise RequestError(
            f"mesh.max_layers must be from 1 to {MAX_LAYERS}", param="mesh.max_layers", code="out_of_range"
        )
    priority, tokens = options.priority or headers_priority, bool(options.return_tokens)
    return MeshExtras(priority, timeout, retries, options.balance or "", nodes, limit or 0, tokens)


def chat_logprobs(logprobs: bool | None, top_logprobs: int | None) -> int:
    """As in ``SamplingParams.logprobs``."""
    if top_logprobs is not None and not 0 <= top_logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {top_logprobs}",
            param="top_logprobs",
            code="out_of_range",
        )
    if top_logprobs and not logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_request")
    return (top_logprobs or 0) if logprobs else -1


def completion_logprobs(logprobs: int | None) -> int:
    if logprobs is not None and not 0 <= logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"logprobs must be from 0 to {MAX_LOGPROBS}, not {logprobs}", param="logprobs", code="out_of_range"
        )
    return -1 if logprobs is None else logprobs


def prompts_of(prompt: Any, vocab_size: int, limit: int) -> list[str | tuple[int, ...]]:
    """A completion's prompt in its four forms: string, strings, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _bad_prompt("prompt must be a string, strings, token ids or lists of token ids, and not empty")
    if len(prompt) > limit and not isinstance(prompt[0], int):
        raise _bad_prompt(f"prompt may hold {limit} prompts at most")
    if isinstance(prompt[0], int) and not isinstance(prompt[0], bool):
        return [_ids(prompt, vocab_size)]
    if all(isinstance(p, str) for p in prompt):
        return list(prompt)
    if all(isinstance(p, list) for p in prompt):
        return [_ids(p, vocab_size) for p in prompt]
    raise _bad_prompt("prompt must hold only strings, only token ids or only lists of token ids")


def _ids(ids: list[Any], vocab_size: int) -> tuple[int, ...]:
    if not ids:
        raise _bad_prompt("a prompt of token ids must not be empty")
    for at, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise _bad_prompt(f"prompt[{at}] is no token id below {vocab_size}: {str(token)[:40]}")
    return tuple(ids)


def _bad_prompt(why: str) -> RequestError:
    return RequestError(why, param="prompt", code="invalid_prompt")
