"""The tools of a request: what the template is told, what the model must write, and calls read from its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from outrider.config import Grammar
from outrider.errors import InvalidRequest
from outrider.serving.tool_calls import ToolDelta, ToolParser, form_of, tool_grammar
from outrider.serving.web import ApiError
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import Piece

__all__ = ["CallDelta", "CallReader", "ToolUse", "joined"]

MOST_TOOLS = 512


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of a call: its first one has id and name."""

    index: int
    arguments: str = ""
    id: str = ""
    name: str = ""


class CallReader:
    """Text and calls of one answer."""

    def __init__(self, parser: ToolParser, marks: Mapping[int, str], most: int | None) -> None:
        """``marks``: special tokens that are part of a call's form, by id. ``most``: calls, None for any number."""
        self._parser, self._marks, self._most = parser, marks, most
        self.complete = False
        """As many calls as were asked for are there, and the answer goes on."""

    def feed(self, pieces: Iterable[Piece]) -> tuple[str, list[CallDelta]]:
        text = "".join(self._marks.get(piece.token_id, "") + piece.text for piece in pieces)
        return self._sorted(self._parser.feed(text))

    def finish(self) -> tuple[str, list[CallDelta]]:
        return self._sorted(self._parser.finish())

    def _sorted(self, found: Sequence[str | ToolDelta]) -> tuple[str, list[CallDelta]]:
        texts, calls = [], []
        for one in found:
            if self._most is not None and isinstance(one, ToolDelta) and one.index >= self._most:
                self.complete = True
            if self.complete:
                break
            if isinstance(one, str):
                texts.append(one)
            else:
                calls.append(CallDelta(one.index, one.arguments, one.id or "", one.name or ""))
        return "".join(texts), calls


class ToolUse:
    """Tools of one request, as chat templates take them. ``choice``: auto, required, or, where ``named``, a tool.

    Raises ApiError where the model's template has no tools, and for a choice that is no tool.
    """

    def __init__(
        self, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], choice: str, *, named: bool, parallel: bool
    ) -> None:
        if len(tools) > MOST_TOOLS:
            raise ApiError(400, f"tools: got {len(tools)}, expected at most {MOST_TOOLS}", param="tools")
        names = Counter(tool["function"]["name"] for tool in tools)
        for name, count in names.items():
            if count > 1:
                raise ApiError(400, f"tools: {count} are called {name!r}; give each a name of its own", param="tools")
        self._template = tokenizer.chat_template_text(tools=True)
        self._tools = list(tools)
        self._most = None if parallel else 1
        form = form_of(self._template)
        if form is None:
            raise ApiError(
                400,
                "tools: the model's chat template has none; leave them out, or use a model that was trained for them",
                param="tools",
                code="unsupported_parameter",
            )
        special = {token: tokenizer.vocabulary.get(token, -1) for token in form.marks}
        self._marks = {number: token for token, number in special.items() if number in tokenizer.special_ids}
        self.grammar: Grammar | None = None
        """What the answer must be."""
        if named or choice == "required":
            try:
                self.grammar = tool_grammar(form, tools, choice if named else None, parallel=parallel and not named)
            except InvalidRequest as error:
                param = "tool_choice" if named and choice not in names else "tools"
                raise ApiError(400, str(error), param=param) from None

    @property
    def for_template(self) -> list[dict[str, Any]]:
        """The tools as the template is told them."""
        return [
            {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}
            for tool in self._tools
        ]

    def reader(self) -> CallReader:
        """Of one answer."""
        return CallReader(ToolParser(self._template, self._tools), self._marks, self._most)


def joined(deltas: Iterable[CallDelta]) -> list[CallDelta]:
    """Whole calls."""
    found: dict[int, CallDelta] = {}
    for one in deltas:
        old = found.get(one.index)
        found[one.index] = one if old is None else replace(old, arguments=old.arguments + one.arguments)
    return [found[index] for index in sorted(found)]
