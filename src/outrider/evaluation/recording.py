"""Prompts that are answered one at a time, with every round recorded: for calibrating and measuring drafters.

Which rounds count:

- The token from the prompt's prefill belongs to no round.
- A round whose draft was cut to fit the token budget does not count, nor does any after it: the number of drafts that
  would have been accepted is not known.
- Where the text ends among a round's accepted drafts, the round counts up to there: drafts after the end of the text
  count as neither verified nor accepted, and there is no bonus token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.files import read_json_lines
from outrider.types import StepRecord

__all__ = [
    "Answer",
    "EvalPrompt",
    "FailedPrompt",
    "Observed",
    "Recorder",
    "Round",
    "answer",
    "counted",
    "observed",
    "read_prompts",
    "recorded",
    "runnable",
]


# ------------------------------------------------------------------------------------------------ prompts

EXPECTED = '{"text": "..."}, {"turns": ["..."]} or {"prompt": [token ids]}'


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """A prompt, the set of prompts it belongs to, and where it was read."""

    id: str
    domain: str
    prompt: str | list[int]
    index: int = field(default=0, compare=False)
    """Number of the prompt in its file, from 0."""
    line: int = field(default=0, compare=False)
    """Its line there, from 1; 0: it comes from no file."""
    file: str = field(default="", compare=False)
    asked: bool = field(default=False, compare=False)
    """A user's turn, which a chat template can take; else text to continue."""

    @property
    def where(self) -> str:
        return f"{self.file} line {self.line}"


@dataclass(frozen=True, slots=True)
class FailedPrompt:
    """A prompt that cannot be answered, and why."""

    file: str
    index: int
    line: int
    error: str

    @classmethod
    def of(cls, prompt: EvalPrompt, error: Exception) -> FailedPrompt:
        return cls(prompt.file, prompt.index, prompt.line, str(error))


def read_prompts(path: Path) -> list[EvalPrompt]:
    """JSON Lines with ``text``, ``turns`` (the first is the prompt) or ``prompt`` (token ids), and perhaps ``id`` and
    ``domain`` (the file's name by default). Raises InvalidRequest naming the line.
    """
    prompts: list[EvalPrompt] = []
    for line, entry in read_json_lines(path, EXPECTED, "prompts"):
        try:
            prompt, asked = _prompt(entry)
            name, domain = str(entry.get("id", f"{path.stem}-{line}")), str(entry.get("domain", path.stem))
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidRequest(f"{path} line {line}: expected {EXPECTED}, got {str(entry)[:60]!r}") from error
        prompts.append(EvalPrompt(name, domain, prompt, len(prompts), line, str(path), asked))
    if not prompts:
        raise InvalidRequest(f"{path} holds no prompts; expected JSON Lines with `text`, `turns` or `prompt`")
    return prompts


def _prompt(entry: dict[str, object]) -> tuple[str | list[int], bool]:
    """The prompt of a line, and whether it is a user's turn."""
    for key, kind in (("prompt", int), ("ids", int), ("turns", str)):
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(part, kind) for part in value):
            raise TypeError(key)
        if not value and kind is str:  # no ids are an empty prompt, no turns are none
            raise TypeError(key)
        return (value, False) if kind is int else (value[0], True)
    text = entry["text"]
    if not isinstance(text, str):
        raise TypeError("text")
    return text, False


def runnable(
    llm: LLM, prompts: Iterable[EvalPrompt], params: SamplingParams, *, chat: bool = False, fail_fast: bool = False
) -> tuple[list[EvalPrompt], list[FailedPrompt]]:
    """The prompts that this model can answer, and those that it cannot, with the reason.

    ``chat``: a user's turn is written into the model's chat template. ``fail_fast``: raises InvalidRequest naming
    the first one that cannot be answered. Raises CheckpointError for ``chat`` and a model without a template.
    """
    good, failed = [], []
    for prompt in prompts:
        try:
            if chat and prompt.asked:
                message = {"role": "user", "content": prompt.prompt}
                prompt = replace(prompt, prompt=llm.tokenizer.encode_chat([message]))
            llm.check(prompt.prompt, params)
        except InvalidRequest as error:
            if fail_fast:
                raise InvalidRequest(f"{prompt.where}: {error}") from error
            failed.append(FailedPrompt.of(prompt, error))
        else:
            good.append(prompt)
    return good, failed


# ------------------------------------------------------------------------------------------------ rounds


@dataclass(frozen=True, slots=True)
class Round:
    """One draft and what verification kept of it."""

    confidence: tuple[float, ...] | None  # of each draft; None: the drafter has none
    planned: int  # the most drafts the policy asked for
    drafted: int
    verified: int
    accepted: int
    committed: (
        int  # tokens of the text: the accepted drafts and the bonus or recovered token, unless the text ended before
    )


class Recorder:
    """A ``StepObserver`` that records every round."""

    def __init__(self) -> None:
        self._rounds: list[Round] = []

    def step(self, record: StepRecord) -> None:
        self._rounds += [
            Round(row.confidence, row.limit, row.drafted, row.verified, row.accepted, len(row.committed))
            for row in record.rows
            if not row.first
        ]

    def take(self) -> list[Round]:
        """The rounds since the last call."""
        rounds, self._rounds = self._rounds, []
        return rounds


def recorded(llm: LLM) -> Recorder:
    """Record the rounds of an LLM that has not answered anything yet."""
    recorder = Recorder()
    llm.observers.append(recorder)
    return recorder


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt."""

    token_ids: list[int]
    seconds: float  # prefill included
    rounds: list[Round]  # those that count


def answer(llm: LLM, recorder: Recorder, prompt: str | Sequence[int], params: SamplingParams) -> Answer:
    """Answer one prompt, alone, after the drafter has dropped what it learnt from earlier ones."""
    llm.forget()
    recorder.take()
    (output,) = llm.generate([prompt], params)
    rounds = counted(recorder.take(), params.max_tokens, llm.drafter.block)
    return Answer(output.token_ids, output.stats.seconds, rounds)


def counted(rounds: Iterable[Round], max_tokens: int, block: int) -> list[Round]:
    """The rounds of one answer that count; of the one that an accepted draft ended, the drafts behind it do not."""
    committed, kept = 1, []
    for one in rounds:
        if max_tokens - committed - 1 < min(one.planned, block):
            break
        committed += one.committed
        if one.committed == one.accepted:  # no bonus token: the text ended before it
            text = one.accepted
            confidences = None if one.confidence is None else one.confidence[:text]
            one = replace(one, confidence=confidences, drafted=text, verified=text)
        kept.append(one)
    return kept


class Observed(NamedTuple):
    """Rounds side by side, as ``outrider.scheduling.calibration`` takes them."""

    confidence: Tensor  # float64 [n, K]; NaN past a round's drafts
    verified: Tensor  # int64 [n]
    accepted: Tensor  # int64 [n]


def observed(rounds: Iterable[Round]) -> Observed:
    """Those that verified at least one draft and have confidences. Raises InvalidRequest for confidences that are no
    probabilities."""
    used = [one for one in rounds if one.verified and one.confidence]
    wrong = next((c for one in used for c in one.confidence or () if not 0 <= c <= 1), None)
    if wrong is not None:
        raise InvalidRequest(f"the drafter states a confidence of {wrong:g}; expected probabilities, from 0 to 1")
    width = max((len(one.confidence or ()) for one in used), default=0)
    rows = [[*(one.confidence or ()), *[torch.nan] * (width - one.drafted)] for one in used]
    return Observed(
        torch.tensor(rows, dtype=torch.float64).view(len(used), width),
        torch.tensor([one.verified for one in used], dtype=torch.int64),
        torch.tensor([one.accepted for one in used], dtype=torch.int64),
    )
