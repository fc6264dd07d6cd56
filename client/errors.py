"""What can go wrong, from the caller's point of view.

ClientError              the root
├ NoNodeReachable        no node answered at all; nothing was started that could still be running
├ ApiError               a node answered with an error
│ ├ BadRequest             the request itself is wrong (400, 409, 413, 415 ...): do not repeat it
│ ├ NotAllowed             the API key is missing, wrong or too narrow (401, 403)
│ ├ NotFound               no such model, session, path (404)
│ ├ Busy                   full everywhere, even after waiting (429): ``retry_after_s``
│ └ Unavailable            the mesh cannot serve it now (5xx): no live node holds some layers, say
├ StreamFailed           the mesh gave a running stream up; ``progress`` says how far it came
└ StreamInterrupted      the node that streamed is gone, and no other has the rest; ``progress`` says how far it came
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.values import Progress


class ClientError(Exception):
    """Root of the tree."""


class NoNodeReachable(ClientError):
    """``failures``: per URL, why."""

    def __init__(self, failures: Mapping[str, str]) -> None:
        self.failures = dict(failures)
        told = "; ".join(f"{url}: {why}" for url, why in self.failures.items())
        super().__init__(f"no node could be reached ({told or 'none is known'})")


class ApiError(ClientError):
    """An error body in OpenAI's form."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        param: str | None = None,
        url: str = "",
        request_id: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.url, self.request_id, self.retry_after_s = url, request_id, retry_after_s


class BadRequest(ApiError):
    pass


class NotAllowed(ApiError):
    pass


class NotFound(ApiError):
    pass


class Busy(ApiError):
    pass


class Unavailable(ApiError):
    pass


class StreamFailed(ClientError):
    def __init__(self, message: str, *, code: str | None, progress: Progress) -> None:
        super().__init__(message)
        self.code, self.progress = code, progress


class StreamInterrupted(ClientError):
    def __init__(self, message: str, *, progress: Progress) -> None:
        super().__init__(message)
        self.progress = progress


def api_error(status: int, body: object, headers: Mapping[str, str], url: str) -> ApiError:
    """The exception for an error response; ``body`` is whatever JSON it had, or None."""
    error = body.get("error") if isinstance(body, dict) else None
    told: dict[str, Any] = error if isinstance(error, dict) else {}
    kind = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 429: Busy}.get(status)
    if kind is None:
        kind = Unavailable if status >= 500 else BadRequest
    return kind(
        str(told.get("message") or f"HTTP status {status} from {url}"),
        status=status,
        code=told.get("code"),
        param=told.get("param"),
        url=url,
        request_id=headers.get("x-request-id", ""),
        retry_after_s=_seconds(headers.get("Retry-After")),
    )


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdecimal() else None
