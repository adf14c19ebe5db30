"""Costs are told apart where the machine's clock changes every second and where prompts join in almost every step."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from outrider.config import SamplingParams
from outrider.planning.simulated_drafts import PROFILES, Synthetic
from outrider.planning.simulation import Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.scheduling.guard import GuardedPolicy
from outrider.scheduling.throughput import ThroughputConfig, ThroughputPolicy
from outrider.types import RequestStats, SchedulerPolicy, StepCost, StepView

K = 7
ARITHMETIC = Costs(  # every token costs as much as every other: drafting hardly pays, or does not
    ((1, 0.006), (4, 0.0065), (8, 0.012), (16, 0.023), (32, 0.045), (64, 0.09), (512, 0.72)),
    draft_fixed=0.002,
    draft_row=0.0003,
    step=0.0003,
    step_drafting=0.0003,
)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def two_speeds(now: float) -> float:
    return 1.75 if int(now / 1.3) % 2 else 1.0


def model_of(costs: Costs, scale: Callable[[int], float]) -> CostModel:
    points = tuple(CostPoint(n, 1, 0, costs.verify(n, 1, 0) * scale(n)) for n in SIZES)
    return CostModel(CostTable(CostKey("model", "int8", "native", "a machine", 2), points))


@pytest.mark.parametrize(("rows", "prompt", "answer"), [(4, 1, 400), (16, 60, 12)])
@pytest.mark.parametrize("times", [0.6, 1.6])
def test_a_wrong_table_costs_little(rows: int, prompt: int, answer: int, times: float) -> None:
    """It says that plain passes are slower, or quicker, than they are; the second traffic hardly has a step in which no
    prompt is read beside the rows."""
    model = model_of(ARITHMETIC, lambda tokens: times if tokens <= rows else 1.0)
    guard = GuardedPolicy(ThroughputPolicy(ThroughputConfig(K), model), model)
    traffic = Traffic(concurrency=rows, prompt=prompt, answer=answer, temperature=1.0)

    def rate(policy: SchedulerPolicy) -> float:
        chat = Synthetic([PROFILES["chat"]])
        return simulate(policy, ARITHMETIC, chat, traffic, seconds=20, seed=1, slowness=two_speeds).tokens_per_second

    assert rate(guard) > 0.97 * rate(FixedPolicy(FixedConfig(0)))


def test_following_is_charged_in_steps_that_read_prompts_alone() -> None:
    """What showing them to the drafter takes, and the features that the pass gives for it."""
    guard = GuardedPolicy(FixedPolicy(FixedConfig(K)), CostModel(features=0.25))
    before = guard.ledger.balance
    guard.observe(StepCost(0.0, 0.010, 0.003, 1, 64, 64), [])  # nothing is followed
    assert guard.ledger.balance == before
    guard.observe(StepCost(0.0, 0.010, 0.003, 1, 64, 64, follow=0.001), [])
    assert guard.ledger.balance == pytest.approx(before - 0.001 - 0.002)


def test_what_a_plain_step_costs_is_seen_among_drafts_and_prompts() -> None:
    """Every third step reads a prompt beside its rows, hardly two of the same size, and a plain step behind drafts
    takes 1.3 times what it takes in plain decoding, the next one 1.2 times, and so on. The table is wrong by 1.4."""
    model, rng = model_of(ARITHMETIC, lambda tokens: 1.4 if tokens <= 4 else 1.0), random.Random(0)
    guard, rows, behind = GuardedPolicy(FixedPolicy(FixedConfig(1)), model), 4, 0
    requests = [RequestStats()] * rows, [SamplingParams()] * rows
    for i in range(1200):
        prompt = rng.randrange(10, 500) if i % 3 == 0 else 0
        limits = guard.plan(StepView([100] * rows, *requests, requests=range(rows), tokens=rows + prompt))
        tokens, drafted = rows + prompt + sum(guard.choose(None, limits)), any(limits)
        behind = 0 if drafted else behind + 1
        seconds = ARITHMETIC.verify(tokens, rows, 0) * (1.0 if drafted else 1 + 0.3 * 0.7 ** (behind - 1))
        guard.observe(StepCost(0.0002 * drafted, seconds, 0.0003, rows, tokens, 400), [int(drafted)] * rows)
    assert model.verify(rows, rows, 400) == pytest.approx(ARITHMETIC.verify(rows, rows, 0), rel=0.1)


@pytest.mark.parametrize("beside", [False, True])
def test_sizes_are_compared_at_the_same_speed(beside: bool) -> None:
    """One pass in twelve is over 4 tokens, the others over 16; the clock changes at random, about every nine passes."""
    model, rng, fast = model_of(ARITHMETIC, lambda tokens: 1.5 if tokens <= 4 else 1.0), random.Random(0), True
    for i in range(900):
        fast ^= rng.random() < 1 / 9
        tokens = 4 if i % 12 == 0 else 16
        seconds = ARITHMETIC.verify(tokens, 4, 0) * (1.0 if fast else 1.75)
        model.observe_verify(tokens, 4, 0, seconds, beside=beside)
    told = model.verify(16, 4, beside=beside) / model.verify(4, 4, beside=beside)
    assert told == pytest.approx(ARITHMETIC.verify(16, 4, 0) / ARITHMETIC.verify(4, 4, 0), rel=0.05)
