"""The public HTTP server: routes, the one middleware, start and stop."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable

import structlog
from aiohttp import web

from mesh.errors import ConfigError, MeshError
from node.api import admin, openai, sessions, system
from node.api.context import API, CONTEXT, Api, ApiSettings, Context
from node.api.door import Listener, read_body_in_time
from node.api.errors import error_object, error_response, http_error_response
from node.api.service import Service
from node.telemetry import Telemetry, get_logger

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NOT_BUILT = ("/v1/embeddings", "/v1/files", "/v1/vector_stores")


def make_app(service: Service, settings: ApiSettings, telemetry: Telemetry) -> web.Application:
    """The application; serve it with ``ApiServer``, or anything that sets ``handler_cancellation``."""
    app = web.Application(middlewares=[_middleware], client_max_size=settings.max_body_bytes)
    app[API] = Api(service, settings, telemetry)
    app.on_response_prepare.append(_add_headers)
    app.add_routes(
        [
            web.post("/v1/chat/completions", openai.chat_completions),
            web.post("/v1/completions", openai.completions),
            web.post("/v1/responses", openai.responses),
            web.get("/v1/models", openai.list_models),
            web.get("/v1/models/{id:.+}", openai.show_model),
            web.delete("/v1/sessions/{id}", system.cancel_session),
            web.get("/v1/sessions/{id}/events", sessions.session_events),
            web.get("/mesh/status", system.status),
            web.get("/health", system.health),
            web.get("/ready", system.ready),
            web.get("/version", system.version),
            web.get("/metrics", system.metrics),
            web.post("/tokenize", system.tokenize),
            web.post("/detokenize", system.detokenize),
            web.get("/tokenizer_info", system.tokenizer_info),
            *(web.route("*", path + rest, system.not_built) for path in NOT_BUILT for rest in ("", "/{rest:.*}")),
            *admin.routes(),
        ]
    )
    return app


@web.middleware
async def _middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who asks and whether they may; every failure to OpenAI's error body; one log line without any text."""
    api, context = request.app[API], Context(request)
    request[CONTEXT] = context
    with structlog.contextvars.bound_contextvars(request_id=context.request_id):
        try:
            api.guard.check_source(request)
            context.caller = api.guard.caller(request, api.service)
            if request.method == "POST" and request.match_info.http_exception is None:
                await read_body_in_time(request, api.settings)
            response = await handler(request)
        except web.HTTPException as error:
            response = http_error_response(error, request.method, request.path)
        except ConnectionError:
            raise
        except Exception as error:
            response = _failed(api, error)
            if response.status == 408:  # the rest of its body would be taken for a request
                response.force_close()
        _log(request, context, response.status)
        return response


def _failed(api: Api, error: Exception) -> web.Response:
    body = error_object(error)
    api.telemetry.failure.labels(body["code"]).inc()
    if not isinstance(error, MeshError | TimeoutError):
        get_logger("api").error("a handler failed", exc_info=error)
    return error_response(error)


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    context = request.get(CONTEXT)
    if context is not None:
        response.headers["x-request-id"] = context.request_id
        response.headers["x-mesh-session"] = context.session
        response.headers["x-mesh-route"] = context.route


def _log(request: web.Request, context: Context, status: int) -> None:
    resource = request.match_info.route.resource
    log = get_logger("api")
    quiet = request.method == "GET" and status != 500
    (log.debug if quiet else log.info)(
        "request",
        method=request.method,
        path=resource.canonical if resource is not None else "-",
        status=status,
        session=context.session,
        ms=round((time.monotonic() - context.started) * 1000, 1),
    )


class ApiServer:
    """One listening public door."""

    def __init__(self, service: Service, settings: ApiSettings, telemetry: Telemetry) -> None:
        self._settings = settings
        app = make_app(service, settings, telemetry)
        self.api = app[API]
        # Without handler_cancellation a client that hangs up would hold its pages to the end of its generation.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
        self._listener = Listener(self._runner, settings)
        self.port = settings.port

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen; ``port`` then says where.  ConfigError where the address is taken or not ours."""
        await self._runner.setup()
        try:
            await self._listener.start(tls)
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                f"--api {self._settings.host}:{self._settings.port}: cannot listen: {error.strerror or error}"
            ) from error
        self.port = self._listener.port

    async def stop(self) -> None:
        """Stop accepting, give running responses 5 s, close the rest."""
        self._listener.close()
        async with asyncio.timeout(30):
            await self._runner.cleanup()
