"""Simulated loads: what the simulation counts, and the shapes that schedulers are known by."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import TABLE
from typer.testing import CliRunner

from outrider.cli import app
from outrider.config import SamplingParams
from outrider.engine.engine import Engine
from outrider.engine.request import Request
from outrider.errors import InvalidRequest
from outrider.evaluation.plots import available
from outrider.models.toy import ToyTarget
from outrider.planning.simulated_drafts import PROFILES, Recorded, Synthetic
from outrider.planning.simulation import Result, Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.planning.sweep import CURVES, make_policy_for, read_costs, read_profile, sweep
from outrider.registry import find
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.types import StepCost

POLICIES = ("none", "fixed:1", "fixed:3", "fixed:7", "throughput")
MIX = [PROFILES[name] for name in ("chat", "code", "maths")]


def test_plain_decoding_takes_what_the_curve_says() -> None:
    """One user, one-token prompts: every step gives a token, and time is counted exactly."""
    costs = Costs(((1, 0.010), (3, 0.014)), per_context=1e-6, step=0.001)
    traffic = Traffic(concurrency=1, prompt=1, answer=50, temperature=0.0)
    result = simulate(FixedPolicy(FixedConfig(0)), costs, Synthetic([PROFILES["chat"]]), traffic, seconds=30)
    assert result.tokens == result.steps and result.drafted == result.accepted == 0
    assert result.gaps.min() >= 0.011 and result.gaps.max() < 0.0115
    assert result.seconds == pytest.approx(30, abs=0.02)
    assert costs.verify(2, 1, 0) == pytest.approx(0.012) and costs.verify(5, 1, 100) == pytest.approx(0.0181)


@dataclass
class AllAccepted:
    """``Acceptance``: three drafts, without confidences."""

    drafts: int = 3

    def begin(self, slot: int, rng: np.random.Generator) -> None: ...

    def draw(self, slots: Any, rng: np.random.Generator) -> tuple[None, Any, Any]:
        return None, np.full(len(slots), 3), np.full(len(slots), 3)

    def advance(self, slot: int, tokens: int) -> None: ...


def test_figures_of_drafting_by_hand() -> None:
    """Two users, one row: a prompt, a round of four tokens, one of the three that are left; the same again."""
    costs = Costs(((1, 0.010),), draft_fixed=0.002, step_drafting=0.001)
    traffic, policy = Traffic(concurrency=2, sizes=((5, 8),)), FixedPolicy(FixedConfig(3))
    result = simulate(policy, costs, AllAccepted(), traffic, seconds=0.07199, max_rows=1)
    assert (result.tokens, result.requests, result.steps, result.rounds) == (16, 2, 6, 4)
    assert (result.drafted, result.accepted) == (10, 10)
    assert sorted(result.gaps) == pytest.approx([0.013 / 4] * 8 + [0.013 / 3] * 6)
    assert result.first == pytest.approx([0.010, 0.046]) and result.users == pytest.approx([7 / 0.026] * 2)
    figures = result.to_json()
    assert (figures["acceptance_length"], figures["verified_per_row"]) == (3.5, 2.5)
    assert (figures["ttft_ms"], figures["itl_p50_ms"]) == pytest.approx((28, 3.25))
    assert figures["tokens_per_second"] == pytest.approx(16 / 0.072, abs=0.001)


def test_showing_a_drafter_the_text_takes_its_time() -> None:
    """A prompt of ten tokens, of which two are held, then a token a step: each is shown, and features are a tenth."""
    costs = Costs(((1, 0.010),), per_context=1e-5, follow_each=0.001, features=0.1)
    traffic, policy = Traffic(concurrency=1, sizes=((10, 3, 2),)), FixedPolicy(FixedConfig(0))
    result = simulate(policy, costs, AllAccepted(), traffic, seconds=0.04)
    assert result.first == pytest.approx([1.1 * 0.01002 + 8 * 0.001])
    assert result.gaps == pytest.approx([1.1 * 0.01011 + 0.001, 1.1 * 0.01012 + 0.001])


def test_confidences_reach_the_policy_by_row() -> None:
    """One of the two rows often has a single token left, so that only the other one drafts: all its drafts are sure."""

    class Sure(AllAccepted):
        def draw(self, slots: Any, rng: np.random.Generator) -> tuple[Any, Any, Any]:  # type: ignore[override]
            return np.full((len(slots), 3), 0.9, dtype=np.float32), *super().draw(slots, rng)[1:]

    def drafted(policy: str) -> int:
        costs, traffic = Costs(((1, 0.010),)), Traffic(concurrency=2, sizes=((1, 2), (1, 40)))
        return simulate(make_policy_for(policy, costs, 3), costs, Sure(), traffic, seconds=5).drafted

    assert drafted("threshold:0.5") == drafted("fixed:3") > 0


def test_bursts_come_every_other_period() -> None:
    arrivals = Traffic(rate=20, burst=5, period=2.0).arrivals(np.random.default_rng(0))
    times = np.array(list(itertools.takewhile(lambda now: now < 200, arrivals)))
    quiet, busy = (np.sum(times // 2 % 2 == odd) / 100 for odd in (0, 1))
    assert (quiet, busy) == pytest.approx((20, 100), rel=0.1)


def test_acceptance_is_the_profile() -> None:
    """The mean over rows and drafts is the profile's, however far single drafts differ."""
    source, rng = Synthetic([PROFILES["code"]], spread=2.0, row_spread=0.5), np.random.default_rng(0)
    counts, reached = np.zeros(7), np.zeros(7)
    for _ in range(300):
        slots = np.arange(32)
        for slot in slots.tolist():
            source.begin(slot, rng)
        said, lengths, accepted = source.draw(slots, rng)
        assert said is not None and (lengths == 7).all()
        for j in range(7):
            reached[j] += (accepted >= j).sum()
            counts[j] += (accepted > j).sum()
    assert counts[0] / reached[0] == pytest.approx(PROFILES["code"][0], abs=0.02)
    assert (counts / reached >= np.array(PROFILES["code"]) - 0.02).all(), "those that came so far are the better ones"


def test_recorded_sizes_and_chunks_beside_decoding() -> None:
    """Prompts of 300 tokens: 100 of them a step while the other user's text goes on, 512 where nothing does."""
    traffic = Traffic(concurrency=2, sizes=((300, 7), (300, 40)), temperature=0.0)
    policy, source = FixedPolicy(FixedConfig(0)), Synthetic([PROFILES["chat"]])
    for beside, slowest in ((100, 0.030), (512, 0.010)):
        result = simulate(policy, Costs(((1, 0.010),)), source, traffic, seconds=30, beside=beside)
        assert result.first[:2] == pytest.approx([0.010, 0.020]) and result.first[2:].max() == pytest.approx(slowest)
        assert 7 * result.requests < result.tokens < 40 * result.requests + 80
    with pytest.raises(InvalidRequest, match="at least 1 token"):
        Traffic(concurrency=1, sizes=((0, 4),))


def test_what_the_cache_holds_of_a_prompt_is_not_read() -> None:
    """Prompts of 300 tokens, 200 of them held: a step over 100 tokens, with the others as context."""
    costs = Costs(((1, 0.001), (301, 0.301)), per_context=1e-5)
    policy, source = FixedPolicy(FixedConfig(0)), Synthetic([PROFILES["chat"]])
    for held, seconds in ((0, 0.300), (200, 0.102)):
        traffic = Traffic(concurrency=1, sizes=((300, 7, held),), temperature=0.0)
        result = simulate(policy, costs, source, traffic, seconds=5)
        assert result.first == pytest.approx(seconds)
        assert result.gaps.min() == pytest.approx(0.001 + 301e-5), "the whole prompt is context"
    for held in (-1, 300):
        with pytest.raises(InvalidRequest, match=f"0 to 299 tokens of a prompt of 300.*got {held}"):
            Traffic(concurrency=1, sizes=((300, 7, held),))


class Watched(FixedPolicy):
    """Keeps new tokens and rows of every step."""

    def __init__(self) -> None:
        super().__init__(FixedConfig(0))
        self.steps: list[tuple[int, int]] = []

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        self.steps.append((cost.tokens, cost.rows))


@pytest.mark.parametrize("held", [0, 12])
def test_a_simulated_engine_takes_the_steps_of_a_real_one(held: int) -> None:
    """A closed loop of three users with prompts of 14 tokens, which differ, or begin with the same three blocks."""
    real, told, picks = Watched(), Watched(), random.Random(0)
    engine = Engine(
        ToyTarget(TABLE, block=4), find("drafter", "none")(), real, max_rows=3, capacity=64, chunk=8, beside=5
    )
    number = 0

    def submit() -> Request:
        nonlocal number
        number += 1
        end = [number // 5 % 5, number % 5]
        start = [0, 1, 2, 3] * 3 if held else [*end, *(picks.randrange(5) for _ in range(10))]
        return engine.submit([*start, *end], SamplingParams(max_tokens=7, ignore_eos=True), 0)

    if held:  # somebody has read it before
        engine.wait([submit()])
        real.steps.clear()
    flying: list[Request] = []
    while len(real.steps) < 60:
        flying = [request for request in flying if request.finish_reason is None]
        flying += [submit() for _ in range(3 - len(flying))]
        engine.step()
    assert engine.totals[1].cached_tokens >= held * (number - 4)
    costs, traffic = Costs(((1, 1.0),)), Traffic(concurrency=3, sizes=((14, 7, held),))
    simulate(told, costs, Synthetic([PROFILES["chat"]]), traffic, seconds=60, chunk=8, beside=5)
    assert told.steps == real.steps


def test_what_happens_while_warming_up_is_not_counted() -> None:
    """A first second in which everything is ten times as slow."""
    traffic = Traffic(concurrency=1, prompt=1, answer=50, temperature=0.0)
    policy, source = FixedPolicy(FixedConfig(0)), Synthetic([PROFILES["chat"]])

    def run(warm: float) -> Result:
        return simulate(
            policy,
            Costs(((1, 0.010),)),
            source,
            traffic,
            seconds=4,
            window=2,
            slowness=lambda now: 10.0 if now < 0.999 else 1.0,
            warm=warm,
        )

    cold, warm = run(0.0), run(1.0)
    assert cold.tokens == pytest.approx(310, abs=2) and cold.gaps.max() == pytest.approx(0.1)
    assert warm.tokens == warm.steps == pytest.approx(400, abs=1) and warm.gaps.max() == pytest.approx(0.01)
    assert warm.seconds == pytest.approx(4, abs=0.011) and warm.windows == pytest.approx([100] * 2, abs=1)


@pytest.mark.parametrize(("drafts", "accepted"), [(0, 1.0), (1, 1.5), (3, 2.0), (7, 2.4)])
def test_recorded_texts_are_replayed_by_their_tokens(drafts: int, accepted: float) -> None:
    """Two rounds of eight tokens and eight of one, whichever length is verified: with three drafts, four rounds and
    eight. Counted by recorded rounds, it would be 1.6 tokens a round."""
    text = [([0.9] * 7, 7)] * 2 + [([0.1] * 7, 0)] * 8
    traffic = Traffic(concurrency=2, sizes=((1, 24 * 50 + 1),))
    source = Recorded([text])
    result = simulate(FixedPolicy(FixedConfig(drafts)), Costs(((1, 0.010),)), source, traffic, seconds=60)
    assert 1 + result.accepted / result.rounds == pytest.approx(accepted, abs=0.02)


def test_what_follows_a_recorded_round_is_like_all_rounds() -> None:
    """Drafts that are each accepted with the same probability: so are those that were never recorded."""
    rng, chance = np.random.default_rng(0), 0.8
    rounds = [([chance] * 7, int(np.minimum.accumulate(rng.random(7) < chance).sum())) for _ in range(4000)]
    traffic = Traffic(concurrency=1, sizes=((1, 2000),))
    for drafts in (2, 5):
        result = simulate(
            FixedPolicy(FixedConfig(drafts)), Costs(((1, 0.010),)), Recorded([rounds]), traffic, seconds=60
        )
        expected = sum(chance**j for j in range(drafts + 1))
        assert 1 + result.accepted / result.rounds == pytest.approx(expected, rel=0.03)
    with pytest.raises(InvalidRequest, match="at least one round"):
        Recorded([[]])


def test_plain_decoding_does_not_pay_for_a_drafter() -> None:
    """``none`` is an engine without one: nothing is shown to it, and passes give no features."""
    costs = Costs(((1, 0.010), (65, 0.020)), follow_each=1e-3, features=0.2)
    traffic, source = Traffic(concurrency=2, prompt=32, answer=32), Synthetic([PROFILES["chat"]])

    def tokens(policy: str, costs: Costs) -> int:
        return simulate(make_policy_for(policy, costs, 7), costs, source, traffic, seconds=20).tokens

    free = replace(costs, follow_each=0.0, features=0.0)
    assert tokens("none", costs) == tokens("none", free) > 1.2 * tokens("fixed:0", costs)


@dataclass(frozen=True)
class PromptsForNothing(Costs):
    """``ReadCosts``: a pass takes no longer for the prompts in it."""

    def read(self, prompts: int, tokens: int, rows: int, context: int) -> float:
        return self.verify(max(tokens - prompts, 1), rows, context)


def test_passes_with_prompts_have_their_own_costs() -> None:
    """Two users, three hundred tokens in every prompt."""
    traffic, source = Traffic(concurrency=2, sizes=((300, 7), (300, 40))), Synthetic([PROFILES["chat"]])
    points = ((1, 0.010), (2, 0.012), (128, 0.200))

    def run(costs: Costs) -> Result:
        return simulate(FixedPolicy(FixedConfig(0)), costs, source, traffic, seconds=10)

    assert run(PromptsForNothing(points)).gaps.max() == pytest.approx(0.012)
    assert run(Costs(points)).gaps.max() > 0.2


def test_the_same_seed_is_the_same_day() -> None:
    def once(seed: int) -> dict[str, Any]:
        policy = make_policy_for("auto", CURVES["accelerator"], 7)
        traffic = Traffic(rate=4.0, burst=3.0, period=2.0, prompt=64, answer=64)
        return simulate(
            policy, CURVES["accelerator"], Synthetic(MIX), traffic, seconds=8, seed=seed, noise=0.1, stalls=0.01
        ).to_json()

    assert once(1) == once(1) != once(2)


def test_no_request_is_lost() -> None:
    """An open loop far below what the machine can do: all that arrived long ago are answered, each in full."""
    traffic = Traffic(rate=5.0, prompt=32, answer=32)
    result = simulate(
        make_policy_for("fixed:3", CURVES["accelerator"], 7), CURVES["accelerator"], Synthetic(MIX), traffic, seconds=60
    )
    assert 5 * 60 * 0.8 < result.requests <= len(result.first) < 5 * 60 * 1.2
    assert np.quantile(result.first, 0.95) < 0.2


def test_the_shape_of_published_figures() -> None:
    """Few users: long drafts win. Many: fixed ones fall behind plain decoding, the scheduler verifies less and less
    and stays in front (the DSpark paper's figures 7 and 8)."""
    traffics = {str(n): Traffic(concurrency=n, prompt=1, answer=64) for n in (8, 32, 256)}
    rows = sweep(CURVES["accelerator"], MIX, traffics, POLICIES, seconds=6)
    rate = {(row["traffic"], row["policy"]): row["tokens_per_second"] for row in rows}
    verified = [row["verified_per_row"] for row in rows if row["policy"] == "throughput"]
    assert rate["8", "fixed:7"] > 3 * rate["8", "none"] and rate["256", "fixed:7"] < 0.9 * rate["256", "none"]
    assert verified[0] > verified[1] > verified[2] > 0.3
    for load in traffics:
        assert rate[load, "throughput"] > 0.95 * max(rate[load, policy] for policy in POLICIES)
    total = dict.fromkeys(POLICIES, 0.0)
    for seed in range(4):  # a run is 1 % off
        for row in sweep(CURVES["accelerator"], MIX, {"256": traffics["256"]}, POLICIES, seconds=6, seed=seed):
            total[row["policy"]] += row["tokens_per_second"]
    assert total["throughput"] > 1.02 * max(total[policy] for policy in POLICIES if policy != "throughput")


def test_what_profile_wrote_is_a_cost_curve(tmp_path: Path) -> None:
    def row(tokens: int, milliseconds: float, rows: int = 1, context: int = 256, dtype: str = "int8") -> dict[str, Any]:
        return {"dtype": dtype, "new_tokens": tokens, "rows": rows, "context": context, "milliseconds": milliseconds}

    rows = [row(8, 6.0), row(1, 4.0), row(1, 5.0, rows=2), row(1, 9.0, context=1024)]
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"bandwidth_gb_s": 33.0, "rows": rows}))
    assert read_costs(str(file)).points == ((1, 0.004), (8, 0.006))
    file.write_text(json.dumps({"bandwidth_gb_s": 33.0, "rows": [*rows, row(1, 7.0, dtype="float32")]}))
    with pytest.raises(InvalidRequest, match="it holds float32, int8; profile with one --dtype"):
        read_costs(str(file))


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_seconds_are_refused(wrong: float) -> None:
    """They had ended a simulation in an IndexError or a ValueError."""
    with pytest.raises(InvalidRequest, match="draft_fixed must be 0 or more, and finite"):
        Costs(((1, 0.01),), draft_fixed=wrong)
    with pytest.raises(InvalidRequest, match="a cost curve needs"):
        Costs(((1, wrong),))
    for points in ((), ((2, 0.01), (1, 0.02)), ((1, 0.01), (1, 0.02)), ((0, 0.01), (2, 0.02))):
        with pytest.raises(InvalidRequest, match="tokens rising from 1 on"):
            Costs(points)
    assert Costs(((1, 0.01),), follow_each=0.001).follow(3) == pytest.approx(0.003)


def test_a_curve_that_falls_is_level() -> None:
    """A pass over 64 tokens had taken less than no time, and one over 8 half of one over a single token."""
    costs = Costs(((1, 0.01), (8, 0.005)))
    assert [costs.verify(n, 1, 0) for n in (1, 5, 8, 64, 10_000)] == pytest.approx([0.01] * 4 + [0.01 * 10_000 / 4095])


def test_costs_are_read_from_tables_and_from_files(tmp_path: Path) -> None:
    key = CostKey("m", "int8", "native", "here", 2)
    points = tuple(CostPoint(n, 1, c, 0.01 * n + 1e-6 * c) for n in (1, 4, 16) for c in (256, 1024))
    points += (CostPoint(4, 2, 256, 0.5),)
    (tmp_path / "table.json").write_text(json.dumps(CostTable(key, points).to_json()))
    (tmp_path / "own.json").write_text('{"points": [[1, 0.01], [8, 0.02]], "draft_fixed": 0.003}')
    assert read_costs(str(tmp_path / "table.json")).verify(4, 1, 0) == pytest.approx(0.040256)
    assert read_costs(str(tmp_path / "own.json")).draft(3, 5) == pytest.approx(0.003)
    (tmp_path / "bad.json").write_text('{"points": [[1, 0.01]], "draft_fixd": 1}')
    for name in ("bad.json", "missing.json"):
        with pytest.raises(InvalidRequest, match="expected"):
            read_costs(str(tmp_path / name))
    assert read_profile("0.9,0.5", 4) == (0.9, 0.5, 0.5, 0.5)
    with pytest.raises(InvalidRequest, match="between 0 and 1"):
        read_profile("1.5", 3)
    for name in ("fixd:3", "fixed:x", "fixed:-1", "fixed:2.5", "threshold:1.5", "threshold:x", "threshold:"):
        with pytest.raises(InvalidRequest):
            make_policy_for(name, CURVES["tiles"], 7)


def test_a_whole_number_behind_a_policy_is_its_drafts() -> None:
    """As in ``generate --policy threshold:1``; with a point it is the least confidence."""
    confidence = np.array([[1.0, 0.8, 0.6, 0.55, 0.4, 0.9, 0.9]], dtype=np.float32)
    expected = {"threshold": 4, "threshold:1": 1, "threshold:3": 3, "threshold:0.7": 2, "threshold:1.0": 1}
    for name, kept in expected.items():
        assert make_policy_for(name, CURVES["tiles"], 7).choose(confidence, [7]) == [kept]


def test_the_command(tmp_path: Path) -> None:
    """A table, JSON with the fields of ``bench --load``, and a diagram."""
    given = ["--duration", "1", "--concurrency", "1,4", "--policies", "none,auto", "--json", str(tmp_path / "out.json")]
    if available():
        given += ["--plot", str(tmp_path / "out.png")]
    result = CliRunner().invoke(app, ["simulate", *given])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["concurrency"], row["policy"]) for row in rows] == [(1, "none"), (1, "auto"), (4, "none"), (4, "auto")]
    wanted = ("tokens_per_second", "per_user_tokens_per_second", "ttft_ms", "itl_p50_ms", "itl_p99_ms")
    assert all({*wanted, "acceptance_length", "verified_per_row"} <= row.keys() for row in rows)
    assert not available() or (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--concurrency", "1,x"], "whole numbers above 0"),
        (["--policies", "fixed:3,fastest"], "unknown policy"),
        (["--profile", "chta"], "profile: expected"),
        (["--costs", "nowhere.json"], "costs: expected"),
        (["--confidence", "maybe"], "says must be"),
        (["--concurrency", "inf"], "whole numbers above 0"),
        (["--concurrency", "1e300"], "may be at most 1000000"),
        (["--rate", "inf"], "--rate: expected numbers above 0"),
        (["--rate", "nan"], "--rate: expected numbers above 0"),
        (["--rate", "1e300"], "1e-06 to 1000000, got a rate of 1e+300"),
        (["--rate", "1", "--concurrency", "4"], "give one of them"),
        (["--rate", "2", "--burst", "inf"], "burst and period finite"),
        (["--burst", "nan"], "burst and period finite"),
        (["--seed", "-1"], "greater than or equal to 0"),
        (["--plot", "x.foo"], "files ending in .foo cannot be drawn" if available() else "needs matplotlib"),
        (["--policies", "fixed:3,none:3"], "none takes no number"),
        (["--policies", "throughput:x"], "throughput takes no number"),
        (["--policies", ""], "no policy is named"),
        (["--policies", "threshold:2.5"], "threshold must be between 0 and 1, got 2.5"),
        (["--policies", "threshold:x"], "as in threshold:3, or the least confidence, as in threshold:0.5"),
        (["--policies", "fixed:"], "as in fixed:3"),
        (["--duration", "inf"], "finite number of seconds"),
    ],
)
def test_wrong_options_are_one_line(given: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["simulate", "--duration", "1", *given])
    assert result.exit_code == 2 and said in " ".join(result.output.replace("│", "").split())


def test_no_column_is_lost_in_a_narrow_terminal() -> None:
    given = ["simulate", "--duration", "1", "--concurrency", "4", "--policies", "throughput"]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "40"}).output
    assert all(name in shown for name in ("load", "throughput", "p99 ms", "verified")) and "…" not in shown
