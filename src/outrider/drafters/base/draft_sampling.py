"""Drawing drafts step by step, each from its own distribution, and the proposal they make.

n rows that draft, B rows of the step, K drafts, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from outrider.drafters.base.network import DraftNet, rowwise
from outrider.sampling.distribution import Categorical, Processed
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng
from outrider.types import Context, Drafts, Proposal, Rng

__all__ = ["Drawing", "draft_keys", "packed_proposal"]


class Drawing:
    """Draws one draft after another for some rows, each from its own distribution, and remembers the distributions."""

    def __init__(self, net: DraftNet, context: Context, rng: Rng, lengths: Sequence[int]) -> None:
        """``lengths`` of all B rows; those above 0 take part."""
        self._net, self._context, self._rng = net, context, rng
        self._lengths = lengths
        self.rows = torch.tensor([b for b, n in enumerate(lengths) if n], dtype=torch.int64)
        self._positions = torch.tensor([len(context.history[b]) for b in self.rows.tolist()], dtype=torch.int64)
        self.tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        self._distributions: list[Processed] = []
        self._logits: list[Tensor] = []
        self._whole: Processed | None = None  # of all positions, where they were drawn at once

    def draw(self, logits: Tensor) -> Tensor:
        """The next draft of each row that takes part. [n, Vd] -> int64 [n], target ids."""
        step, rows = len(self._distributions), self.rows
        depth = torch.full_like(rows, step)
        distribution = process(self._net.spread(logits), self._context, rows, depth, drafted=self.tokens)
        drawn = self._net.backend.sample(distribution, self._rng.token_keys(rows, self._positions + step, "draft"))
        self.tokens[rows, step] = drawn
        self._distributions.append(distribution)
        self._logits.append(logits)
        return drawn

    def draw_all(self, logits: Tensor) -> None:
        """All drafts, from logits that do not depend on the drafts before them. [n, K, Vd]"""
        count, drafts, _ = logits.shape
        if self.stepwise:
            for step in range(drafts):
                self.draw(logits[:, step])
            return
        rows = self.rows.repeat_interleave(drafts)
        self._whole = process(self._net.spread(logits.flatten(0, 1)), self._context, rows)
        self.tokens[self.rows] = self._net.backend.sample(self._whole, self.keys().flatten()).view(count, drafts)
        self._logits = list(logits.unbind(1))

    @property
    def stepwise(self) -> bool:
        """See ``Context.stepwise``: penalties and grammars depend on the drafts before, whatever the logits do."""
        return self._context.stepwise

    def keys(self) -> Tensor:
        """Of all drafts of each row that takes part, int64 [n, K]; zeros where nothing is sampled."""
        drafts = self.tokens.shape[1]
        if not any(p.temperature for p in self._context.params):
            return torch.zeros(len(self.rows), drafts, dtype=torch.int64)
        positions = self._positions[:, None] + torch.arange(drafts)
        rows = self.rows.repeat_interleave(drafts)
        return self._rng.token_keys(rows, positions.flatten(), "draft").view(-1, drafts)

    def margins(self) -> Tensor:
        """A confidence for drafters without a confidence head: sigmoid(the largest logit - the second), for each draft.
        It does not depend on the draft itself nor on later ones. float32 [n, K]"""
        logits = torch.stack(self._logits, 1)
        if logits.shape[-1] == 1:  # of a draft vocabulary of one token
            return torch.ones(logits.shape[:-1])
        best = logits.topk(2, -1).values.float()
        return rowwise(torch.sigmoid, best[..., 0] - best[..., 1])

    def proposal(self, confidence: Tensor | None = None) -> Proposal:
        """``confidence`` float32 [n, K] of the rows that took part."""
        lengths = torch.tensor(self._lengths, dtype=torch.int64)
        count, drafts = self.tokens.shape
        if confidence is not None and len(confidence) < count:
            confidence = confidence.new_zeros(count, drafts).index_copy(0, self.rows, confidence)
        return Proposal(self.tokens, lengths, self._distribution(count, drafts), confidence)

    def _distribution(self, count: int, drafts: int) -> Processed | None:
        distributions = self._distributions if self._whole is None else [self._whole]
        if all(distribution.is_greedy for distribution in distributions):
            return None
        distribution = Categorical.stack(distributions) if self._whole is None else self._whole
        if len(self.rows) == count:
            return distribution
        # Rows that drafted nothing point to 0, which is never read.
        index = torch.zeros(count, drafts, dtype=torch.int64)
        index[self.rows] = torch.arange(len(distribution)).view(-1, drafts)
        return distribution.take(index.flatten())


def draft_keys(rows: Sequence[int], drafts: int, context: Context, rng: Rng) -> list[list[int]]:
    """The keys of all drafts of some rows, K for each."""
    if isinstance(rng, RowRng):
        return rng.token_keys_after(rows, [len(context.history[b]) for b in rows], drafts, "draft")
    owners = [b for b in rows for _ in range(drafts)]
    positions = [len(context.history[b]) + k for b in rows for k in range(drafts)]
    both = torch.from_numpy(np.array([owners, positions], np.int64))  # numpy reads lists several times faster
    return rng.token_keys(both[0], both[1], "draft").view(len(rows), drafts).tolist()


def packed_proposal(drafts: Drafts, rows: Sequence[int], lengths: list[int], vocab_size: int) -> Proposal:
    """What a backend drafted for ``rows``, as the proposal of all rows; ``lengths`` [B]."""
    tokens, confidence = drafts.tokens, drafts.confidence
    distribution: Processed | None = None
    if drafts.logits is not None:
        distribution = Categorical(vocab_size, ids=drafts.ids, logits=drafts.logits)
    if len(rows) < len(lengths):  # rows that drafted nothing point to the first draft, which is never read
        index = np.zeros(len(lengths), np.int64)
        index[list(rows)] = np.arange(len(rows))
        tokens, confidence = tokens[index], confidence[index]
        if distribution is not None:
            count = drafts.tokens.shape[1]
            distribution = distribution.take(torch.from_numpy((index[:, None] * count + np.arange(count)).ravel()))
    return Proposal(tokens, lengths, distribution, confidence)
