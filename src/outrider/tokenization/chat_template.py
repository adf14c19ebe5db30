"""Chat templates: a conversation to the text a model was taught to read, by sandboxed Jinja."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outrider.errors import CheckpointError, InvalidRequest

__all__ = ["ChatTemplate"]


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here its content is simply rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(TemplateError):
    """The template itself says that it cannot render these messages."""


def _refuse(message: str) -> str:
    raise _Refused(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own ``tojson`` escapes for HTML, which no model was taught."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """One compiled template, in the environment that Hugging Face's templates are written for.

    ``special_tokens`` (``bos_token`` and the like) are variables of the template. Raises CheckpointError for a
    template that does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Text of the conversation; with ``add_generation_prompt`` it ends where the assistant's answer begins.

        ``messages`` have ``role`` and ``content``. Raises InvalidRequest for messages the template refuses.
        """
        for index, message in enumerate(messages):
            if "role" not in message or "content" not in message:
                raise InvalidRequest(f"message {index + 1} needs role and content, got the keys {sorted(message)}")
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from None
