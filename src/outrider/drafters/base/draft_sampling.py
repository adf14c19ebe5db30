"""Drawing drafts step by step, each from its own distribution, and the proposal they make.

n rows that draft, B rows of the step, K drafts, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.drafters.base.network import DraftNet, rowwise
from outrider.sampling.distribution import Categorical, Processed
from outrider.sampling.processors import process
from outrider.types import Context, Proposal, Rng

__all__ = ["Drawing"]


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
        self._margins: Tensor | None = None

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
        if self.penalised:  # penalties do depend on them
            for step in range(drafts):
                self.draw(logits[:, step])
            return
        rows = self.rows.repeat_interleave(drafts)
        self._whole = process(self._net.spread(logits.flatten(0, 1)), self._context, rows)
        self.tokens[self.rows] = self._net.backend.sample(self._whole, self.keys().flatten()).view(count, drafts)
        self._logits = list(logits.unbind(1))

    @property
    def penalised(self) -> bool:
        """Whether a row's distribution depends on the tokens drafted before it by an option of its request."""
        return self._context.stepwise

    @property
    def plain(self) -> bool:
        """Whether all requests sample from softmax(logits / temperature) or greedily: no penalty, bias, truncation."""
        return not self._context.stepwise and not any(
            p.logit_bias or (p.temperature and (p.top_k or p.top_p < 1 or p.min_p)) for p in self._context.params
        )

    @property
    def temperatures(self) -> Tensor:
        """Of each row that takes part, float32 [n]."""
        return torch.tensor([self._context.params[b].temperature for b in self.rows.tolist()], dtype=torch.float32)

    def keys(self) -> Tensor:
        """Of all drafts of each row that takes part, int64 [n, K]; zeros where nothing is sampled."""
        drafts = self.tokens.shape[1]
        if not any(p.temperature for p in self._context.params):
            return torch.zeros(len(self.rows), drafts, dtype=torch.int64)
        positions = self._positions[:, None] + torch.arange(drafts)
        rows = self.rows.repeat_interleave(drafts)
        return self._rng.token_keys(rows, positions.flatten(), "draft").view(-1, drafts)

    def record(self, tokens: Tensor, margins: Tensor, distribution: tuple[Tensor, Tensor] | None) -> None:
        """All drafts at once, as a backend has drawn them from the keys: tokens int64 [n, K], margins float32 [n, K],
        and the distributions as ids [n K, S] and logits [n K, S], row by row; None where all drafts are greedy."""
        self.tokens[self.rows] = tokens
        self._margins = margins
        size = self._net.vocab_size
        if distribution is None:
            self._whole = Categorical.greedy(tokens.flatten(), size)
        else:
            self._whole = Categorical(size, ids=distribution[0], logits=distribution[1])

    def margins(self) -> Tensor:
        """A confidence for drafters without a confidence head: sigmoid(the largest logit - the second), for each draft.
        It does not depend on the draft itself nor on later ones. float32 [n, K]"""
        if self._margins is not None:
            return rowwise(torch.sigmoid, self._margins)
        best = torch.stack(self._logits, 1).topk(2, -1).values.float()
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
        index = torch.zeros(
            count, drafts, dtype=torch.int64
        )  # rows that drafted nothing point to 0, which is never read
        index[self.rows] = torch.arange(len(distribution)).view(-1, drafts)
        return distribution.take(index.flatten())
