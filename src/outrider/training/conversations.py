"""The turns that a target answers, one prompt or a whole conversation, and the lines that its answers become."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest
from outrider.tokenization.chat_template import with_system_in_user
from outrider.tokenization.tokenizer import Tokenizer

__all__ = ["Answerer", "ChatTurn", "Conversations", "Settings"]


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One turn to answer: the tokens of its prompt, and the conversation that they stand for."""

    id: str
    domain: str
    tokens: list[int]
    messages: tuple[Mapping[str, Any], ...]
    """Empty for plain text."""
    later: tuple[str, ...]
    """The user's messages of the turns after this one."""
    number: int = 1
    """Of the turn in its conversation, from 1."""
    line: int = 0
    """The prompt's line in its file, from 1."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the target answers: sampling, the end tokens of its files, the most tokens of prompt and answer together."""

    params: SamplingParams
    end_tokens: tuple[int, ...]
    context: int
    seed: int
    temperatures: tuple[float, ...] = ()
    """Where there are some, each turn is answered at one of them."""

    def of(self, turn: ChatTurn) -> SamplingParams:
        """The same sampling with the turn's own seed, and its temperature where there are several."""
        digest = hashlib.sha256(f"{self.seed} {turn.id}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
        if not self.temperatures:
            return replace(self.params, seed=seed)
        chosen = self.temperatures[int.from_bytes(digest[8:16], "big") % len(self.temperatures)]
        return replace(self.params, seed=seed, temperature=chosen)


Answerer = Callable[[deque[ChatTurn]], Iterator[list[tuple[ChatTurn, list[int]]]]]
"""Takes turns from a queue until it is empty and yields answers (token ids) as they are finished, in any order. The
caller may queue more turns in between."""


class Conversations:
    """The conversations of one part (most have one turn): turns that are still to be answered, and answers by id.

    ``prompts`` are the lines of ``source``. Where the target's chat template takes no system message, its text is put
    before the first user message, and ``note`` is told so once.
    """

    def __init__(
        self,
        prompts: list[dict[str, Any]],
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        source: Path | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.todo: deque[ChatTurn] = deque()
        self.finished = 0  # prompts of which every turn is answered, or does not fit
        self.too_long = 0
        self._prompts, self._tokenizer, self._settings = prompts, tokenizer, settings
        self._source, self._note, self._noted = source, note, False
        self._lines: dict[str, dict[str, Any]] = {}

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Queue what ``records`` do not answer. Raises InvalidRequest for messages that the template refuses."""
        self._lines = {record["id"]: record for record in records}
        for line, prompt in enumerate(self._prompts, 1):
            turn: ChatTurn | None = self._fits(self._first(prompt, line))
            while turn is not None and turn.id in self._lines:
                turn = self._next(turn, self._lines[turn.id]["answer"])
            if turn is not None:
                self.todo.append(turn)

    def take(self, turn: ChatTurn, answer: list[int]) -> dict[str, Any]:
        """The answer's line; the next turn of its conversation is queued in front."""
        line = {"id": turn.id, "domain": turn.domain, "prompt": turn.tokens, "answer": answer}
        self._lines[turn.id] = line
        following = self._next(turn, answer)
        if following is not None:
            self.todo.appendleft(following)
        return line

    def ordered(self) -> list[dict[str, Any]]:
        """All lines in the order of the prompts, and turn after turn."""
        lines = []
        for prompt in self._prompts:
            numbers = range(1, len(prompt.get("turns", "1")) + 1)
            names = [_name(prompt["id"], number) for number in numbers]
            lines += [self._lines[name] for name in names if name in self._lines]
        return lines

    def _first(self, prompt: dict[str, Any], line: int) -> ChatTurn:
        if "text" in prompt:
            return ChatTurn(prompt["id"], prompt["domain"], self._tokenizer.encode(prompt["text"]), (), (), 1, line)
        user, *later = prompt["turns"]
        messages: list[Mapping[str, Any]] = [{"role": "user", "content": user}]
        if prompt.get("system"):
            messages = self._with_system(prompt["system"], messages)
        tokens = self._encode(messages, prompt["id"], line)
        return ChatTurn(prompt["id"], prompt["domain"], tokens, tuple(messages), tuple(later), 1, line)

    def _with_system(self, system: str, messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        messages = [{"role": "system", "content": system}, *messages]
        if self._tokenizer.takes_system:
            return messages
        if not self._noted:
            self._note("the chat template takes no system messages: their text goes before the first user message")
            self._noted = True
        return with_system_in_user(messages)

    def _next(self, turn: ChatTurn, answer: list[int]) -> ChatTurn | None:
        """The conversation's next turn, where it has one and that fits."""
        if not turn.later:
            self.finished += 1
            return None
        user, *later = turn.later
        answered = {"role": "assistant", "content": self._tokenizer.decode_after(turn.tokens, answer)}
        messages = (*turn.messages, answered, {"role": "user", "content": user})
        number = turn.number + 1
        name = _name(turn.id.split("#")[0], number)
        tokens = self._encode(messages, name, turn.line)
        return self._fits(ChatTurn(name, turn.domain, tokens, messages, tuple(later), number, turn.line))

    def _encode(self, messages: Iterable[Mapping[str, Any]], name: str, line: int) -> list[int]:
        try:
            return self._tokenizer.encode_chat(messages)
        except InvalidRequest as error:
            where = f"line {line}" if self._source is None else f"{self._source} line {line}"
            raise InvalidRequest(f"{where} (prompt {name}): {error}") from error

    def _fits(self, turn: ChatTurn) -> ChatTurn | None:
        """The turn, unless it has no tokens, or too many for the target's context."""
        if 0 < len(turn.tokens) <= self._settings.context - self._settings.params.max_tokens:
            return turn
        self.finished += 1
        self.too_long += 1
        return None


def _name(prompt: str, number: int) -> str:
    return prompt if number == 1 else f"{prompt}#{number}"
