"""Audits of other servers: a local one, fair and with planted biases; and a copy in fewer bits of what it claims."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from simulated_server import Simulated, serving
from typer.testing import CliRunner

from outrider import LLM, SamplingParams
from outrider.cli import app
from outrider.core import native
from outrider.proof.alternatives import Bets, alternatives_of
from outrider.proof.completion_server import Completion, CompletionServer, SampledToken
from outrider.proof.reference_check import SeededDraws, TokenNames, add_answer
from outrider.proof.server_checks import ServerAudit
from outrider.proof.two_sample import counts, first_token, mmd

RUN = CliRunner()
PROMPTS = (
    "Question: Tom has 3 apples and buys 4 more. How many?\nAnswer:",
    "def read(path):\n",
    "Once upon a time there was",
)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(drafter="suffix", max_rows=8)


@pytest.fixture(scope="module")
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture(scope="module")
def fair(llm: LLM, stack: ExitStack) -> str:
    return stack.enter_context(serving(Simulated(llm)))


# ------------------------------------------------------------------------------------------------ whole audits


@pytest.mark.parametrize("bias", ["top-p", "temperature", "greedy"])
@pytest.mark.slow
def test_planted_biases_are_found(llm: LLM, stack: ExitStack, bias: str) -> None:
    server = CompletionServer(stack.enter_context(serving(Simulated(llm, bias))))
    audit = ServerAudit(server, None, PROMPTS)
    check = audit._own_logprobs(server, bias)
    assert not check.passed and check.figures["samples"] < audit.tokens, check.found


def test_a_server_that_cuts_the_tail_is_found_soon(llm: LLM, stack: ExitStack) -> None:
    server = CompletionServer(stack.enter_context(serving(Simulated(llm, "top-p"))))
    check = ServerAudit(server, None, PROMPTS)._own_logprobs(server, "top-p")
    assert not check.passed and check.figures["samples"] < 8000
    assert check.figures["likeliest_alternative"].startswith("top-p")


def test_a_fair_server_passes_against_its_baseline(fair: str) -> None:
    server = CompletionServer(fair)
    audit = ServerAudit(server, server, PROMPTS, max_tokens=20, tokens=600, answers=5, tied_answers=5)
    checks = {check.name: check for check in audit.checks()}
    assert all(check.passed for check in checks.values()) and len(checks) == 7
    assert checks["own log-probabilities"].figures["samples"] >= 600
    assert checks["greedy text equals the baseline's"].figures["equal"] == len(PROMPTS)


def test_greedy_text_of_another_model_is_a_fault(fair: str, stack: ExitStack) -> None:
    other = stack.enter_context(serving(Simulated(LLM("embedded-draft", drafter="none"))))
    audit = ServerAudit(CompletionServer(other), CompletionServer(fair), PROMPTS, max_tokens=24)
    checks = audit.checks()
    assert next(checks).passed  # usage
    greedy = next(checks)
    assert not greedy.passed and greedy.figures["faults"] > 0


def test_a_server_without_logprobs_needs_a_baseline(llm: LLM, stack: ExitStack) -> None:
    silent = stack.enter_context(serving(Simulated(llm, logprobs=False)))
    checks = list(ServerAudit(CompletionServer(silent), None, PROMPTS, max_tokens=8).checks())
    assert not checks[-1].passed and "baseline is needed" in checks[-1].found
    with_baseline = ServerAudit(CompletionServer(silent), CompletionServer(silent), PROMPTS, max_tokens=8)
    assert [check.name for check in with_baseline.checks()][-1] == "sampled text, maximum mean discrepancy"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "localhost:8000"], "expected an address like"),
        (["--url", "http://127.0.0.1:1"], "is the server running"),
        (["--baseline-url", "http://127.0.0.1:1"], "need --url"),
        (["--url", "http://127.0.0.1:1", "--shared-seeds"], "needs --reference"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str) -> None:
    result = RUN.invoke(app, ["audit", *words])
    assert result.exit_code == 2 and message in result.output


# ------------------------------------------------------------------------------------------------ reference


@pytest.mark.skipif(native is None, reason="quantised weights need the compiled core")
@pytest.mark.parametrize("how", ["shared seeds", pytest.param("likelihood", marks=pytest.mark.slow)])
def test_a_copy_in_four_bits_is_told_from_its_original(llm: LLM, how: str) -> None:
    """Within 1,200 tokens with shared seeds, 4,000 by likelihood; the original is not taken for it."""
    original = LLM(drafter="none", dtype="bfloat16", max_rows=8)
    copy = LLM(drafter="none", dtype="int4", max_rows=8)
    most = 1200 if how == "shared seeds" else 4000
    for server, is_copy in ((original, False), (copy, True)):
        bets, draws, asked = Bets(), SeededDraws(), 0
        while max(bets.samples, draws.samples) < most and max(bets.log_value, draws.log_value) < np.log(1000):
            seeds = range(asked, asked + 8)
            params = [SamplingParams(max_tokens=48, temperature=1.0, seed=s, ignore_eos=True) for s in seeds]
            prompts = [llm.encode(PROMPTS[s % 3]) for s in seeds]
            for prompt, output, one in zip(prompts, server.generate(prompts, params), seeds, strict=True):
                if how == "shared seeds":
                    draws.add(original.target, prompt, output.token_ids, one)
                else:
                    add_answer(bets, original.target, {"int4": copy.target}, prompt, output.token_ids)
            asked += 8
        assert (max(bets.log_value, draws.log_value) >= np.log(1000)) == is_copy
        assert is_copy or draws.wrong == 0


def test_the_reference_of_a_server_through_the_command_line(fair: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in PROMPTS))
    words = ["audit", "--url", fair, "--reference", "embedded", "--shared-seeds", "--prompts", str(prompts)]
    result = RUN.invoke(app, [*words, "--tokens", "300", "--json", "-"])
    checks = {check["name"]: check for check in json.loads(result.stdout)["tiers"][1]["checks"]}
    assert result.exit_code == 0, result.output
    assert checks["draws of shared seeds"]["wrong"] == 0 and checks["draws of shared seeds"]["samples"] > 250


def test_names_of_tokens(llm: LLM) -> None:
    names = TokenNames(llm.tokenizer)
    ids = llm.encode("def read(path):")
    tokens = [SampledToken(llm.tokenizer.decode([token]), -1.0, ()) for token in ids]
    broken = [*tokens[:2], SampledToken("\ufffd", -1.0, ()), *tokens[2:]]
    assert names.tokens(Completion("", tuple(tokens), None, {})) == ids
    assert names.tokens(Completion("", tuple(broken), None, {})) == [*ids[:2], -1]
    assert not names.ambiguous(llm.target.spec.vocab_size)[ids].any()


# ------------------------------------------------------------------------------------------------ statistics


def test_bets_are_distributions() -> None:
    generator = np.random.default_rng(0)
    p = -np.sort(-generator.dirichlet(np.ones(6), 40), 1)
    for rest in (True, False):
        for name, q in alternatives_of(p, rest, np.arange(40)).items():
            assert q.shape == p.shape and (q >= 0).all() and q.sum(1) == pytest.approx(np.ones(40)), name


def test_bets_have_mean_one_and_find_what_they_are_for() -> None:
    """The expected ratio under the stated probabilities is 1, exactly; a sharper sampler is found."""
    generator = np.random.default_rng(1)
    p = -np.sort(-generator.dirichlet(np.ones(6), 3000), 1)
    for name, q in alternatives_of(p, False, np.arange(3000)).items():
        assert (p * (q / p)).sum(1) == pytest.approx(np.ones(3000)), name
    sharp = p**1.25 / (p**1.25).sum(1, keepdims=True)
    for q, caught in ((p, False), (sharp, True)):
        columns = (q.cumsum(1) < generator.random((3000, 1))).sum(1).clip(max=5)
        bets = Bets()
        bets.add(p, False, columns, np.arange(3000))
        assert (bets.log_value > np.log(1000)) == caught


def test_two_sample_tests_tell_samples_apart_and_keep_their_level() -> None:
    generator = np.random.default_rng(2)

    def words(probability: float, prompts: int = 6, n: int = 10) -> list[list[str]]:
        drawn = generator.random((prompts, n, 12)) < probability
        return [["".join("ab"[int(bit)] for bit in row) for row in prompt] for prompt in drawn]

    assert mmd(words(0.5), words(0.9))[1] < 1e-3
    assert (
        counts([[w[0] for w in p] for p in words(0.2, n=30)], [[w[0] for w in p] for p in words(0.8, n=30)])[1] < 1e-3
    )
    values = [mmd(words(0.5, 2), words(0.5, 2))[1] for _ in range(20)]
    assert min(values) > 1e-3 and 0.2 < float(np.mean(values)) < 0.8
    same = generator.normal(size=(12, 4)) * 0.01
    assert first_token(same, same + generator.normal(size=same.shape) * 0.01)[1] > 1e-3
    assert first_token(same, same + 0.1)[1] < 1e-3
