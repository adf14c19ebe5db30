"""Values that pass between packages: their forms say the same."""

from __future__ import annotations

import pytest
import torch

from outrider.types import Proposal, RaggedBatch, Verification, finds_largest


@pytest.mark.parametrize("rows", [[], [[5]], [[1, 2, 3], [], [7]]])
def test_a_batch_says_the_same_as_lists_and_tensors(rows: list[list[int]]) -> None:
    batch = RaggedBatch.pack(rows, list(range(len(rows))), list(range(3, 3 + len(rows))))
    again = RaggedBatch(batch.tokens, batch.positions, batch.slots, batch.offsets)
    for one in (batch, again):
        assert len(one) == len(one.tokens) == sum(map(len, rows))
        assert one.lists == tuple(part.tolist() for part in one.tensors)
    assert batch.lists == again.lists
    assert batch.lengths.tolist() == [len(row) for row in rows]


def test_a_verification_says_the_same_as_lists_and_tensors() -> None:
    accepted, tokens = [0, 2], [[7, 1, 2], [1, 2, 9]]
    made = Verification.of_lists(accepted, tokens)
    again = Verification(made.accepted, made.tokens, made.lengths)
    assert again.lists == (accepted, tokens)
    assert made.lengths.tolist() == [1, 3]
    of = Verification.of(torch.tensor(accepted), torch.tensor([[1, 2], [1, 2]]), torch.tensor([7, 9]))
    assert of.accepted.tolist() == accepted
    assert of.tokens[1].tolist() == tokens[1]


def test_a_proposal_says_the_same_from_lists_arrays_and_tensors() -> None:
    made = Proposal.pack([[4, 5], [], [6]], [[0.5, 0.25], [], [0.75]])
    again = Proposal(made.tokens, made.lengths, None, made.confidence)
    for one in (made, again):
        tokens, confidence = one.arrays
        assert tokens.tolist() == one.tokens.tolist() == [[4, 5], [0, 0], [6, 0]] and one.width == 2
        assert one.counts == one.lengths.tolist() == [2, 0, 1]
        assert one.confidence is not None and confidence is not None
        assert confidence.tolist() == one.confidence.tolist() == [[0.5, 0.25], [0.0, 0.0], [0.75, 0.0]]
        assert one.tokens.dtype == one.lengths.dtype == torch.int64 and one.confidence.dtype == torch.float32
    empty = Proposal.empty(2)
    assert (empty.counts, empty.width, empty.arrays[1], empty.confidence) == ([0, 0], 0, None, None)
    assert empty.tokens.shape == (2, 0)


def test_largest_logits_are_found_where_flag_and_forward_both_say_so() -> None:
    class Finds:
        finds_largest = True

        def forward(self, batch: RaggedBatch, largest: bool = False) -> None: ...

    class FindsNot(Finds):
        finds_largest = False

    class Overridden(Finds):
        def forward(self, batch: RaggedBatch) -> None: ...  # type: ignore[override]

    assert finds_largest(Finds())
    assert not any(map(finds_largest, (FindsNot(), Overridden(), object())))
