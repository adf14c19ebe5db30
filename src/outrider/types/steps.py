"""What scheduling policies and observers see of a step, and their contracts.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from outrider.config import SamplingParams
from outrider.types.passes import Values
from outrider.types.results import RequestStats

__all__ = ["RowRecord", "SchedulerPolicy", "StepCost", "StepObserver", "StepRecord", "StepView", "StepsAside"]


@dataclass(slots=True)  # not frozen: that takes three times as long to make, in every step
class StepCost:
    """Measured seconds of one step, for the policy."""

    draft: float
    verify: float
    bookkeeping: float
    rows: int
    tokens: int  # in the target pass: prompt chunks, each row's last token and its drafts
    context: int  # cached tokens over all rows
    follow: float = 0.0  # of bookkeeping: showing the drafter what was committed
    drafts: int = 0  # the most asked for in a row, fewer than planned where texts are about to end; 0: as planned


@dataclass(slots=True)
class StepView:
    """What a policy may know before drafting: the past of each of the B rows that are ready to draft."""

    contexts: Sequence[int]  # B: committed tokens, the prompt included
    stats: Sequence[RequestStats]  # B: rounds, drafts and accepted drafts so far; read only
    params: Sequence[SamplingParams]  # B
    slots: Sequence[int] = ()  # B: the row's slot; empty: 0, 1, ...
    requests: Sequence[int] = ()  # B: the number of the row's request; empty: unknown
    can_draft: int = -1  # only so many rows, the first ones, can be drafted for; -1: all
    tokens: int = 0  # of the target pass without drafts: B, and chunks of prompts beside them; 0: B
    rows: int = 0  # of the target pass; 0: B
    context: int = 0  # cached tokens over all rows of the pass; 0: those of the B rows

    def __len__(self) -> int:
        return len(self.contexts)


@dataclass(frozen=True, slots=True)
class RowRecord:
    """One row of a step, as it was committed."""

    request: int  # the request's number, unique in its engine
    limit: int  # drafts the policy allowed
    drafted: int
    verified: int
    accepted: int  # drafts that are part of the text: none behind its end
    committed: tuple[int, ...]  # new tokens: the accepted drafts, then the bonus token unless the text ended before it
    confidence: tuple[float, ...] | None  # of each draft; None: the drafter reports none
    first: bool  # the token that follows the prompt's own pass: it belongs to no round


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, after its commit."""

    rows: tuple[RowRecord, ...]  # those that committed tokens
    cost: StepCost


@runtime_checkable
class SchedulerPolicy(Protocol):
    """How much is drafted, and how much of it is verified.

    Non-anticipating: (keep[b] >= j) may depend on confidence[b, :j], on other rows and on the past; never on
    confidence[b, j:]; and it never sees the tokens (DSpark, Appendix A). Where every row that ``plan`` was shown is
    greedy or ``coupled``, texts do not depend on the schedule, and the next ``choose`` may look at everything.
    """

    def plan(self, step: StepView) -> Sequence[int]:
        """The most tokens to draft for each row in this step, from the past only; 0 = plain decoding. -> B"""
        ...

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        """float32 [B, K] or None, [B] -> keep [B], 0 <= keep <= lengths."""
        ...

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """What the step cost, and accepted drafts per row [B]."""
        ...


@runtime_checkable
class StepsAside(Protocol):
    """A policy that can leave the drafter out altogether, so that steps cost what plain decoding costs."""

    @property
    def follows(self) -> bool:
        """Whether the drafter is shown what is committed from this step on. Rows that it has not followed from their
        beginning are drafted for again only after they were shown to it, which counts as time spent on drafting."""
        ...


@runtime_checkable
class StepObserver(Protocol):
    """Sees every step after its commit: evaluation, metrics and audits."""

    def step(self, record: StepRecord) -> None: ...
