"""What is asked of a target, one prompt or a whole conversation, and in which form its answers are kept."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from outrider.config import SamplingParams
from outrider.tokenization.tokenizer import Tokenizer

__all__ = ["Ask", "Question", "Settings", "Talks"]


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: the tokens of a prompt, and the conversation they stand for."""

    id: str
    domain: str
    tokens: list[int]
    messages: tuple[Mapping[str, str], ...]
    """Empty for plain text."""
    later: tuple[str, ...]
    """What the user says afterwards."""
    turn: int = 1


@dataclass(frozen=True, slots=True)
class Settings:
    """What the target's files count_accepted: its sampling, its end tokens, its context."""

    params: SamplingParams
    end_tokens: tuple[int, ...]
    context: int
    seed: int

    def of(self, question: Question) -> SamplingParams:
        """The same sampling with the question's own seed."""
        digest = hashlib.sha256(f"{self.seed} {question.id}".encode()).digest()
        return replace(self.params, seed=int.from_bytes(digest[:8], "big") >> 1)


Ask = Callable[[deque[Question]], Iterator[list[tuple[Question, list[int]]]]]
"""Takes questions from a queue until it is empty and yields answers as they are finished, in any order; whoever reads
them may queue more."""


class Talks:
    """The conversations of one part (most have one turn): what is still to be asked, and the answers so far by id."""

    def __init__(self, prompts: list[dict[str, Any]], tokenizer: Tokenizer, settings: Settings) -> None:
        self.todo: deque[Question] = deque()
        self.finished = 0  # prompts whose every turn is answered, or does not fit
        self.too_long = 0
        self._prompts, self._tokenizer, self._settings = prompts, tokenizer, settings
        self._lines: dict[str, dict[str, Any]] = {}

    def resume(self, records: list[dict[str, Any]]) -> None:
        """Queue what ``records`` do not answer."""
        self._lines = {record["id"]: record for record in records}
        for prompt in self._prompts:
            question: Question | None = self._fits(self._first(prompt))
            while question is not None and question.id in self._lines:
                question = self._next(question, self._lines[question.id]["answer"])
            if question is not None:
                self.todo.append(question)

    def take(self, question: Question, answer: list[int]) -> dict[str, Any]:
        """The answer's line; the next turn of its conversation is queued in front."""
        line = {"id": question.id, "domain": question.domain, "prompt": question.tokens, "answer": answer}
        self._lines[question.id] = line
        follow = self._next(question, answer)
        if follow is not None:
            self.todo.appendleft(follow)
        return line

    def ordered(self) -> list[dict[str, Any]]:
        """All lines as the prompts are ordered, turn after turn."""
        lines = []
        for prompt in self._prompts:
            turns = range(1, len(prompt.get("turns", "1")) + 1)
            names = [_name(prompt["id"], turn) for turn in turns]
            lines += [self._lines[name] for name in names if name in self._lines]
        return lines

    def _first(self, prompt: dict[str, Any]) -> Question:
        messages: tuple[Mapping[str, str], ...] = ()
        later: tuple[str, ...] = ()
        if "text" in prompt:
            tokens = self._tokenizer.encode(prompt["text"])
        else:
            said, *rest = prompt["turns"]
            system = prompt.get("system")
            messages = ({"role": "system", "content": system},) if system else ()
            messages, later = (*messages, {"role": "user", "content": said}), tuple(rest)
            tokens = self._tokenizer.encode_chat(messages)
        return Question(prompt["id"], prompt["domain"], tokens, messages, later)

    def _next(self, question: Question, answer: list[int]) -> Question | None:
        """The conversation's next turn, where it has one and that fits."""
        if not question.later:
            self.finished += 1
            return None
        said, *rest = question.later
        answered = {"role": "assistant", "content": self._tokenizer.decode(answer)}
        messages = (*question.messages, answered, {"role": "user", "content": said})
        turn = question.turn + 1
        name = _name(question.id.split("#")[0], turn)
        tokens = self._tokenizer.encode_chat(messages)
        return self._fits(Question(name, question.domain, tokens, messages, tuple(rest), turn))

    def _fits(self, question: Question) -> Question | None:
        """The question, unless its tokens are none, or too many for the target's context."""
        if 0 < len(question.tokens) <= self._settings.context - self._settings.params.max_tokens:
            return question
        self.finished += 1
        self.too_long += 1
        return None


def _name(prompt: str, turn: int) -> str:
    return prompt if turn == 1 else f"{prompt}#{turn}"
