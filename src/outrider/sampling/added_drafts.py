"""Drafts that come from elsewhere than the drafter, put into its proposal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from outrider.sampling.distribution import Categorical, ProcessedLogits
from outrider.types import Distribution, Proposal

__all__ = ["with_drafts"]


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
        distribution = _spread(distribution, rows, drafts, old, width)
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


def _spread(
    distribution: Distribution, rows: Sequence[Sequence[int]], drafts: Mapping[int, Sequence[int]], old: int, width: int
) -> Categorical:
    """Row b * ``width`` + j: what draft j of row b was drawn from, which was row b * ``old`` + j."""
    if not isinstance(distribution, Categorical | ProcessedLogits):
        dense = distribution.dense(torch.arange(len(distribution)))
        distribution = Categorical(dense.shape[1], probabilities=dense)
    added = [token for b in sorted(drafts) for token in drafts[b]]
    certain = Categorical.greedy(torch.tensor(added, dtype=torch.int64), distribution.vocab_size)
    last, at = len(distribution) - 1, len(distribution)
    index = []
    for b in range(len(rows)):
        row = [min(b * old + min(j, old - 1), last) for j in range(width)]
        if b in drafts:
            row[: len(rows[b])] = range(at, at + len(rows[b]))
            at += len(rows[b])
        index += row
    return Categorical.concatenate([distribution, certain]).take(torch.tensor(index, dtype=torch.int64))
