"""Run the target over training texts: features at every position, logits where a loss needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from outrider.training.dataset import Text, pack
from outrider.training.networks.batch import FeatureBatch, TrainableDrafter
from outrider.types import KVCache, RaggedBatch, TargetModel

__all__ = ["FeatureSource", "TargetRunner"]


class FeatureSource(Protocol):
    """Where training batches come from: the target itself (``TargetRunner``) or cached features."""

    def batch(self, texts: Sequence[Text], drafter: TrainableDrafter, epoch: int) -> FeatureBatch:
        """Features, logits and anchors of ``texts`` for one training step."""
        ...


class TargetRunner:
    """The target in the same process: one forward pass per pack, nothing is stored."""

    def __init__(self, target: TargetModel, length: int) -> None:
        """``length``: most tokens of a text."""
        self._target, self._length = target, length
        self._cache: KVCache | None = None
        self._slots: list[int] = []

    def batch(self, texts: Sequence[Text], drafter: TrainableDrafter, epoch: int) -> FeatureBatch:
        """See ``FeatureSource.batch``."""
        packed = pack(texts)
        anchors, rows = drafter.wanted(packed, epoch)
        features, logits, hidden = self._read(texts, drafter.aux_layers, rows)
        return FeatureBatch(packed, anchors, rows, features, logits, hidden)

    @torch.inference_mode()
    def _read(
        self, texts: Sequence[Text], aux_layers: tuple[int, ...], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features [N, F], and at ``rows`` logits [R, V] and hidden states [R, D] where the target can tell them."""
        cache = self._cache_for(len(texts))
        slots = self._slots[: len(texts)]
        batch = RaggedBatch.pack([text.tokens for text in texts], [0] * len(texts), slots)
        output = self._target.forward(batch, cache, aux_layers, rows)
        cache.rewind(torch.tensor(slots), torch.zeros(len(slots), dtype=torch.int64))
        with torch.inference_mode(False):  # autograd refuses inference tensors
            features, hidden = output.features, output.hidden
            return (
                torch.zeros(len(batch.tokens), 0) if features is None else features.float().clone(),
                output.logits.float().clone(),
                None if hidden is None else hidden.float().clone(),
            )

    def _cache_for(self, rows: int) -> KVCache:
        if self._cache is None or len(self._slots) < rows:
            self._cache = self._target.new_cache(rows, self._length)
            self._slots = [self._cache.open() for _ in range(rows)]
        return self._cache
