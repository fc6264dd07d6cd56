"""Every failure of every path as OpenAI's error body; nothing else is shown to a client."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from aiohttp import web

from mesh.errors import MeshError

KINDS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "invalid_request_error",
    429: "rate_limit_error",
}
CODES = {
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}


def error_object(error: BaseException) -> dict[str, Any]:
    """``{"message","type","param","code"}`` of ``error``.  What is our own fault says no more than that."""
    if isinstance(error, MeshError):
        return {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}
    if isinstance(error, TimeoutError):
        return {"message": "the request's time ran out", "type": "server_error", "param": None, "code": "timeout"}
    return {
        "message": "internal error; the node's log says more",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


def status_of(error: BaseException) -> int:
    if isinstance(error, MeshError):
        return error.status
    return 503 if isinstance(error, TimeoutError) else 500


def error_response(error: BaseException) -> web.Response:
    response = json_response({"error": error_object(error)}, status=status_of(error))
    wait = getattr(error, "retry_after_s", None)
    if wait is None and response.status in (429, 503):
        wait = 1.0
    if wait is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(wait)))
    return response


def http_error_response(error: web.HTTPException, method: str, path: str) -> web.Response:
    """aiohttp's own refusals (404, 405, 413 ...), whose bodies are plain text."""
    status = error.status
    message = {
        404: f"no such path: {method} {path}",
        405: f"{method} is not allowed on {path}",
        413: f"the body is larger than {getattr(error, 'max_size', None) or 'this node takes in'} bytes",
    }.get(status, error.reason)
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    body = {"message": message, "type": kind, "param": None, "code": CODES.get(status, f"http_{status}")}
    response = json_response({"error": body}, status=status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def json_response(value: Any, *, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", charset="utf-8"
    )
