"""Tokens a second, latency and speed-up of one setting: a drafter, its number of drafts, and the rows of a step.

    speed-up = tau * T_plain / (T_draft + T_verify + T_bookkeeping),   tau = 1 + sum over j of p_1 ... p_j

Rows of a closed loop are its users; of an open loop they follow from Little's formula: requests in the system are their
rate times the time of one. A prompt's passes hold up the steps of all rows. The interval joins two errors as
independent ones of the logarithm: that of the acceptance and that of the ratio of times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

from outrider.errors import InvalidRequest
from outrider.planning.step_costs import StepCosts
from outrider.scheduling.acceptance import expected_accepted

__all__ = [
    "LARGEST",
    "Forecast",
    "Profile",
    "ReadsDraftCache",
    "ReadsPrompts",
    "WholeRounds",
    "Workload",
    "cache_seconds",
    "chunks",
    "forecast",
    "prompt_seconds",
    "step_seconds",
    "whole_rounds",
]

CHUNK = 512  # tokens of a prompt in one pass
STEPS = 60  # of the search for an open loop's rows
LARGEST = 1_000_000  # tokens, rows, and requests a second


@dataclass(frozen=True)
class Workload:
    """What is asked for. Raises InvalidRequest for values out of range."""

    prompt: int = 128
    answer: int = 256
    concurrency: int = 1
    """Users of a closed loop, that is, rows; of an open loop the most rows."""
    rate: float = 0.0
    """Requests a second of an open loop; 0: closed."""
    latency: float = 0.0
    """Objective in seconds for a whole answer; 0: none."""
    token_latency: float = 0.0
    """Objective in seconds between tokens; 0: none."""

    def __post_init__(self) -> None:
        if min(self.prompt, self.answer, self.concurrency) < 1:
            raise InvalidRequest("prompt, answer and concurrency must be at least 1")
        if max(self.prompt, self.answer, self.concurrency) > LARGEST:
            raise InvalidRequest(
                f"prompt, answer and concurrency may be at most {LARGEST}, got {self.prompt}, {self.answer}, "
                f"{self.concurrency}"
            )
        if not all(0 <= value <= LARGEST for value in (self.rate, self.latency, self.token_latency)):
            raise InvalidRequest(
                f"rate and latency objectives must be 0 to {LARGEST}, got {self.rate:g}, {self.latency:g} and "
                f"{self.token_latency:g}"
            )

    @property
    def context(self) -> int:
        """Mean cached tokens of a row."""
        return self.prompt + self.answer // 2


@dataclass(frozen=True)
class Profile:
    """How drafts of one drafter are accepted."""

    conditional: tuple[float, ...]
    """P(draft j accepted | those before it were); of a round that may have fewer than j drafts."""
    uncertainty: float = 0.1
    """Half a 95 % interval of the accepted drafts, as a share of them."""
    offered: tuple[float, ...] = ()
    """P(a round has at least j drafts): drafters that look text up are often silent. Empty: always."""

    def accepted(self, drafts: int) -> float:
        """Mean accepted drafts of a round."""
        return expected_accepted(self.conditional[:drafts])

    def verified(self, drafts: int) -> tuple[float, ...]:
        """P(a round verifies n drafts), n from 0 to ``drafts``, which is the limit."""
        if not self.offered:
            return (*(0.0,) * drafts, 1.0)
        least = [1.0, *self.offered[:drafts], *(0.0,) * (drafts - len(self.offered)), 0.0]
        return tuple(high - low for high, low in pairwise(least))


@runtime_checkable
class ReadsPrompts(Protocol):
    """Costs that know what reading a prompt takes, the drafter's reading included."""

    def prompt(self, tokens: int, drafting: bool) -> float: ...


@runtime_checkable
class ReadsDraftCache(Protocol):
    """Costs that know what drafting takes longer because the drafter reads its own cache."""

    def draft_cache(self, drafts: int, context: int) -> float:
        """``context``: cached tokens over all rows."""
        ...


@runtime_checkable
class WholeRounds(Protocol):
    """Costs that know how much longer whole rounds take than the sum of their parts, by drafts of a round."""

    def whole(self, drafts: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Forecast:
    """One setting. Times in seconds."""

    drafter: str
    drafts: int
    rows: float
    acceptance_length: float
    draft: float
    verify: float
    bookkeeping: float
    first_token: float
    between_tokens: float
    latency: float  # of a whole answer
    tokens_per_second: float  # over all rows
    speedup: float
    low: float  # of the speed-up, 95 %
    high: float
    break_even: float  # acceptance length at which the setting is as fast as plain decoding
    overloaded: bool = False

    @property
    def step(self) -> float:
        return self.draft + self.verify + self.bookkeeping

    @property
    def pays(self) -> bool:
        """Faster than plain decoding, with the whole interval."""
        return self.drafts > 0 and self.low > 1


def step_seconds(
    costs: StepCosts, rows: int, drafts: int, context: int, verified: Sequence[float] = ()
) -> tuple[float, float, float]:
    """Mean draft, verify and bookkeeping of a step. ``verified``: P(a row verifies n drafts); empty: all of them."""
    draft = costs.draft(rows, drafts) + cache_seconds(costs, drafts, rows * context)
    if not verified:
        verify = costs.verify(rows * (1 + drafts), rows, rows * context)
    elif rows == 1:
        verify = sum(p * costs.verify(1 + n, 1, context) for n, p in enumerate(verified) if p > 0)
    else:  # the number of tokens varies little beside that of one row
        mean = sum(n * p for n, p in enumerate(verified))
        verify = costs.verify(rows + round(rows * mean), rows, rows * context)
    factor = whole_rounds(costs, drafts)
    return factor * draft, factor * verify, factor * costs.bookkeeping(rows, drafts > 0)


def cache_seconds(costs: StepCosts, drafts: int, context: int) -> float:
    """Seconds in which drafting reads the drafter's own cache; 0 where that is part of drafting."""
    return costs.draft_cache(drafts, context) if isinstance(costs, ReadsDraftCache) else 0.0


def whole_rounds(costs: StepCosts, drafts: int) -> float:
    """Seconds of a round over the sum of its parts; 1 where only parts are known."""
    return costs.whole(drafts) if isinstance(costs, WholeRounds) else 1.0


def forecast(
    name: str, drafts: int, profile: Profile, costs: StepCosts, work: Workload, *, uncertainty: float = 0
) -> Forecast:
    """``drafts``: 0 is plain decoding. ``uncertainty``: of the ratio of two times."""
    length = 1 + profile.accepted(drafts)
    mine, plain = (_loop(d, profile, costs, work) for d in (drafts, 0))
    seconds = {d: _answer_seconds(costs, one.rows, d, profile, work) for d, one in ((drafts, mine), (0, plain))}
    speedup = seconds[0] / seconds[drafts]
    per_second = mine.rows * work.answer / seconds[drafts]
    if work.rate:  # whoever asks at a rate gets it, unless it is too much
        per_second = min(per_second, work.rate * work.answer)
    parts = _parts(costs, mine.rows, drafts, profile, work)
    same = [sum(_parts(costs, mine.rows, d, profile, work)) for d in (0, drafts)]
    needed = same[1] / same[0]
    spread = math.hypot(profile.uncertainty * (length - 1) / length, uncertainty) if drafts else 0.0
    return Forecast(
        drafter=name,
        drafts=drafts,
        rows=mine.rows,
        acceptance_length=length,
        draft=parts[0],
        verify=parts[1],
        bookkeeping=parts[2],
        first_token=max(1.0, mine.rows if work.rate else 1.0) * prompt_seconds(costs, work.prompt, drafts > 0),
        between_tokens=sum(parts) / length,
        latency=seconds[drafts],
        tokens_per_second=per_second,
        speedup=speedup,
        low=speedup * math.exp(-spread),
        high=speedup * math.exp(spread),
        break_even=needed,
        overloaded=mine.overloaded,
    )


def prompt_seconds(costs: StepCosts, tokens: int, drafting: bool) -> float:
    """Of one prompt's passes."""
    if isinstance(costs, ReadsPrompts):
        return costs.prompt(tokens, drafting)
    return sum(costs.verify(size, 1, cached) for size, cached in chunks(tokens))


def chunks(tokens: int) -> list[tuple[int, int]]:
    """(tokens, cached tokens before them) of a prompt's passes."""
    return [(min(CHUNK, tokens - cached), cached) for cached in range(0, tokens, CHUNK)]


def _parts(costs: StepCosts, rows: float, drafts: int, profile: Profile, work: Workload) -> tuple[float, float, float]:
    return step_seconds(costs, max(1, round(rows)), drafts, work.context, profile.verified(drafts))


def _answer_seconds(costs: StepCosts, rows: float, drafts: int, profile: Profile, work: Workload) -> float:
    """A whole request among ``rows``, prompts of the others included."""
    steps = work.answer / (1 + profile.accepted(drafts))
    reading = max(1.0, rows) * prompt_seconds(costs, work.prompt, drafts > 0)
    return steps * sum(_parts(costs, rows, drafts, profile, work)) + reading


@dataclass(frozen=True, slots=True)
class _Loop:
    rows: float
    overloaded: bool = False  # more is asked than can be served


def _loop(drafts: int, profile: Profile, costs: StepCosts, work: Workload) -> _Loop:
    """The rows of a step: the users of a closed loop, or as many as an open loop has in the system."""
    most = work.concurrency
    if not work.rate:
        return _Loop(most)
    if work.rate * _answer_seconds(costs, most, drafts, profile, work) > most:
        return _Loop(most, overloaded=True)
    low, high = 0.0, float(most)
    for _ in range(STEPS):  # as many requests are in the system as come in the time of one
        middle = (low + high) / 2
        more = work.rate * _answer_seconds(costs, middle, drafts, profile, work) > middle
        low, high = (middle, high) if more else (low, middle)
    return _Loop(high)
