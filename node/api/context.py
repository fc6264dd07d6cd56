"""What belongs to one HTTP request and to the API as a whole; handlers find both on the aiohttp request."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping

from aiohttp import web

from mesh.types import Priority
from node.api.admission import AdmissionGate
from node.api.guard import Guard
from node.api.service import Caller, Service
from node.telemetry import Telemetry


class ApiSettings:
    """Settings of the public API; the composition root fills them from NodeConfig."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_sessions: int = 64,
        max_queue: int = 64,
        class_queues: Mapping[Priority, int] | None = None,
        patience_s: float = 5.0,
        names: tuple[str, ...] = (),
        origins: tuple[str, ...] = (),
        keepalive_s: float = 10.0,
        default_max_tokens: int = 4096,
        max_body_bytes: int = 8 * 1024 * 1024,
        body_s: float = 30.0,
        idle_s: float = 75.0,
        max_connections: int = 512,
    ) -> None:
        self.host, self.port = host, port
        self.max_sessions, self.max_queue = max_sessions, max_queue
        self.class_queues = class_queues
        """How many of a class may wait, where that is less than ``max_queue``."""
        self.patience_s = patience_s
        """How long a request that has not begun waits for layers that are on the move, or for room in the mesh."""
        self.names, self.origins = names, origins
        """Further Host names (of the advertised URL, say) and Origins that are let in."""
        self.keepalive_s = keepalive_s
        """Silence after which a stream gets a comment, so that proxies and clients know it lives."""
        self.default_max_tokens = default_max_tokens
        """Of a chat without max_tokens: pages are reserved when it is let in, so it cannot be without bound."""
        self.max_body_bytes = max_body_bytes
        self.body_s = body_s
        """For the body of a request, and more for a large one (``door``)."""
        self.idle_s = idle_s
        """For the headers of a connection's first request, and between two requests."""
        self.max_connections = max_connections
        """Well below the usual 1024 open files, which peers need too."""


class Api:
    """Everything that handlers share."""

    def __init__(self, service: Service, settings: ApiSettings, telemetry: Telemetry) -> None:
        self.service, self.settings, self.telemetry = service, settings, telemetry
        self.gate = AdmissionGate(settings.max_sessions, settings.max_queue, settings.class_queues)
        self.guard = Guard(settings.host, settings.names, settings.origins)
        self.started = int(time.time())


class Context:
    """One request: its id, the session and route that the response's headers name, who asks."""

    def __init__(self, request: web.Request) -> None:
        self.request_id = _request_id(request.headers.get("x-request-id", ""))
        self.trace = request.headers.get("traceparent", "")[:128]
        self.session = ""
        self.route = ""
        self.caller = Caller()
        self.started = time.monotonic()


API = web.AppKey("api", Api)
CONTEXT = web.RequestKey("context", Context)


def _request_id(wanted: str) -> str:
    """The client's own id where it is a harmless one."""
    return wanted if re.fullmatch(r"[\w.:-]{1,128}", wanted, re.ASCII) else f"req-{secrets.token_hex(12)}"
