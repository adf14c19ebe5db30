"""The throughput policy and its cost model, in simulations on virtual time: exact, whatever the machine."""

from __future__ import annotations

from collections.abc import Sequence
from time import thread_time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_costs import (
    IN_TURN,
    JAGGED,
    NATIVE,
    SIZES,
    STEEP,
    K,
    costs_of,
    guarded,
    run,
    throughput,
)

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest
from outrider.planning.simulated_drafts import PROFILES, Recorded, Synthetic
from outrider.planning.simulation import Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.scheduling.guard import GuardedPolicy
from outrider.scheduling.schedule import RoundScheduler
from outrider.scheduling.throughput import ThroughputConfig, ThroughputPolicy
from outrider.types import RequestStats, SchedulerPolicy, StepCost, StepView, Values

# ------------------------------------------------------------------------------------------ as good as the best


def recorded(profile: str) -> Recorded:
    """Rounds as an engine would record them: every draft verified."""
    rng, source = np.random.default_rng(3), Synthetic([PROFILES[profile]])
    requests = []
    for slot in range(16):
        source.begin(slot, rng)
        rounds = []
        for _ in range(100):
            said, _, accepted = source.draw(np.array([slot]), rng)
            assert said is not None
            rounds.append((said[0].tolist(), int(accepted[0])))
        requests.append(rounds)
    return Recorded(requests)


@pytest.mark.parametrize(
    ("costs", "profile", "rows", "temperature"),
    [
        (NATIVE, "chat", 1, 0.0),
        (NATIVE, "code", 4, 1.0),
        (NATIVE, "chat", 16, 1.0),
        (JAGGED, "code", 16, 0.0),
        (JAGGED, "code", 16, 1.0),
        (STEEP, "code", 4, 1.0),
        (IN_TURN, "chat", 4, 1.0),
    ],
)
def test_within_two_percent_of_the_best_fixed_length(costs: Costs, profile: str, rows: int, temperature: float) -> None:
    """On recorded rounds, drafting, bookkeeping and trying included."""
    rounds = recorded(profile)

    def rate(policy: SchedulerPolicy) -> float:
        traffic = Traffic(concurrency=rows, prompt=1, answer=400, temperature=temperature)
        return simulate(policy, costs, rounds, traffic, seconds=10, seed=1).tokens_per_second

    best = max(rate(FixedPolicy(FixedConfig(k))) for k in (0, 1, 3, 7))
    assert rate(throughput(costs)) >= 0.98 * best


class ColdAtFirst:
    """Costs of a small drafter: in a step after plain ones its weights and code are in no cache."""

    def __init__(self, costs: Costs, times: float) -> None:
        self.costs, self.times, self.warm = costs, times, False

    def verify(self, tokens: int, rows: int, context: int) -> float:
        return self.costs.verify(tokens, rows, context)

    def draft(self, rows: int, drafts: int) -> float:
        seconds = self.costs.draft(rows, drafts) * (1 if self.warm else self.times)
        self.warm = seconds > 0
        return seconds

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return self.costs.bookkeeping(rows, drafting) * (1 if self.warm or not drafting else self.times)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_drafter_that_is_slow_at_first_is_not_given_up(rows: int) -> None:
    """What is tried once in a while always costs the first step's time; drafting in every step does not."""
    rounds = recorded("chat")

    def rate(policy: SchedulerPolicy) -> float:
        traffic = Traffic(concurrency=rows, prompt=1, answer=400, temperature=1.0)
        return simulate(policy, ColdAtFirst(IN_TURN, 6.0), rounds, traffic, seconds=5, seed=1).tokens_per_second

    best = max(rate(FixedPolicy(FixedConfig(k))) for k in (1, 3, 5))
    assert best > 1.05 * rate(FixedPolicy(FixedConfig(0)))
    assert rate(guarded(throughput(IN_TURN), IN_TURN)) > 0.95 * best  # its plain steps make the next one slow


class Counted:
    """A ``RoundScheduler`` that counts the steps it chose in."""

    def __init__(self, rounds: RoundScheduler) -> None:
        self.rounds, self.chosen = rounds, 0

    def __getattr__(self, name: str) -> object:
        self.chosen += name == "schedule"
        return getattr(self.rounds, name)


@pytest.mark.parametrize(("each", "least", "most"), [(1e-6, 0.06, 0.19), (1.5e-3, 0.5, 1.0)])
def test_drafts_are_chosen_from_where_that_saves_something(each: float, least: float, most: float) -> None:
    """A pass that is hardly longer for another draft is given all, but for the first 48, and one in the eight
    steps that a plan is good for, which are learnt from."""
    costs = Costs(((1, 0.005), (9, 0.005 + 8 * each)), draft_fixed=0.0005, step=0.0002)
    inner = throughput(costs)
    inner._rounds = counted = Counted(inner._rounds)  # type: ignore[assignment]
    policy = GuardedPolicy(inner, inner.costs)
    drafting = 0
    whole = policy.choose

    def choose(confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        nonlocal drafting
        drafting += any(lengths)
        return whole(confidence, lengths)

    policy.choose = choose  # type: ignore[method-assign]
    run(policy, costs, "code", 1, 10)
    assert least <= counted.chosen / drafting <= most


def test_a_dip_in_the_costs_is_looked_past_without_anticipating() -> None:
    """At 16 rows a 17th token costs half a pass more: Algorithm 1 stops there, a budget from the past does not."""
    caught, lagged, auto = (
        run(throughput(JAGGED, search=search), JAGGED, "code", 16, 6, temperature=1.0).tokens_per_second
        for search in ("early", "lagged", "auto")
    )
    plain = run(FixedPolicy(FixedConfig(0)), JAGGED, "code", 16, 6).tokens_per_second
    assert caught < 1.05 * plain and min(lagged, auto) > 1.25 * plain


# ------------------------------------------------------------------------------------------ the cost model


def test_costs_follow_what_is_observed() -> None:
    """A table of a quieter machine without the edge at 17 tokens: both are learnt."""
    smooth = Costs(((1, 0.010), (64, 0.0235), (512, 0.2)))
    model = costs_of(smooth)
    rng = np.random.default_rng(0)
    for _ in range(800):
        tokens = int(rng.integers(1, 40))
        stall = 20.0 if rng.random() < 0.02 else 1.0
        model.observe_verify(
            tokens, 1, 0, 1.5 * JAGGED.verify(tokens, 1, 0) * stall * float(np.exp(0.05 * rng.normal()))
        )
    assert model.trusted
    for tokens in (4, 16, 17, 32):
        assert model.verify(tokens) == pytest.approx(1.5 * JAGGED.verify(tokens, 1, 0), rel=0.1)
    curve = model.verify_curve(10, 20)
    assert curve.tolist() == pytest.approx([model.verify(tokens) for tokens in range(10, 31)])


def test_a_table_of_another_machine_is_dropped() -> None:
    """Its shape is another one; a machine that is merely slower today keeps its table."""
    foreign, slower = costs_of(NATIVE, scale=lambda tokens: 0.2 * tokens**0.8), costs_of(NATIVE, scale=lambda _: 2.0)
    for _ in range(12):
        for tokens in (1, 4, 8, 16):
            foreign.observe_verify(tokens, 1, 0, NATIVE.verify(tokens, 1, 0))
            slower.observe_verify(tokens, 1, 0, NATIVE.verify(tokens, 1, 0))
    assert slower.trusted and not foreign.trusted and foreign.table is None
    for tokens in (1, 8, 16):
        assert foreign.verify(tokens) == pytest.approx(NATIVE.verify(tokens, 1, 0), rel=0.15)


@pytest.mark.parametrize("times", [0.5, 2.0])
@pytest.mark.parametrize("wrong", ["table", "drafts"])
@pytest.mark.parametrize(("costs", "profile", "rows"), [(NATIVE, "chat", 16), (IN_TURN, "chat", 4)])
def test_wrong_costs_are_corrected_within_seconds(
    costs: Costs, profile: str, rows: int, wrong: str, times: float
) -> None:
    """A table, or draft costs alone, of a machine that was busier or quieter: after two seconds of decoding, decisions
    are about as good as with the right ones."""

    def rate(times: float) -> float:
        model = costs_of(costs, scale=lambda _: times if wrong == "table" else 1.0)
        for _ in range(12):
            for k in (1, 3, K):
                model.observe_draft(rows, k, costs.draft(rows, k) * (times if wrong == "drafts" else 1.0))
        policy = GuardedPolicy(ThroughputPolicy(ThroughputConfig(K), model), model)
        result = run(policy, costs, profile, rows, 4, window=1.0)
        assert model.verify(rows, rows) == pytest.approx(costs.verify(rows, rows, 0), rel=0.1)
        return float(result.windows[2:].mean())

    assert rate(times) > 0.97 * rate(1.0)


def test_a_table_that_was_measured_later_replaces_the_first_one() -> None:
    """What was learnt of passes belonged to the first one; what drafts cost stays."""
    model, better = costs_of(STEEP), costs_of(NATIVE).table
    assert better is not None
    for _ in range(20):
        model.observe_verify(8, 1, 0, 2 * STEEP.verify(8, 1, 0))
        model.observe_draft(1, 3, 0.001)
    model.use(better)
    assert model.table is better and model.trusted
    assert all(model.verify(n) == pytest.approx(NATIVE.verify(n, 1, 0)) for n in SIZES)
    assert model.draft(1, 3) == pytest.approx(0.001)


def test_a_step_in_which_nothing_was_proposed_says_nothing_of_drafting() -> None:
    """Texts that are about to end leave no room for drafts, whatever the plan was."""
    model = costs_of(NATIVE)
    for _ in range(20):
        model.observe_draft(1, 7, 0.002)
        model.observe_draft(1, 3, 0.0)
    assert model.draft(1, 7) == pytest.approx(0.002) and 0.0005 < model.draft(1, 3) < 0.002


def test_drafts_of_other_lengths_follow_a_machine_that_changes() -> None:
    """What was not drafted since is as much slower as passes are, and as drafts of the length that is in use."""
    model = costs_of(NATIVE)
    for slow in (1.0, 1.8):
        for _ in range(60):
            model.observe_verify(4, 1, 0, slow * NATIVE.verify(4, 1, 0))
            model.observe_draft(1, 7, slow * 0.002)
            if slow == 1:
                model.observe_draft(1, 3, 0.001)
    assert model.draft(1, 7) == pytest.approx(0.0036, rel=0.1)
    assert model.draft(1, 3) == pytest.approx(0.0018, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-5, 10.0)), max_size=30), st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_costs_stay_numbers(observed: list[tuple[int, float]], tokens: int) -> None:
    model = CostModel()
    for n, seconds in observed:
        model.observe_verify(n, 1, 0, seconds)
        model.observe_draft(n, 3, seconds)
        model.observe_bookkeeping(n, True, seconds)
    for value in (model.verify(tokens), model.draft(tokens, 5), model.verify_curve(tokens, 3)[3]):
        assert 0 < value < 1e4


# ------------------------------------------------------------------------------------------ the contract


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("search", ["auto", "early", "lagged"])
def test_sampled_rows_are_not_cut_by_what_was_drawn_later(search: str, seed: int) -> None:
    """keep[b] >= j is unmoved by confidences from j on and by how long the draft became, after any past, on costs with
    dips."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 7))
    past = [
        (torch.from_numpy(rng.random((rows, K)).astype(np.float32)), rng.integers(0, K + 1, rows), rng.random())
        for _ in range(4)
    ]
    points = np.cumsum(rng.random(12) * rng.choice([0.1, 3.0], 12))
    costs = Costs(tuple((n, float(0.001 * p)) for n, p in zip(range(1, 60, 5), points, strict=True)), draft_each=0.0004)
    view = StepView([9] * rows, [RequestStats()] * rows, [SamplingParams(temperature=1.0)] * rows, requests=range(rows))

    def keep(confidence: torch.Tensor, lengths: list[int]) -> list[int]:
        policy = throughput(costs, search=search)
        for said, right, slow in past:
            policy.plan(view)
            kept = policy.choose(said, [K] * rows)
            accepted = [min(int(a), n) for a, n in zip(right, kept, strict=True)]
            tokens = rows + sum(kept)
            policy.observe(StepCost(0.002 * slow, costs.verify(tokens, rows, 0), 1e-4, rows, tokens, 9), accepted)
        policy.plan(view)
        return policy.choose(confidence, lengths)

    confidence = torch.from_numpy(rng.random((rows, K)).astype(np.float32))
    lengths = rng.integers(1, K + 1, rows).tolist()
    before = keep(confidence, lengths)
    for b in range(rows):
        j = int(rng.integers(0, K))
        for level in (0.0, 0.999):
            other = confidence.clone()
            other[b, j:] = level
            assert min(keep(other, lengths)[b], j) == min(before[b], j)
        longer = lengths.copy()
        longer[b] = K
        j = min(j, lengths[b])
        assert min(keep(confidence, longer)[b], j) == min(before[b], j)


def test_greedy_and_coupled_rows_leave_the_search_free() -> None:
    def kept(*params: SamplingParams) -> int:
        policy = throughput(JAGGED)
        policy.plan(StepView([9] * 16, [RequestStats()] * 16, [*params] * (16 // len(params))))
        return sum(policy.choose(torch.full((16, K), 0.98), [K] * 16))

    assert kept(SamplingParams(temperature=1.0)) == 0, "an early stop does not pass the edge of a tile"
    assert kept(SamplingParams(), SamplingParams(temperature=1.0)) == 0, "one sampled row binds all"
    assert min(kept(SamplingParams()), kept(SamplingParams(temperature=1.0, seed=1))) >= 16


def seconds_of_steps(rows: int) -> np.ndarray:
    """Seconds of the processor that scheduling takes (``plan``, ``choose`` and ``observe``), step by step."""
    policy, rng = throughput(Costs(((1, 0.010), (2048, 0.014)), draft_fixed=0.001)), np.random.default_rng(0)
    view = StepView(
        [300] * rows, [RequestStats()] * rows, [SamplingParams(temperature=1.0)] * rows, requests=list(range(rows))
    )
    found = []
    for _ in range(104):
        said = torch.from_numpy(rng.uniform(0.3, 0.99, (rows, K)).astype(np.float32))
        began = thread_time()
        limits = policy.plan(view)
        keep = policy.choose(said, limits)
        chosen = thread_time()
        assert sum(limits), "the step draws on everything"
        tokens = rows + sum(keep)
        right = (rng.random((rows, K)) < said.numpy()).cumprod(1).sum(1)
        accepted = np.minimum(keep, right).tolist()
        cost = StepCost(0.001, 0.010 + 2e-6 * tokens, 1e-4, rows, tokens, 300 * rows)
        planned = thread_time()
        policy.observe(cost, accepted)
        found.append(thread_time() - planned + chosen - began)
    return np.array(found[40:])  # the first steps learn from every round


@pytest.mark.parametrize(("rows", "most"), [(256, 200e-6), (1024, 1e-3)])
def test_scheduling_does_not_grow(rows: int, most: float) -> None:
    """The goal for a mean step with 7 drafts a row, steps that plan or learn included. Ten times as long is a mistake
    on any machine; how long it takes is in the log."""
    least = np.min([seconds_of_steps(rows) for _ in range(5)], axis=0)  # the same steps, so that stalls do not count
    assert least.mean() < 10 * most


def test_wrong_options_are_named() -> None:
    with pytest.raises(InvalidRequest, match="draft_tokens must be at least 0, got -1"):
        ThroughputConfig(-1)
    with pytest.raises(InvalidRequest, match="search must be one of"):
        ThroughputConfig(3, search="earlyy")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="probe_share"):
        ThroughputConfig(3, probe_share=2.0)
    with pytest.raises(InvalidRequest, match="closed"):
        Traffic()
    with pytest.raises(InvalidRequest, match="cost curve"):
        Costs(((4, 0.1), (2, 0.1)))


def test_confidences_of_any_layout() -> None:
    """Drafters from elsewhere may give slices and float64: the same decisions as with what the core reads."""
    given = torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[:, ::2]
    kept = [
        ThroughputPolicy(ThroughputConfig(draft_tokens=3), CostModel()).choose(confidence, [3, 2])
        for confidence in (given, given.float().contiguous())
    ]
    assert kept[0] == kept[1]
