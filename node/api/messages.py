"""A chat request's messages as chat templates want them: text content, known roles."""

from __future__ import annotations

from typing import Any

import msgspec

from mesh.errors import RequestError

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 10_000


def normalise(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of ``messages`` with ``developer`` as ``system`` and content parts joined to one text."""
    if not messages:
        raise RequestError("messages must not be empty", param="messages", code="invalid_messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"at most {MAX_MESSAGES} messages", param="messages", code="invalid_messages")
    return [_message(message, at) for at, message in enumerate(messages)]


def _message(message: dict[str, Any], at: int) -> dict[str, Any]:
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise _bad(at, "role", f"must be one of developer, {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and not (role == "assistant" and message.get("tool_calls")):
        raise _bad(at, "content", "is missing")
    done = {**message, "role": role, "content": _text(content, at)}
    if message.get("tool_calls") is not None:
        done["tool_calls"] = _tool_calls(message["tool_calls"], at)
    return done


def _text(content: Any, at: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _bad(at, "content", "must be a string or a list of text parts")
    return "".join(_part(part, at) for part in content)


def _part(part: Any, at: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    raise _bad(at, "content", f"holds a part of type {str(kind)[:40]!r}; only text is supported")


def _tool_calls(calls: Any, at: int) -> list[dict[str, Any]]:
    """Earlier calls, their arguments as objects: templates print them as JSON themselves."""
    if not isinstance(calls, list):
        raise _bad(at, "tool_calls", "must be a list")
    return [_tool_call(call, at) for call in calls]


def _tool_call(call: Any, at: int) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _bad(at, "tool_calls", "each needs a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            raise _bad(at, "tool_calls", "arguments must be JSON") from None
    return {**call, "function": {**function, "arguments": arguments or {}}}


def _bad(at: int, field: str, why: str) -> RequestError:
    return RequestError(f"messages[{at}].{field} {why}", param=f"messages[{at}].{field}", code="invalid_messages")
