"""A KV cache in blocks: every slot has a table of blocks, and slots that begin alike share them.

A shared block is never written: a slot that is rewound into one gets a copy before its next token. What backends differ
in is where the keys and values are, and how a table is made known to the kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt
from torch import Tensor

from outrider.errors import CacheFull
from outrider.kv_cache.block_pool import BlockPool, digests
from outrider.types import to_list

__all__ = ["RETAINED", "BlockCache"]

RETAINED = 512 << 20  # bytes of blocks that are kept for later sequences


@dataclass(slots=True)
class _Slot:
    """A sequence's blocks. The first ``fixed`` may not be written: others share them, or may come to."""

    table: list[int] = field(default_factory=list)
    room: int = 0  # tokens the slot may grow to without another block
    fixed: int = 0
    names: list[bytes] = field(default_factory=list)  # of the first blocks, as far as they were needed


class BlockCache(ABC):
    """See ``outrider.types.PagedCache``."""

    lengths: Tensor
    _held: npt.NDArray[np.int64]  # the same on the same memory: a number is read and written in a tenth of the time

    def __init__(
        self,
        slots: int,
        capacity: int,
        pool: BlockPool,
        block_bytes: int,
    ) -> None:
        self.pool, self.block_bytes, self.block_tokens = pool, block_bytes, pool.size
        self.blocks = pool.count
        self.capacity = min(capacity, pool.count * pool.size)
        self._slots: list[_Slot | None] = [None] * slots
        self._closed = list(range(slots))
        heapify(self._closed)

    @abstractmethod
    def _apply(self, slot: int, table: list[int], fixed: int) -> None:
        """Let the kernels know a slot's blocks, of which the first ``fixed`` are not to be written."""

    @abstractmethod
    def _copy(self, source: int, target: int) -> None:
        """Copy a block's keys and values."""

    @abstractmethod
    def _set_open(self, slot: int, is_open: bool) -> None:
        """A slot begins or ends, with length 0."""

    # ------------------------------------------------------------------------------------------------ slots

    def open(self) -> int:
        """Reserve an empty slot, the lowest free one. Raises CacheFull."""
        if not self._closed:
            raise CacheFull(f"all {len(self._slots)} slots are in use; close one, or make the cache with more slots")
        slot = heappop(self._closed)
        self._slots[slot] = _Slot()
        self._set_open(slot, True)
        return slot

    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for ``tokens``; blocks that nobody holds are given up for it."""
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is not open"
        if tokens <= state.room:
            return True
        return tokens <= self.capacity and self._extend(slot, state, tokens)

    def rewind(self, slots: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor) -> None:
        """Drop everything past ``lengths[b]`` tokens of slot ``slots[b]``. [B], [B]."""
        held = self._held
        for slot, length in zip(to_list(slots), to_list(lengths), strict=True):
            assert 0 <= length <= held.item(slot), f"cannot rewind {held[slot]} tokens of slot {slot} to {length}"
            held[slot] = length
            self._cut(slot, length)

    def release(self, slot: int) -> None:
        """Give a slot back. Blocks that were published are kept until their memory is needed."""
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is not open"
        for block in reversed(state.table):  # the ends of sequences are the first to be given up
            self.pool.drop(block)
        self._slots[slot] = None
        self._set_open(slot, False)
        heappush(self._closed, slot)

    # ------------------------------------------------------------------------------------------------ prefixes

    def match(self, tokens: Sequence[int]) -> int:
        """How many tokens from the beginning of a sequence are held: whole blocks."""
        return len(self.pool.find(tokens)) * self.pool.size

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """Begin an empty slot with the first ``count`` tokens of a sequence, which ``match`` has found."""
        state, size = self._slots[slot], self.pool.size
        assert state is not None and not state.table, f"slot {slot} is not empty"
        state.table = self.pool.find(tokens)[: -(-count // size)]
        assert len(state.table) * size >= count, f"{count} tokens are not held"
        for block in state.table:
            self.pool.hold(block)
        state.fixed = count // size
        state.room = state.fixed * size
        self._apply(slot, state.table[: state.fixed], state.fixed)
        self._held[slot] = count

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """Let other sequences take over the slot's full blocks; ``tokens`` are what they hold, from its start."""
        state, pool = self._slots[slot], self.pool
        assert state is not None, f"slot {slot} is not open"
        full = min(int(self._held[slot]), len(tokens) - pool.ahead) // pool.size
        if full <= state.fixed:
            return
        state.names += list(digests(tokens[: full * pool.size + pool.ahead], pool.size, pool.ahead, state.names))
        for block, name in zip(state.table[state.fixed : full], state.names[state.fixed : full], strict=True):
            pool.name(block, name)
        state.fixed = full
        self._apply(slot, state.table, full)

    def forget(self) -> None:
        """Drop what finished sequences have left."""
        self.pool.forget_idle()

    def reset(self) -> None:
        """Release every slot; what was published stays."""
        for slot, state in enumerate(self._slots):
            if state is not None:
                self.release(slot)

    # ------------------------------------------------------------------------------------------------ blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that a sequence can still get."""
        return self.pool.available

    def require(self, slot: int, start: int, end: int) -> None:
        """Make sure that tokens ``start`` to ``end`` may be written: no hole before them, and room for them.

        Raises CacheFull.
        """
        state = self._slots[slot]
        assert state is not None, f"slot {slot} is not open"
        held = int(self._held[slot])
        assert start <= held, f"slot {slot} holds {held} tokens; writing from {start} would leave a hole"
        if start < state.fixed * self.pool.size:
            self._held[slot] = start
            self._cut(slot, start)
        if not self.reserve(slot, end):
            raise CacheFull(
                f"a sequence of {end} tokens does not fit: a slot holds at most {self.capacity}, and "
                f"{self.pool.available} of {self.pool.count} blocks of {self.pool.size} tokens are free; "
                "shorten the prompt or max_tokens, or make the cache with a larger capacity"
            )

    def _extend(self, slot: int, state: _Slot, tokens: int) -> bool:
        """Take the blocks that a sequence of ``tokens`` lacks, all of them or none."""
        pool, size = self.pool, self.pool.size
        at = int(self._held[slot]) // size  # the block of the next token
        shared = at == state.fixed < len(state.table) and pool.is_named(state.table[at])
        copied = shared and pool.holders(state.table[at]) > 1
        missing = -(-tokens // size) - len(state.table)
        if missing + copied > pool.available:
            return False
        if copied:
            own = pool.take()
            self._copy(state.table[at], own)
            pool.drop(state.table[at])
            state.table[at] = own
        elif shared:
            pool.forget(state.table[at])
        state.table += [pool.take() for _ in range(missing)]
        state.room = len(state.table) * size
        self._apply(slot, state.table, state.fixed)
        return True

    def _cut(self, slot: int, length: int) -> None:
        """A slot was rewound. Where it now ends in a shared block, the next ``reserve`` replaces that one."""
        state, size = self._slots[slot], self.pool.size
        assert state is not None, f"slot {slot} is not open"
        if length >= state.fixed * size:
            return
        kept = -(-length // size)
        for block in reversed(state.table[kept:]):
            self.pool.drop(block)
        del state.table[kept:]
        state.fixed = length // size
        del state.names[state.fixed :]
        state.room = state.fixed * size
        self._apply(slot, state.table[: state.fixed], state.fixed)
