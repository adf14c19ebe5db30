"""Small worlds whose every probability is known: a toy target, a draft model beside it, and an engine over both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from outrider import registry
from outrider.config import build
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine.engine import Engine
from outrider.engine.loader import load_policy
from outrider.engine.rows import Rows
from outrider.models.toy import ToyTarget
from outrider.proof.enumeration import EnumeratingBackend, EnumeratingDraftModel
from outrider.proof.literal import Chain
from outrider.scheduling.cost_model import CostModel
from outrider.types import Drafter, RequestRows, SchedulerPolicy, StepCost, StepView, Values

__all__ = ["GrammarEngine", "NoRepeat", "RemembersLastRound", "SteadyCosts", "ToyWorld", "make_policy"]

CAPACITY = 512
POLICY_OPTIONS: dict[str, dict[str, Any]] = {"threshold": {"threshold": 0.7}}
"""What makes a policy of the catalogue cut drafts in these worlds."""
COST = StepCost(draft=0.002, verify=0.01, bookkeeping=0.0005, rows=2, tokens=6, context=20)


@dataclass(frozen=True)
class ToyWorld:
    """A target and a draft model, chains over ``size`` tokens; random, and the same for a seed."""

    size: int = 2
    order: int = 2
    seed: int = 0
    spread: float = 1.2
    no_repeat: int | None = None
    """A grammar: this token never follows itself."""
    stop_ids: tuple[int, ...] = ()

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """Logits of target and draft model, float64 [V] * (order + 1): alike, but not equal."""
        shape = [self.size] * (self.order + 1)
        noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        table = noise[0] * self.spread
        return table, 0.5 * table + noise[1]

    @property
    def chain(self) -> Chain:
        """The target as ``literal`` reads it."""
        return Chain(self.tables[0].numpy(), self.no_repeat)

    @property
    def middle_confidence(self) -> float:
        """A threshold that half of the draft model's rows pass: its confidence is its largest probability."""
        return float(self.tables[1].softmax(-1).amax(-1).quantile(0.5))

    def target(self, kind: type[ToyTarget] = ToyTarget, dtype: torch.dtype = torch.float64) -> ToyTarget:
        return kind(self.tables[0].to(dtype), eos_token_ids=self.stop_ids)

    def draft_model(self, dtype: torch.dtype = torch.float64) -> ToyTarget:
        return ToyTarget(self.tables[1].to(dtype))

    def enumerated(
        self,
        policy: SchedulerPolicy,
        drafts: int,
        *,
        rows: int = 16,
        drafter: str = "draft_model",
        backend: EnumeratingBackend | None = None,
        draft_model: type[EnumeratingDraftModel] = EnumeratingDraftModel,
        target: type[ToyTarget] = ToyTarget,
        engine: type[GrammarEngine] | None = None,
    ) -> Engine:
        """An engine whose outcomes are enumerated; what a control breaks is given as another class."""
        backend = backend or EnumeratingBackend()
        model, small = self.target(target), self.draft_model()
        model.backend = small.backend = backend
        drafting: Drafter = (
            draft_model(small, drafts) if drafter == "draft_model" else plain_drafter(drafter, model, drafts)
        )
        return self.engine(model, drafting, policy, rows=rows, kind=engine)

    def sampled(self, policy: SchedulerPolicy, drafts: int, *, rows: int, dtype: torch.dtype = torch.float32) -> Engine:
        """An engine that really samples, with the backend that this machine uses."""
        return self.engine(
            self.target(dtype=dtype), DraftModelDrafter(self.draft_model(dtype), drafts), policy, rows=rows
        )

    def engine(
        self,
        target: ToyTarget,
        drafter: Drafter,
        policy: SchedulerPolicy,
        *,
        rows: int,
        kind: type[GrammarEngine] | None = None,
    ) -> Engine:
        """``kind``: None takes the plain engine, or the one with a grammar where the world has one."""
        steady = SteadyCosts(policy)
        if kind is None and self.no_repeat is None:
            return Engine(target, drafter, steady, max_rows=rows, capacity=CAPACITY)
        made = (kind or GrammarEngine)(target, drafter, steady, max_rows=rows, capacity=CAPACITY)
        made.grammar = None if self.no_repeat is None else NoRepeat(self.no_repeat)
        return made


def plain_drafter(name: str, target: ToyTarget, drafts: int) -> Drafter:
    """A drafter of the catalogue that needs no model, with options that let it match in so small a vocabulary."""
    kind = registry.find("drafter", name)
    options: dict[str, dict[str, Any]] = {"ngram": {"min_ngram": 1}, "suffix": {"stored_tokens": 0}}
    drafted = {} if name == "none" else {"draft_tokens": drafts}
    config = build(kind.Config, {**options.get(name, {}), **drafted}, f"drafter {name}")
    drafter: Drafter = kind.from_config(config, target)
    return drafter


def make_policy(name: str, drafts: int, costs: CostModel | None = None, /, **options: Any) -> SchedulerPolicy:
    """A policy of the catalogue, or ``remembers``: one whose budget follows the last round. ``costs``: what steps cost,
    as far as the policy reads it. ``options``: of the policy, in place of ``POLICY_OPTIONS``."""
    if name == "remembers":
        return RemembersLastRound(drafts)
    drafter = plain_drafter("ngram", ToyWorld().target(), max(drafts, 1))
    return load_policy(name, {"draft_tokens": drafts, **(options or POLICY_OPTIONS.get(name, {}))}, drafter, costs)


class RemembersLastRound:
    """Drafts k tokens after a round that accepted all of its drafts, else 1: a budget made of the past, as is allowed.

    Noise that comes back after a rejection biases the text most under such a budget.
    """

    def __init__(self, drafts: int) -> None:
        self._drafts = drafts
        self._rejected: dict[int, int] = {}  # request -> its rejected drafts before the last round

    def plan(self, step: StepView) -> Sequence[int]:
        names = step.requests or range(len(step))
        rejected = {name: stats.drafted - stats.accepted for name, stats in zip(names, step.stats, strict=True)}
        limit = [self._drafts if count == self._rejected.get(name, 0) else 1 for name, count in rejected.items()]
        self._rejected = rejected
        return limit

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        return list(lengths)

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None: ...


class SteadyCosts:
    """A policy that is told the same cost of every step, so that its choices repeat."""

    def __init__(self, policy: SchedulerPolicy) -> None:
        self.policy = policy

    def plan(self, step: StepView) -> Sequence[int]:
        return self.policy.plan(step)

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        return self.policy.choose(confidence, lengths)

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        self.policy.observe(replace(COST, rows=cost.rows, tokens=cost.tokens, context=cost.context), accepted)


@dataclass(frozen=True, slots=True)
class NoRepeat:
    """The mask of a grammar of one rule (``types.Processor``): a token never follows itself."""

    token: int

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        deepest = int(rows.depth.max())
        for index, depth in zip(rows.index.tolist(), rows.depth.tolist(), strict=True):
            if rows.tokens[len(rows.tokens) - 1 - (deepest - depth)] == self.token:
                logits[index, self.token] = -torch.inf


class GrammarEngine(Engine):
    """An engine that gives every row one more processor."""

    grammar: NoRepeat | None = None

    def _next_rows(self) -> Rows:
        rows = super()._next_rows()
        if self.grammar is not None:
            rows.context = replace(rows.context, processors=[[self.grammar]] * len(rows.context.params))
        return rows
