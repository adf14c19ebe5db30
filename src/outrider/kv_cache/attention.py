"""Attention of a ragged batch against a key/value cache, for backends that run torch's own kernels.

Letters: T packed tokens, n new tokens of one row, L keys they see, H heads, Hkv key/value heads, G = H / Hkv, Dh head
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.config import LayerConfig
from outrider.kv_cache.contiguous import ContiguousCache
from outrider.types import Mask, RaggedBatch

__all__ = ["Pass", "attend"]

QUERIES = 512  # new tokens of a row that attend at a time, so that a long prefill's masks stay small
FOLDED = 32  # up to this many new tokens, the G queries of a key head share one pass over its keys


@dataclass(slots=True)
class Row:
    """One row of a batch: packed tokens ``begin:end`` are written to ``slot`` at positions ``start:stop``."""

    begin: int
    end: int
    slot: int
    start: int
    stop: int


@dataclass(slots=True)
class Span:
    """Queries that attend together: packed tokens ``begin:end`` of ``slot`` see its keys ``first:last``."""

    begin: int
    end: int
    slot: int
    first: int
    last: int
    mask: Tensor | None  # what each sees: bool [n, L], or folded (n <= FOLDED) added to the scores [G n, L]; None = all


class Pass:
    """What the layers of one forward pass share: rows, positions and masks."""

    def __init__(self, batch: RaggedBatch, cache: Any, mask: Mask, dtype: torch.dtype) -> None:
        self.batch, self.cache, self.mask, self.dtype = batch, cache, mask, dtype
        self.rows = _rows(batch, cache)
        # Where the new tokens are written; one row alone of a contiguous cache needs no index.
        alone = len(self.rows) == 1 and isinstance(cache, ContiguousCache)
        self._at = None if alone else cache.index(batch.slots.repeat_interleave(batch.lengths), batch.positions)
        self._spans: dict[tuple[int | None, int], list[Span]] = {}

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a layer's new keys and values [T, Hkv, Dh] at their slots and positions."""
        for cache, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            if self._at is None:
                (row,) = self.rows
                cache[row.slot].narrow(1, row.start, row.stop - row.start).copy_(new.transpose(0, 1))
            else:
                cache[self._at[0], :, self._at[1]] = new

    def spans(self, config: LayerConfig) -> list[Span]:
        """The spans of a layer's attention; layers of one window share them."""
        key = (config.window, config.num_heads // config.num_kv_heads)
        if key not in self._spans:
            self._spans[key] = [span for row in self.rows for span in _spans(row, *key, self.mask, self.dtype)]
        return self._spans[key]

    def finish(self) -> None:
        """The rows now hold their new tokens."""
        for row in self.rows:
            self.cache.lengths[row.slot] = row.stop


def _rows(batch: RaggedBatch, cache: Any) -> list[Row]:
    """The rows that have new tokens, checked against the cache."""
    offsets, slots = batch.offsets.tolist(), batch.slots.tolist()
    assert len(set(slots)) == len(slots), f"a slot is in one batch twice: {slots}"
    rows = []
    for slot, begin, end in zip(slots, offsets, offsets[1:], strict=False):
        if begin < end:
            start = int(batch.positions[begin])
            cache.require(slot, start, start + end - begin)
            rows.append(Row(begin, end, slot, start, start + end - begin))
    return rows


def _spans(row: Row, window: int | None, group: int, mask: Mask, dtype: torch.dtype) -> Iterator[Span]:
    """Cut a row's queries into spans, each with the keys it can see at all and the mask among those."""
    for start in range(row.start, row.stop, QUERIES):
        stop = min(start + QUERIES, row.stop)
        first = 0 if window is None else max(0, start - window + 1)
        last = stop if mask == "causal" else row.stop
        begin = row.begin + start - row.start
        seen = _mask(start, stop, first, last, window, mask)
        if seen is not None and stop - start <= FOLDED:
            seen = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat(group, 1)
        yield Span(begin, begin + stop - start, row.slot, first, last, seen)


def _mask(start: int, stop: int, first: int, last: int, window: int | None, mask: Mask) -> Tensor | None:
    """Which of the keys first:last each of the queries start:stop sees, bool [n, L]; None = all of them."""
    ahead = mask == "causal" and stop - start > 1
    behind = window is not None and stop - window > first
    if not ahead and not behind:
        return None
    distance = torch.arange(start, stop)[:, None] - torch.arange(first, last)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if ahead:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    return seen


def attend(queries: Tensor, layer: int, config: LayerConfig, step: Pass) -> Tensor:
    """A layer's attention of [T, H, Dh] against its cache -> [T, H Dh]."""
    keys, values = step.cache.keys[layer], step.cache.values[layer]
    outputs = []
    for span in step.spans(config):
        k, v = (step.cache.stretch(tensor, span.slot, span.first, span.last)[None] for tensor in (keys, values))
        q = queries[span.begin : span.end]
        n, heads, width = q.shape
        if n <= FOLDED:
            folded = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).reshape(1, k.shape[1], -1, width)
            seen = F.scaled_dot_product_attention(folded, k, v, span.mask, scale=config.scale)
            seen = seen.view(heads, n, width).transpose(0, 1)
        else:
            grouped = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], k, v, span.mask, scale=config.scale, enable_gqa=True
            )
            seen = grouped[0].transpose(0, 1)
        outputs.append(seen.reshape(n, heads * width))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs) if outputs else queries.flatten(1)
