"""Drawing drafts step by step, each from its own law, and the proposal they make.

n rows that draft, B rows of the step, K drafts, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.drafting.net import DraftNet, rowwise
from outrider.sampling import Categorical, process
from outrider.types import Context, Noise, Proposal

__all__ = ["Drawing"]


class Drawing:
    """Draws one draft after another for some rows, each from its own law, and remembers the laws."""

    def __init__(self, net: DraftNet, context: Context, noise: Noise, lengths: Sequence[int]) -> None:
        """``lengths`` of all B rows; those above 0 take part."""
        self._net, self._context, self._noise = net, context, noise
        self._lengths = lengths
        self.rows = torch.tensor([b for b, n in enumerate(lengths) if n], dtype=torch.int64)
        self._positions = torch.tensor([len(context.history[b]) for b in self.rows.tolist()], dtype=torch.int64)
        self.tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        self._laws: list[Categorical] = []
        self._logits: list[Tensor] = []

    def draw(self, logits: Tensor) -> Tensor:
        """The next draft of each row that takes part. [n, Vd] -> int64 [n], target ids."""
        step, rows = len(self._laws), self.rows
        depth = torch.full_like(rows, step)
        law = process(self._net.spread(logits), self._context, rows, depth, drafted=self.tokens)
        drawn = law.draw(self._noise.token_keys(rows, self._positions + step, "draft"))
        self.tokens[rows, step] = drawn
        self._laws.append(law)
        self._logits.append(logits)
        return drawn

    @property
    def certain(self) -> bool:
        """Whether every draft is the likeliest token as the drafter has it: greedy, and no option moves a logit."""
        return all(p.temperature == 0 and not p.penalised and not p.logit_bias for p in self._context.params)

    def record(self, tokens: Tensor) -> Tensor:
        """The next draft of each row, found by the drafter itself where ``certain``. int64 [n] -> the same"""
        step = len(self._laws)
        self.tokens[self.rows, step] = tokens
        self._laws.append(Categorical.greedy(tokens, self._net.vocab_size))
        return tokens

    def margins(self) -> Tensor:
        """A confidence for drafters that have no head for it: how clearly each draft's likeliest token beat the second,
        sigmoid(margin), which no draft at or after that place has any part in. float32 [n, K]"""
        best = torch.stack(self._logits, 1).topk(2, -1).values.float()
        return rowwise(torch.sigmoid, best[..., 0] - best[..., 1])

    def proposal(self, confidence: Tensor | None = None) -> Proposal:
        """``confidence`` float32 [n, K] of the rows that took part."""
        lengths = torch.tensor(self._lengths, dtype=torch.int64)
        count, drafts = self.tokens.shape
        if confidence is not None and len(confidence) < count:
            confidence = confidence.new_zeros(count, drafts).index_copy(0, self.rows, confidence)
        return Proposal(self.tokens, lengths, self._law(count, drafts), confidence)

    def _law(self, count: int, drafts: int) -> Categorical | None:
        if all(law.is_greedy for law in self._laws):
            return None
        law = Categorical.stack(self._laws)
        if len(self.rows) == count:
            return law
        places = torch.zeros(count, drafts, dtype=torch.int64)  # rows that drafted nothing borrow place 0, never read
        places[self.rows] = torch.arange(len(law)).view(-1, drafts)
        return law.take(places.flatten())
