"""Drafts that come from elsewhere than the drafter, put into its proposal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from outrider.sampling.distribution import Categorical, Processed
from outrider.types import Distribution, Proposal

__all__ = ["relaid", "with_drafts"]


def with_drafts(proposal: Proposal, drafts: Mapping[int, Sequence[int]], confidence: float) -> Proposal:
    """The proposal with these drafts in rows for which it has none. They are deterministic: beside rows that were
    sampled, their distribution has all mass on them. ``confidence``: of each, where the drafter reports any.

    Legend: B rows, K drafts at most.
    """
    tokens, lengths, old = proposal.arrays[0].tolist(), proposal.counts, proposal.width
    assert not any(lengths[b] for b in drafts), "a row has drafts of the drafter already"
    rows = [list(drafts[b]) if b in drafts else tokens[b][: lengths[b]] for b in range(len(lengths))]
    width = max(map(len, rows), default=0)
    distribution = proposal.distribution if any(lengths) else None
    if distribution is not None:
        distribution = relaid(distribution, len(rows), old, width, drafts)
    sure = None
    if proposal.confidence is not None or not any(lengths):
        known = [[0.0] * old] * len(rows) if proposal.confidence is None else proposal.confidence.tolist()
        values = [[confidence] * len(row) if b in drafts else known[b][: len(row)] for b, row in enumerate(rows)]
        sure = torch.tensor([row + [0.0] * (width - len(row)) for row in values]).view(len(rows), width)
    return Proposal(
        torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width),
        [len(row) for row in rows],
        distribution,
        sure,
        sampled=[0 if b in drafts else n for b, n in enumerate(lengths)],
    )


def relaid(
    distribution: Distribution, rows: int, old: int, width: int, certain: Mapping[int, Sequence[int]]
) -> Processed:
    """A proposal's distribution for another width: that of draft j of row b, which was row b * ``old`` + j, becomes row
    b * ``width`` + j. ``certain``: row -> deterministic drafts that stand in it instead, each with all mass on itself.
    Rows without a draft are meaningless."""
    if not isinstance(distribution, Processed):
        dense = distribution.dense(torch.arange(len(distribution)))
        distribution = Categorical(dense.shape[1], probabilities=dense)
    at = len(distribution)
    index = [min(b * old + min(j, old - 1), at - 1) for b in range(rows) for j in range(width)]
    added: list[int] = []
    for b, tokens in certain.items():
        index[b * width : b * width + len(tokens)] = range(at + len(added), at + len(added) + len(tokens))
        added += tokens
    if added:
        deterministic = Categorical.greedy(torch.tensor(added, dtype=torch.int64), distribution.vocab_size)
        distribution = Categorical.concatenate([distribution, deterministic])
    return distribution.take(torch.tensor(index, dtype=torch.int64))
