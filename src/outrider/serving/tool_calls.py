"""Tool calls: found in an answer as it is written, in the form of the model's chat template, and forced by a grammar.

A template shows how its model writes a call (``form_of``)::

    hermes      <tool_call>{"name": ..., "arguments": {...}}</tool_call>            Hermes, Qwen, SmolLM3
    tags        <tool_call><function=...><parameter=...>...</tool_call>              Qwen3-Coder
    llama       {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>     Llama 3
    mistral     [TOOL_CALLS][{"name": ..., "arguments": {...}}]                      Mistral
    colon       <start_function_call>call:name{...}<end_function_call>               FunctionGemma, Gemma 4
    tool_code   a block of Python that is marked tool_code                           Gemma 3
    json        {"name": ..., "arguments": {...}}                                    any other that shows its tools

``ToolParser`` splits the text of an answer into text and calls. Nothing that may be the beginning of a call is given
away as text, and what turns out to be none is given back as text. Marks that are special tokens are no part of an
answer's text: feed their text (``Form.marks``) where such a token comes; without them, calls that begin the answer are
found in all forms but those that start with ``<tool_call>`` or a block of code.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outrider.config import Grammar
from outrider.errors import InvalidRequest
from outrider.sampling.grammar import JSON_WHITESPACE
from outrider.serving.tool_bodies import BODIES, JsonCall, Malformed

__all__ = ["Form", "ToolDelta", "ToolParser", "form_of", "tool_grammar"]

_SPACE = " \t\r\n"
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes calls."""

    name: str
    begin: tuple[str, ...] = ()
    """Any of these begins a call."""
    end: tuple[str, ...] = ()
    """Any of these ends it; a JSON object ends by itself."""
    body: str = "json"
    """See ``tool_bodies.BODIES``."""
    bare: tuple[str, ...] = ()
    """Any of these begins a call without a mark where it begins the answer."""
    arguments: str = "arguments"
    """Their name in JSON."""

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that must be fed even where they are special tokens."""
        return (*self.begin, *self.end, *(_STRING_MARKS if self.body == "colon" else ()))


_STRING_MARKS = ("<escape>", '<|"|>')
_FORMS = (  # the first one whose words are all in the template
    (
        ("<start_function_call>",),
        Form("colon", ("<start_function_call>",), ("<end_function_call>",), "colon", ("call:", "{")),
    ),
    (("<|tool_call>",), Form("colon", ("<|tool_call>",), ("<tool_call|>",), "colon", ("call:", "{"))),
    (("<tool_call>", "<function="), Form("tags", ("<tool_call>",), ("</tool_call>",), "tags")),
    (("<tool_call>",), Form("hermes", ("<tool_call>",), ("</tool_call>",))),
    (("[TOOL_CALLS]",), Form("mistral", ("[TOOL_CALLS]",), bare=("[",))),
    (("<|python_tag|>",), Form("llama", ("<|python_tag|>",), bare=("{",), arguments="parameters")),
    (("ipython", '"parameters"'), Form("llama", ("<|python_tag|>",), bare=("{",), arguments="parameters")),
    (("tool_code",), Form("tool_code", ("```tool_code", "```tool_call"), ("```",), "python")),
    (("tools",), Form("json", bare=("{", "["))),
)


def form_of(template: str) -> Form | None:
    """The form of a chat template; None where it shows no tools to the model."""
    return next((form for words, form in _FORMS if all(word in template for word in words)), None)


@dataclass(frozen=True, slots=True)
class ToolDelta:
    """The beginning of a call (``id`` and ``name``), or more of its arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


class ToolParser:
    """Splits one answer into text and calls, as it comes."""

    def __init__(
        self,
        template_text: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        """``tools`` as a request gives them: {"type": "function", "function": {"name", "parameters"}}. Raises
        InvalidRequest for a template without tools."""
        found = form_of(template_text)
        if found is None:
            raise InvalidRequest(
                "the model's chat template has no tools: leave out `tools`, or use a model that was trained for them"
            )
        self.form = found
        self.calls = 0
        """Calls so far: an answer with any ends for the reason ``tool_calls``."""
        functions = [tool.get("function", tool) for tool in tools]
        self._parameters = {
            str(one.get("name")): (one.get("parameters") or {}).get("properties") or {} for one in functions
        }
        length = 9 if found.name == "mistral" else 24  # Mistral's templates insist on it
        self._new_id = new_id or (lambda: _identifier(length))
        self._text = ""  # not yet looked at, or possibly the beginning of a mark
        self._raw = ""  # of the call so far: text again, if it is none
        self._json: JsonCall | None = None  # the call that is being read as it comes
        self._body: str | None = None  # or the one that is read when it is complete
        self._marked = False
        self._state = "text"  # text, call, after, skip
        self._begun = False  # whether the answer has text or calls

    def feed(self, text: str) -> list[str | ToolDelta]:
        """More of the answer."""
        self._text += text
        return self._run(final=False)

    def finish(self) -> list[str | ToolDelta]:
        """What was held back, at the answer's end. A call whose name is known stays one, complete or not."""
        found = self._run(final=True)
        if self._state == "call" and self._body is not None:
            found += self._complete(self._body)
        elif self._state == "call":
            found.append(self._raw)
        self._text = self._raw = ""
        return [piece for piece in found if piece != ""]

    # ------------------------------------------------------------------------------------------ parts

    def _run(self, final: bool) -> list[str | ToolDelta]:
        found: list[str | ToolDelta] = []
        steps = {"text": self._in_text, "call": self._in_call, "after": self._after, "skip": self._skip}
        while self._text or final:
            before = self._text, self._state
            found += steps[self._state](final)
            if (self._text, self._state) == before:
                break
        return [piece for piece in found if piece != ""]

    def _in_text(self, final: bool) -> list[str | ToolDelta]:
        """Text up to where a call may begin."""
        if not self._begun and self.form.bare:
            first = self._text.lstrip(_SPACE)
            marked = any(first.startswith(mark) or mark.startswith(first) for mark in self.form.begin)
            if first and not marked:
                if first.startswith(self.form.bare):
                    self._open(self._text[: -len(first)], first, marked=False)
                    return []
                if not final and any(one.startswith(first) for one in self.form.bare):
                    return []
        marks = [(at, mark) for mark in self.form.begin if (at := self._text.find(mark)) >= 0]
        if marks:
            at, mark = min(marks)
            text = self._text[:at].rstrip(_SPACE)
            self._open(self._text[len(text) : at] + mark, self._text[at + len(mark) :], marked=True)
        else:
            keep = 0 if final else max((_overlap(self._text, mark) for mark in self.form.begin), default=0)
            text = self._text[: len(self._text) - keep]
            text = text if final else text.rstrip(_SPACE)
            self._text = self._text[len(text) :]
        self._begun |= bool(text)
        return [text]

    def _open(self, raw: str, rest: str, marked: bool) -> None:
        self._raw, self._text, self._marked, self._state = raw, rest, marked, "call"
        self._json, self._body = (JsonCall(), None) if self.form.body == "json" else (None, "")

    def _in_call(self, final: bool) -> list[str | ToolDelta]:
        if self._json is None:
            return self._whole_body()
        found: list[str | ToolDelta] = []
        for at, char in enumerate(self._text):
            known = self._json.name is not None
            try:
                if self.form.name in ("mistral", "json") and self._json.starts and char in "[,":
                    new = ""  # a list of calls
                else:
                    new = self._json.feed(char)
            except (Malformed, RecursionError):
                return [*found, *self._give_back(self._text[at:])]
            if not known:
                self._raw += char
            if self._json.name is not None and not known:
                if not self._marked and self._json.name not in self._parameters:  # the answer is JSON, and no call
                    return self._give_back(self._text[at + 1 :])
                found.append(self._named(self._json.name))
                self._raw = ""
            if new:
                found.append(ToolDelta(self.calls - 1, None, None, new))
            if self._json.done:
                self._text, self._raw, self._state = self._text[at + 1 :], "", "after"
                return found
        self._text = ""
        return found

    def _whole_body(self) -> list[str | ToolDelta]:
        assert self._body is not None
        self._body += self._text
        self._text = ""
        ends = [(at, mark) for mark in self.form.end if (at := self._body.find(mark)) >= 0]
        if not ends:
            return []
        at, mark = min(ends)
        body, self._text = self._body[:at], self._body[at + len(mark) :]
        return self._complete(body, mark)

    def _complete(self, body: str, mark: str = "") -> list[str | ToolDelta]:
        """The calls of a whole body. Models that are forced write JSON in every form."""
        kind = "json" if body.lstrip(_SPACE)[:1] in ("{", "[") else self.form.body
        try:
            calls = BODIES[kind](body, self._parameters)
        except (Malformed, RecursionError):
            calls = []
        if not calls or not (self._marked or all(call.name in self._parameters for call in calls)):
            text, self._raw, self._state, self._begun = self._raw + body + mark, "", "text", True
            return [text]
        self._raw, self._state = "", "after"
        found: list[str | ToolDelta] = []
        for call in calls:
            found += [self._named(call.name), ToolDelta(self.calls - 1, None, None, call.arguments)]
        return found

    def _named(self, name: str) -> ToolDelta:
        self.calls += 1
        self._begun = True
        return ToolDelta(self.calls - 1, self._new_id(), name, "")

    def _give_back(self, rest: str) -> list[str | ToolDelta]:
        """What was read as a call is text, unless its name was given away: then its malformed rest is dropped."""
        named = self._json is not None and self._json.name is not None and not self._raw
        self._state = "skip" if named else "text"
        text, self._raw, self._text, self._begun = self._raw, "", rest, True
        return [text]

    def _skip(self, final: bool) -> list[str | ToolDelta]:
        """Drop everything up to the end of a call."""
        ends = [at for mark in self.form.end if (at := self._text.find(mark)) >= 0]
        if ends:
            self._text, self._state = self._text[min(ends) :], "after"
        else:
            keep = max((_overlap(self._text, mark) for mark in self.form.end), default=0)
            self._text = self._text[len(self._text) - keep :]
        return []

    def _after(self, final: bool) -> list[str | ToolDelta]:
        """Behind a call: marks and separators are no text, another call may begin, anything else is text."""
        rest = self._text.lstrip(_SPACE + ",;]")
        if rest.startswith(self.form.begin):  # first: a mark that ends calls may begin one that begins them
            self._text, self._state = rest, "text"
            return []
        if rest and not final and any(mark.startswith(rest) for mark in self.form.begin):
            return []
        for mark in self.form.end:
            if rest.startswith(mark):
                self._text = rest[len(mark) :]
                return []
            if mark.startswith(rest):
                self._text = "" if final else self._text
                return []
        if not rest:
            self._text = ""
        elif rest[0] == "{" and self.form.bare:
            self._open("", rest, marked=self._marked)
        else:
            self._text, self._state = rest, "text"
        return []


def _overlap(text: str, mark: str) -> int:
    """The longest end of ``text`` with which ``mark`` begins."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)


def _identifier(length: int) -> str:
    code = "".join(secrets.choice(_LETTERS) for _ in range(length))
    return code if length == 9 else f"call_{code}"


# ------------------------------------------------------------------------------------------------ grammars


def tool_grammar(
    form: Form, tools: Sequence[Mapping[str, Any]], name: str | None = None, *, parallel: bool = True
) -> Grammar:
    """A grammar whose texts are calls of these tools in the model's form: what ``tool_choice`` asks for.

    ``name``: the function that must be called; None: any of them. ``parallel``: several calls may follow each other.
    Arguments are valid under the function's schema; parts of a schema that grammars do not know are ignored, unless the
    function is ``strict``. Forms whose calls are no JSON get JSON between their marks, which ``ToolParser`` reads.
    Raises InvalidRequest for a name that no tool has.
    """
    functions = [tool.get("function", tool) for tool in tools]
    if name is not None:
        functions = [one for one in functions if one.get("name") == name]
        if not functions:
            raise InvalidRequest(
                f"tool_choice names {name!r}, which is no function of `tools`; add it, or name another"
            )
    if not functions:
        raise InvalidRequest("tool_choice asks for a call, but there are no `tools`; add one")
    calls, rules = [], []
    for number, function in enumerate(functions):
        head = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{form.arguments}": '
        schema = dict(function.get("parameters") or {"type": "object"})
        options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not function.get("strict")}
        given = schema.get("x-guidance", {})
        if not isinstance(given, dict):
            raise InvalidRequest(
                f"tools: x-guidance of {function['name']} is a {type(given).__name__}, expected an object"
            )
        schema["x-guidance"] = {**options, **given}
        calls.append(f"call_{number}")
        rules.append(f'call_{number}: {_quoted(head)} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(schema, ensure_ascii=False)}")
    before, between, after = _frame(form)
    more = f" ({_quoted(between)} call)*" if parallel else ""
    start = [_quoted(before) if before else "", f"call{more}", _quoted(after) if after else ""]
    return Grammar("lark", "\n".join([f"start: {' '.join(filter(None, start))}", f"call: {' | '.join(calls)}", *rules]))


def _frame(form: Form) -> tuple[str, str, str]:
    """Text before, between and after calls. Marks that are special tokens in their models are left out."""
    if form.name in ("hermes", "tags"):
        begin, end = f"{form.begin[0]}\n", f"\n{form.end[0]}"
        return begin, f"{end}\n{begin}", end
    if form.name == "tool_code":
        return "```tool_call\n", ",\n", "\n```"
    if form.name == "mistral":
        return "[", ", ", "]"
    return "", "; " if form.name == "llama" else "\n", ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
