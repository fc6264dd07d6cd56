"""Structured output and tool calls: requests to llguidance grammars, and generated text back to tool calls.

A forced call (``tool_choice`` "required" or a function) is generated under the schema of
``{"name": ..., "arguments": ...}``.  With "auto" the model decides; calls are found in the ``<tool_call>`` form of
Hermes and Qwen templates.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Any, Literal

import msgspec

from mesh.errors import RequestError

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_SCHEMA_BYTES = 262_144

ToolMode = Literal["none", "auto", "required", "named"]


class Structure(msgspec.Struct, frozen=True):
    """What the answer's form shall be."""

    grammar: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    """For the chat template; empty where tool_choice is none."""
    mode: ToolMode = "none"


class ToolCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str
    """JSON text, as OpenAI has it."""

    def as_openai(self, index: int | None = None) -> dict[str, Any]:
        call: dict[str, Any] = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**call, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


async def structure_of(
    response_format: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None,
    tool_choice: str | dict[str, Any] | None,
    *,
    supported: bool,
) -> Structure:
    """The grammar and tools of a request.  RequestError names what is wrong, or not supported for this model."""
    functions = _functions(tools or [])
    mode, chosen = _mode(tool_choice, functions)
    schema, param = _schema_of(response_format), "response_format"
    if mode in ("required", "named"):
        if schema is not None:
            raise RequestError("response_format cannot be combined with a forced tool call", param="tool_choice")
        schema, param = _call_schema(chosen), "tool_choice"
    grammar = await _grammar(schema, param, supported) if schema is not None else ""
    return Structure(grammar, () if mode == "none" else tuple(tools or ()), mode)


async def _grammar(schema: dict[str, Any], param: str, supported: bool) -> str:
    if not supported:
        raise RequestError(
            f"{param}: constrained output is not available for this model", param=param, code="unsupported_parameter"
        )
    grammar = msgspec.json.encode({"grammars": [{"json_schema": schema}]}).decode()
    if len(grammar) > MAX_SCHEMA_BYTES:
        raise RequestError(f"the schema is larger than {MAX_SCHEMA_BYTES} bytes", param=param, code="invalid_schema")
    fault = await asyncio.to_thread(_fault_of, grammar)
    if fault:
        raise RequestError(f"the schema cannot be enforced: {fault}", param=param, code="invalid_schema")
    return grammar


def _fault_of(grammar: str) -> str:
    from llguidance import LLMatcher

    return str(LLMatcher.validate_grammar(grammar))


def _schema_of(wanted: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON schema that ``response_format`` asks for; None: any text."""
    if wanted is None or wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object":
        return {"type": "object"}
    if wanted.get("type") != "json_schema":
        raise RequestError(
            "response_format.type must be text, json_object or json_schema",
            param="response_format",
            code="invalid_request",
        )
    inner = wanted.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise RequestError(
            "response_format.json_schema.schema must be an object", param="response_format", code="invalid_schema"
        )
    return schema


def _functions(tools: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Parameters' schema by function name."""
    found: dict[str, dict[str, Any]] = {}
    for at, tool in enumerate(tools):
        function = tool.get("function") if tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"tools[{at}] must be of type function and have a name", param=f"tools[{at}]", code="invalid_tool"
            )
        parameters = function.get("parameters")
        found[function["name"]] = parameters if isinstance(parameters, dict) else {"type": "object"}
    return found


def _mode(
    choice: str | dict[str, Any] | None, functions: dict[str, dict[str, Any]]
) -> tuple[ToolMode, dict[str, dict[str, Any]]]:
    """How calls come about, and which functions may be called."""
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in functions:
            raise RequestError("tool_choice names no function of tools", param="tool_choice", code="invalid_tool")
        return "named", {str(name): functions[str(name)]}
    if choice not in (None, "none", "auto", "required"):
        raise RequestError(
            "tool_choice must be none, auto, required or a function", param="tool_choice", code="invalid_tool"
        )
    if choice == "required" and not functions:
        raise RequestError("tool_choice required needs tools", param="tool_choice", code="invalid_tool")
    if choice == "none" or not functions:
        return "none", {}
    return ("required" if choice == "required" else "auto"), functions


def _call_schema(functions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One call of one of ``functions``."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": parameters},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in functions.items()
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def split_calls(text: str, mode: ToolMode) -> tuple[str, list[ToolCall]]:
    """(plain text, calls).  Text that does not parse stays text: an answer cut by its length is shown as it is."""
    if mode in ("required", "named"):
        call = _read_call(text)
        return ("", [call]) if call else (text, [])
    if mode == "none" or OPEN not in text:
        return text, []
    before, *blocks = text.split(OPEN)
    calls = [_read_call(block.split(CLOSE)[0]) for block in blocks]
    good = [call for call in calls if call is not None]
    return (before.rstrip(), good) if len(good) == len(calls) else (text, [])


def _read_call(text: str) -> ToolCall | None:
    try:
        value = msgspec.json.decode(text.strip())
    except (msgspec.DecodeError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    return ToolCall(value["name"], msgspec.json.encode(value.get("arguments") or {}).decode())


class CallFilter:
    """Lets a stream's text through until a tool call begins, and keeps the rest for ``split_calls``."""

    def __init__(self, mode: ToolMode) -> None:
        self._mode = mode
        self._kept = ""

    def push(self, text: str) -> str:
        if self._mode == "none":
            return text
        if self._mode != "auto":
            self._kept += text
            return ""
        self._kept += text
        at = self._kept.find(OPEN)
        if at < 0:
            at = next(
                (
                    i
                    for i in range(max(0, len(self._kept) - len(OPEN)), len(self._kept))
                    if OPEN.startswith(self._kept[i:])
                ),
                len(self._kept),
            )
        shown, self._kept = self._kept[:at], self._kept[at:]
        return shown

    def end(self) -> tuple[str, list[ToolCall]]:
        """The rest: text that was no call after all, or calls."""
        return split_calls(self._kept, self._mode)
