"""``response_format``: what an answer must be, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from outrider.config import Grammar
from outrider.errors import InvalidRequest
from outrider.serving.web import ApiError

__all__ = ["grammar_of"]

KINDS = ("text", "json_object", "json_schema")


def grammar_of(given: Mapping[str, Any] | None, name: str = "response_format") -> Grammar | None:
    """None for plain text. The schema of ``json_schema`` may stand in an object of that name (chat completions) or
    beside the type (responses). Raises ApiError."""
    if given is None:
        return None
    kind = given.get("type")
    if kind == "text":
        _only(given, ("type",), name)
        return None
    if kind == "json_object":
        _only(given, ("type",), name)
        return Grammar("json_object")
    if kind != "json_schema":
        expected = ", ".join(KINDS)
        raise ApiError(400, f"{name}.type: expected one of {expected}, got {str(kind)[:40]!r}", param=f"{name}.type")
    holder: Any = given
    if "json_schema" in given:
        _only(given, ("type", "json_schema"), name)
        holder, name = given["json_schema"], f"{name}.json_schema"
    if not isinstance(holder, Mapping) or not isinstance(holder.get("schema"), (dict, bool)):
        raise ApiError(400, f"{name}.schema: expected a JSON schema (an object)", param=f"{name}.schema")
    _only(holder, ("type", "name", "description", "schema", "strict"), name)
    try:
        return Grammar("json_schema", json.dumps(holder["schema"]))
    except InvalidRequest as error:
        raise ApiError(400, f"{name}.schema: {error}", param=f"{name}.schema") from None


def _only(given: Mapping[str, Any], known: tuple[str, ...], name: str) -> None:
    if unknown := [key for key in given if key not in known]:
        raise ApiError(400, f"{name}: unknown field {str(unknown[0])[:80]!r}; remove it", param=name)
