"""What ``outrider plan`` computes, by hand: forecasts, memory, objectives, and what would change the answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from outrider.planning.advice import Candidate, Memory, Plan, _accepts, described_candidates, make_plan
from outrider.planning.described import DrafterShape, Machine, TargetShape
from outrider.planning.forecast import Profile, Workload, forecast, step_seconds
from outrider.planning.roofline import LOOKUP_SECONDS, Roofline
from outrider.planning.step_costs import Costs

COSTS = Costs(
    ((1, 0.010), (4, 0.013), (64, 0.073)), per_context=1e-6, draft_fixed=0.002, step=0.001, step_drafting=0.0005
)
PROFILE = Profile((0.8, 0.5, 0.25), uncertainty=0.1)
TARGET = TargetShape(layers=4, width=256, vocabulary=1000, parameters=4e6, kv_heads=2, head_dim=64, heads=4)


def planned(
    work: Workload, *, costs: Costs = COSTS, uncertainty: float = 0.05, tried: dict[int, float] | None = None
) -> Plan:
    return make_plan([Candidate("x", PROFILE, costs, 3, uncertainty, tried=tried or {})], costs, work)


def test_a_forecast_by_hand() -> None:
    """A prompt of 600 tokens is read in passes of 512 and 88 tokens, the second beside 512 that are cached."""
    work = Workload(prompt=600, answer=200)
    made = forecast("x", 2, PROFILE, COSTS, work, uncertainty=0.05)
    length, context = 1 + 0.8 + 0.8 * 0.5, 600 + 100
    reading = COSTS.verify(512, 1, 0) + COSTS.verify(88, 1, 512)
    step, plain = 0.002 + 0.012 + 1e-6 * context + 0.0015, 0.010 + 1e-6 * context + 0.001
    assert made.acceptance_length == pytest.approx(length) and made.step == pytest.approx(step)
    assert made.first_token == pytest.approx(reading) and made.between_tokens == pytest.approx(step / length)
    assert made.latency == pytest.approx(200 / length * step + reading)
    assert made.speedup == pytest.approx((200 * plain + reading) / made.latency)
    assert made.break_even == pytest.approx(step / plain)
    spread = math.hypot(0.1 * (length - 1) / length, 0.05)
    assert made.high / made.speedup == made.speedup / made.low == pytest.approx(math.exp(spread))
    assert made.tokens_per_second == pytest.approx(200 / made.latency)


def test_prompts_of_other_rows_hold_up_an_answer() -> None:
    work = Workload(prompt=512, answer=100, concurrency=3)
    made = forecast("none", 0, Profile(()), COSTS, work)
    assert made.latency == pytest.approx(100 * (COSTS.verify(3, 3, 3 * 562) + 0.001) + 3 * COSTS.verify(512, 1, 0))
    assert made.first_token == pytest.approx(COSTS.verify(512, 1, 0))
    shared = forecast("none", 0, Profile(()), COSTS, replace(work, concurrency=64, rate=3.0))
    assert shared.rows > 2 and shared.first_token == pytest.approx(shared.rows * COSTS.verify(512, 1, 0))


def test_an_open_loop_by_hand() -> None:
    """Half a request a second meets itself seldom: a row, whose prompt is read once. Drafting and plain decoding have
    rows of their own; the break-even is that of as many rows."""
    steep = Costs(((1, 0.010), (65, 0.074)))
    calm = forecast("x", 2, PROFILE, steep, Workload(prompt=1, answer=50, concurrency=64, rate=0.5))
    plain = forecast("none", 0, Profile(()), steep, Workload(prompt=1, answer=50, concurrency=64, rate=0.5))
    assert calm.rows == pytest.approx(0.5 * calm.latency) and calm.rows < 1
    assert calm.latency == pytest.approx(50 / 2.2 * 0.012 + 0.010) and calm.speedup == plain.latency / calm.latency
    busy = Workload(prompt=1, answer=50, concurrency=4, rate=5)
    drafting, plain = forecast("x", 2, PROFILE, steep, busy), forecast("none", 0, Profile(()), steep, busy)
    assert 3 < plain.rows < 3.5 and 1.5 < drafting.rows < 2.5 and not plain.overloaded
    assert drafting.break_even == pytest.approx(0.015 / 0.011), "passes over 6 tokens and 2"
    assert drafting.speedup == pytest.approx(plain.latency / drafting.latency)
    assert drafting.tokens_per_second == pytest.approx(5 * 50), "what is asked for, and no more"
    most = forecast("none", 0, Profile(()), steep, replace(busy, concurrency=3))
    assert most.overloaded and most.rows == 3 and most.tokens_per_second < 5 * 50


def test_silent_rounds_read_the_cache_too() -> None:
    silent, one = COSTS.verify(1, 1, 5000), COSTS.verify(2, 1, 5000)
    assert step_seconds(COSTS, 1, 1, 5000, (0.75, 0.25))[1] == pytest.approx(0.75 * silent + 0.25 * one)


def test_the_memory_of_a_plan_is_the_sum_of_its_parts() -> None:
    """A drafter of 2 layers and 3 auxiliary layers, in 4 bits, with a Markov head of rank 16; 5 rows of 64 + 100."""
    drafter = DrafterShape.read("dspark,layers=2,aux_layers=3,markov_rank=16,bytes=0.5,drafts=3,profile=0.9")
    machine = Machine.read("bandwidth=100,tflops=10,memory=1")
    work = Workload(prompt=64, answer=100, concurrency=5)
    made = make_plan(
        described_candidates(machine, TARGET, [drafter]),
        Roofline(machine, TARGET),
        work,
        target=TARGET,
        machine=machine,
    )
    assert made.pays and made.memory is not None
    cached = 5 * (64 + 100) * 2 * 2 * 64 * 2  # bytes of a layer: keys and values of two heads, 2 bytes each
    held = 64 + 5 * (made.advised.drafts + 1)
    expected = Memory(
        target=4e6 * 2,
        target_cache=4 * cached,
        drafter=0.5 * (drafter.multiplied(TARGET) + 2 * 1000 * 16),
        drafter_cache=2 * cached,
        auxiliary=held * 3 * 256 * 2,
        available=1e9,
    )
    assert made.memory == expected
    parts = (expected.target, expected.target_cache, expected.drafter, expected.drafter_cache, expected.auxiliary)
    assert made.to_json()["memory"]["total"] == sum(parts) and made.memory.fits


def test_layers_of_a_draft_model_are_its_share_of_the_parameters() -> None:
    drafter = DrafterShape.read("draft_model,parameters=1e6,drafts=2,profile=0.95,draft_ms=0.001")
    machine = Machine.read("bandwidth=100,tflops=10")
    made = make_plan(
        described_candidates(machine, TARGET, [drafter]),
        Roofline(machine, TARGET),
        Workload(),
        target=TARGET,
        machine=machine,
    )
    assert made.pays and made.memory is not None
    assert made.memory.drafter_cache == made.memory.target_cache / 4, "one of four layers"


def test_only_numbers_of_drafts_that_were_run_are_advised() -> None:
    best = planned(Workload()).advised.drafts
    assert best > 1 and planned(Workload(), tried={1: 0.01}).advised.drafts == 1
    assert not planned(Workload(), tried={1: 1.0}).pays, "that many drafts were run with little certainty"


def test_the_fewest_of_about_equal_drafts_are_advised() -> None:
    flat = Costs(((1, 0.010), (64, 0.010)))
    for second, drafts in ((0.0, 1), (0.01, 1), (0.02, 2)):  # tokens a round: 1.8, and 1.808 or 1.816
        profile = replace(PROFILE, conditional=(0.8, second, 0.0))
        made = make_plan([Candidate("x", profile, flat, 3, 0.05)], flat, Workload())
        assert made.advised.drafts == drafts


def test_what_would_change_it_moves_the_part_that_it_names() -> None:
    work = Workload()
    made = planned(work)
    drafts = made.advised.drafts
    told = {one.what: one for one in made.sensitivities}

    def speedup(costs: Costs, profile: Profile = PROFILE) -> float:
        return forecast("x", drafts, profile, costs, work).speedup

    free = replace(COSTS, step=0.0, step_drafting=0.0)
    assert told["drafting takes half the time"].speedup == pytest.approx(speedup(replace(COSTS, draft_fixed=0.001)))
    assert told["drafting takes twice the time"].speedup == pytest.approx(speedup(replace(COSTS, draft_fixed=0.004)))
    assert told["no bookkeeping"].speedup == pytest.approx(speedup(free))
    less, more = (told[f"verifying costs {how} beyond a plain pass"].speedup for how in ("nothing", "twice as much"))
    assert more < made.advised.speedup < less
    for sign, share in (("-", 0.75), ("+", 1.25)):
        moved = _accepts(PROFILE, share)
        assert moved.accepted(3) == pytest.approx(share * PROFILE.accepted(3))
        assert told[f"accepted drafts {sign}25 %"].speedup == pytest.approx(speedup(COSTS, moved))


def test_more_drafts_than_are_offered_are_never_accepted() -> None:
    assert _accepts(Profile((0.95, 0.95)), 1.25).accepted(2) == pytest.approx(0.999 * 2)
    assert _accepts(Profile((0.5, 0.8), offered=(0.6, 0.5)), 4).accepted(2) == pytest.approx(0.999 * 1.1)


def test_what_makes_plain_decoding_better_changes_the_answer() -> None:
    """Drafting takes 5 of 19 ms here: taking twice that, it no longer pays for certain; half of it changes nothing."""
    made = planned(Workload(), costs=replace(COSTS, draft_fixed=0.005))
    told = {one.what: one for one in made.sensitivities}
    assert made.pays and not told["no bookkeeping"].changes
    twice = told["drafting takes twice the time"]
    assert twice.changes and twice.best == "plain decoding" and twice.best_speedup == 1


def test_passes_on_a_described_machine_by_hand() -> None:
    """Reading decides: 1 GB/s, and a processor so fast that multiplying takes no time."""
    machine = Machine.read("bandwidth=1,bandwidth_share=1,tflops=1e6,flops_share=1,pass_ms=0,tile=1")
    costs = Roofline(machine, TARGET)
    weights = TARGET.matrix_parameters * 2
    assert costs.verify(3, 1, 0) == pytest.approx(weights / 1e9)
    assert costs.verify(3, 1, 1000) == pytest.approx((weights + 1000 * TARGET.cache_bytes) / 1e9)
    one = DrafterShape.read("draft_model,parameters=1e6,drafts=4,profile=0.9")
    assert Roofline(machine, TARGET, one).draft(1, 3) == pytest.approx(3 * 1e6 * 2 / 1e9)
    block = DrafterShape.read("dspark,drafts=4,profile=0.9,layers=1,markov_rank=16")
    read = (block.multiplied(TARGET) + 3 * 1000 * 16) * 2
    assert Roofline(machine, TARGET, block).draft(1, 3) == pytest.approx(read / 1e9)
    lookup = DrafterShape.read("ngram,drafts=4,profile=0.5")
    assert Roofline(machine, TARGET, lookup).draft(5, 3) == pytest.approx(5 * LOOKUP_SECONDS)
    timed = DrafterShape.read("dspark,drafts=4,profile=0.9,draft_ms=2,draft_each_ms=0.5")
    assert Roofline(machine, TARGET, timed).draft(8, 3) == pytest.approx(0.0035)


def test_a_described_drafter_reads_prompts_too() -> None:
    """1 GB/s decides: a draft model's pass over each chunk, with what it has cached; a block's projections alone."""
    machine = Machine.read("bandwidth=1,bandwidth_share=1,tflops=1e6,flops_share=1,pass_ms=0,tile=1")
    model = DrafterShape.read("draft_model,parameters=1e6,layers=2,drafts=4,profile=0.9")
    eagle = DrafterShape.read("eagle3,drafts=4,profile=0.9")
    block = DrafterShape.read("dflash,drafts=4,profile=0.9,bytes=1")
    fused = 256**2
    for drafter, read in (
        (model, 2 * 1e6 * 2 + 512 * 2 * 2 * 2 * 64 * 2),  # two passes; keys and values of two layers, 2 bytes each
        (eagle, 2 * (TARGET.layer_parameters + 3 * fused) * 2 + 512 * 2 * 2 * 64 * 2),
        (block, 2 * (5 * 2 * 256 * 2 * 64 + 5 * fused)),
        (DrafterShape.read("suffix,profile=0.5"), 0),
        (DrafterShape.read("draft_model,draft_ms=2,profile=0.9"), 0),
    ):
        costs = Roofline(machine, TARGET, drafter)
        plain = costs.verify(512, 1, 0) + costs.verify(88, 1, 512)
        assert costs.prompt(600, False) == pytest.approx(plain), "in passes of 512 and 88 tokens"
        assert costs.prompt(600, True) - plain == pytest.approx(read / 1e9), drafter.kind
    slow = Machine.read("bandwidth=1e6,bandwidth_share=1,tflops=0.001,flops_share=1,pass_ms=0,tile=1")
    costs, attended = Roofline(slow, TARGET, model), 4 * 2 * (4 * 64) * 512 * 88
    more = costs.prompt(600, True) - costs.prompt(600, False)
    assert more == pytest.approx((2 * 1e6 * 600 + attended) / 1e9, rel=1e-3), "multiplying decides"
    work = Workload(prompt=600, answer=100)
    made = forecast("x", 2, PROFILE, costs, work)
    assert made.first_token == pytest.approx(costs.prompt(600, True))


def test_multiplying_on_a_described_machine_is_done_in_tiles() -> None:
    machine = Machine.read("bandwidth=1e6,bandwidth_share=1,tflops=0.001,flops_share=1,pass_ms=0,tile=8")
    costs = Roofline(machine, TARGET)
    assert costs.verify(3, 1, 0) == pytest.approx(2 * TARGET.active(1) * 8 / 1e9, rel=1e-3)
    attended = 4 * 4 * (4 * 64) * 600 * 6 / 2  # layers, width of the heads, cached tokens of each row, new tokens
    assert costs.verify(6, 2, 600) == pytest.approx((2 * TARGET.active(1) * 8 + attended) / 1e9, rel=1e-3)
    block = DrafterShape.read("dflash,drafts=8,profile=0.9,layers=1")
    weights = block.multiplied(TARGET)
    assert Roofline(machine, TARGET, block).draft(3, 8) == pytest.approx(2 * weights * 24 / 1e9, rel=1e-3)


def test_shares_and_experts_of_a_described_machine() -> None:
    machine = Machine.read(
        "bandwidth=1,bandwidth_share=0.5,tflops=0.001,flops_share=0.25,pass_ms=1,step_ms=2,drafting_ms=3"
    )
    mixed = replace(TARGET, experts=8, experts_used=2, expert_parameters=2e6)
    costs = Roofline(machine, mixed)
    read, multiplied = mixed.touched(3) * 2 / 0.5e9, 2 * mixed.active(3) / 0.25e9
    assert costs.verify(3, 1, 0) == pytest.approx((read**4 + multiplied**4) ** 0.25 + 0.001)
    assert [costs.bookkeeping(1, drafting) for drafting in (False, True)] == pytest.approx([0.002, 0.005])
    slow = Machine.read("bandwidth=1e6,bandwidth_share=1,tflops=0.001,flops_share=1,pass_ms=0")
    block = DrafterShape.read("dspark,drafts=4,profile=0.9,layers=1,markov_rank=16")
    operations = 2 * (block.multiplied(TARGET) * 3 * 2 + 2 * 1000 * 16 * 3)
    assert Roofline(slow, TARGET, block).draft(3, 2) == pytest.approx(operations / 1e9, rel=1e-3)
    assert Roofline(slow, mixed).verify(2, 1, 0) == pytest.approx(2 * mixed.active(2) / 1e9, rel=1e-3)
    small, fast = DrafterShape.read("eagle3,drafts=4,profile=0.9,bytes=0.5"), replace(slow, bandwidth=1.0, tflops=1e6)
    assert Roofline(fast, TARGET, small).draft(1, 2) == pytest.approx(2 * 0.5 * small.multiplied(TARGET) / 1e9)


def test_notes_say_what_is_missed() -> None:
    late = planned(Workload(latency=0.01, token_latency=0.001))
    (whole, each), plain = late.notes, late.plain
    assert whole == f"the latency objective of 0.01 s is missed ({late.advised.latency:.3g} s; plain decoding: " + (
        f"{plain.latency:.3g} s)"
    )
    assert late.pays and each.startswith("the objective between tokens of 0.001 s is missed (0.00")
    slow = planned(Workload(token_latency=0.001), uncertainty=5.0)
    assert slow.notes == [f"the objective between tokens of 0.001 s is missed ({plain.between_tokens:.3g} s)"]
    assert not planned(Workload(latency=1000, token_latency=1)).notes
    busy = planned(Workload(rate=100, concurrency=2))
    assert "the rate is more than plain decoding can serve here" in busy.notes


def test_costs_beyond_their_points_and_of_a_draft_model() -> None:
    costs = Costs(((1, 0.010), (2, 0.012)), draft_share=0.5, draft_row=0.001)
    assert costs.verify(5, 1, 0) == pytest.approx(0.018) and costs.verify(4095, 1, 0) == pytest.approx(8.198)
    assert costs.verify(8190, 1, 0) == pytest.approx(2 * 8.198), "in proportion, far beyond"
    assert costs.draft(2, 3) == pytest.approx(3 * 0.5 * 0.012 + 2 * 0.001) and costs.draft(2, 0) == 0


def test_cached_tokens_are_read_as_fast_as_a_measured_curve_shows() -> None:
    machine = Machine.read("bandwidth=1,tflops=10,curve=1:20/8:30")
    costs, cached = Roofline(machine, TARGET), 100 * TARGET.cache_bytes
    assert costs.verify(8, 2, 0) == pytest.approx(0.030)
    assert costs.verify(1, 1, 100) == pytest.approx(0.020 * (1 + cached / (TARGET.matrix_parameters * 2)))


def test_the_policy_follows_the_plan() -> None:
    even = Costs(((1, 0.010), (2000, 0.0101)))
    fixed = make_plan([Candidate("x", Profile((0.9,) * 3, 0.01), even, 3, 0.01)], even, Workload(prompt=1))
    assert fixed.policy == "fixed, 3 drafts" and {one.drafts for _, one in fixed.by_rows} == {3}
    assert planned(Workload()).policy == "throughput", "other numbers of rows want other drafts"
    assert replace(fixed, workload=Workload(rate=1.0)).policy == "throughput"
    assert replace(fixed, advised=fixed.plain).policy == "none"


def test_the_tables_of_rows_and_contexts_are_of_what_they_name() -> None:
    work = Workload(prompt=64, answer=100, concurrency=4, rate=2.0)
    made = make_plan([Candidate("x", PROFILE, COSTS, 3, 0.05)], COSTS, work, longest=3000)
    assert made.by_rows[-1][1].drafts == 0 == made.by_context[-1][1].drafts, "plain decoding's own figures there"
    assert [one.rows for _, one in made.by_rows] == [rows for rows, _ in made.by_rows], "closed loops of so many rows"
    assert [context for context, _ in made.by_context] == [512, 2048]
    for rows, one in made.by_rows:
        asked = replace(work, concurrency=rows, rate=0.0)
        assert one.latency == forecast("x", one.drafts, PROFILE, COSTS, asked, uncertainty=0.05).latency
    for context, one in made.by_context:
        asked = replace(work, prompt=context - 50)
        assert asked.context == context
        assert one.latency == forecast("x", one.drafts, PROFILE, COSTS, asked, uncertainty=0.05).latency


def test_a_drafter_that_does_not_fit_is_not_advised_and_that_is_said() -> None:
    drafter = DrafterShape.read("dspark,layers=2,drafts=3,profile=0.9")
    machine = Machine.read("bandwidth=100,tflops=10,memory=0.009")
    costs = Roofline(machine, TARGET)
    made = make_plan(
        described_candidates(machine, TARGET, [drafter]), costs, Workload(), target=TARGET, machine=machine
    )
    assert made.forecasts[0].pays and not made.pays and made.memory is not None and not made.memory.fits
    assert "does not fit the memory" in made.answer and any("GB are needed" in note for note in made.notes)


def test_what_would_change_it_keeps_whole_rounds_and_prompts() -> None:
    """Measured costs know how much longer whole rounds are than their parts, and what reading a prompt takes."""

    class Measured(Costs):
        def whole(self, drafts: int) -> float:
            return 1.1 if drafts else 1.0

        def prompt(self, tokens: int, drafting: bool) -> float:
            return (0.004 if drafting else 0.001) * tokens

    costs = Measured(COSTS.points, draft_fixed=0.002, step=0.001)
    made = planned(Workload(), costs=costs, uncertainty=0.01)
    told = {one.what: one.speedup for one in made.sensitivities}
    assert made.pays and made.advised.first_token == pytest.approx(0.004 * 128)
    free = Measured(COSTS.points, draft_fixed=0.002)
    expected = forecast("x", made.advised.drafts, PROFILE, free, Workload()).speedup
    assert told["no bookkeeping"] == pytest.approx(expected)
    parts = (0.002, costs.verify(1 + made.advised.drafts, 1, 0), 0.001)
    assert step_seconds(costs, 1, made.advised.drafts, 0) == pytest.approx(tuple(1.1 * part for part in parts))


def test_a_small_gain_elsewhere_changes_no_answer() -> None:
    """A second draft would gain 0.9 % where verifying costs nothing."""
    profile, costs = replace(PROFILE, conditional=(0.8, 0.02, 0.0)), Costs(((1, 0.0100), (64, 0.0163)))
    made = make_plan([Candidate("x", profile, costs, 3, 0.05)], costs, Workload())
    told = {one.what: one for one in made.sensitivities}["verifying costs nothing beyond a plain pass"]
    assert made.advised.drafts == 1 and told.best == "x, 2" and not told.changes
    assert told.best_speedup == pytest.approx(1.009 * told.speedup, rel=1e-3)


def test_what_would_change_it_moves_the_reading_of_the_drafters_cache() -> None:
    class Reading(Costs):
        share = 1.0

        def draft_cache(self, drafts: int, context: int) -> float:
            return self.share * 1e-6 * drafts * context

    class Twice(Reading):
        share = 2.0

    work = Workload(prompt=1000)
    made = planned(work, costs=Reading(COSTS.points, draft_fixed=0.002), uncertainty=0.01)
    told = {one.what: one.speedup for one in made.sensitivities}
    expected = forecast("x", made.advised.drafts, PROFILE, Twice(COSTS.points, draft_fixed=0.004), work).speedup
    assert made.pays and told["drafting takes twice the time"] == pytest.approx(expected)
