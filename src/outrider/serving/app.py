"""The application: routes, and what surrounds every request: keys, CORS, request ids, errors, metrics, logs."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.resources import files
from secrets import token_hex
from time import perf_counter
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.serving.chat_endpoint import chat_completions
from outrider.serving.chat_run import api_error
from outrider.serving.completion_endpoint import completions
from outrider.serving.idle_measurements import IdleMeasurements
from outrider.serving.messages_endpoint import count_tokens, messages
from outrider.serving.openapi import openapi
from outrider.serving.responses_endpoint import responses
from outrider.serving.service import Service
from outrider.serving.token_endpoints import detokenize, tokenize
from outrider.serving.web import ApiError, Disconnected, JsonResponse, error_response, read_json, until_disconnect

__all__ = ["make_app"]

OPEN = ("/", "/health", "/ready")  # the page asks for the key itself; what watches a server holds none
ANTHROPIC = "/v1/messages"
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")  # of a client, kept as it is

log = logging.getLogger("outrider.serving")
Endpoint = Callable[[Service, Mapping[str, Any], Request], Awaitable[Response]]

POSTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
    "/v1/tokenize": tokenize,
    "/v1/detokenize": detokenize,
}


def make_app(service: Service) -> Starlette:
    """A Starlette application that runs ``service`` while it runs itself."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        service.thread.start(asyncio.get_running_loop())
        measurements = IdleMeasurements(service.llm)
        measurements.start()
        try:
            yield
        finally:
            measurements.stop()
            service.thread.stop()
            if service.telemetry is not None:
                service.telemetry.close()

    routes = [Route(path, _endpoint(service, run, path), methods=["POST"]) for path, run in POSTS.items()]
    routes += [Route(path, _get(service, show), methods=["GET"]) for path, show in GETS.items()]
    routes.append(Route("/", _page, methods=["GET"]))
    routes.append(Route("/v1/models/{name:path}", _one_model(service), methods=["GET"]))
    middleware = [Middleware(_Surroundings, service=service, paths={route.path for route in routes})]
    if service.settings.cors_origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=service.settings.cors_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            ),
        )
    return Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )


def _endpoint(service: Service, run: Endpoint, path: str) -> Callable[[Request], Awaitable[Response]]:
    settings = service.settings

    async def answer(request: Request) -> Response:
        try:
            if service.draining:
                raise ApiError(503, "the server is shutting down; ask another one", retry_after=5)
            body = await read_json(request, settings.max_body_bytes, settings.body_seconds)
            return await until_disconnect(request, run(service, body, request))
        except Disconnected:
            return Response(status_code=499)  # nobody reads it; the log shows it
        except Exception as error:
            found = api_error(error)
            if found.status == 500:
                log.exception("%s failed", path)
            return error_response(found, anthropic=path.startswith(ANTHROPIC))

    return answer


def _get(service: Service, show: Callable[[Service], Response]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return show(service)

    return answer


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"[:200]
    message = {404: f"{where}: no such path", 405: f"{where}: this path takes another method"}
    found = ApiError(error.status_code, message.get(error.status_code, error.detail))
    response = error_response(found, request.url.path.startswith(ANTHROPIC))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


# ------------------------------------------------------------------------------------------------ what is shown


async def _page(request: Request) -> Response:
    """The playground. It is one file that asks nobody but this server."""
    page = files("outrider.serving").joinpath("playground.html")
    if not page.is_file():
        return JsonResponse({"models": "/v1/models"})
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
    )
    return Response(
        page.read_bytes(), media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": policy}
    )


def _models(service: Service) -> Response:
    name = service.settings.served_name
    page = {"first_id": name, "last_id": name, "has_more": False}  # Anthropic's; the rest is OpenAI's
    return JsonResponse({"object": "list", "data": [_model(service)], **page})


def _one_model(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            service.check_model(request.path_params["name"])
        except ApiError as error:
            return error_response(error, anthropic="anthropic-version" in request.headers)
        return JsonResponse(_model(service))

    return answer


def _model(service: Service) -> dict[str, Any]:
    """In OpenAI's and in Anthropic's form at once: their keys do not collide."""
    return {
        "id": service.settings.served_name,
        "object": "model",
        "created": service.created,
        "type": "model",
        "display_name": service.settings.served_name,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat().replace("+00:00", "Z"),
        "owned_by": "outrider",
        "max_model_len": service.llm.target.spec.max_positions,
        "drafter": service.llm.drafter_name,
    }


def _health(service: Service) -> Response:
    healthy = service.thread.healthy
    return JsonResponse({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)


def _ready(service: Service) -> Response:
    ready = service.thread.healthy and not service.draining
    status = "ready" if ready else "draining" if service.draining else "failed"
    return JsonResponse({"status": status}, 200 if ready else 503)


def _metrics(service: Service) -> Response:
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _openapi(service: Service) -> Response:
    return JsonResponse(openapi())


GETS: Mapping[str, Callable[[Service], Response]] = {
    "/v1/models": _models,
    "/health": _health,
    "/ready": _ready,
    "/metrics": _metrics,
    "/openapi.json": _openapi,
}


# ------------------------------------------------------------------------------------------------ around a request


class _Surroundings:
    """Checks the key, names the request, counts and logs its response."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = perf_counter(), 0
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"")
        name = given.decode() if REQUEST_ID.fullmatch(given) else f"req_{token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        path = scope["path"]
        try:
            if self._service.keys and path not in OPEN and not self._allowed(headers):
                got = "a key that is none of them" if _given_keys(headers) else "none"
                error = ApiError(
                    401,
                    "this server asks for one of its API keys in the header Authorization: Bearer KEY (or x-api-key), "
                    f"got {got}",
                    code="api_key",
                )
                anthropic = path.startswith(ANTHROPIC) or b"anthropic-version" in headers
                response = error_response(error, anthropic)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, named)
            elif self._service.telemetry is not None:
                with self._service.telemetry.request(scope["method"], path[:200], headers) as span:
                    await self._app(scope, receive, named)
                    span.set_attribute("http.response.status_code", status)
            else:
                await self._app(scope, receive, named)
        finally:
            seconds = perf_counter() - began
            self._service.metrics.response(path if path in self._paths else "other", status, seconds)
            level = logging.DEBUG if path in (*OPEN, "/metrics") else logging.INFO
            log.log(
                level,
                "%s %s %d in %.3f s",
                scope["method"],
                path[:200],
                status,
                seconds,
                extra={"request_id": name, "path": path[:200], "status": status, "seconds": round(seconds, 4)},
            )

    def _allowed(self, headers: Mapping[bytes, bytes]) -> bool:
        """Every key is compared, each in constant time: the time tells neither which one nor how much of it fits."""
        found = False
        for given in _given_keys(headers):
            for key in self._service.keys:
                found |= hmac.compare_digest(key, given)
        return found


def _given_keys(headers: Mapping[bytes, bytes]) -> list[bytes]:
    """Of both headers: Anthropic's client sends a token and a key where it has both."""
    scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
    given = [bearer.strip() if scheme.lower() == b"bearer" else b"", headers.get(b"x-api-key", b"")]
    return [key for key in given if key]
