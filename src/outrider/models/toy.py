"""A target without a network: a Markov chain whose every probability is known, for tests and proofs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.kv_cache.attention import Pass
from outrider.models.decoder import check_aux_layers
from outrider.models.loading import load_backend
from outrider.registry import find
from outrider.types import KVCache, RaggedBatch, TargetOutput, TargetSpec

__all__ = ["ToyTarget"]


class ToyTarget:
    """A chain of order m: ``table`` [V, ..., V] (m + 1 times) holds the logits of the next token after the last m.

    The latest token is the last of the m indices; token 0 fills in before a sequence's beginning. Every pass reads the
    earlier tokens from its cache, so a cache that was rewound wrongly gives other logits. Features are one-hot tokens,
    D = V.
    """

    def __init__(
        self, table: Tensor, *, eos_token_ids: Sequence[int] = (), max_positions: int = 4096, name: str = "toy"
    ) -> None:
        vocabulary = len(table)
        assert table.ndim >= 2 and set(table.shape) == {vocabulary}, f"the table's sides differ: {tuple(table.shape)}"
        self.table = table
        self.backend = load_backend("auto")
        self.spec = TargetSpec(
            architecture="toy",
            vocab_size=vocabulary,
            hidden_size=vocabulary,
            num_layers=2,
            max_positions=max_positions,
            dtype=table.dtype,
            name=name,
            eos_token_ids=tuple(eos_token_ids),
        )

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """A cache that holds tokens in place of keys."""
        cache: KVCache = find("kv_cache", "contiguous")(slots, capacity, [((1, capacity, 1), (0,))], torch.int64)
        return cache

    def forward(
        self,
        batch: RaggedBatch,
        cache: Any,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
    ) -> TargetOutput:
        """Logits of the table; the features of every auxiliary layer are the same."""
        check_aux_layers(aux_layers, self.spec.num_layers)
        step = Pass(batch, cache, "causal", self.table.dtype)
        for row in step.rows:
            cache.keys[0][row.slot, 0, row.start : row.stop, 0] = batch.tokens[row.begin : row.end]
        step.finish()
        slots = batch.slots.repeat_interleave(batch.lengths)
        past = [self._token(cache, slots, batch.positions - back) for back in range(self.table.ndim - 2, -1, -1)]
        logits = self.table[tuple(past)]
        features = torch.cat([self.embed(batch.tokens)] * len(aux_layers), -1) if aux_layers else None
        return TargetOutput(logits if logits_at is None else logits[logits_at], features)

    @staticmethod
    def _token(cache: Any, slots: Tensor, positions: Tensor) -> Tensor:
        """Tokens at ``positions``, 0 before the beginning. int64 [T], int64 [T] -> [T]."""
        return torch.where(positions < 0, 0, cache.keys[0][slots, 0, positions.clamp(min=0), 0])

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> one-hot [..., V]."""
        return F.one_hot(tokens, self.spec.vocab_size).to(self.table.dtype)

    def unembed(self, hidden: Tensor) -> Tensor:
        """One-hot last tokens [..., V] -> logits [..., V], with token 0 before them in a chain of higher order."""
        return hidden @ self.table[(0,) * (self.table.ndim - 2)]
