"""``/openapi.json``: what the server takes, for documentation, generated clients and fuzzing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from outrider.serving.chat_endpoint import ChatRequest
from outrider.serving.completion_endpoint import CompletionRequest
from outrider.serving.messages_endpoint import CountRequest, MessagesRequest
from outrider.serving.responses_endpoint import ResponsesRequest
from outrider.serving.token_endpoints import DetokenizeRequest, TokenizeRequest
from outrider.version import __version__

__all__ = ["openapi"]

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/tokenize": TokenizeRequest,
    "/v1/detokenize": DetokenizeRequest,
}
ERRORS = {
    "400": "a field is wrong, unknown or not supported",
    "401": "the key is missing or wrong",
    "404": "the model is another one",
    "408": "the body took too long",
    "413": "the body is too long",
    "415": "the body is no JSON",
    "429": "the server is busy; Retry-After says how long",
    "503": "the server is shutting down",
}
SHOWN = {  # and what else than 200 they answer
    "/v1/models": {"401": ERRORS["401"]},
    "/health": {"503": "the engine has failed"},
    "/ready": {"503": "the engine has failed, or the server is shutting down"},
    "/metrics": {"401": ERRORS["401"]},
}


@cache
def openapi() -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    models = list(dict.fromkeys(BODIES.values()))
    refs, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, Any] = {}
    for path, model in BODIES.items():
        errors = {status: {"description": text} for status, text in ERRORS.items()}
        body = {"required": True, "content": {"application/json": {"schema": refs[model, "validation"]}}}
        content: dict[str, Any] = {"application/json": {}, "text/event-stream": {}}
        answer = {"200": {"description": "the answer, or its events", "content": content}}
        paths[path] = {"post": {"operationId": path.strip("/"), "requestBody": body, "responses": {**answer, **errors}}}
    for path, others in SHOWN.items():
        found = {status: {"description": text} for status, text in {"200": "found", **others}.items()}
        paths[path] = {"get": {"operationId": path.strip("/"), "responses": found}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Outrider", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }
