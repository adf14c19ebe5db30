"""Chat templates: a conversation to the text that a model was trained on, as Transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.errors import CheckpointError, InvalidRequest

__all__ = ["ChatTemplate", "Message", "has_calls", "with_system_in_user"]

Message = Mapping[str, Any]

# Names that a message's reasoning comes under; templates read the first one, gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_END = "<END OF THE FINAL MESSAGE> "  # the space at its end is lost where a template strips the message
_PROBE = "Instruction 5f3a."


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here its content is rendered, in a scope of its own
    as in Transformers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return [nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))]


class _Refused(TemplateError):
    """The template itself says that it cannot render these messages."""


def _raise_exception(message: str) -> str:
    raise _Refused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own ``tojson`` escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """One compiled template, in the environment that Hugging Face's templates are written for.

    ``special_tokens`` (``bos_token`` and the like) are variables of the template. Raises CheckpointError for a
    template that does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # SyntaxError or RecursionError too, from the Python code that Jinja writes
            raise CheckpointError(f"the chat template does not compile: {error}") from None

    def render(
        self,
        messages: Iterable[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Text of the conversation; with ``add_generation_prompt`` it ends where the assistant's answer begins.

        messages: ``role``, ``content`` (text, or a list of parts ``{"type": "text", "text": ...}``) and whatever else
            the template reads. A key whose value is None counts as missing.
        tools: JSON schemas of functions. documents: what an answer may cite. None where there are none.
        continue_final_message: the text ends within the last message, for the model to go on.
        variables: further variables of the template, such as ``enable_thinking``.

        Raises InvalidRequest for messages that the template refuses.
        """
        conversation = [_message(message, number) for number, message in enumerate(messages, 1)]
        if not conversation:
            raise InvalidRequest("the conversation is empty: got 0 messages, expected at least 1")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message, add_generation_prompt begins a new one; "
                "expected only one of them"
            )
        values = {
            **self._special_tokens,
            **_plain(variables, "variables"),
            "messages": conversation,
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        if continue_final_message:
            return self._up_to_the_end_of(conversation[-1], values)
        return self._render(values)

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is part of the text; some templates refuse one, others leave it out."""
        messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "Hello"}]
        try:
            return _PROBE in self.render(messages)
        except InvalidRequest:
            return False

    def shows_calls(self, tools: Sequence[Mapping[str, Any]] | None = None) -> bool:
        """Whether earlier tool calls and their results are part of the text, with these tools; some templates leave
        them out. True for a template that refuses the conversation that is tried: it will say why."""
        function = {"name": "probe", "arguments": {"text": _PROBE}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "probe0000", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "probe0000", "content": _PROBE},
        ]
        try:
            return self.render(messages, tools=tools).count(_PROBE) >= 2
        except InvalidRequest:
            return True

    def _render(self, values: Mapping[str, Any]) -> str:
        try:
            return self._template.render(values)
        except Exception as error:  # a template is foreign code and may fail in any way
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from None

    def _up_to_the_end_of(self, final: dict[str, Any], values: Mapping[str, Any]) -> str:
        """Mark the end of the last message's text, render, and cut there."""
        holder, key = final, "content"
        if isinstance(final.get("content"), list):
            texts = [part for part in final["content"] if isinstance(part, dict) and isinstance(part.get("text"), str)]
            holder, key = (texts[-1], "text") if texts else ({}, "text")
        if not isinstance(holder.get(key), str):
            raise InvalidRequest("the last message has no text to go on with: expected its content to be text")
        holder[key] += _END
        text = self._render(values)
        end = text.rfind(_END.strip())
        if end < 0:
            raise InvalidRequest("the model's chat template leaves out the last message, so it cannot be continued")
        whole = text.startswith(_END, end)
        return text[:end] if whole else text[:end].rstrip()  # a template that strips the message strips its end too


def has_calls(messages: Iterable[Message]) -> bool:
    """Whether a conversation has tool calls or their results."""
    given = (message.model_dump() if hasattr(message, "model_dump") else message for message in messages)
    return any(isinstance(one, Mapping) and (one.get("tool_calls") or one.get("role") == "tool") for one in given)


def with_system_in_user(messages: Iterable[Message]) -> list[Message]:
    """The conversation without system messages: their text comes first in the first user message, for templates that
    take no system message. Unchanged where there is no user message."""
    rest = [message for message in messages if message.get("role") != "system"]
    system = "\n\n".join(str(message.get("content") or "") for message in messages if message.get("role") == "system")
    for index, message in enumerate(rest):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, list):
                content = [{"type": "text", "text": f"{system}\n\n"}, *content]
            else:
                content = f"{system}\n\n{content or ''}"
            return [*rest[:index], {**message, "content": content}, *rest[index + 1 :]] if system else rest
    return list(messages)


def _message(message: Message, number: int) -> dict[str, Any]:
    if callable(dump := getattr(message, "model_dump", None)):  # a pydantic model, as OpenAI's client returns it
        message = dump()
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        got = f"the keys {sorted(message)}" if isinstance(message, Mapping) else f"{type(message).__name__}"
        raise InvalidRequest(f"message {number}: got {got}, expected an object with a role (text) and its content")
    given = {key: _plain(value, f"message {number}, {key}") for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _plain(value: Any, what: str) -> Any:
    """A copy of JSON values, so that a template meets no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, what) for item in value]
    for kind in (str, int, float):  # subclasses: enums, numpy's numbers
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise InvalidRequest(f"{what}: got {type(value).__name__}, expected JSON values (text, numbers, lists, objects)")
