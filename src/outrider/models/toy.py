"""A target without a network: a Markov chain whose every probability is known, for tests and proofs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.kv_cache.attention import Pass
from outrider.models.decoder import check_aux_layers
from outrider.models.loading import load_backend
from outrider.registry import find
from outrider.types import KVCache, PagedCache, RaggedBatch, TargetOutput, TargetSpec

__all__ = ["ToyTarget"]


class ToyTarget:
    """A chain of order m: ``table`` [V, ..., V] (m + 1 times) holds the logits of the next token after the last m.

    The latest token is the last of the m indices; token 0 fills in before a sequence's beginning. Every pass reads the
    earlier tokens from its cache, so a cache that was rewound wrongly gives other logits. Features are one-hot tokens,
    D = V.
    """

    def __init__(
        self,
        table: Tensor,
        *,
        eos_token_ids: Sequence[int] = (),
        max_positions: int = 4096,
        name: str = "toy",
        block: int = 64,
    ) -> None:
        """``block``: tokens of a block of its paged cache."""
        vocabulary = len(table)
        assert table.ndim >= 2 and set(table.shape) == {vocabulary}, f"the table's sides differ: {tuple(table.shape)}"
        self.table, self.block = table, block
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

    def paged_cache(
        self, slots: int, capacity: int, memory: int | None = None, kv_dtype: str = "auto", ahead: int = 0
    ) -> PagedCache:
        """The same in blocks of ``block`` tokens, of 8 bytes each. Raises InvalidRequest for a ``kv_dtype`` that is not
        ``auto``."""
        if kv_dtype != "auto":
            raise InvalidRequest(f"the toy keeps tokens in place of keys and values, not as {kv_dtype!r}; use 'auto'")
        shapes = [((1, self.block, 1), (0,))]
        cache: PagedCache = find("kv_cache", "gathered")(
            slots, capacity, shapes, torch.int64, size=self.block, memory=memory, ahead=ahead
        )
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
        slots = batch.slots.repeat_interleave(batch.lengths)
        first, second = cache.index(slots, batch.positions)
        cache.keys[0][first, 0, second, 0] = batch.tokens
        step.finish()
        past = [self._token(cache, slots, batch.positions - back) for back in range(self.table.ndim - 2, -1, -1)]
        logits = self.table[tuple(past)]
        features = torch.cat([self.embed(batch.tokens)] * len(aux_layers), -1) if aux_layers else None
        return TargetOutput(logits if logits_at is None else logits[logits_at], features)

    @staticmethod
    def _token(cache: Any, slots: Tensor, positions: Tensor) -> Tensor:
        """Tokens at ``positions``, 0 before the beginning. int64 [T], int64 [T] -> [T]."""
        first, second = cache.index(slots, positions.clamp(min=0))
        return torch.where(positions < 0, 0, cache.keys[0][first, 0, second, 0])

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> one-hot [..., V]."""
        return F.one_hot(tokens, self.spec.vocab_size).to(self.table.dtype)

    def unembed(self, hidden: Tensor) -> Tensor:
        """One-hot last tokens [..., V] -> logits [..., V], with token 0 before them in a chain of higher order."""
        return hidden @ self.table[(0,) * (self.table.ndim - 2)]
