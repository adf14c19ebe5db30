"""Evaluating drafters: intervals with known values, figures by hand, and resumed evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TEXTS
from typer.testing import CliRunner, Result

from outrider.cli import app
from outrider.cli import eval as tables
from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import ArtefactError, InvalidRequest
from outrider.evaluation import drafter_quality as evaluation
from outrider.evaluation.comparison import MACRO, Counts, Difference, Evaluation, Row, Sample, SweepPoint, row_of
from outrider.evaluation.drafter_quality import Config, evaluate
from outrider.evaluation.intervals import Estimate, estimate, macro, share
from outrider.evaluation.recording import Round
from outrider.evaluation.speedup import _row, _Steps, bootstrap_ratio, repeated_ngrams, run_bench
from outrider.types import Output, RequestStats, StepCost, StepRecord

SMALL = Config(max_tokens=24, draws=200, temperatures=(0.0,))


def outrider(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sets of three prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    files = [folder / "prose.jsonl", folder / "code.jsonl"]
    for file, text in zip(files, (TEXTS[0], TEXTS[1]), strict=True):
        lines = [{"turns": [text * 2 + text[: 5 + i]]} for i in range(3)]
        file.write_text("\n".join(json.dumps(line) for line in lines))
    return files


# ------------------------------------------------------------------------------------------------ intervals


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(2, 1, 400)
    found = estimate([400], lambda picks: values[picks[0]].mean(-1), draws=4000)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.high == pytest.approx(values.mean() + half, abs=0.01)


def test_intervals_have_their_coverage() -> None:
    """95 % of them, within 4 standard errors of 300 trials and the error of having only 40 prompts."""
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        lengths = generator.geometric(0.4, 40) + generator.integers(0, 2, 40)
        found = estimate([40], lambda picks, x=lengths: x[picks[0]].mean(-1), draws=300)
        assert found.low is not None and found.high is not None
        covered += found.low <= 2.5 + 0.5 <= found.high
    assert 0.95 - 0.05 - 0.03 <= covered / 300 <= 0.99


def test_domains_have_equal_weight_whatever_their_size() -> None:
    few, many = np.array([1.0, 3.0]), np.full(50, 10.0)
    found = estimate([2, 50], macro([lambda p: few[p].mean(-1), lambda p: many[p].mean(-1)]))
    assert found.value == pytest.approx((2 + 10) / 2)
    assert (found.low, found.high) == (pytest.approx(5.5), pytest.approx(6.5))  # the second domain never varies


def test_paired_differences_vary_less() -> None:
    generator = np.random.default_rng(3)
    hard = generator.normal(0, 5, 60)
    a, b = hard + 0.5 + generator.normal(0, 0.3, 60), hard
    paired = estimate([60], lambda picks: a[picks[0]].mean(-1) - b[picks[0]].mean(-1))
    alone = estimate([60], lambda picks: a[picks[0]].mean(-1))
    assert paired.excludes_zero and not alone.excludes_zero


def test_zero_over_zero_has_no_value_and_one_prompt_no_interval() -> None:
    zeros = np.zeros(3, dtype=np.int64)
    assert estimate([3], lambda picks: share(zeros, zeros, picks[0])) == Estimate(None)
    assert estimate([1], lambda picks: share(zeros[:1] + 1, zeros[:1] + 2, picks[0])) == Estimate(0.5)
    assert not Estimate(0.5).excludes_zero


def test_an_interval_needs_two_prompts_in_each_domain_and_nearly_all_resamples() -> None:
    assert estimate([1, 3], macro([lambda p: p.mean(-1), lambda p: p.mean(-1)])) == Estimate(0.5)
    ones, drafted = np.ones(6, dtype=np.int64), np.array([1, 0, 0, 0, 0, 0])
    assert estimate([6], lambda picks: share(ones * drafted, drafted, picks[0])) == Estimate(1.0)  # 0 / 0 in a third
    drafted[:] = 1, 1, 1, 0, 0, 0
    assert estimate([6], lambda picks: share(ones * drafted, drafted, picks[0])) == Estimate(1.0, 1.0, 1.0)
    assert share(ones, np.full(6, 0.125), np.array([0, 1])) == 8  # answers of less than a second


def test_an_interval_that_touches_zero_does_not_exclude_it() -> None:
    assert Estimate(1.0, 0.5, 2.0).excludes_zero and Estimate(-1.0, -2.0, -0.5).excludes_zero
    assert not Estimate(1.0, 0.0, 2.0).excludes_zero and not Estimate(-1.0, -2.0, 0.0).excludes_zero
    assert (str(Estimate(1.234)), str(Estimate(None))) == ("1.23", "-")


# ------------------------------------------------------------------------------------------------ figures


def test_figures_by_hand() -> None:
    def one(accepted: int, verified: int = 2, drafted: int = 2) -> Round:
        return Round(None, 2, drafted, verified, accepted, accepted + 1)

    samples = [Sample(7, 1.0, [one(2), one(0), one(1)]), Sample(4, 1.0, [one(1, verified=1), one(0, 0, 0)])]
    plain = [Sample(7, 2.0, []), Sample(6, 3.0, [])]  # another text, and a longer one
    row = row_of("d", 1.0, "x", [Counts.of(samples, plain, depth=2)], 100)
    assert row.acceptance_length.value == pytest.approx(9 / 5)
    assert row.without_bonus.value == pytest.approx(4 / 5)
    assert row.verify_rate.value == pytest.approx(7 / 8)
    assert row.acceptance_rate.value == pytest.approx(4 / 7)
    assert row.speedup.value == pytest.approx((11 / 2) / (13 / 5))
    assert [c.value for c in row.conditional] == [pytest.approx(3 / 4), pytest.approx(1 / 2)]
    assert [c.value for c in row.cumulative] == [pytest.approx(3 / 4), pytest.approx(1 / 3)]
    assert (row.prompts, row.rounds) == (2, 5)
    other = [Sample(2, 0.5, [one(1)])]
    both = row_of("d", 1.0, MACRO, [Counts.of(samples, plain, 2), Counts.of(other, plain[:1], 2)], 100)
    assert (both.prompts, both.rounds) == (3, 6)
    assert both.acceptance_length.value == pytest.approx((9 / 5 + 2) / 2)
    assert samples[0] + samples[1] == Sample(11, 2.0, samples[0].rounds + samples[1].rounds)


def test_a_row_of_a_benchmark_by_hand() -> None:
    """Every pair is twice as fast for each token, so the interval of the paired ratio has no width."""

    def output(tokens: int, rounds: int = 0, drafted: Sequence[int] = (), accepted: Sequence[int] = ()) -> Any:
        stats = RequestStats(rounds=rounds, drafted=sum(drafted), accepted=sum(accepted))
        stats.drafted_per_position, stats.accepted_per_position = list(drafted), list(accepted)
        return SimpleNamespace(token_ids=list(range(tokens)), stats=stats)

    outputs = {"plain": [output(4), output(60)], "fast": [output(8, 4, [4, 4], [3, 1]), output(30, 2, [4], [1])]}
    seconds = {"plain": [4.0, 60.0], "fast": [4.0, 15.0]}
    steps = {side: _Steps() for side in outputs}
    for side, scale in (("plain", 1), ("fast", 2)):
        for prompt, verify in ((True, 1.0), (False, 0.001), (False, 0.003)):
            cost = StepCost(0.002 * (scale - 1), scale * verify, 0.001, 1, 100, 0)
            steps[side].step(StepRecord((SimpleNamespace(first=prompt),), cost))  # type: ignore[arg-type]
    row = _row("d", "x", 0.0, 1, seconds, outputs, steps)
    assert row.accepted_per_position == [0.5, 0.25]  # the second answer drafted one token a round
    assert row.step_ms == {"draft": 2.0, "verify": 4.0, "bookkeeping": 1.0} and row.plain_step_ms == 3.0
    assert (row.speedup, row.speedup_ci95) == (2.0, (2.0, 2.0))
    assert (row.acceptance_length, row.drafted_per_round) == (round(1 + 5 / 6, 3), 2.0)
    assert (row.baseline_tokens_per_second, row.tokens_per_second, row.generated) == (1.0, 2.0, 38)


def test_the_interval_of_a_speedup_is_that_of_the_normal_distribution() -> None:
    plain = np.random.default_rng(4).normal(2, 1, 400)
    ratio, interval = bootstrap_ratio(plain.tolist(), [1.0] * 400, draws=8000)
    half = 1.96 * plain.std() / 20
    assert interval == pytest.approx((ratio - half, ratio + half), abs=0.005)


def test_repeated_eightgrams_by_hand() -> None:
    assert [repeated_ngrams([5] * n) for n in (7, 8, 9, 11)] == [0.0, 0.0, 0.5, 0.75]
    assert repeated_ngrams([*range(8), *range(8)]) == pytest.approx(1 / 9)


def test_figures_agree_with_the_answers(tiny_model_dir: Path, tiny_draft_dir: Path, prompts: list[Path]) -> None:
    model, draft = str(tiny_model_dir), str(tiny_draft_dir)
    found = evaluate(SMALL, [model, draft], prompts, model, dtype="float32", backend="reference")
    names = tiny_model_dir.name, tiny_draft_dir.name
    assert [(row.drafter, row.domain) for row in found.rows] == [
        (name, domain) for name in names for domain in ("prose", "code", MACRO)
    ]
    for row in found.rows:
        assert row.acceptance_length.value is not None and row.without_bonus.value is not None
        assert 0 <= row.without_bonus.value <= row.acceptance_length.value <= 1 + row.without_bonus.value
        assert row.verify_rate.value == 1
    llm = LLM(model, draft, dtype="float32", backend="reference")
    texts = [json.loads(line)["turns"][0] for line in prompts[0].read_text().splitlines()]
    stats = [llm.generate([text], SamplingParams(max_tokens=24))[0].stats for text in texts]
    own = found.rows[3]
    # The last rounds, with drafts shortened to fit 24 tokens, count in the answers' statistics only.
    assert 0 < own.rounds < sum(s.rounds for s in stats)
    its_own_target = found.rows[0]  # every draft is right, up to the end of the text
    assert its_own_target.acceptance_rate.value == 1 and its_own_target.conditional[3].value == 1
    lengths = [row.acceptance_length.value for row in found.rows[:3]]
    assert lengths[2] == pytest.approx((lengths[0] + lengths[1]) / 2)  # type: ignore[operator]
    assert [(d.drafter, d.other) for d in found.differences] == [names] * 3
    difference = found.differences[2].acceptance_length.value
    assert difference == pytest.approx(lengths[2] - found.rows[5].acceptance_length.value)  # type: ignore[operator]
    assert found.differences[2].acceptance_length.excludes_zero


def test_each_answer_has_a_seed_of_its_own_which_all_sides_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats with the same seed would be the same answers, and intervals too narrow."""
    seeds: dict[str, list[int | None]] = {"plain": [], "x": []}

    def answer(llm: Any, recorder: Any, prompt: Any, params: SamplingParams) -> SimpleNamespace:
        seeds[llm].append(params.seed)
        return SimpleNamespace(token_ids=[1, 2], seconds=0.5, rounds=[])

    monkeypatch.setattr(evaluation, "answer", answer)
    asked: Any = [SimpleNamespace(prompt="a"), SimpleNamespace(prompt="b")]
    sides: Any = {name: (name, None) for name in seeds}
    for seed in (1, 2, 3):
        found = evaluation._measure(sides, asked, SamplingParams(seed=seed), 3, lambda share: None)
        assert [(one.tokens, one.seconds) for one in found["x"]] == [(6, 1.5)] * 2
    used = {name: [seed for i, seed in enumerate(own) if i % 7] for name, own in seeds.items()}  # not of the warm-up
    assert used["plain"] == used["x"] and len(set(used["x"])) == 3 * 3 * 2


def test_a_drafter_is_known_by_the_bytes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = evaluation._content(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert before != evaluation._content(str(tmp_path)) and evaluation._content("ngram") is None


def test_what_was_measured_is_kept_for_the_same_question_alone(
    tiny_model_dir: Path, prompts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception): ...

    def parts(folder: Path | None, facts: dict[str, Any]) -> None:
        raise Asked(facts)

    monkeypatch.setattr(evaluation, "_Parts", parts)
    with pytest.raises(Asked) as asked:
        options = {"dtype": "float32", "backend": "reference", "machine": {"cores": 2}}
        evaluate(Config(limit=2), ["ngram"], prompts, str(tiny_model_dir), **options)  # type: ignore[arg-type]
    facts = asked.value.args[0]
    assert {name: facts[name] for name in options} == options and facts["target"] == str(tiny_model_dir)
    assert facts["drafters"] == {"ngram": None} and facts["prompts"] == 2 * 2


def test_a_drafter_does_not_differ_from_itself(
    tiny_model_dir: Path, tiny_draft_dir: Path, prompts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = str(tiny_draft_dir)
    labels = iter(["one", "two"] * 2)
    monkeypatch.setattr(evaluation, "_label", lambda drafter: next(labels))
    config = SMALL.model_copy(update={"temperatures": (1.0,)})
    found = evaluate(config, [draft, draft], prompts, str(tiny_model_dir), dtype="float32", backend="reference")
    assert {d.acceptance_length for d in found.differences} == {Estimate(0.0, 0.0, 0.0)}


def test_higher_thresholds_verify_less(tiny_model_dir: Path, prompts: list[Path], tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"thresholds": (0.0, 0.6, 0.9), "max_tokens": 100})
    out, model = tmp_path / "out", str(tiny_model_dir)
    found = evaluate(config, [model], prompts, model, out, dtype="float32", backend="reference")
    rates = [point.verify_rate.value for point in found.sweep]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[2] < 1  # type: ignore[type-var, operator]
    (one,) = found.confidences
    assert one.pooled.rounds == sum(quality.rounds for quality in one.positions)
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json",
        "parts",
        "positions.png",
        "reliability.png",
        "sweep.png",
    }
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(found.to_json()))


def test_an_interrupted_evaluation_resumes(
    tiny_model_dir: Path, prompts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: tuple[Any, ...] = (SMALL, ["ngram"], prompts, str(tiny_model_dir), tmp_path)
    options = {"dtype": "float32", "backend": "reference"}
    measure, calls = evaluation._measure, []

    def interrupted(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*values)

    monkeypatch.setattr(evaluation, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, **options)
    first = evaluate(*arguments, **options)
    assert len(calls) == 3  # the first set was not measured again
    assert evaluate(*arguments, **options) == first and len(calls) == 3
    other = SMALL.model_copy(update={"max_tokens": 23})
    evaluate(other, *arguments[1:], **options)
    assert len(calls) == 5


@pytest.mark.parametrize("damaged", ['{"plain": [', '{"plain": 3, "ngram": 3}', "{}", '{"plain": [{}], "ngram": []}'])
def test_a_damaged_measurement_is_named_with_what_to_do(damaged: str, tmp_path: Path) -> None:
    parts, what = evaluation._Parts(tmp_path, {}), {"sides": ["plain", "ngram"]}
    parts.get(what, lambda: {"plain": [Sample(1, 1.0, [])], "ngram": []})
    (file,) = tmp_path.iterdir()
    file.write_text(damaged)
    with pytest.raises(ArtefactError, match=rf"{file.name} is damaged: .*\. Delete it and run the same command"):
        parts.get(what, dict)


def test_a_prompt_that_is_too_long_is_left_out_and_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    texts = ["It was", "word " * 300, "def f(x):"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8-sig")
    options = ["--target", tiny_model_dir, "--dtype", "float32", "--backend", "reference", "--prompts", file]
    arguments = ("eval", "--drafter", "ngram", *options, "--max-tokens", 24, "--temperature", 0, "--json", "-")
    result = outrider(*arguments)
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert [(error["index"], error["line"]) for error in found["errors"]] == [(1, 2)]
    assert "pass the context" in found["errors"][0]["error"] and "1 of 3 prompts" in result.stderr
    assert found["rows"][0]["prompts"] == 2 and found["rows"][0]["acceptance_length"]["value"] >= 1
    strict = outrider(*arguments, "--fail-fast")
    assert strict.exit_code == 2 and "set.jsonl line 2: the prompt has" in strict.stderr
    file.write_text(json.dumps({"text": texts[1]}))
    alone = outrider(*arguments)
    assert alone.exit_code == 2 and "no prompt can be answered" in alone.stderr


def test_two_drafters_with_the_same_name_are_refused(tiny_model_dir: Path, prompts: list[Path]) -> None:
    with pytest.raises(InvalidRequest, match="given twice"):
        evaluate(SMALL, ["ngram", "ngram"], prompts, str(tiny_model_dir), dtype="float32", backend="reference")


# ------------------------------------------------------------------------------------------------ the commands


def test_the_command_prints_tables_and_json(tiny_model_dir: Path, prompts: list[Path]) -> None:
    options = ["--target", tiny_model_dir, "--dtype", "float32", "--backend", "reference", "--prompts", prompts[0]]
    result = outrider(
        "eval", "--drafter", "ngram", "--drafter", "none", *options, "--max-tokens", 16, "--no-sweep", "--json", "-"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {row["drafter"] for row in found["rows"]} == {"ngram", "none"}
    plain = [row for row in found["rows"] if row["drafter"] == "none"]
    assert all(row["acceptance_length"]["value"] == 1 and row["acceptance_rate"]["value"] is None for row in plain)
    assert "Differences of acceptance length" in result.stderr


def test_each_figure_is_shown_under_its_heading() -> None:
    seven = [Estimate(n, n - 0.5, n + 0.5) for n in range(1, 8)]
    length, drafts, verified, rate, _, _, speedup = seven
    row = Row("d", 0.5, MACRO, 3, 6, *seven, [Estimate(0.3)], [Estimate(0.2)])
    point = SweepPoint("d", 0.5, 0.25, length, verified, rate, speedup)
    found = Evaluation({}, [row], [Difference("d", "e", 0.5, MACRO, drafts)], [point], [])

    def shown(table: Any) -> list[tuple[str, str]]:
        return [(str(column.header), *column.cells) for column in table.columns]

    assert shown(tables._acceptance(found)) == [
        ("drafter", "d"),
        ("prompts", "all"),
        ("temp", "0.5"),
        ("accept", "1.00"),
        ("95 %", "0.50-1.50"),
        ("drafts", "2.00"),
        ("rate", "4.00"),
        ("tok/s", "5"),
        ("x", "7.00"),
        ("95 %", "6.50-7.50"),
    ]
    swept = {"accept": "1.00", "rate": "4.00", "verified": "3.00", "x": "7.00", "95 %": "6.50-7.50"}
    assert shown(tables._sweep(found)) == [("drafter", "d"), ("temp", "0.5"), ("threshold", "0.25"), *swept.items()]
    assert shown(tables._differences(found))[3:] == [
        ("temp", "0.5"),
        ("difference", "+2.00"),
        ("95 %", "+1.50 to +2.50"),
    ]
    assert shown(tables._positions(found)[0])[3] == ("1", "30", "20")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "blok"], "did you mean 'block'"),
        (["--temperature", "-1"], "--temperature must be between 0 (greedy) and 100"),
        (["--threshold", "2"], "--threshold must be between 0 and 1"),
        (["--draft-tokens", "0"], "--draft-tokens must be at least 1"),
        (["--prompts", "nowhere.jsonl"], "cannot read prompts"),
        (["--drafter", "ngram"], "given twice"),
    ],
)
def test_bad_input_is_one_line(tiny_model_dir: Path, options: list[str], message: str) -> None:
    result = outrider("eval", "--drafter", "ngram", "--target", tiny_model_dir, "--backend", "reference", *options)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.strip().count("\n") == 0


def test_a_benchmark_of_one_prompt_has_no_interval(tiny_model_dir: Path) -> None:
    options = ["--model", tiny_model_dir, "--backend", "reference", "--drafter", "ngram", "--temperature", "0"]
    result = outrider("bench", *options, "--limit", "1", "--max-tokens", "4", "--json", "-")
    assert [row["speedup_ci95"] for row in json.loads(result.stdout)["rows"]] == [None] * 3
    assert " - " in result.stderr and bootstrap_ratio([1.0, 1.0], [2.0, 2.0]) == (0.5, (0.5, 0.5))


def test_a_benchmark_reads_every_prompt_again_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of over a block of the cache would otherwise be read once by the side that forgets nothing."""
    plain = LLM(drafter="none", max_rows=1)
    cached: dict[int, list[int]] = {}
    generate = LLM.generate

    def watched(llm: LLM, *args: Any, **options: Any) -> list[Output]:
        done = generate(llm, *args, **options)
        cached.setdefault(id(llm), []).extend(output.stats.cached_tokens for output in done)
        return done

    monkeypatch.setattr(LLM, "generate", watched)
    prompt = [i % 500 + 5 for i in range(150)]
    assert plain.generate(prompt, SamplingParams(max_tokens=2)) and plain.generate(prompt, SamplingParams(max_tokens=2))
    assert cached[id(plain)] == [0, 128], "the cache shares prefixes"
    cached.clear()
    fast = plain.with_drafter("suffix")
    run_bench("embedded", {"suffix": fast}, plain, {"x": [prompt]}, temperatures=(0.0,), max_tokens=4, repeats=3)
    timed = {id(llm): cached[id(llm)][1:] for llm in (plain, fast)}  # after the warm-up
    assert timed == {id(plain): [0, 0, 0], id(fast): [0, 0, 0]}
