"""Drafts from an expected text: what is proposed, in which form, and that the output stays the target's own."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams
from outrider.engine.llm import LLM
from outrider.engine.predicted_text import PredictedText
from outrider.sampling.added_drafts import with_drafts
from outrider.sampling.distribution import Categorical
from outrider.types import Proposal

PROMPTS = ["def add(a, b):\n    return a", "It was a dark", "Tom has 3 boxes"]


def test_it_follows_the_output_and_finds_it_again() -> None:
    text = PredictedText(range(100, 120))
    history = [1, 2]
    assert text.drafts(history, 2, 3) == [100, 101, 102]
    history += [100, 101]
    assert text.drafts(history, 2, 3) == [102, 103, 104]
    history += [7]  # the output leaves the text
    assert text.drafts(history, 2, 3) == []
    history += [104, 105]
    assert text.drafts(history, 2, 3) == []  # two tokens agree: not enough
    history += [106]
    assert text.drafts(history, 2, 3) == [107, 108, 109]
    history += range(107, 119)
    assert text.drafts(history, 2, 3) == [119]
    assert text.drafts([*history, 119], 2, 3) == []  # the text is over


def test_of_several_occurrences_the_next_one_is_taken() -> None:
    text = PredictedText([1, 2, 3, 50, 9, 1, 2, 3, 60, 8, 1, 2, 3, 70])
    assert text.drafts([0, 1, 2, 3, 50, 9, 77, 1, 2, 3], 1, 1) == [60]


def test_added_drafts_have_all_mass_beside_sampled_ones() -> None:
    logits = torch.randn(4, 6)
    sampled = Proposal(torch.tensor([[2, 3], [0, 0]]), torch.tensor([2, 0]), Categorical.of(logits))
    both = with_drafts(sampled, {1: [4, 5, 1]}, 0.9)
    assert both.tokens.tolist() == [[2, 3, 0], [4, 5, 1]] and both.lengths.tolist() == [2, 3]
    assert both.distribution is not None and both.confidence is None
    dense = both.distribution.dense(torch.arange(6))
    assert torch.equal(dense[:2], torch.softmax(logits[:2], -1))
    assert torch.equal(dense[3:], torch.eye(6)[[4, 5, 1]])
    alone = with_drafts(Proposal.empty(2), {0: [4]}, 0.9)
    assert alone.distribution is None and alone.confidence is not None and alone.confidence[0, 0] == torch.tensor(0.9)


@pytest.mark.parametrize("drafter", ["suffix", "draft_model"])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.8, seed=4)], ids=["greedy", "coupled"]
)
def test_the_output_is_the_same_in_fewer_rounds(drafter: str, params: SamplingParams) -> None:
    llm = LLM("embedded", drafter, policy="fixed", guard=False)
    alone = llm.with_drafter("none").generate(PROMPTS, params)
    wrong = [alone[2].token_ids, (), alone[2].token_ids]  # the first one expects another answer, the second one none
    for expected in ([output.token_ids for output in alone], wrong):
        requests = [
            llm.engine.submit(llm.encode(prompt), params, params.seed or 0, i, expected[i])
            for i, prompt in enumerate(PROMPTS)
        ]
        llm.engine.wait(requests)
        assert [request.output for request in requests] == [output.token_ids for output in alone]
        assert requests[2].stats.rounds < alone[2].stats.rounds / 4


def test_sampled_rows_beside_an_expected_text_keep_their_distribution() -> None:
    """A row whose neighbour is drafted from a text writes what it writes alone: its random numbers and distributions
    are its own."""
    llm = LLM("embedded", "draft_model", policy="fixed", guard=False)
    params = SamplingParams(temperature=1.0, seed=9, rule="rejection")
    prompt = llm.encode(PROMPTS[1])
    alone = llm.engine.submit(prompt, params, 9)
    llm.engine.wait([alone])
    text = llm.with_drafter("none").generate(PROMPTS[0])[0].token_ids
    beside = llm.engine.submit(prompt, params, 9)
    other = llm.engine.submit(llm.encode(PROMPTS[0]), SamplingParams(), 1, 1, text)
    llm.engine.wait([beside, other])
    assert beside.output == alone.output and other.output == text
