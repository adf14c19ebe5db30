"""The guard around a policy and its ledger: never slower than plain decoding, in simulations on virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated_costs import (
    IN_TURN,
    JAGGED,
    NATIVE,
    SEEDS,
    SLOW,
    STEEP,
    K,
    costs_of,
    guarded,
    run,
    throughput,
)

from outrider.config import SamplingParams
from outrider.planning.simulated_drafts import PROFILES, Synthetic
from outrider.planning.simulation import Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.scheduling.guard import GuardedPolicy
from outrider.scheduling.ledger import Ledger
from outrider.scheduling.throughput import ThroughputConfig, ThroughputPolicy
from outrider.types import RequestStats, SchedulerPolicy, StepCost, StepsAside, StepView


@pytest.mark.parametrize(
    ("costs", "profile", "says", "fixed"),
    [
        (NATIVE, "hostile", "sure", False),
        (NATIVE, "hostile", "sure", True),
        (JAGGED, "hostile", "nothing", False),
        (STEEP, "hostile", "sure", True),
        (STEEP, "chat", "truth", False),
        (SLOW, "hostile", "sure", True),
        (SLOW, "chat", "nothing", False),
    ],
)
def test_the_guard_keeps_every_window(costs: Costs, profile: str, says: str, fixed: bool) -> None:
    """Confidently wrong drafters, slow ones, steep costs, a policy that always drafts: 0.98 of plain decoding."""
    policy = FixedPolicy(FixedConfig(K)) if fixed else throughput(costs)
    kept = run(guarded(policy, costs), costs, profile, 2, 61, says=says, window=30.0)
    plain = run(FixedPolicy(FixedConfig(0)), costs, profile, 2, 61, window=30.0)
    assert kept.windows.min() >= 0.98 * plain.windows.min()


FOLLOWED = replace(NATIVE, follow_each=0.0004, features=0.03, takes_up=False)  # a drafter that reads features
SHOWN = replace(IN_TURN, follow_each=0.00006)  # one that reads a row again before it drafts for it


@pytest.mark.parametrize(
    ("costs", "rows", "answer", "fixed"),
    [
        (FOLLOWED, 1, 40, False),
        (FOLLOWED, 16, 40, False),
        (replace(FOLLOWED, draft_share=1.0), 4, 40, True),
        (SHOWN, 16, 40, False),
    ],
)
def test_following_is_charged(costs: Costs, rows: int, answer: int, fixed: bool) -> None:
    """A drafter whose drafts are all wrong, and which costs something in every step in which it is shown what was
    committed: what is lost against plain decoding stays within what the account allows, from the first step on."""

    def guarded() -> GuardedPolicy:
        model = costs_of(costs)
        model.features = costs.features
        policy = FixedPolicy(FixedConfig(K)) if fixed else ThroughputPolicy(ThroughputConfig(K), model)
        return GuardedPolicy(policy, model, takes_up=costs.takes_up)

    def windows(policy: SchedulerPolicy, costs: Costs, seed: int) -> np.ndarray:
        traffic = Traffic(concurrency=rows, prompt=30, answer=answer)
        source = Synthetic([PROFILES["hostile"]], says="sure")
        return simulate(policy, costs, source, traffic, seconds=61, seed=seed, window=10).windows

    free = replace(costs, follow_each=0.0, features=0.0)
    plain = [windows(FixedPolicy(FixedConfig(0)), free, seed) for seed in SEEDS]
    kept = [windows(guarded(), costs, seed) for seed in SEEDS]
    assert np.mean(kept) >= 0.98 * np.mean(plain)
    assert kept[0][0] >= 0.95 * plain[0][0], "the start: the credit, and what ten seconds earn"


class TriesNowAndThen(FixedPolicy):
    """Drafts in every eighth step, where it breaks even; deciding costs something in every step it is asked for."""

    asked = False
    steps = 0

    def plan(self, step: StepView) -> Sequence[int]:
        self.asked, self.steps = True, self.steps + 1
        return [0 if self.steps % 8 else 1] * len(step)


def test_what_deciding_costs_is_charged() -> None:
    """Steps of 4 ms, a sixteenth of which is the policy's own work: all in all no more is lost than may be."""
    policy = TriesNowAndThen(FixedConfig(1))
    guard = GuardedPolicy(policy, CostModel())
    rows, total, lost = 4, 0.0, 0.0
    for _ in range(15_000):
        policy.asked = False
        requests = [RequestStats()] * rows, [SamplingParams()] * rows
        limits = guard.plan(StepView([100] * rows, *requests, requests=[1, 2, 3, 4]))
        drafts = any(limits)
        keep = guard.choose(None, limits)
        deciding = 0.00025 if policy.asked else 0.0
        seconds = (0.004, 0.0034, 0.0006 + deciding) if drafts else (0.0, 0.0034, 0.0006 + deciding)
        guard.observe(StepCost(*seconds, rows, rows + sum(keep), 100 * rows, 0.0), [int(drafts)] * rows)
        total += 0.004 * (1 + drafts)
        lost += deciding
    assert lost < guard.ledger.most + 0.01 * total < 0.00025 * 15_000


def test_the_guard_comes_back_for_other_texts() -> None:
    """Requests that drafting suits and others that it does not, one after the other: each is decoded as suits it."""
    costs = replace(IN_TURN, draft_each=0.00008)
    texts = Synthetic([(0.95,) * K, (0.15,) * K], spread=0.5, row_spread=0.2)
    traffic = Traffic(concurrency=1, prompt=1, answer=100, temperature=1.0)

    def rate(policy: SchedulerPolicy) -> float:
        return simulate(policy, costs, texts, traffic, seconds=8, seed=1).tokens_per_second

    alone = rate(throughput(costs))
    assert alone > 1.2 * rate(FixedPolicy(FixedConfig(0)))
    assert rate(guarded(throughput(costs), costs)) > 0.97 * alone


def test_without_the_guard_a_fixed_length_is_slower() -> None:
    """The control of the test above."""
    kept = run(FixedPolicy(FixedConfig(K)), STEEP, "hostile", 2, 20)
    assert kept.tokens_per_second < 0.5 * run(FixedPolicy(FixedConfig(0)), STEEP, "hostile", 2, 20).tokens_per_second


def test_the_guard_on_a_machine_that_is_not_alone() -> None:
    """Passes that differ, stalls, and a machine that is at times half as fast: gains are kept, losses bounded."""

    def slowness(now: float) -> float:
        return 2.0 if int(now / 7) % 2 else 1.0

    options = {"noise": 0.1, "stalls": 0.002, "slowness": slowness}
    plain = run(FixedPolicy(FixedConfig(0)), NATIVE, "code", 2, 42, **options).tokens_per_second
    fast = run(guarded(throughput(NATIVE), NATIVE), NATIVE, "code", 2, 14, **options).tokens_per_second
    lost = run(guarded(throughput(NATIVE), NATIVE), NATIVE, "hostile", 2, 42, says="sure", **options).tokens_per_second
    assert fast > 2 * plain and lost > 0.97 * plain


def test_the_guard_steps_aside_altogether_and_comes_back() -> None:
    policy = guarded(throughput(NATIVE), NATIVE)
    assert isinstance(policy, StepsAside) and policy.follows
    seen: list[bool] = []
    whole = policy.observe
    policy.observe = lambda *given: (whole(*given), seen.append(policy.follows))[0]  # type: ignore[method-assign]
    run(policy, NATIVE, "hostile", 1, 20, says="sure")
    assert not policy.follows and seen.count(False) > 0.8 * len(seen)
    assert any(after and not before for before, after in zip(seen, seen[1:], strict=False)), "it never tried again"
    run(policy, NATIVE, "maths", 1, 24)  # the text changes
    assert policy.follows and policy.advantage > 1.5


def test_a_small_model_loses_little_before_anything_was_gained() -> None:
    """Steps of a quarter of a millisecond: of the first second, not the quarter that a large model may lose."""
    small = Costs(((1, 0.00022), (4, 0.00032), (8, 0.0004), (64, 0.002)), draft_fixed=0.00015, step=0.00005)
    kept = run(guarded(throughput(small), small), small, "hostile", 1, 1.0, says="sure")
    plain = run(FixedPolicy(FixedConfig(0)), small, "hostile", 1, 1.0)
    assert kept.tokens >= 0.95 * plain.tokens


class HeldUp:
    """Costs of drafts of which one in so many takes many times as long."""

    def __init__(self, costs: Costs, times: float, every: int) -> None:
        self.costs, self.times, self.every, self.drafts = costs, times, every, 0
        self.verify, self.bookkeeping = costs.verify, costs.bookkeeping

    def draft(self, rows: int, drafts: int) -> float:
        seconds = self.costs.draft(rows, drafts)
        self.drafts += seconds > 0
        return seconds * (self.times if self.drafts % self.every == 10 else 1.0)


def test_drafts_that_others_hold_up_now_and_then_do_not_end_drafting() -> None:
    """40 milliseconds are all that the drafts of a small model may lose."""
    small = Costs(((1, 0.00022), (4, 0.00026), (8, 0.0003), (64, 0.002)), draft_fixed=0.0001, step=0.00005)
    held_up = HeldUp(small, 400, 1000)
    guard, traffic = guarded(throughput(small), small), Traffic(concurrency=1, prompt=1, answer=400, temperature=0)
    simulate(guard, held_up, Synthetic([PROFILES["maths"]]), traffic, seconds=0.1, seed=1)
    assert held_up.drafts > 30 and guard.follows


def test_a_first_call_that_is_slow_is_not_charged_to_a_drafter() -> None:
    """Its code and weights are read: a hundredth of a second, of a credit of two."""
    guard = guarded(FixedPolicy(FixedConfig(K)), Costs(((1, 0.0001), (64, 0.002)), step=0.00005))
    first = StepCost(0.0, 0.004, 0.011, 1, 60, 60, follow=0.010)
    guard.observe(first, [])
    assert guard.ledger.credit - guard.ledger.balance == pytest.approx(0.001), "a quarter of the pass"
    for _ in range(6):
        guard.observe(first, [])
    assert guard.ledger.balance < guard.ledger.credit - 0.01, "not for ever"


def test_noise_between_controls_does_not_change_what_plain_decoding_costs() -> None:
    """Passes with drafts become a tenth faster as caches warm up, plain ones do not."""
    guard = guarded(FixedPolicy(FixedConfig(K)), NATIVE)
    view = StepView([50], [RequestStats()], [SamplingParams()], (0,), (7,), can_draft=1, tokens=1)
    for i in range(400):
        drafts = guard.plan(view)[0]
        guard.choose(None, [drafts])
        seconds = NATIVE.verify(1 + drafts, 1, 50) * (1 - 0.1 * min(i, 200) / 200 if drafts else 1)
        draft = NATIVE.draft(1, drafts) if drafts else 0.0
        guard.observe(StepCost(draft, seconds, 0.0003, 1, 1 + drafts, 50), [min(drafts, 2)])
    plain, _, _ = guard._plain(1, 50)
    assert plain == pytest.approx(NATIVE.verify(1, 1, 50) + 0.0003, rel=0.02)


def test_a_drafter_that_holds_itself_up_is_charged() -> None:
    policy = guarded(throughput(NATIVE), NATIVE)
    traffic = Traffic(concurrency=2, prompt=1, answer=400, temperature=0)
    held_up, chat = HeldUp(NATIVE, 150, 20), Synthetic([PROFILES["chat"]])
    kept = simulate(policy, held_up, chat, traffic, seconds=61, seed=1, window=30.0)
    plain = run(FixedPolicy(FixedConfig(0)), NATIVE, "chat", 2, 61, window=30.0)
    assert kept.windows.min() >= 0.98 * plain.windows.min()
    always = simulate(FixedPolicy(FixedConfig(K)), HeldUp(NATIVE, 150, 20), chat, traffic, seconds=61, seed=1)
    assert always.tokens_per_second < 0.9 * plain.tokens_per_second


def test_gains_are_saved_up_beyond_the_credit() -> None:
    ledger = Ledger(share=0.01, most=0.2, credit=0.25)
    assert ledger.credit == ledger.balance == 0.2
    ledger.limit(0.02)
    assert ledger.balance == pytest.approx(0.02), "the same share of the credit is left"
    assert ledger.affords(1.0), "as all of the credit is there"
    ledger.settle(-0.03)
    assert not ledger.affords(0.001)
    for _ in range(1000):
        ledger.earn(1.0)
    assert ledger.balance == pytest.approx(0.02), "plain steps do not earn more than the credit"
    ledger.settle(0.1)
    ledger.earn(1.0)
    assert ledger.balance == pytest.approx(0.12)
    ledger.limit(0.04)
    assert ledger.balance == pytest.approx(0.14), "gains stay"


def test_a_ledger_never_lends_more_than_it_says() -> None:
    ledger = Ledger(share=0.01, most=0.2)
    for _ in range(100):
        ledger.settle(1.0)  # gains are not saved up beyond the bound
    assert ledger.balance == 0.2
    lost = 0.0
    for _ in range(1000):
        ledger.earn(0.01)
        while ledger.affords(0.005):
            ledger.settle(-0.005)
            lost += 0.005
    assert lost <= 0.2 + 0.01 * 10 + 1e-9


class Stubborn(CostModel):
    """Believes passes over few tokens to take twice as long as they do, whatever it sees."""

    def verify(self, tokens: int, rows: int = 1, context: int = 0, *, beside: bool = False) -> float:
        return (2.0 if tokens <= 8 else 1.0) * NATIVE.verify(tokens, rows, context)


class Nervous(CostModel):
    """Believes the machine to be slower or faster with every pass."""

    picks = random.Random(0)

    def observe_verify(self, *seen: Any, **more: Any) -> None:
        super().observe_verify(*seen, **more)
        self._speed = self._pace = self.picks.gauss(0.0, 0.8)


@pytest.mark.parametrize("model", [Stubborn, Nervous])
def test_the_guard_goes_by_its_controls_whatever_the_model_says(model: type[CostModel]) -> None:
    """Four rows and seven bad drafts each, which would pay if plain decoding were as slow as is believed."""
    plain, drafting = FixedPolicy(FixedConfig(0)), FixedPolicy(FixedConfig(K))
    without = run(plain, NATIVE, "chat", 4, 8, window=2.0).windows
    always = run(drafting, NATIVE, "chat", 4, 8, window=2.0).windows
    assert 0.5 * without[-1] < always[-1] < 0.9 * without[-1], "slower than plain decoding, faster than is believed"
    guard = GuardedPolicy(FixedPolicy(FixedConfig(K)), model(costs_of(NATIVE).table))
    assert run(guard, NATIVE, "chat", 4, 8, window=2.0).windows[1:].mean() > 0.95 * without[1:].mean()


class ThreeMore(FixedPolicy):
    """Two drafts, and three more steps like each that it is asked about, whose sums of accepted drafts it is told."""

    def __init__(self) -> None:
        super().__init__(FixedConfig(2))
        self.told: list[int] = []

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        self.told.append(sum(accepted))

    def repeat(self) -> int:
        return 3


def test_a_policy_that_repeats_is_asked_again_when_rows_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that takes over a slot, a chunk of a prompt beside the rows, a row that cannot be drafted for."""
    monkeypatch.setattr("outrider.scheduling.guard.UNKNOWN", 99)  # no plain steps between
    same = StepView([50, 50], [RequestStats()] * 2, [SamplingParams()] * 2, (0, 1), (7, 8), can_draft=2, tokens=2)
    others = [replace(same, requests=(7, 9)), replace(same, tokens=99), replace(same, can_draft=1)]
    policy = ThreeMore()
    guard = GuardedPolicy(policy, CostModel())
    for i, view in enumerate([same] * 6 + [view for other in others for view in (other, same)]):
        assert list(guard.plan(view)) == [2, 2]
        assert guard.choose(None, [2, 1]) == [2, 1]
        guard.observe(StepCost(1e-5, 0.001, 0.0, 2, view.tokens + 3, 100), [i, 0])
    assert policy.told == [0, 4, 6, 7, 8, 9, 10, 11]


def test_an_empty_account_ends_repeated_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them takes a second: the next one is plain, however many were to come."""
    monkeypatch.setattr("outrider.scheduling.guard.UNKNOWN", 99)  # no plain steps between
    view = StepView([50], [RequestStats()], [SamplingParams()], (0,), (7,), can_draft=1, tokens=1)
    guard = GuardedPolicy(ThreeMore(), CostModel())
    for seconds in (1e-5, 1.0):
        assert list(guard.plan(view)) == [2]
        guard.observe(StepCost(seconds, 0.001, 0.0, 1, 3, 50), [2])
    assert list(guard.plan(view)) == [0]
