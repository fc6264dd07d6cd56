"""``/v1/responses``, for clients that speak only it: a chat request in other words, and its typed stream of events.

Stateless: what ``previous_response_id`` and stored responses need is not kept, so they are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from mesh.errors import RequestError
from node.api.calls import CallPiece, joined_calls
from node.api.render import grouped, usage_of
from node.api.run import Call, Delta, Run
from node.api.schemas import ChatBody, MeshOptions, read_body

REFUSED = ("previous_response_id", "conversation", "background", "prompt")


class ResponsesBody(msgspec.Struct, kw_only=True):
    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    user: str | None = None
    mesh: MeshOptions | None = None


def as_chat(raw: dict[str, Any]) -> ChatBody:
    """The same request as a chat.  RequestError names what is wrong or cannot be done."""
    for name in REFUSED:
        if raw.get(name):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported_parameter")
    body = read_body(ResponsesBody, raw)
    for name in ("return_tokens", "resume_tokens"):
        if body.mesh is not None and getattr(body.mesh, name):
            raise RequestError(
                f"mesh.{name} is not supported here: use /v1/chat/completions or /v1/completions",
                param=f"mesh.{name}",
                code="unsupported_parameter",
            )
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages += [_message(item, at) for at, item in enumerate(items)]
    return ChatBody(
        messages=messages,
        model=body.model,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        response_format=_format(body.text),
        tools=[_tool(tool, at) for at, tool in enumerate(body.tools or ())] or None,
        tool_choice=_choice(body.tool_choice),
        user=body.user,
        mesh=body.mesh,
    )


def _message(item: dict[str, Any], at: int) -> dict[str, Any]:
    """An item of ``input``: a message, an earlier call, or what a call gave."""
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    raise RequestError(
        f"input[{at}] is of type {str(kind)[:40]!r}, which is not supported", param=f"input[{at}]", code="invalid_input"
    )


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    wanted = (text or {}).get("format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return wanted if isinstance(wanted, dict) else None
    return {"type": "json_schema", "json_schema": {"name": wanted.get("name"), "schema": wanted.get("schema")}}


def _tool(tool: dict[str, Any], at: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(f"tools[{at}] must be of type function", param=f"tools[{at}]", code="invalid_tool")
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    return {"function": {"name": choice.get("name")}} if isinstance(choice, dict) else choice


class ResponseRender:
    """Events in the order that clients check: created first, completed, incomplete or failed last, all numbered."""

    done = False

    def __init__(self, call: Call) -> None:
        self._call, first = call, call.first
        self._message_id = f"msg_{first.session}"
        self._head = {
            "id": first.response_id,
            "object": "response",
            "created_at": first.created,
            "model": first.model,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        self._sequence = 0
        self._text = ""
        self._finish: str | None = None
        self._items: list[dict[str, Any]] = []
        self._calls: list[CallPiece] = []

    def opening(self, choice: int) -> list[dict[str, Any]]:
        begun = self._response("in_progress")
        item = {**self._message(""), "status": "in_progress", "content": []}
        return [
            self._event("response.created", response=begun),
            self._event("response.in_progress", response=begun),
            self._event("response.output_item.added", output_index=0, item=item),
            self._of_text("response.content_part.added", part=_part("")),
        ]

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        self._text += delta.text
        made = [self._of_text("response.output_text.delta", delta=delta.text, logprobs=[])] if delta.text else []
        made += [event for piece in delta.calls for event in self._of_call(piece)]
        if delta.finish is not None:
            made += self._ended(delta.finish)
        return made

    def _of_call(self, piece: CallPiece) -> list[dict[str, Any]]:
        """A call's output item comes after the message's; its arguments as they are generated."""
        self._calls.append(piece)
        item, index = _call_item(piece), piece.index + 1
        if piece.name:
            begun = {**item, "arguments": "", "status": "in_progress"}
            return [self._event("response.output_item.added", output_index=index, item=begun)]
        at = {"item_id": item["id"], "output_index": index}
        return [self._event("response.function_call_arguments.delta", **at, delta=piece.arguments)]

    def _ended(self, finish: str) -> list[dict[str, Any]]:
        self._finish = finish
        message = self._message(self._text)
        self._items = [message, *map(_call_item, joined_calls(self._calls))]
        made = [
            self._of_text("response.output_text.done", text=self._text, logprobs=[]),
            self._of_text("response.content_part.done", part=_part(self._text)),
            self._event("response.output_item.done", output_index=0, item=message),
        ]
        for index, item in enumerate(self._items[1:], start=1):
            at = {"item_id": item["id"], "output_index": index}
            made.append(self._event("response.function_call_arguments.done", **at, arguments=item["arguments"]))
            made.append(self._event("response.output_item.done", output_index=index, item=item))
        return made

    def closing(self, run: Run) -> list[dict[str, Any]]:
        status = "incomplete" if self._finish == "length" else "completed"
        return [self._event(f"response.{status}", response=self._response(status, run))]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """How far it got, and why no further; never a completed response."""
        told = {**self._response("failed"), "error": {"code": error["code"], "message": error["message"]}}
        return self._event("response.failed", response=told)

    def whole(self, deltas: Iterable[Delta], run: Run) -> dict[str, Any]:
        for delta in grouped(deltas, 1)[0]:
            self.chunks(delta)
        return self._response("incomplete" if self._finish == "length" else "completed", run)

    def _response(self, status: str, run: Run | None = None) -> dict[str, Any]:
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = None if run is None else _usage(usage_of(self._call, run))
        said = {"status": status, "error": None, "incomplete_details": details, "output": self._items, "usage": usage}
        return {**self._head, **said}

    def _message(self, text: str) -> dict[str, Any]:
        body = {"status": "completed", "role": "assistant", "content": [_part(text)]}
        return {"id": self._message_id, "type": "message", **body}

    def _of_text(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._message_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._sequence = self._sequence, self._sequence + 1
        return {"type": kind, "sequence_number": number, **fields}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: CallPiece) -> dict[str, Any]:
    said = {"call_id": call.id, "name": call.name, "arguments": call.arguments, "status": "completed"}
    return {"id": call.id.replace("call_", "fc_"), "type": "function_call", **said}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    told = {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
    return {**told, "mesh": usage["mesh"]} if "mesh" in usage else told
