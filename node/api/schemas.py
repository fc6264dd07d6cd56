"""Bodies of the OpenAI-shaped requests, and the first look at them: JSON, types, what is refused by name.

Types are checked by msgspec against the Structs below; a wrong one becomes a 400 that names the parameter.
Unknown parameters are ignored, as OpenAI's servers do; those in ``REFUSED`` would change the answer and are not
built, so ignoring them would be a lie.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from mesh.errors import RequestError
from mesh.types import Priority

S = TypeVar("S", bound=msgspec.Struct)

REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "web_search_options": (None,),
    "vector_store_ids": (None, []),
    "prompt_logprobs": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "truncate_prompt_tokens": (None,),
    "prompt_embeds": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
}
"""Parameter -> values that ask for nothing."""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class MeshOptions(msgspec.Struct, kw_only=True):
    """Our extras, all under the one field ``mesh``."""

    priority: Priority | None = msgspec.field(name="class", default=None)
    timeout: float | None = None
    max_retries: int | None = None
    balance: str | None = None
    allowed_nodes: list[str] | None = None
    max_layers: int | None = None
    return_tokens: bool | None = None
    """Chunks of the stream name the tokens that they are made of, and the seed."""
    resume_tokens: list[int] | None = None
    """Tokens that were drawn for this very request before all that knew it were lost: go on after them."""


class GenerationBody(msgspec.Struct, kw_only=True):
    """What chat and completion requests share."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    mesh: MeshOptions | None = None
    response_format: dict[str, Any] | None = None


class ChatBody(GenerationBody, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionBody(GenerationBody, kw_only=True):
    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None


class TokenizeBody(msgspec.Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body.  RequestError says what is wrong with it."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        name = _not_finite(body)
        if name is not None:
            raise RequestError(f"{name} must be a finite number", param=name, code="out_of_range") from error
        raise RequestError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return value


def _not_finite(body: bytes) -> str | None:
    """The field that holds NaN or an infinity, as Python's json writes them or as a number too large for a float."""
    found = re.search(rb'"(\w{1,40})"\s*:\s*(?:NaN|-?Infinity|-?\d[\d.]{0,40}[eE]\+?\d{3,40})\s*[,}]', body[:4096])
    return found.group(1).decode("ascii", "replace") if found else None


def read_body(kind: type[S], raw: dict[str, Any]) -> S:
    """``raw`` as ``kind``; RequestError names the parameter of a wrong type or one that is refused."""
    for name, harmless in REFUSED.items():
        if name in raw and raw[name] not in harmless:
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        raise RequestError(text.replace(" - at `$.", " - at `"), param=_param_of(text), code="invalid_type") from error


def _param_of(text: str) -> str | None:
    """The parameter that a msgspec message speaks of, as ``mesh.timeout`` or ``prompt``."""
    missing = re.search(r"missing required field `([^`]+)`", text)
    if missing:
        return missing.group(1)
    at = re.search(r"at `(?:key in )?\$\.?([^`\[]*)", text)
    return (at.group(1) or None) if at else None
