"""The tools of a request: what the template is told, what the model may write, and calls read from its text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outrider.config import Grammar
from outrider.serving.web import ApiError
from outrider.tokenization.tokenizer import Tokenizer

__all__ = ["CallDelta", "CallReader", "ToolUse", "joined"]


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of a call: its first one has id and name."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


class CallReader:
    """Text and calls of one answer."""

    complete = False  # the only call that was asked for is there

    def feed(self, text: str) -> tuple[str, list[CallDelta]]:
        return text, []

    def finish(self) -> tuple[str, list[CallDelta]]:
        return "", []


class ToolUse:
    """Tools of one request. ``choice``: auto, required, or, where ``named``, a tool."""

    def __init__(
        self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], choice: str, *, named: bool, parallel: bool
    ) -> None:
        self.for_template = list(tools)
        self.grammar: Grammar | None = None
        raise ApiError(400, "tools are not supported here: leave them out", param="tools", code="unsupported_parameter")

    def parser(self) -> CallReader:
        return CallReader()


def joined(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """Whole calls."""
    found: dict[int, CallDelta] = {}
    for one in deltas:
        old = found.get(one.index)
        found[one.index] = one if old is None else replace(old, arguments=old.arguments + one.arguments)
    return [found[index] for index in sorted(found)]
