"""Log-probabilities of committed tokens: against a softmax of the target's own pass, and the same with any drafter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outrider.config import Grammar, SamplingParams
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.sampling.logprobs import token_logprobs
from outrider.types import Piece, RaggedBatch

PROMPT = "def add(a, b):\n    return a"
OPTIONS = [
    SamplingParams(max_tokens=40, logprobs=3),
    SamplingParams(max_tokens=40, logprobs=3, temperature=0.7, top_k=20, seed=3, logit_bias=((5, 2.0),)),
    SamplingParams(max_tokens=40, logprobs=0, temperature=1.0, seed=3, repetition_penalty=1.2, min_p=0.05),
]


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("embedded", "none")


def pieces(llm: LLM, params: SamplingParams) -> list[Piece]:
    return [piece for event in llm.stream(PROMPT, params) for piece in event.pieces]


@pytest.mark.parametrize("drafter", ["suffix", "draft_model", "eagle3", "dspark"])
@pytest.mark.parametrize("params", OPTIONS, ids=["greedy", "truncated", "penalised"])
def test_they_are_the_same_with_any_drafter(plain: LLM, drafter: str, params: SamplingParams) -> None:
    drafted = pieces(plain.with_drafter(drafter), params)
    alone = pieces(plain, params)
    assert [(p.token_id, p.logprobs) for p in drafted] == [(p.token_id, p.logprobs) for p in alone]
    assert all(p.draft is None for p in alone) and (params.temperature or any(p.drafted for p in drafted))
    for p in drafted:
        assert (p.draft is not None) == p.drafted
        if p.draft is not None and p.draft.probability is not None:
            assert 0 < p.draft.probability <= 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, False),
        ({"temperature": 1.0, "seed": 3}, True),
        ({"temperature": 1.0, "rule": "coupled", "grammar": Grammar("regex", " the answer is forty-two[.]")}, False),
        ({"temperature": 1.0, "rule": "block", "grammar": Grammar("regex", " the answer is forty-two[.]")}, False),
    ],
    ids=["greedy", "an expected text", "forced, coupled", "forced, block"],
)
def test_drafts_that_were_not_sampled_have_no_probability_beside_those_that_were(
    plain: LLM, options: dict[str, Any], expected: bool
) -> None:
    engine = plain.with_drafter("draft_model").engine
    params = SamplingParams(max_tokens=20, logprobs=0, **options)
    prompt, text = plain.encode(PROMPT), []
    if expected:
        text = plain.generate(PROMPT, params)[0].token_ids
    alone = engine.submit(prompt, params, 3, expected=text)
    engine.wait([alone])
    request = engine.submit(prompt, params, 3, expected=text)
    beside = engine.submit(prompt, SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True), 5)
    engine.wait([request, beside])
    first, same = (
        [p.draft.probability for event in one.events for p in event.pieces if p.draft is not None]
        for one in (alone, request)
    )
    assert None in first and same == first


@pytest.mark.parametrize("drafter", ["none", "suffix", "dspark"])
def test_greedy_text_is_the_same_without_them(plain: LLM, drafter: str) -> None:
    """Where nobody asks for them, a greedy pass gives its largest logits alone."""
    llm = plain.with_drafter(drafter)
    params = SamplingParams(max_tokens=60)
    asked = [p.token_id for p in pieces(llm, SamplingParams(max_tokens=60, logprobs=0))]
    assert [p.token_id for p in pieces(llm, params)] == asked
    sampled, changed = (
        SamplingParams(max_tokens=60, temperature=1.0),
        SamplingParams(max_tokens=60, logit_bias=((5, 2.0),)),
    )
    for beside in (sampled, changed):  # in one pass with rows whose logits are needed
        other, greedy = llm.run(PROMPT, beside), llm.run(PROMPT, params)
        assert [p.token_id for e in greedy.events() for p in e.pieces] == asked
        list(other.events())


def test_they_are_a_softmax_of_the_targets_logits(plain: LLM) -> None:
    found = pieces(plain, OPTIONS[0])
    prompt = plain.encode(PROMPT)
    text = prompt + [p.token_id for p in found]
    cache = plain.target.new_cache(1, len(text))
    slot = cache.open()
    with torch.inference_mode():
        logits = plain.target.forward(RaggedBatch.pack([text], [0], [slot]), cache).logits.double()
    expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    for row, piece in zip(expected, found, strict=True):
        assert piece.logprobs is not None
        assert piece.logprobs.logprob == pytest.approx(float(row[piece.token_id]), abs=1e-5)
        values, ids = row.topk(3)
        assert [i for i, _ in piece.logprobs.top] == ids.tolist()
        assert [p for _, p in piece.logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_ties_go_to_the_lowest_id_and_nothing_is_computed_unasked() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, -torch.inf], [0.0, 0.0, 0.0, 0.0, 0.0]])
    params = [SamplingParams(logprobs=2), SamplingParams()]
    found = token_logprobs(logits, torch.tensor([0, 1]), [[4], [0]], [0, 0], params)
    assert list(found) == [0]
    assert [token for token, _ in found[0][0].top] == [1, 2]
    assert found[0][0].logprob == -torch.inf
    assert token_logprobs(logits, torch.tensor([0, 1]), [[4], [0]], [0, 0], params[1:] * 2) == {}


@pytest.mark.parametrize("value", [-1, 101, 1.5, True, "3"])
def test_counts_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="logprobs"):
        SamplingParams(logprobs=value)  # type: ignore[arg-type]
