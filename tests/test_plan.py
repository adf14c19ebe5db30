"""``outrider plan``: forecasts against published figures, advice never slower than plain, and runs explained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from served import drafting, eventually, serving
from typer.testing import CliRunner

from outrider.cli import app
from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.evaluation.speedup import run_bench
from outrider.planning import measuring
from outrider.planning.advice import described_candidates, make_plan
from outrider.planning.described import DrafterShape, Machine, TargetShape, conditional_of
from outrider.planning.forecast import Forecast, Profile, Workload, forecast, step_seconds
from outrider.planning.measuring import MeasuredCosts, _costs, _profile, _Side, _Turns, _Watch
from outrider.planning.page import plan_page
from outrider.planning.roofline import Roofline
from outrider.planning.run_split import (
    DRAFTING,
    KEPT,
    REJECTED,
    Round,
    read_run,
    split,
    split_page,
)
from outrider.planning.simulated_drafts import Synthetic
from outrider.planning.simulation import Traffic, simulate
from outrider.planning.step_costs import Costs
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.types import RequestStats, RowRecord, StepCost, StepRecord

RUNS = Path(__file__).parent / "data" / "runs"
MI50 = "bandwidth=1024,tflops=26,curve=1:31/8:68.7/9:106.9"


def plan_of(shape: str, machine: str, drafters: list[str], work: Workload):  # type: ignore[no-untyped-def]
    target, where = TargetShape.read(shape), Machine.read(machine)
    candidates = described_candidates(where, target, [DrafterShape.read(text) for text in drafters])
    return make_plan(candidates, Roofline(where, target), work, target=target, machine=where)


# ------------------------------------------------------------------------------------------------ described machines


@pytest.mark.parametrize(("rows", "published"), [(1, 1.76), (32, 1.29)])
def test_a_described_h100_comes_near_the_published_speedups(rows: int, published: float) -> None:
    """Qwen3-8B on one H100, DSpark with 7 drafts and acceptance length 2.33."""
    made = plan_of("qwen3-8b", "h100", ["dspark,length=2.33"], Workload(concurrency=rows))
    seven = made.curves["dspark"][6]
    assert seven.drafts == 7 and seven.acceptance_length == pytest.approx(2.33, abs=1e-6)
    assert seven.speedup == pytest.approx(published, rel=0.25)
    assert made.advised.speedup >= 0.99 * seven.speedup


@pytest.mark.parametrize(
    "drafter", ["draft_model,drafts=12,profile=0.95,draft_each_ms=0.5", "eagle3,drafts=12,length=5"]
)
def test_a_jump_of_the_verify_curve_is_avoided(drafter: str) -> None:
    """31 ms for one token, 68.7 for 8, 106.9 for 9: a step verifies 8 at most, however good the drafter."""
    made = plan_of("qwen3-8b", MI50, [drafter], Workload())
    assert 1 <= made.advised.drafts <= 7
    curve = next(iter(made.curves.values()))
    assert curve[7].speedup < curve[6].speedup - 0.1, "the ninth token costs more than it returns"


def test_tiles_make_a_staircase_and_the_plan_stays_on_a_step() -> None:
    """Compute-bound in tiles of 8 tokens: 9 tokens cost what 16 do."""
    target, machine = TargetShape.read("qwen3-8b"), Machine.read("bandwidth=3000,tflops=20,tile=8")
    costs = Roofline(machine, target)
    assert costs.verify(9, 1, 0) == costs.verify(16, 1, 0) > 1.5 * costs.verify(8, 1, 0) == 1.5 * costs.verify(2, 1, 0)
    assert plan_of(
        "qwen3-8b", "bandwidth=3000,tflops=20,tile=8", ["ngram,profile=0.9,drafts=12"], Workload()
    ).advised.drafts in (7, 12)


def test_experts_and_long_contexts_change_the_answer() -> None:
    dense = plan_of("qwen3-8b", "h100", ["eagle3,length=3"], Workload(concurrency=4))
    sparse = plan_of("qwen3-30b-a3b", "h100", ["eagle3,length=3,parameters=200e6"], Workload(concurrency=4))
    dense_loss = dense.curves["eagle3"][6].verify / dense.plain.verify
    sparse_loss = sparse.curves["eagle3"][6].verify / sparse.plain.verify
    assert sparse_loss > 1.5 > dense_loss and any("experts" in note for note in sparse.notes)
    assert sparse.advised.drafts < dense.advised.drafts
    shape = TargetShape.read("qwen3-30b-a3b")
    assert shape.touched(1) == pytest.approx(shape.active(1)) and shape.touched(1e6) == shape.matrix_parameters
    assert dense.memory is not None and dense.memory.target == pytest.approx(8.19e9 * 2)
    assert dense.memory.target_cache == 4 * (128 + 256) * 2 * 36 * 8 * 128 * 2


def test_noise_in_a_measured_curve_makes_no_pass_shorter() -> None:
    costs = Roofline(Machine.read("bandwidth=1024,tflops=26,curve=1:31/4:30/8:40"), TargetShape.read("qwen3-8b"))
    assert costs.verify(1, 1, 0) == costs.verify(4, 1, 0) == pytest.approx(0.031)
    assert costs.verify(8, 1, 0) == pytest.approx(0.040)


def test_a_draft_model_reads_its_own_cache_in_every_pass() -> None:
    """28 layers like those of Qwen3-4B: 114,688 bytes a token, which 819 GB/s read in 4.6 ms at 32,768 tokens."""
    target, machine = TargetShape.read("qwen3-4b"), Machine.read("bandwidth=819,tflops=200,bandwidth_share=1")
    draft_model = DrafterShape.read("draft_model,parameters=0.6e9,layers=28,length=3,drafts=5")
    costs = Roofline(machine, target, draft_model)
    assert costs.draft_cache(1, 32768) == pytest.approx(32768 * 28 * 2 * 8 * 128 * 2 / 819e9)
    assert costs.draft_cache(5, 32768) == pytest.approx(5 * costs.draft_cache(1, 32768)) and not costs.draft_cache(0, 9)
    block = Roofline(machine, target, DrafterShape.read("dspark,length=3"))
    assert block.draft_cache(7, 32768) == pytest.approx(32768 * 5 * 2 * 8 * 128 * 2 / 819e9), "one pass for all drafts"
    measured = Roofline(machine, target, DrafterShape.read("draft_model,draft_ms=5,length=3,drafts=5"))
    assert not measured.draft_cache(5, 32768), "what was measured has it"
    short, long = (step_seconds(costs, 2, 5, context)[0] for context in (0, 32768))
    assert long - short == pytest.approx(2 * costs.draft_cache(5, 32768))


def test_an_open_loop_has_the_rows_that_its_rate_needs_and_knows_overload() -> None:
    calm = plan_of("qwen3-8b", "h100", ["dspark,length=2.33"], Workload(concurrency=64, rate=2))
    assert calm.plain.rows == pytest.approx(2 * calm.plain.latency, rel=0.01), "Little's formula"
    assert calm.advised.rows < calm.plain.rows and calm.advised.tokens_per_second == pytest.approx(2 * 256)
    assert plan_of("qwen3-8b", "h100", ["dspark,length=2.33"], Workload(concurrency=4, rate=50)).plain.overloaded


def test_objectives_memory_and_prices() -> None:
    small = plan_of("qwen3-8b", "h100,memory=17", ["dspark,length=2.33"], Workload())
    assert not small.pays and small.memory is not None and not small.memory.fits
    priced = plan_of("qwen3-8b", "h100,price=3.6", ["dspark,length=2.33"], Workload())
    assert priced.cost_per_million is not None
    plain, advised = priced.cost_per_million
    assert plain == pytest.approx(1e6 * 3.6 / 3600 / priced.plain.tokens_per_second)
    assert plain / advised == pytest.approx(priced.advised.speedup)


# ------------------------------------------------------------------------------------------------ never slower


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1.0, 7.9), st.sampled_from([1, 3, 16, 100]), st.floats(5, 4000), st.floats(0.1, 900),
    st.sampled_from(["dspark", "eagle3", "ngram"]), st.sampled_from([1, 8, 16]), st.floats(0, 30),
)  # fmt: skip
def test_what_is_advised_is_never_slower_than_plain(
    length: float, rows: int, bandwidth: float, tflops: float, kind: str, tile: int, step_ms: float
) -> None:
    machine = f"bandwidth={bandwidth},tflops={tflops},tile={tile},drafting_ms={step_ms}"
    made = plan_of("llama-3.1-8b", machine, [f"{kind},length={length}"], Workload(concurrency=rows))
    assert made.advised is made.plain or made.advised.low > 1
    assert all(f.drafts == 0 or f.low > 1 for _, f in (*made.by_rows, *made.by_context))
    best: Forecast = max(made.curves[kind], key=lambda f: f.speedup)
    assert made.pays or best.low <= 1
    assert best.low <= best.speedup <= best.high
    assert best.break_even == pytest.approx(best.step / made.plain.step)


def test_a_forecast_agrees_with_a_simulation_of_the_engine() -> None:
    """The same costs and acceptance, step by step, with the real policy."""
    costs = Costs(((1, 0.010), (8, 0.013), (64, 0.040)), draft_fixed=0.002, draft_each=0.0004, step=0.0005)
    profile = (0.8, 0.7, 0.6, 0.5)
    work = Workload(prompt=16, answer=400, concurrency=4)
    for drafts in (1, 2, 4):
        run = simulate(
            FixedPolicy(FixedConfig(draft_tokens=drafts)),
            costs,
            Synthetic([profile[:drafts]], spread=0, row_spread=0, says="nothing"),
            Traffic(concurrency=4, prompt=16, answer=400),
            seconds=60,
        )
        told = forecast("x", drafts, Profile(profile), costs, work)
        assert told.tokens_per_second == pytest.approx(run.tokens_per_second, rel=0.06)


def test_rounds_with_fewer_drafts_cost_their_own_passes() -> None:
    """6 of 10 rounds are silent, 2 verify one draft and 2 two; passes over 1, 2 and 3 tokens take 10, 15 and 40 ms."""
    costs = Costs(((1, 0.010), (2, 0.015), (3, 0.040)))
    profile = Profile((0.3, 0.5), offered=(0.4, 0.2))
    assert profile.verified(2) == pytest.approx((0.6, 0.2, 0.2)) and profile.verified(1) == pytest.approx((0.6, 0.4))
    assert profile.verified(0) == (1.0,) and Profile((0.3, 0.5)).verified(2) == (0.0, 0.0, 1.0)
    assert step_seconds(costs, 1, 2, 0, profile.verified(2))[1] == pytest.approx(
        0.6 * 0.010 + 0.2 * 0.015 + 0.2 * 0.040
    )
    assert step_seconds(costs, 1, 2, 0)[1] == pytest.approx(0.040)
    assert profile.accepted(2) == pytest.approx(0.3 + 0.3 * 0.5)


def test_costs_follow_what_was_observed() -> None:
    """Passes take 1.2 times the table's at one token and 1.5 times at four; a prompt's token takes 2 ms."""
    key = CostKey("toy", "float32", "reference", "here", 1)
    table = CostTable(key, tuple(CostPoint(n, 1, 0, 0.01 + 0.001 * n) for n in (1, 2, 4, 8)))

    def run(drafts: int, factor: float, draft: float) -> _Watch:
        watch = _Watch(1)
        row = RowRecord(0, drafts, drafts, drafts, 1, (1,), None, False)
        for _ in range(40):
            cost = StepCost(draft, factor * table.seconds(1 + drafts, 1, 0), 0.001, 1, 1 + drafts, 0)
            watch.step(StepRecord((row,), cost))
        first = replace(row, drafted=0, verified=0, accepted=0, first=True)
        watch.step(StepRecord((first,), StepCost(0.0, 0.199, 0.001, 1, 100, 0)))
        return watch

    stats = [RequestStats(40, 120, 40, 41, accepted_per_position=[30, 10], drafted_per_position=[40, 40, 40])]
    plain = MeasuredCosts(table, ((1.0, 1.2),), 0.0005, reading=(0.001, 0.001))
    costs = _costs(plain, {1: run(1, 1.3, 0.002), 3: run(3, 1.5, 0.003)}, best=3)
    for tokens, factor in ((1, 1.2), (2, 1.3), (3, 1.4), (4, 1.5), (8, 1.5)):
        assert costs.verify(tokens, 1, 0) == pytest.approx(factor * table.seconds(tokens, 1, 0))
    assert [costs.draft(1, n) for n in (0, 1, 2, 3)] == pytest.approx([0.0, 0.002, 0.0025, 0.003])
    assert costs.bookkeeping(1, False) == 0.0005 and costs.bookkeeping(1, True) == pytest.approx(0.001)
    assert costs.prompt(50, False) == pytest.approx(0.05) and costs.prompt(50, True) == pytest.approx(0.1)
    profile = _profile({3: [stats], 1: [stats]}, best=3, most=3)
    assert profile.conditional == pytest.approx((0.75, 1 / 3, 0.0)) and profile.offered == (1.0, 1.0, 1.0)


def test_repeated_turns_do_not_narrow_the_interval_of_acceptance() -> None:
    prompts = [RequestStats(20, 20, n, 20 + n, accepted_per_position=[n], drafted_per_position=[20]) for n in (4, 16)]
    once, often = (_profile({1: [prompts] * turns}, best=1, most=1) for turns in (1, 9))
    assert once == often and once.uncertainty > 0.3


class _Clock:
    """Stands in for time: every fake answer moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Timed:
    """Takes the place of an LLM: ``accepted`` drafts a round, and rounds that take ``seconds``, of which ``told`` are
    in the parts that steps report. Seconds grow with the number of calls, as on a machine that gets slower."""

    def __init__(self, clock: _Clock, seconds: float, told: float, drafts: int = 0, accepted: int = 0) -> None:
        self.clock, self.seconds, self.told, self.drafts, self.accepted = clock, seconds, told, drafts, accepted
        self.observers: list[Any] = []
        self.drafter = SimpleNamespace(block=drafts)
        self.calls = 0

    def generate(self, prompts: list[Any], params: SamplingParams) -> list[Any]:
        outputs = []
        for _ in prompts:
            rounds, each = params.max_tokens // (1 + self.accepted), 1 + self.accepted
            for i in range(rounds):
                self.clock.now += self.seconds * (1 + self.clock.now)
                drafts = self.drafts if i % 2 else 0  # every second round is silent, and its pass three times as long
                row = RowRecord(0, drafts, drafts, drafts, self.accepted, (1,), None, False)
                cost = StepCost(self.told / 4, self.told * (0.5 if drafts else 1.5), self.told / 4, 1, 1 + drafts, i)
                for observer in self.observers:
                    observer.step(StepRecord((row,), cost))
            stats = RequestStats(
                rounds,
                rounds * self.drafts,
                rounds * self.accepted,
                rounds * each,
                accepted_per_position=[rounds] * self.accepted,
                drafted_per_position=[rounds] * self.drafts,
            )
            outputs.append(SimpleNamespace(token_ids=[0] * (rounds * each), stats=stats))
        return outputs

    def forget(self) -> None: ...

    def encode(self, prompt: Any) -> list[int]:
        return [1, 2]


def test_a_forecast_is_what_whole_runs_were_whatever_the_parts_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds take twice as long as steps report, and the machine gets slower all the time: the speed-up of the sample
    is that of the pairs, 3 tokens in 1.5 times the seconds; the best number of drafts is found by running it."""
    clock = _Clock()
    table = CostTable(CostKey("toy", "", "", "", 1), tuple(CostPoint(n, 1, 0, 0.001) for n in (1, 8)))
    monkeypatch.setattr(measuring, "start_costs", lambda *a, **k: table)
    monkeypatch.setattr(measuring, "_drafter_shape", lambda *a: None)
    plain: Any = _Timed(clock, 1e-6, 1e-6)
    plain.target, plain.loaded = None, SimpleNamespace(dtype="")

    def make(drafts: int | None) -> Any:
        drafts = drafts or 5
        return _Timed(clock, 1e-6 * (1.3 + 0.1 * drafts), 0.5e-6, drafts, min(2, drafts))

    params = SamplingParams(max_tokens=60)
    costs, (candidate,) = measuring.measure(plain, {"toy": make}, ["a", "b"], params, Workload(2, 60), clock=clock)
    made = make_plan([candidate], costs, Workload(2, 60))
    assert made.plain.latency == pytest.approx(60 * 1e-6, rel=0.02), "the clock moved by 2 %"
    assert made.advised.drafts == 2 and made.pays
    assert made.advised.speedup == pytest.approx(3 / 1.5, rel=0.01)
    assert made.advised.tokens_per_second / made.plain.tokens_per_second == pytest.approx(made.advised.speedup)
    assert set(candidate.tried) == {2}, "the others had one turn"
    at_five = next(f for f in made.curves["toy"] if f.drafts == 5)
    assert at_five.speedup == pytest.approx(3 / 1.8, rel=0.01)


def test_profiles_from_a_length() -> None:
    for length in (1.0, 1.5, 2.33, 5.0, 7.99):
        assert 1 + Profile(conditional_of(length, 7)).accepted(7) == pytest.approx(length, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qwen3-9b", "did you mean 'qwen3-8b'"),
        ("layers=36", "needs width"),
        ("qwen3-8b,layer=3", "did you mean 'layers'"),
        ("qwen3-8b,layers=many", "a whole number"),
        ("qwen3-8b,layers=36.9", "a whole number"),
        ("qwen3-8b,parameters=1e8", "fewer than"),
        ("missing.toml", "cannot be read"),
        ("qwen3-8b,parameters=inf", "a number"),
    ],
)
def test_a_wrong_shape_says_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        TargetShape.read(text)


@pytest.mark.parametrize(
    "text",
    [
        "dspark",
        "dspark,length=9",
        "dspark,length=2,profile=0.4",
        "eagle3,profile=1.4",
        "x,length=2",
        "draft_model,length=2",
        "eagle3,length=2,bytes=-1",
        "eagle3,length=2,layers=-5",
        "eagle3,length=2,drafts=3.5",
        "dspark,length=2,markov_rank=-1",
        "dspark,length=2,aux_layers=-2",
        "dspark,length=2,uncertainty=1e15",
    ],
)
def test_a_wrong_drafter_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        DrafterShape.read(text)


@pytest.mark.parametrize(
    "text",
    [
        "h100,curve=2:3/4:5", "h100,curve=1:3/1:4", "bandwidth=1", "h100,tile=0", "h100,curve=a",
        "h100,curve=1:3/8.5:4", "h100,curve=1:31", "h100,curve=1:31/8:20",
        "h100,uncertainty=1e15", "h100,flops_share=65", "h100,tile=1.5",
    ],
)  # fmt: skip
def test_a_wrong_machine_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Machine.read(text)


def test_what_is_below_0_is_named() -> None:
    with pytest.raises(InvalidRequest, match="price must be 0 or more, got -1"):
        Machine.read("h100,price=-1")
    with pytest.raises(InvalidRequest, match="uncertainty must be 0 or more, got -0.5"):
        DrafterShape.read("dspark,length=2,uncertainty=-0.5")


def test_descriptions_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "box.toml"
    file.write_text('bandwidth = 33\ntflops = 0.3\nname = "box"\ncurve = [[1, 31], [8, 68.7]]\n')
    machine = Machine.read(str(file))
    assert (machine.name, machine.curve) == ("box", ((1, 31.0), (8, 68.7)))


# ------------------------------------------------------------------------------------------------ runs


def test_a_loaded_vllm_server_loses_most_to_rejected_work() -> None:
    (one,) = read_run(RUNS / "vllm_metrics.txt")
    assert one.acceptance_length == pytest.approx(1 + 639124 / 412338) and one.drafted == pytest.approx(7)
    assert one.round_seconds == pytest.approx(9937.35 / 412338)
    assert one.bottleneck == REJECTED and one.levers[0].what == "draft at most 2 tokens"


def test_a_llama_server_with_a_slow_draft_model_loses_most_to_drafting() -> None:
    (one,) = read_run(RUNS / "llama_draft_model.log")
    assert one.parts[DRAFTING] == pytest.approx(7740.25e-3 / 85), "tokens but the first that were not drafted"
    assert one.round_seconds == pytest.approx(14.52 / 85)
    assert one.speedup == pytest.approx((7.936 / 127) / (14.52 / 255))
    assert one.bottleneck == DRAFTING
    assert one.levers[0].what.startswith(("draft at most", "draft in half"))


def test_a_llama_server_whose_passes_grow_loses_most_to_verifying() -> None:
    (one,) = read_run(RUNS / "llama_eagle3.log")
    assert one.bottleneck == KEPT and one.speedup == pytest.approx((3.968 / 127) / (3.52 / 255))
    assert one.levers[0].what.startswith("halve what verifying adds")


def test_recorded_vllm_pages_of_an_ngram_drafter() -> None:
    """vLLM 0.32's CPU build, SmolLM2, four drafts, one user: drafting and verifying are nearly free there."""
    (one,) = read_run(RUNS / "vllm_cpu_ngram.txt", RUNS / "vllm_cpu_plain.txt")
    assert one.bottleneck == REJECTED and one.speedup == pytest.approx(1.61, abs=0.01)
    assert one.parts["target pass that plain decoding needs too"] > 0.9 * one.round_seconds
    assert one.levers[0].what.startswith("accept a tenth more drafts") and any("52%" in note for note in one.notes)
    (alone,) = read_run(RUNS / "vllm_cpu_ngram.txt")
    assert alone.speedup is None and alone.bottleneck.startswith("target pass, drafting and bookkeeping")


def test_a_recorded_llama_server_log_whose_target_pass_is_slow() -> None:
    """llama-server with SmolLM2 and its DSpark of 7 drafts, two cores: passes of eight tokens take most of a round."""
    (one,) = read_run(RUNS / "llama_dspark.log")
    assert one.bottleneck.startswith("target pass, verifying included") and "--plain" in one.notes[-1]
    assert one.parts[DRAFTING] == pytest.approx(0.0150, rel=0.01) and 6.8 < one.drafted < 7
    assert all("4 tokens" not in lever.what for lever in one.levers), "a block takes the same time for fewer drafts"


def test_our_servers_recorded_page_loses_most_to_drafting() -> None:
    """The embedded target with its DSpark of 7 drafts, which accepts a third of one."""
    (one,) = read_run(RUNS / "outrider_dspark.txt")
    assert one.bottleneck == DRAFTING and one.levers[0].what == "draft at most 3 tokens"
    assert one.speedup == pytest.approx(1.05, abs=0.01)


def test_timings_and_our_own_results_are_read(tmp_path: Path) -> None:
    timings = tmp_path / "timings.jsonl"
    timings.write_text(
        '{"timings": {"predicted_n": 100, "predicted_ms": 3100.0}}\n'
        '{"timings": {"predicted_n": 100, "predicted_ms": 2000.0, "draft_n": 120, "draft_n_accepted": 60}}\n'
    )
    (one,) = read_run(timings)
    assert one.speedup == pytest.approx(1.55) and one.acceptance_length == pytest.approx(1 + 60 / 39)
    row = {
        "drafter": "suffix", "prompts": "code", "temperature": 0.0, "concurrency": 1, "acceptance_length": 2.0,
        "baseline_tokens_per_second": 90.0, "tokens_per_second": 115.0, "accepted_per_position": [0.6, 0.4],
        "drafted_per_round": 2.0, "step_ms": {"draft": 1.0, "verify": 12.0, "bookkeeping": 3.0}, "plain_step_ms": 10.0,
    }  # fmt: skip
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"rows": [row, row | {"drafted_per_round": 0.0, "accepted_per_position": []}]}))
    (one,) = read_run(bench)
    assert one.parts == pytest.approx(
        {"target pass that plain decoding needs too": 0.010, DRAFTING: 0.001, KEPT: 0.001, REJECTED: 0.001,
         "bookkeeping": 0.003}
    )  # fmt: skip
    assert "bookkeeping" in one.answer and "bookkeeping" in split_page([one])
    assert one.speedup == pytest.approx(2.0 * 10.0 / 16.0) and "prompts left out" in one.title
    del row["plain_step_ms"]  # an older file: both sides with their prompts, and no parts
    bench.write_text(json.dumps({"rows": [row]}))
    (one,) = read_run(bench)
    assert one.speedup == pytest.approx(115 / 90) and DRAFTING not in one.parts


def test_a_bench_is_explained_as_it_went(tmp_path: Path) -> None:
    """What is said of a run agrees with the run: short answers, of whose time the prompts are a good part."""
    llm = LLM("embedded", "suffix", policy="fixed", guard=False)
    found = run_bench(
        "embedded", {"suffix": llm}, llm.with_drafter("none"), {"code": ["def f(a, b):\n    return a"]}, max_tokens=24
    )
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(found))
    for one, row in zip(read_run(bench), found["rows"], strict=True):
        steps = sum(row["step_ms"].values())
        assert one.speedup == pytest.approx(row["acceptance_length"] * row["plain_step_ms"] / steps, rel=0.01)
        assert sum(one.parts.values()) == pytest.approx(one.round_seconds)


def test_the_servers_own_page_tells_all_parts(tmp_path: Path) -> None:
    """Steps with drafts and plain steps are timed apart, steps with prompts are left out."""
    ask = {"prompt": "a b c a b c a b c", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with serving(drafting()) as (url, service):
        for more in ({}, {"outrider": {"off": True}}):
            assert httpx.post(f"{url}/v1/completions", json=ask | more, timeout=60).status_code == 200
        assert eventually(lambda: not service.llm.engine.busy)
        page = tmp_path / "page"
        page.write_text(httpx.get(f"{url}/metrics").text)
    (one,) = read_run(page)
    assert {DRAFTING, "bookkeeping", "target pass that plain decoding needs too"} <= set(one.parts)
    assert one.speedup is not None and 1 < one.acceptance_length <= 1 + one.drafted
    totals = dict(line.split() for line in page.read_text().splitlines() if line[:1] != "#" and "{" not in line)
    parts = sum(float(totals[f"outrider_drafting_step_{n}_seconds_total"]) for n in ("draft", "verify", "bookkeeping"))
    steps, plain = (float(totals[f"outrider_{n}_steps_total"]) for n in ("drafting", "plain"))
    assert one.round_seconds == pytest.approx(parts / steps)
    assert 39 <= plain + steps < float(totals["outrider_steps_total"])


def test_a_vllm_page_without_speculation_tells_what_a_plain_step_takes(tmp_path: Path) -> None:
    names = ("request_decode_time_seconds_sum", "inter_token_latency_seconds_count")
    drafting_page, plain, neither = tmp_path / "drafting", tmp_path / "plain", tmp_path / "neither"
    counts = {"num_drafts": 40, "num_draft_tokens": 160, "num_accepted_tokens": 80}
    lines = [f"vllm:spec_decode_{name}_total {value}" for name, value in counts.items()]
    drafting_page.write_text("\n".join([*lines, f"vllm:{names[0]} 3.0", f"vllm:{names[1]} 100"]))
    plain.write_text(f"vllm:{names[0]} 2.0\nvllm:{names[1]} 100\n")
    neither.write_text("vllm:num_requests_running 0\n")
    (one,) = read_run(drafting_page, plain)
    assert one.round_seconds == pytest.approx(0.03), "of all rounds, 60 of which had no drafts"
    assert one.acceptance_length == pytest.approx(1.8) and one.speedup == pytest.approx(1.2)
    assert one.parts[REJECTED] == pytest.approx(0.005) and any("60%" in note for note in one.notes)
    (alone,) = read_run(drafting_page)
    assert alone.bottleneck.startswith("target pass, drafting") and "--plain" in alone.notes[-1]
    for wrong in (drafting_page, neither, tmp_path / "absent"):
        with pytest.raises(InvalidRequest, match="--plain"):
            read_run(drafting_page, wrong)


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1e-4, 10), st.floats(0, 1), st.floats(0.1, 20), st.floats(0, 1), st.one_of(st.none(), st.floats(0.1, 1))
)
def test_parts_sum_to_the_round_and_levers_are_gains(
    seconds: float, share: float, drafted: float, kept: float, plain: float | None
) -> None:
    one = Round(
        "x", seconds, drafted, kept * drafted, 0.5 * share * seconds, 0.1 * seconds, plain and plain * seconds,
        (0.9, 0.5, 0.1),
    )  # fmt: skip
    made = split(one)
    assert made.round_seconds == pytest.approx(seconds)
    assert all(lever.gain > 1 for lever in made.levers)
    assert [x.gain for x in made.levers] == sorted((x.gain for x in made.levers), reverse=True)
    assert split(replace(one, draft=None, bookkeeping=None)).round_seconds == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "{}",
        '{"rows": [{}]}',
        "[1]",
        "",
        "vllm:spec_decode_num_drafts_total 0\n",
        "eval time",
        "vllm:spec_decode_num_drafts_total e\n",
    ],
)
def test_a_file_that_is_no_run_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match="--explain"):
        read_run(file)


# ------------------------------------------------------------------------------------------------ command line


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_describes_and_explains(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    described = ("--shape", "qwen3-8b", "--machine", "h100,price=2", "--drafter", "dspark,length=2.33")
    made = json.loads(invoke(*described, "--html", str(page), "--json"))
    assert made["pays"] and made["advised"]["drafter"] == "dspark" and len(made["curves"]["dspark"]) == 7
    assert "It pays: dspark" in page.read_text() and "<table>" in page.read_text()
    assert "It pays" in invoke(*described)
    assert json.loads(invoke("--explain", str(RUNS / "vllm_metrics.txt"), "--json"))[0]["bottleneck"] == REJECTED


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shape", "qwen3-8b"),
        ("--machine", "h100"),
        ("--shape", "qwen3-8b", "--target", "embedded"),
        ("--explain", "no"),
        ("--plain", "no"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2 and "error:" in result.output


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("--rate", "inf"), "rate and latency objectives must be 0 to"),
        (("--answer-tokens", str(10**23)), "answer and concurrency may be"),
        (("--machine", "bandwidth=1e-300,tflops=1"), "bandwidth must be above 0, at least 1e-06, got 1e-300"),
        (("--machine", "bandwidth=1e300,tflops=1"), "bandwidth must be a number up to 1e+15, got '1e300'"),
        (("--shape", "qwen3-8b,heads=-3"), "heads and experts must be at least 0"),
    ],
)
def test_figures_with_which_nothing_can_be_planned(changed: tuple[str, ...], said: str) -> None:
    described = ["--shape", "qwen3-8b", "--machine", "h100", "--drafter", "dspark,length=2.33"]
    result = CliRunner().invoke(app, ["plan", *described, *changed])
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("work", [Workload(prompt=131_072), Workload(concurrency=1_000_000)])
def test_what_would_change_it_asks_for_no_workload_that_may_not_be_asked_for(work: Workload) -> None:
    """Prompts of 131,072 tokens had been refused, because 8 times as many are over a million."""
    made = plan_of("qwen3-8b", "h100", ["dspark,length=2.33"], work)
    assert len(made.sensitivities) == 8


def test_contexts_are_those_that_the_table_names() -> None:
    """Half an answer of 4,000 tokens is more context than 512."""
    made = plan_of("qwen3-8b", "h100", ["dspark,length=2.33"], Workload(answer=4000))
    assert [context for context, _ in made.by_context] == [2048, 8192, 32768, 131072]


def test_a_workload_beyond_the_context_is_refused() -> None:
    result = CliRunner().invoke(app, ["plan", "--target", "embedded", "--answer-tokens", "2000"])
    assert result.exit_code == 2 and "pass the target's context of 2048 tokens" in result.stderr


def test_a_plan_is_measured_here() -> None:
    made = json.loads(
        invoke("--target", "embedded", "--drafter", "ngram", "--limit", "3", "--answer-tokens", "24", "--json")
    )
    (best,) = made["forecasts"]
    assert best["acceptance_length"] >= 1 and made["plain"]["tokens_per_second"] > 0
    assert made["advised"]["drafts"] == 0 or made["advised"]["low"] > 1


def test_pages_hold_what_was_asked() -> None:
    made = plan_of("qwen3-8b", "h100", ["dspark,length=2.33", "eagle3,length=2.1"], Workload())
    text = plan_page(made)
    assert "eagle3" in text and made.answer in text


def _turns(plain: list[list[float]], mine: list[list[float]]) -> tuple[_Turns, _Side]:
    """Recorded seconds a token, [turns, groups]; groups have equal weights."""
    turns = _Turns.__new__(_Turns)
    turns.groups = [["prompt"]] * len(plain[0])
    turns.tokens = np.ones(len(plain[0]))
    turns.plain = _Side(None, _Watch(1), plain)  # type: ignore[arg-type]
    return turns, _Side(None, _Watch(1), mine, list(range(len(mine))))  # type: ignore[arg-type]


def test_turns_of_a_changing_clock_and_one_that_was_held_up() -> None:
    """Both settings slow down together, and one turn takes a hundred times as long: the ratio is what it was."""
    clock = [1.0, 1.75, 1.0, 1.75, 1.75, 1.0, 1.0, 1.75, 1.0, 1.0]
    plain = [[0.010 * c, 0.020 * c] for c in clock]
    mine = [[0.005 * c, 0.020 * c] for c in clock]
    mine[4] = [0.5, 2.0]
    turns, side = _turns(plain, mine)
    assert turns.speedup(side) == pytest.approx(30 / 25)
    assert turns.uncertainty(side) == measuring.LEAST


def test_uncertainty_of_turns_is_the_t_interval_of_trimmed_means() -> None:
    """Against scipy's own, one group of ten turns."""
    ratios = np.log([1.1, 1.3, 0.9, 1.2, 1.25, 1.0, 1.05, 1.4, 0.8, 1.15])
    turns, side = _turns([[1.0]] * 10, [[float(np.exp(-r))] for r in ratios])
    half = turns.uncertainty(side)
    low, high = stats.ttest_1samp(ratios, 0).confidence_interval()  # untrimmed: as a check of size
    assert 0.5 < half / ((high - low) / 2) < 2
    expected = stats.mstats.trimmed_stde(ratios, (0.2, 0.2), (True, True)) * stats.t.ppf(0.975, 5)
    assert half == pytest.approx(float(expected), rel=0.06)  # scipy's has n where Yuen's has n - 1
    assert turns.speedup(side) == pytest.approx(float(np.exp(stats.trim_mean(ratios, 0.2))))


def test_a_drafter_that_is_not_there_is_not_said_to_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = CliRunner().invoke(app, ["plan", "--target", "embedded", "--drafter", "ngram", "--drafter", "suffx"])
    assert result.exit_code == 2 and result.stderr.startswith("error: there is no drafter 'suffx'; did you mean 'suf")
