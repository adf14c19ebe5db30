"""The audit of a target with its drafters and policies: which checks each tier runs, quick and in full."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain, cycle, islice
from typing import Any, Literal

from outrider import registry
from outrider.backends.native import NativeStack
from outrider.config import Rule, SamplingParams
from outrider.engine.engine import Engine
from outrider.engine.llm import LLM
from outrider.engine.loader import EMBEDDED, LoadedModel
from outrider.errors import CheckpointError, InvalidRequest, UnknownKind
from outrider.models.decoder import DecoderTarget
from outrider.models.loading import load_target
from outrider.proof import contracts, equality, exact, statistical
from outrider.proof.certificate import Certificate, Check, Tier, run_tier
from outrider.proof.evidence import Budget
from outrider.proof.proposing import DraftRow, Session
from outrider.proof.toy_world import ToyWorld, make_policy
from outrider.types import Drafter, SchedulerPolicy, TargetModel

__all__ = ["TIERS", "Audit", "TierName"]

TierName = Literal["exact", "contracts", "equality", "statistical"]
TIERS: tuple[TierName, ...] = ("exact", "contracts", "equality", "statistical")
STATISTICAL_ROWS = 4  # times the rows of an equality check: volume is what counts there
FLOAT32_BOUND = 2e-3
"""A float32 target's logits may differ by so much from the reference backend's in float64."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    prompts: int
    max_tokens: int
    prompt_tokens: int
    toy_bias: float
    real_bias: float
    policies_each: bool  # every drafter under every policy; else policies take turns
    rounds: int  # of the contracts of drafters


QUICK = Size(3, 20, 48, 0.05, 0.1, False, 2)
FULL = Size(24, 96, 160, 0.01, 0.03, True, 6)


@dataclass(frozen=True)
class Audit:
    """What is audited. Raises CheckpointError and its kin for drafters that do not fit."""

    model: LoadedModel
    drafters: tuple[str, ...]
    policies: tuple[str, ...] = ()
    """Empty: all of the catalogue."""
    prompts: tuple[tuple[int, ...], ...] = ()
    tiers: tuple[TierName, ...] = TIERS
    quick: bool = False
    seed: int = 0
    max_rows: int = 4
    progress: Callable[[str], None] = field(default=lambda text: None, compare=False)

    def __post_init__(self) -> None:
        if not self.drafters or not self.prompts:
            raise InvalidRequest("an audit needs at least one drafter and one prompt")
        for name in self.policies:
            registry.find("policy", name)

    def run(self) -> Certificate:
        """All chosen tiers."""
        for name in self.drafters:  # one that does not load is said now, and not after minutes of other checks
            self._drafter(name)
        made = {
            "exact": self._exact,
            "contracts": self._contracts,
            "equality": self._equality,
            "statistical": self._statistical,
        }
        return Certificate(self._subject(), tuple(made[name]() for name in self.tiers))

    # ---------------------------------------------------------------- parts

    @property
    def _size(self) -> Size:
        return QUICK if self.quick else FULL

    @property
    def _target(self) -> TargetModel:
        return self.model.target

    @cached_property
    def _policy_names(self) -> tuple[str, ...]:
        return self.policies or tuple(registry.names("policy"))

    @cached_property
    def _texts(self) -> list[list[int]]:
        size = self._size
        return [list(prompt[-size.prompt_tokens :]) for prompt in self.prompts[: size.prompts]]

    def _llm(self, drafter: str, policy: str = "fixed", rows: int | None = None) -> LLM:
        capacity = min(self._size.prompt_tokens + self._size.max_tokens + 1, self._target.spec.max_positions)
        return LLM(self.model, drafter, policy=policy, guard=False, max_rows=rows or self.max_rows, capacity=capacity)

    def _engine(self, drafter: str, policy: str, rows: int | None = None) -> Engine:
        return self._llm(drafter, policy, rows).engine

    def _drafter(self, name: str) -> Drafter:
        return self._llm(name).drafter

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Drafters with policies."""
        if self._size.policies_each:
            yield from ((drafter, policy) for drafter in self.drafters for policy in self._policy_names)
        else:
            turns = max(len(self.drafters), len(self.policies))  # each policy that was asked for has one
            yield from islice(zip(cycle(self.drafters), cycle(self._policy_names), strict=False), turns)

    def _subject(self) -> dict[str, Any]:
        stack = self._target.stack if isinstance(self._target, DecoderTarget) else None
        dtype = stack.dtype if isinstance(stack, NativeStack) else str(self._target.spec.dtype).removeprefix("torch.")
        backend = self._target.backend.name
        if isinstance(stack, NativeStack):
            backend += f" ({stack.core.isa})"
        return {
            "model": self.model.name or self._target.spec.name,
            "dtype": dtype,
            "backend": backend,
            "drafters": list(self.drafters),
            "policies": list(self._policy_names),
            "size": "quick" if self.quick else "full",
            "seed": self.seed,
        }

    # ---------------------------------------------------------------- tiers

    def _exact(self) -> Tier:
        return run_tier("exact", exact.METHOD, exact.exact_checks(self.quick, self.seed), self.progress)

    def _equality(self) -> Tier:
        others = {
            f"{drafter}, policy {policy}": partial(self._engine, drafter, policy) for drafter, policy in self._pairs()
        }
        plain = self._llm("none", rows=1).engine
        checks = equality.equality_checks(
            plain, others, self._texts, max_tokens=self._size.max_tokens, seed=1000 * self.seed
        )
        tier = run_tier("equality", equality.METHOD, checks, self.progress)
        for name in self.drafters:
            mine = [check for check in tier.checks if f", {name}, policy " in check.name]
            if mine and not any(check.figures["accepted"] for check in mine) and self._drafter(name).block:
                self.progress(
                    f"equality: no draft of {name} was accepted, so its texts say nothing of accepted drafts; give "
                    "--prompts that it drafts well for, or audit without --tier quick"
                )
        return tier

    def _statistical(self) -> Tier:
        toys = statistical.toy_settings(self.quick, self.seed)
        most = min(64, self._size.max_tokens)
        asked: dict[Rule, SamplingParams] = {
            "rejection": SamplingParams(max_tokens=most, temperature=1.0, rule="rejection", ignore_eos=True),
            "block": SamplingParams(max_tokens=most, temperature=0.9, top_p=0.95, rule="block", ignore_eos=True),
        }
        engines: dict[str, tuple[Callable[[], Engine], SamplingParams]] = {}
        policies, rules = cycle(self._policy_names), cycle(reversed(asked))
        for drafter in self.drafters[: 1 if self.quick else None]:
            policy, rule = next(policies), next(rules)
            make = partial(self._engine, drafter, policy, STATISTICAL_ROWS * self.max_rows)
            engines[f"{drafter}, {rule}, policy {policy}"] = (make, asked[rule])
        budget = Budget(len(toys) + len(engines))
        short = [text[-QUICK.prompt_tokens :] for text in self._texts]
        checks = chain(
            statistical.toy_checks(toys, self._size.toy_bias, budget),
            statistical.real_checks(engines, short, self._size.real_bias, budget, seed=self.seed),
        )
        method = statistical.method(budget, self._size.toy_bias, self._size.real_bias)
        figures = {"false_alarm_rate": budget.alpha, "tests": budget.tests}
        return run_tier("statistical", method, checks, self.progress, figures)

    def _contracts(self) -> Tier:
        return run_tier("contracts", contracts.METHOD, self._contract_checks(), self.progress)

    def _contract_checks(self) -> Iterator[Check]:
        for policy in self._policy_names:

            def make(name: str = policy) -> SchedulerPolicy:
                return make_policy(name, 6, contracts.stepped_costs())

            wrong = contracts.policy_faults(make)
            yield Check(f"policy {policy} keeps its bounds", not wrong, wrong[0] if wrong else "20 steps of 4 rows")
            peeks = contracts.policy_anticipates(make, trials=3 if self.quick else 20)
            yield Check(f"policy {policy} does not look ahead", not peeks, "looks ahead" if peeks else "nothing moved")
        for name in self.drafters:
            yield from self._drafter_checks(name)
        yield from self._cache_checks()
        wrong_rows = contracts.backend_disagreements(self._target.backend, seed=self.seed)
        yield Check(
            f"backend {self._target.backend.name} verifies as the rules are written",
            not wrong_rows,
            f"{wrong_rows} of 480 rows differ",
        )
        if not self.quick:
            yield from self._error_bound()
        shared = list(contracts.rng_faults())
        found = shared[0] if shared else "76,800 numbers differ; rows are independent of their neighbours"
        yield Check("random numbers", not shared, found)

    def _drafter_checks(self, name: str) -> Iterator[Check]:
        rules: tuple[Rule, ...] = ("block", "rejection", "coupled")
        asked = [
            SamplingParams(),
            *(SamplingParams(temperature=t, rule=rule) for t, rule in zip((1.0, 0.7, 1.0), rules, strict=True)),
        ]
        asked[2] = SamplingParams(temperature=0.7, rule="rejection", top_k=20, repetition_penalty=1.2)
        prompts = [(self._texts * 4)[b] for b in range(4)]

        def begin(trial: int) -> tuple[Drafter, list[DraftRow]]:
            seeds = [self.seed + 100 * trial + b for b in range(4)]
            rows = [DraftRow(*row) for row in zip(seeds, asked, [0] * 4, prompts, strict=True)]
            drafter = self._drafter(name)
            Session(self._target, drafter, rows, self._size.prompt_tokens + 32).read()
            return drafter, rows

        peeks, moved = contracts.drafter_anticipates(begin, trials=1 if self.quick else 3)
        found = (
            "looks ahead" if peeks else "later tokens changed, nothing before them moved" if moved else "deterministic"
        )
        yield Check(f"drafter {name} does not look ahead", not peeks, found)
        stale, wrong, looked = contracts.drafter_remembers_wrongly(
            self._target, partial(self._drafter, name), prompts, asked, rounds=self._size.rounds, seed=self.seed
        )
        yield Check(
            f"drafter {name} proposes from the text alone", not stale, stale or f"{self._size.rounds} rounds of 4 rows"
        )
        yield Check(
            f"drafter {name} states the probabilities that it draws from",
            not wrong,
            f"{looked - wrong} of {looked} sampled drafts are draws of them",
        )

    def _cache_checks(self) -> Iterator[Check]:
        text = max(self._texts, key=len)[:40]
        exactly = self._target.backend.name == "native"
        difference = contracts.rewind_difference(self._target, text, seed=self.seed)
        yield Check(
            "the target's cache, rewound, equals a fresh one",
            difference == 0 if exactly else difference < 1e-2,
            f"logits differ by {difference:.2g}",
        )
        toy = contracts.rewind_difference(ToyWorld(size=4).target(), [0, 1, 2, 3, 3, 1, 0, 2, 2, 1], seed=self.seed)
        yield Check("the toy target's cache, rewound, equals a fresh one", toy == 0, f"logits differ by {toy:.2g}")

    def _error_bound(self) -> Iterator[Check]:
        """Of float32 logits, where the model can be loaded again in float64."""
        stack = self._target.stack if isinstance(self._target, DecoderTarget) else None
        if not isinstance(stack, NativeStack) or stack.dtype != "float32" or self.model.name != EMBEDDED:
            return
        try:
            reference = load_target(self.model.name, dtype="float64", backend="reference")
        except (CheckpointError, UnknownKind):
            return
        generator = random.Random(self.seed)
        text = [*max(self._texts, key=len), *(generator.randrange(self._target.spec.vocab_size) for _ in range(8))]
        a, b = (equality.next_logits(target, text).double() for target in (self._target, reference))
        error = float((a - b).abs().max())
        yield Check(
            "the backend's error against float64",
            error <= FLOAT32_BOUND,
            f"logits differ by {error:.2g}, allowed are {FLOAT32_BOUND:g}",
            {"largest_error": error, "bound": FLOAT32_BOUND},
        )
