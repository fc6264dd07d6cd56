"""Structured output and tool calls: from a request to a grammar, in llguidance's form, and what its calls are read by.

A forced call (``tool_choice`` "required" or a function) is generated under the schema of
``{"name": ..., "arguments": ...}``.  With "auto" the model decides; where a tool says ``strict``, text is free up to
``<tool_call>``, and from there on the schemas of the tools hold.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from mesh.errors import RequestError
from node.api.calls import CLOSE, OPEN, ToolMode

MAX_GRAMMAR_BYTES = 65_536
"""Of all schemas of a request.  The widest object that fits compiles in 1.5 s (docs/decisions/0060)."""
WHITESPACE = r"(\n[ \t]{0,40}| )?"
"""Between JSON's tokens: as people and programs write it.  Without a bound a model may spend its whole answer on it."""
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
MAX_TOOLS = 128

Check = Callable[[str], Awaitable[None]]
"""RequestError where the model cannot be held to a grammar; param is set here."""


class Structure(msgspec.Struct, frozen=True):
    """What the answer's form shall be."""

    grammar: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    """For the chat template; empty where tool_choice is none."""
    mode: ToolMode = "none"

    @property
    def forced(self) -> bool:
        """The answer is a call and nothing else."""
        return self.mode in ("required", "named")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.tools)


class _Function(msgspec.Struct, frozen=True):
    """A tool as its grammar needs it."""

    name: str
    schema: dict[str, Any]
    strict: bool
    param: str


async def structure_of(
    response_format: dict[str, Any] | None,
    tools: list[dict[str, Any]] | None,
    tool_choice: str | dict[str, Any] | None,
    check: Check,
) -> Structure:
    """The grammar and tools of a request.  RequestError names what is wrong, or not supported for this model."""
    functions = _functions(tools or [])
    mode, chosen = _mode(tool_choice, functions)
    schema, at = _schema_of(response_format), "response_format"
    constrained = mode in ("required", "named") or (mode == "auto" and any(f.strict for f in chosen))
    if constrained and schema is not None:
        raise RequestError("response_format cannot be combined with forced or strict tools", param="tool_choice")
    grammar = ""
    if schema is not None:
        grammar = await _checked(_grammar(_json(schema)), at, check)
    elif constrained:
        made = _grammar(_call(chosen) if mode != "auto" else _free_text_and_calls(chosen))
        grammar = await _checked_tools(made, chosen, "tools" if mode == "auto" else "tool_choice", check)
    return Structure(grammar, () if mode == "none" else tuple(tools or ()), mode)


# -- grammars ----------------------------------------------------------------------------------------------------------


def _grammar(lark: str) -> str:
    return msgspec.json.encode({"grammars": [{"lark_grammar": f"%llguidance {{}}\nstart: {lark}"}]}).decode()


def _json(schema: dict[str, Any]) -> str:
    """``schema`` as a rule; its own ``x-guidance``, the library's switches, has no say."""
    try:
        return "%json " + msgspec.json.encode({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}).decode()
    except RecursionError as error:
        raise _too_deep() from error


def _too_deep() -> RequestError:
    return RequestError("the schema is nested too deeply", code="invalid_schema")


def _call(functions: list[_Function]) -> str:
    """One call of one of ``functions``."""
    calls = []
    for number, function in enumerate(functions):
        at = ("" if len(functions) == 1 else f"/anyOf/{number}") + "/properties/arguments"
        try:
            arguments = _moved(function.schema, at)
        except RecursionError as error:
            raise _too_deep() from error
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return _json(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _moved(schema: Any, at: str) -> Any:
    """``schema`` as it reads at ``at`` of another: its references are from the root."""
    if isinstance(schema, list):
        return [_moved(each, at) for each in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, at) for name, value in schema.items()}
    if isinstance(schema.get("$ref"), str) and schema["$ref"].startswith("#"):
        moved["$ref"] = f"#{at}{schema['$ref'][1:]}"
    return moved


def _free_text_and_calls(functions: list[_Function]) -> str:
    opened, free = rf"opened[lazy]: /(.|\n)*{OPEN}/", rf"FREE: /(.|\n)*/ & ~/(.|\n)*{OPEN}(.|\n)*/"
    call = rf'opened /\n?/ call /\n?/ "{CLOSE}"'
    return f"({call})* FREE\n{opened}\n{free}\ncall: {_call(functions)}"


async def _checked(grammar: str, param: str, check: Check) -> str:
    """``grammar``, once it is known that the model can be held to it."""
    size = len(grammar.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"the schema takes {size} bytes, of at most {MAX_GRAMMAR_BYTES}", param=param, code="invalid_schema"
        )
    try:
        await check(grammar)
    except RequestError as error:
        raise RequestError(f"{param}: {error}", param=param, code=error.code) from error
    return grammar


async def _checked_tools(grammar: str, functions: list[_Function], param: str, check: Check) -> str:
    """As ``_checked``; of several tools, the one whose schema is at fault is named."""
    try:
        return await _checked(grammar, param, check)
    except RequestError as error:
        if error.code == "invalid_schema" and len(grammar) <= MAX_GRAMMAR_BYTES:
            for function in functions:
                await _checked(_grammar(_json(function.schema)), function.param, check)
        raise


# -- the request's fields ----------------------------------------------------------------------------------------------


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


def _functions(tools: list[dict[str, Any]]) -> list[_Function]:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"at most {MAX_TOOLS} tools", param="tools", code="invalid_tool")
    found: dict[str, _Function] = {}
    for at, tool in enumerate(tools):
        function = tool.get("function") if tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str):
            raise _bad_tool(at, "must be of type function and have a name")
        if not NAME.fullmatch(name) or name in found:
            raise _bad_tool(at, f"needs a name of its own, of letters, digits, _, . and -: {name[:80]!r}")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise _bad_tool(at, "function.parameters must be a JSON schema")
        # What a call passes is an object, where the schema does not say so itself.
        schema = {"type": "object", **(parameters or {})}
        where = f"tools[{at}].function.parameters"
        if schema["type"] != "object":
            why = f"{where} must be of type object, not {str(schema['type'])[:80]}"
            raise RequestError(why, param=where, code="invalid_schema")
        found[name] = _Function(name, schema, function.get("strict") is True, where)
    return list(found.values())


def _bad_tool(at: int, why: str) -> RequestError:
    return RequestError(f"tools[{at}] {why}", param=f"tools[{at}]", code="invalid_tool")


def _mode(choice: str | dict[str, Any] | None, functions: list[_Function]) -> tuple[ToolMode, list[_Function]]:
    """How calls come about, and which functions may be called."""
    if isinstance(choice, dict):
        inner = choice.get("function")
        name = inner.get("name") if isinstance(inner, dict) else None
        chosen = [function for function in functions if function.name == name]
        if not chosen:
            raise RequestError("tool_choice names no function of tools", param="tool_choice", code="invalid_tool")
        return "named", chosen
    if choice not in (None, "none", "auto", "required"):
        raise RequestError(
            "tool_choice must be none, auto, required or a function", param="tool_choice", code="invalid_tool"
        )
    if choice == "required" and not functions:
        raise RequestError("tool_choice required needs tools", param="tool_choice", code="invalid_tool")
    if choice == "none" or not functions:
        return "none", []
    return ("required" if choice == "required" else "auto"), functions
