"""A KV cache of blocks in plain tensors: written through each slot's table, read by gathering the slot's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.kv_cache.block_cache import RETAINED, BlockCache
from outrider.kv_cache.block_pool import BlockPool

__all__ = ["BLOCK", "GatheredCache"]

BLOCK = 64  # tokens of a block, unless the caller says otherwise

Shapes = Sequence[tuple[Sequence[int], Sequence[int]]]


class GatheredCache(BlockCache):
    """Keys and values of ``slots`` sequences of up to ``capacity`` tokens each, in blocks of ``size`` tokens.

    ``layer_shapes`` gives each layer's key and value shape of one block, and the tensors are ``keys[layer]`` and
    ``values[layer]``, [blocks, *shape]. ``memory``: bytes for all blocks; None: as many as all slots can need.
    """

    def __init__(
        self,
        slots: int,
        capacity: int,
        layer_shapes: Shapes,
        dtype: torch.dtype,
        *,
        size: int = BLOCK,
        memory: int | None = None,
        ahead: int = 0,
    ) -> None:
        elements = sum(torch.Size(shape).numel() for pair in layer_shapes for shape in pair)
        block_bytes = max(1, elements * dtype.itemsize)
        longest = -(-capacity // size)
        count = slots * longest
        if memory is not None:
            count = min(count, max(1, memory // block_bytes))
        pool = BlockPool(count, size, ahead, retained=max(1, RETAINED // block_bytes))
        super().__init__(slots, capacity, pool, block_bytes)
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self._held = self.lengths.numpy()
        self.keys: list[Tensor] = [torch.empty(count, *key, dtype=dtype) for key, _ in layer_shapes]
        self.values: list[Tensor] = [torch.empty(count, *value, dtype=dtype) for _, value in layer_shapes]
        self._tables = torch.zeros(slots, longest, dtype=torch.int64)

    def index(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where positions are: blocks, and positions within them. int64 [T], int64 [T] -> two of [T]."""
        return self._tables[slots, positions // self.pool.size], positions % self.pool.size

    def stretch(self, tensor: Tensor, slot: int, first: int, last: int) -> Tensor:
        """Positions ``first:last`` of a slot, a copy. [blocks, Hkv, size, Dh] -> [Hkv, last - first, Dh]"""
        begin = first // self.pool.size
        blocks = self._tables[slot, begin : -(-last // self.pool.size)]
        joined = tensor.index_select(0, blocks).transpose(0, 1).flatten(1, 2)
        return joined.narrow(1, first - begin * self.pool.size, last - first)

    def _apply(self, slot: int, table: list[int], fixed: int) -> None:
        self._tables[slot, : len(table)] = torch.tensor(table, dtype=torch.int64)

    def _copy(self, source: int, target: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def _set_open(self, slot: int, is_open: bool) -> None:
        self.lengths[slot] = 0
