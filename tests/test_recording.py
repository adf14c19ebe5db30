"""Rounds of an answer: which of them count, how they are recorded, and the questions that start them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.evaluation.recording import EvalPrompt, Round, answer, counted, observed, read_prompts, recorded, runnable

BLOCK = 3


def held(accepted: int, drafted: int = BLOCK, planned: int = BLOCK) -> Round:
    return Round(tuple([0.5] * drafted), planned, drafted, drafted, accepted, accepted + 1)


# ------------------------------------------------------------------------------------------------ which rounds count


def test_rounds_of_a_text_that_goes_on_count_as_they_are() -> None:
    rounds = [held(3), held(0), held(2)]
    assert counted(rounds, max_tokens=100, block=BLOCK) == rounds


def test_rounds_whose_draft_was_cut_to_the_budget_do_not_count() -> None:
    rounds = [held(3), held(1, drafted=2), held(0, drafted=0)]  # 12 tokens left, 8, then no room for 3 drafts and one
    assert counted(rounds, max_tokens=8, block=BLOCK) == rounds[:1]
    assert counted([held(3), held(3)], max_tokens=9, block=BLOCK) == [held(3), held(3)]  # it just fits


def test_the_round_in_which_the_text_ends_counts_up_to_its_end() -> None:
    ended = Round((0.5,) * 3, BLOCK, 3, 3, accepted=2, committed=2)  # the second draft was the end of the text
    (last,) = counted([ended], max_tokens=100, block=BLOCK)
    assert last == Round((0.5, 0.5), BLOCK, drafted=2, verified=2, accepted=2, committed=2)


def test_an_end_that_the_target_wrote_itself_changes_nothing() -> None:
    assert counted([held(1)], max_tokens=100, block=BLOCK) == [held(1)]


def test_side_by_side_rounds_are_padded_with_nan_and_empty_ones_left_out() -> None:
    cut = Round((0.2,) * 3, BLOCK, drafted=3, verified=0, accepted=0, committed=1)  # by the policy
    confidence, verified, accepted = observed([held(1), held(0, drafted=0), cut, held(2, drafted=2)])
    assert confidence[0].tolist() == [0.5] * 3 and math.isnan(confidence[1, 2])
    assert (verified.tolist(), accepted.tolist()) == ([3, 2], [1, 2])
    assert observed([]).confidence.shape == (0, 0)


# ------------------------------------------------------------------------------------------------ recording


@pytest.mark.parametrize(("policy", "options"), [("fixed", {}), ("threshold", {"threshold": 0.3})])
def test_recorded_rounds_are_those_of_the_engine(tiny_model_dir: Path, policy: str, options: dict[str, float]) -> None:
    llm = LLM(tiny_model_dir, "suffix", policy=policy, policy_options=options, dtype="float32")
    recorder = recorded(llm)
    prompt = "The dog sleeps, and the fox runs on. The dog sleeps, and the fox"
    params = SamplingParams(max_tokens=60, temperature=0.3, seed=2, ignore_eos=True)
    plain = LLM(tiny_model_dir, "none", dtype="float32").generate([prompt], params)[0]
    (output,) = llm.generate([prompt], params)
    rounds = recorder.take()
    assert output.token_ids == plain.token_ids
    assert len(rounds) == output.stats.rounds
    assert sum(r.verified for r in rounds) == output.stats.drafted > 0
    assert sum(r.accepted for r in rounds) == output.stats.accepted
    assert sum(r.committed for r in rounds) == output.stats.generated - 1
    assert all(len(r.confidence or ()) == r.drafted >= r.verified for r in rounds)
    assert recorder.take() == []


def test_several_prompts_in_one_step_are_rounds_of_their_own(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, "ngram", dtype="float32", max_rows=2)
    recorder = recorded(llm)
    outputs = llm.generate(["a b a b a b", "one two three"] * 2, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(recorder.take()) == sum(output.stats.rounds for output in outputs)


def test_an_answer_forgets_what_was_answered_before(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, "suffix", dtype="float32", policy="fixed", guard=False)
    recorder, params = recorded(llm), SamplingParams(max_tokens=40)
    first, second = (answer(llm, recorder, "The quick brown fox", params) for _ in range(2))
    assert first.rounds == second.rounds


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.1, 2.0])
def test_a_confidence_that_is_no_probability_is_refused(wrong: float) -> None:
    """NaN had been fitted: a calibration of it, and figures that are not JSON."""
    with pytest.raises(InvalidRequest, match="states a confidence of .*; expected probabilities, from 0 to 1"):
        observed([held(1), Round((0.5, wrong), 2, 2, 2, 1, 2)])


# ------------------------------------------------------------------------------------------------ questions


def test_questions_of_every_shape(tmp_path: Path) -> None:
    lines = [{"turns": ["a", "b"]}, {"id": "x", "domain": "d", "text": "t"}, {"prompt": [1, 2], "answer": [3]}]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_prompts(file) == [
        EvalPrompt("mixed-1", "mixed", "a"),
        EvalPrompt("x", "d", "t"),
        EvalPrompt("mixed-5", "mixed", [1, 2]),
    ]


@pytest.mark.parametrize(("line", "prompt"), [('{"text": ""}', ""), ('{"prompt": []}', [])])
def test_an_empty_prompt_is_one_that_cannot_be_answered(tmp_path: Path, line: str, prompt: str | list[int]) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "fine"}\n' + line)
    prompts = read_prompts(tmp_path / "some.jsonl")
    assert [p.prompt for p in prompts] == ["fine", prompt]
    good, failed = runnable(LLM(drafter="none"), prompts, SamplingParams(max_tokens=2))
    assert [p.prompt for p in good] == ["fine"] and "empty" in failed[0].error


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"turns": []}', '{"text": 3}', '{"prompt": ["a"]}'])
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InvalidRequest, match="bad.jsonl line 2.*: expected"):
        read_prompts(file)


def test_no_questions_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidRequest, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
    with pytest.raises(InvalidRequest, match="cannot read prompts"):
        read_prompts(tmp_path / "missing.jsonl")
