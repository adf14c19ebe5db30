"""What stands between the marks of a tool call: a function's name and its arguments, in the forms that models write.

``JsonCall`` reads a JSON object as it comes and gives the arguments away piece by piece. The other forms are read when
they are complete: calls of Python (Gemma 3), ``call:name{key:value}`` (FunctionGemma, Gemma 4), and tags (Qwen3-Coder).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BODIES", "Call", "JsonCall", "Malformed", "Parameters"]

Parameters = Mapping[str, Mapping[str, Any]]
"""Function -> the JSON schemas of its parameters, by name and in order."""
_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class Malformed(Exception):
    """The text is no call."""


@dataclass(frozen=True, slots=True)
class Call:
    """A complete call."""

    name: str
    arguments: str  # a JSON object


@dataclass(slots=True)
class JsonCall:
    """``{"name": ..., "arguments": {...}}``, character by character; ``parameters`` is another name of arguments.

    ``feed`` returns what of the arguments is new. They are held back until the name is known.
    """

    name: str | None = None
    done: bool = False
    _state: str = "start"  # start, key, in key, colon, value, in value
    _key: str = ""
    _value: str = ""
    _depth: int = 0
    _quoted: bool = False
    _escaped: bool = False
    _arguments: str = ""  # known, not yet returned
    _has_arguments: bool = False
    _streams: bool = False  # the value that is being read is given away as it comes
    _others: dict[str, Any] = field(default_factory=dict)

    @property
    def starts(self) -> bool:
        """Whether nothing of it was read yet."""
        return self._state == "start"

    def feed(self, char: str) -> str:
        """Raises Malformed."""
        if self._state == "in value":
            self._in_value(char)
        elif self._state == "in key":
            self._in_key(char)
        elif char not in _SPACE:
            self._between(char)
        if self.name is None or not self._arguments:
            return ""
        new, self._arguments = self._arguments, ""
        return new

    def _between(self, char: str) -> None:
        if self._state == "start" and char == "{":
            self._state = "key"
        elif self._state == "key" and char == '"':
            self._state, self._key = "in key", char
        elif self._state == "key" and char == "}":
            self._end()
        elif self._state == "key" and char == ",":
            pass
        elif self._state == "colon" and char == ":":
            self._state = "value"
        elif self._state == "value" and char not in ",:]}":
            self._state, self._value, self._depth, self._quoted = "in value", "", 0, False
            self._streams = self._key in _ARGUMENTS and char == "{"
            self._has_arguments |= self._streams
            self._in_value(char)
        else:
            raise Malformed

    def _in_key(self, char: str) -> None:
        self._key += char
        if self._escaped or char == "\\":
            self._escaped = not self._escaped
        elif char == '"':
            self._key, self._state = _json(self._key), "colon"

    def _in_value(self, char: str) -> None:
        if not self._quoted and self._depth == 0 and self._value and char in ",}" + _SPACE:  # a number or a word ended
            self._finish_value()
            if char not in _SPACE:
                self._between(char)
            return
        self._value += char
        if self._streams:
            self._arguments += char
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = char == "\\", char != '"'
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if not self._quoted and self._depth == 0 and char in '"}]':
            self._finish_value()

    def _finish_value(self) -> None:
        self._state = "key"
        if self._streams:
            self._streams = False
            return
        value = _json(self._value)
        if self._key == "name":
            if not isinstance(value, str) or not value:
                raise Malformed
            self.name = value
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self._arguments, self._has_arguments = _object_text(value), True
        else:
            self._others[self._key] = value

    def _end(self) -> None:
        inner = self._others.get("function")
        if self.name is None and isinstance(inner, Mapping) and isinstance(inner.get("name"), str):
            self.name = inner["name"]  # OpenAI's own form, which some models write
            given = next((inner[key] for key in _ARGUMENTS if key in inner), None)
            self._arguments, self._has_arguments = _object_text(given), True
        if self.name is None:
            raise Malformed
        if not self._has_arguments:
            self._arguments = "{}"
        self.done = True


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise Malformed from None


def _object_text(value: Any) -> str:
    """Arguments as a JSON object: they may come as none at all, or as a text that holds one."""
    if value is None:
        return "{}"
    if isinstance(value, str):
        inner = _json(value)
        if isinstance(inner, Mapping):
            return value
    if not isinstance(value, Mapping):
        raise Malformed
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ whole bodies


def _json_calls(body: str) -> list[Call]:
    """One object, several, or a list of them."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(body):
        if body[at] in _SPACE + ",;":
            at += 1
            continue
        try:
            value, at = decoder.raw_decode(body, at)
        except ValueError:
            raise Malformed from None
        for one in value if isinstance(value, list) else [value]:
            reader, arguments = JsonCall(), ""
            for char in json.dumps(one, ensure_ascii=False):
                arguments += reader.feed(char)
            if not reader.done or reader.name is None:
                raise Malformed
            found.append(Call(reader.name, arguments))
    return found


def _python_calls(body: str, parameters: Parameters) -> list[Call]:
    """``name(key=value)``, one a line or in a list, perhaps within ``print``. Values are literals."""
    try:
        statements = ast.parse(body.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Malformed from None
    found = []
    for statement in statements:
        value = statement.value if isinstance(statement, ast.Expr | ast.Assign) else None
        for node in value.elts if isinstance(value, ast.List | ast.Tuple) else [value]:
            if isinstance(node, ast.Call) and _name(node.func) == "print" and len(node.args) == 1:
                node = node.args[0]
            if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
                raise Malformed
            name = _name(node.func)
            order = list(parameters.get(name, {}))
            if len(node.args) > len(order):
                raise Malformed
            try:
                given = {key: ast.literal_eval(one) for key, one in zip(order, node.args, strict=False)}
                given |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
                found.append(Call(name, json.dumps(given, ensure_ascii=False)))
            except (ValueError, TypeError, RecursionError):
                raise Malformed from None
    return found


def _name(node: ast.expr) -> str:
    """``name`` or ``module.name``. Raises Malformed."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise Malformed
    return node.id


def _tagged_calls(body: str, parameters: Parameters) -> list[Call]:
    """``<function=name><parameter=key>value</parameter></function>``; values that are no texts are JSON."""
    found = []
    for name, inside in re.findall(r"<function=([^>\n]+)>(.*?)(?:</function>|$)", body, re.DOTALL):
        given = {
            key: _typed(value.removeprefix("\n").removesuffix("\n"), parameters.get(name, {}).get(key))
            for key, value in re.findall(r"<parameter=([^>\n]+)>(.*?)</parameter>", inside, re.DOTALL)
        }
        found.append(Call(name, json.dumps(given, ensure_ascii=False)))
    return found


def _typed(text: str, schema: Any) -> Any:
    """A value that is written without quotes: a text where the schema says so, or where it is no JSON."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


_QUOTES = ("<escape>", '<|"|>', '"')
_BARE = re.compile(r"(?=[}\]]|,\s*[^:{}\[\],\s]{1,64}\s*:)|$")  # where a value without quotes ends
_BARE_IN_LIST = re.compile(r"(?=[,}\]])|$")
_KEY = re.compile(r"""["']?([^:{}\[\],"']{1,128})["']?\s*:\s*""")
_CALL = re.compile(r"call:\s*([^\s{]{1,128})\s*")


def _colon_calls(body: str, parameters: Parameters) -> list[Call]:
    """``call:name{key:value,key:[value]}``; texts stand between ``<escape>``, ``<|"|>`` or quotes, or bare."""
    found, at = [], 0
    while at < len(body):
        if body[at] in _SPACE + ",;":
            at += 1
            continue
        start = _CALL.match(body, at)
        if start is None:
            raise Malformed
        schemas = parameters.get(start[1], {})
        value, at = _colon_value(body, start.end(), {"type": "object", "properties": schemas})
        if not isinstance(value, dict):
            raise Malformed
        found.append(Call(start[1], json.dumps(value, ensure_ascii=False)))
    return found


def _colon_value(text: str, at: int, schema: Any, in_list: bool = False) -> tuple[Any, int]:
    """The value that begins at ``at``, and where it ends. Raises Malformed."""
    schema = schema if isinstance(schema, Mapping) else {}
    if at >= len(text):
        raise Malformed
    if text[at] == "{":
        value: dict[str, Any] = {}
        at += 1
        while True:
            at = _skip(text, at, _SPACE + ",")
            if text[at : at + 1] == "}":
                return value, at + 1
            key = _KEY.match(text, at)
            if key is None:
                raise Malformed
            inner = schema.get("properties")
            value[key[1]], at = _colon_value(text, key.end(), inner.get(key[1]) if isinstance(inner, Mapping) else None)
    if text[at] == "[":
        values: list[Any] = []
        at += 1
        while True:
            at = _skip(text, at, _SPACE + ",")
            if text[at : at + 1] == "]":
                return values, at + 1
            one, at = _colon_value(text, at, schema.get("items"), in_list=True)
            values.append(one)
    for quote in _QUOTES:
        if text.startswith(quote, at):
            end = text.find(quote, at + len(quote))
            if end < 0:
                raise Malformed
            return text[at + len(quote) : end], end + len(quote)
    stop = (_BARE_IN_LIST if in_list else _BARE).search(text, at)
    assert stop is not None
    return _typed(text[at : stop.start()].strip(), schema), stop.start()


def _skip(text: str, at: int, chars: str) -> int:
    """Where something else than ``chars`` begins. Raises Malformed at the end."""
    while text[at : at + 1] and text[at] in chars:
        at += 1
    if at >= len(text):
        raise Malformed
    return at


BODIES: dict[str, Callable[[str, Parameters], list[Call]]] = {
    "json": lambda body, parameters: _json_calls(body),
    "python": _python_calls,
    "tags": _tagged_calls,
    "colon": _colon_calls,
}
"""Kind of a body -> its calls, at least one. Raises Malformed."""
