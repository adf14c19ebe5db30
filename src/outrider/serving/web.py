"""What every endpoint shares: bodies read within limits, errors in the client's form, event streams, disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from typing import Any, NoReturn, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outrider.errors import nearest

__all__ = [
    "ApiError",
    "Disconnected",
    "EventStreamResponse",
    "JsonResponse",
    "error_response",
    "parse",
    "read_json",
    "sse",
    "until_disconnect",
]

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
SHOWN = 200  # characters of a value that a message quotes


class ApiError(Exception):
    """A request that gets an error instead of an answer. ``param``: the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self, anthropic: bool = False) -> dict[str, Any]:
        """OpenAI's form of an error, or Anthropic's."""
        kind = _TYPES.get(self.status, "api_error")
        if anthropic:
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Disconnected(Exception):
    """The client has gone; nobody reads an answer."""


class JsonResponse(Response):
    """JSON without spaces, in UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def error_response(error: ApiError, anthropic: bool = False) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JsonResponse(error.body(anthropic), error.status, headers)


# ------------------------------------------------------------------------------------------------ bodies


async def read_json(request: Request, most: int, seconds: float) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError for one of more than ``most`` bytes, one that takes longer than
    ``seconds`` to arrive, and one that is not a JSON object in UTF-8, Disconnected where the client goes before its
    end."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind[:SHOWN]!r}: expected application/json")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding is {coding[:SHOWN]!r}: expected none; send the body as it is")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > most:
        _too_large(declared[:20], most)
    try:
        async with asyncio.timeout(seconds):
            raw = await _read(request, most)
    except ClientDisconnect:
        raise Disconnected from None
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds; send it at once") from None
    return await asyncio.to_thread(_object, raw) if len(raw) > 1 << 16 else _object(raw)


async def _read(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            _too_large(f"more than {most}", most)
        parts.append(part)
    return b"".join(parts)


def _too_large(size: str, most: int) -> NoReturn:
    raise ApiError(413, f"the body has {size} bytes, and this server takes at most {most}; send a shorter one")


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode(), parse_constant=_not_a_number, parse_float=_finite)
        if b"\\ud" in raw.lower():  # an escape may be half of a surrogate pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; expected the few levels that the fields have") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}; encode it as UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except ValueError as error:
        said = str(error).partition("; use sys.")[0]  # Python's advice on long numbers is not for clients
        raise ApiError(400, f"the body is not valid JSON: {said[:SHOWN]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}: expected an object with the request's fields")
    return value


def _not_a_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number, or too large for one")


def _finite(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _not_a_number(text[:SHOWN])


def parse(kind: type[Model], body: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> Model:
    """The body's fields. Raises ApiError for what is wrong, unknown or not supported, naming the field.

    ``unsupported``: fields that clients know and this server does not have, with values that ask for nothing.
    """
    given = {}
    for name, value in body.items():
        if name not in unsupported:
            given[name] = value
        elif value is not None and value not in unsupported[name]:
            without = " or ".join(repr(one) for one in unsupported[name]) or "nothing"
            raise ApiError(
                400,
                f"{name} is not supported here, got {_shown(value)}: leave it out (or send {without})",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first = errors[0]
    path, value, kinds = _place(given, errors)
    if kinds:
        raise ApiError(400, f"{path}: expected {kinds}, got {_shown(value)}", param=path)
    if first["type"] == "extra_forbidden":
        *above, field = first["loc"]
        known = [*_fields_at(kind, above), *(() if above else unsupported)]
        raise ApiError(
            400, f"unknown field {path[:SHOWN]!r}; {nearest(str(field), known)}", param=path, code="unknown_parameter"
        )
    if first["type"] == "none_required":
        message = f"{path} is not supported here, got {_shown(first['input'])}: leave it out"
        raise ApiError(400, message, param=path, code="unsupported_parameter")
    got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{path or 'the body'}: {message}{got}", param=path or None)


def _fields_at(kind: type[BaseModel], place: Iterable[int | str]) -> Iterable[str]:
    """The fields of the object at ``place`` of a body; every field has at most one kind of object."""
    for part in place:
        if isinstance(part, str):
            kind = _model_in(kind.model_fields[part].annotation) or kind
    return kind.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in a type such as ``list[Model] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _place(given: Mapping[str, Any], errors: Sequence[ErrorDetails]) -> tuple[str, Any, str]:
    """Where the first error is, as ``messages.0.content``, the value there, and its types where it may have several:
    pydantic names each of them in an error of its own, as a part of the place."""
    value: Any = given
    place = errors[0]["loc"]
    for i, part in enumerate(place):
        if part in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
            value = value[part]
        elif errors[0]["type"] != "missing" or i < len(place) - 1:
            kinds = dict.fromkeys(str(one["loc"][i]) for one in errors if one["loc"][:i] == place[:i])
            return ".".join(map(str, place[:i])), value, " or ".join(kinds)
    return ".".join(map(str, place)), value, ""


def _shown(value: Any) -> str:
    with suppress(RecursionError, ValueError):
        return repr(value)[:SHOWN]
    return type(value).__name__


# ------------------------------------------------------------------------------------------------ answers


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event; ``data``: JSON values, or a text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {text}\n\n".encode()


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client goes. Raises Disconnected."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected
    finally:
        for one in (task, watch):
            if not one.done():
                one.cancel()
                with suppress(asyncio.CancelledError):
                    await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Server-sent events. The source is closed, which cancels its work, as soon as the client goes."""

    def __init__(self, source: AsyncIterator[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        watch = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((writing, watch), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for one in (writing, watch):
                if not one.done():
                    one.cancel()
                    with suppress(asyncio.CancelledError):
                        await one

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for part in self._source:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client has gone between two events
            pass
        finally:
            close = getattr(self._source, "aclose", None)
            if close is not None:
                await close()
