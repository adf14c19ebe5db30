"""Questions put to a model one at a time, and every round of the answers: for calibrating and measuring drafters.

Which rounds count:

- The token that a prompt's own pass gives belongs to no round.
- A round whose draft had to be cut to fit the token budget does not count, nor does any after it: how far it might have
  come is not known.
- Where the text ends among a round's accepted drafts, the round counts up to there; the drafts behind the end of the
  text are no text, and neither verified nor accepted. It commits no token of the target's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import StepRecord

__all__ = [
    "Answer",
    "Observed",
    "Question",
    "Recorder",
    "Round",
    "ask",
    "counted",
    "observed",
    "read_questions",
    "recorded",
]


# ------------------------------------------------------------------------------------------------ questions


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and which set of prompts it belongs to."""

    id: str
    domain: str
    prompt: str | list[int]


def read_questions(path: Path, tokenizer: Tokenizer | None = None) -> list[Question]:
    """JSON Lines with ``text``, ``turns`` (the first is the prompt) or ``prompt`` (token ids), and perhaps ``id`` and
    ``domain`` (the file's name by default). ``tokenizer``: turns are written into its chat template.

    Raises InvalidRequest naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: U+2028 may stand in a string
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read prompts from {path}: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt = _prompt(entry, tokenizer)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InvalidRequest(
                f'{path} line {number}: expected {{"text": "..."}}, {{"turns": ["..."]}} or {{"prompt": [token ids]}}, '
                f"got {line[:60]!r}"
            ) from error
        domain = str(entry.get("domain", path.stem))
        questions.append(Question(str(entry.get("id", f"{path.stem}-{number}")), domain, prompt))
    if not questions:
        raise InvalidRequest(f"{path} holds no prompts; expected JSON Lines with `text`, `turns` or `prompt`")
    return questions


def _prompt(entry: dict[str, object], tokenizer: Tokenizer | None) -> str | list[int]:
    for key, kind in (("prompt", int), ("turns", str)):
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not value or not all(isinstance(part, kind) for part in value):
            raise TypeError(key)
        if key == "prompt":
            return value
        return value[0] if tokenizer is None else tokenizer.encode_chat([{"role": "user", "content": value[0]}])
    text = entry["text"]
    if not isinstance(text, str) or not text:
        raise TypeError("text")
    return text


# ------------------------------------------------------------------------------------------------ rounds


@dataclass(frozen=True, slots=True)
class Round:
    """One draft and what verification kept of it."""

    confidence: tuple[float, ...] | None  # of each draft; None: the drafter has none
    planned: int  # the most drafts the policy asked for
    drafted: int
    verified: int
    accepted: int
    committed: int  # tokens of the text: the accepted drafts and one of the target's own, unless the text ended before


class Recorder:
    """A ``StepObserver`` that keeps every round."""

    def __init__(self) -> None:
        self._rounds: list[Round] = []

    def step(self, record: StepRecord) -> None:
        self._rounds += [
            Round(row.confidence, row.limit, row.drafted, row.verified, row.accepted, len(row.committed))
            for row in record.rows
            if not row.first
        ]

    def take(self) -> list[Round]:
        """The rounds since it was last asked."""
        rounds, self._rounds = self._rounds, []
        return rounds


def recorded(llm: LLM) -> Recorder:
    """Make an LLM that has answered nothing yet keep its rounds."""
    recorder = Recorder()
    llm.observers.append(recorder)
    return recorder


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one question."""

    token_ids: list[int]
    seconds: float  # the prompt's pass included
    rounds: list[Round]  # those that count


def ask(llm: LLM, recorder: Recorder, prompt: str | Sequence[int], params: SamplingParams) -> Answer:
    """Answer one prompt, alone, with a drafter that remembers nothing."""
    llm.forget()
    recorder.take()
    (output,) = llm.generate([prompt], params)
    rounds = counted(recorder.take(), len(output.token_ids), params.max_tokens, llm.drafter.block)
    return Answer(output.token_ids, output.stats.seconds, rounds)


def counted(rounds: Iterable[Round], generated: int, max_tokens: int, block: int) -> list[Round]:
    """The rounds of one answer of ``generated`` tokens that count, the last one up to the end of the text."""
    committed, kept = 1, []
    for one in rounds:
        if max_tokens - committed - 1 < min(one.planned, block):
            break
        new = min(one.accepted + 1, generated - committed)
        committed += new
        if new <= one.accepted:
            sure = None if one.confidence is None else one.confidence[:new]
            one = replace(one, confidence=sure, drafted=new, verified=new, accepted=new, committed=new)
        kept.append(one)
    return kept


class Observed(NamedTuple):
    """Rounds side by side, as ``outrider.scheduling.calibration`` takes them."""

    confidence: Tensor  # float64 [n, K]; NaN past a round's drafts
    verified: Tensor  # int64 [n]
    accepted: Tensor  # int64 [n]


def observed(rounds: Iterable[Round]) -> Observed:
    """Those that verified at least one draft and have confidences."""
    used = [one for one in rounds if one.verified and one.confidence]
    width = max((len(one.confidence or ()) for one in used), default=0)
    rows = [[*(one.confidence or ()), *[torch.nan] * (width - one.drafted)] for one in used]
    return Observed(
        torch.tensor(rows, dtype=torch.float64).view(len(used), width),
        torch.tensor([one.verified for one in used], dtype=torch.int64),
        torch.tensor([one.accepted for one in used], dtype=torch.int64),
    )
