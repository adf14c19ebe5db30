"""Contracts of KV caches.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["KVCache", "PagedCache", "PagedTarget", "SharesPrefixes"]


@runtime_checkable
class KVCache(Protocol):
    """The keys and values of a layer stack: append, then take back exactly."""

    capacity: int  # tokens a slot can hold
    lengths: Tensor  # int64 [slots]   tokens each slot holds

    def open(self) -> int:
        """Take a free slot. Raises CacheFull."""
        ...

    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for ``tokens`` in a slot, those it holds included. False: there is no memory for them now; what
        the slot holds is untouched, and the caller may release another slot and ask again."""
        ...

    def rewind(self, slots: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor) -> None:
        """Forget everything past ``lengths[b]`` tokens of slot ``slots[b]``. [B], [B], lists or int64."""
        ...

    def release(self, slot: int) -> None:
        """Give a slot and its memory back. A preempted row is released and computed again later."""
        ...


@runtime_checkable
class SharesPrefixes(Protocol):
    """A KV cache, or a drafter that has one, in which sequences that begin alike share what they hold, during their
    lives and afterwards."""

    def match(self, tokens: Sequence[int]) -> int:
        """How many tokens from the beginning of a sequence are held."""
        ...

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """Begin an empty slot with the first ``count`` tokens of a sequence, at most as many as ``match`` has found."""
        ...

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """Let others take over what a slot holds; ``tokens`` of the sequence, from its start."""
        ...


@runtime_checkable
class PagedCache(KVCache, SharesPrefixes, Protocol):
    """A cache whose slots share blocks of one pool, so that ``reserve`` says what memory there really is."""

    block_bytes: int
    block_tokens: int
    blocks: int  # in all

    @property
    def free_blocks(self) -> int: ...  # that ``reserve`` can still get

    def forget(self) -> None:
        """Drop what finished sequences have left."""
        ...

    def reset(self) -> None:
        """Release every slot; what was published stays."""
        ...


@runtime_checkable
class PagedTarget(Protocol):
    """A stack or target with such a cache."""

    def paged_cache(
        self, slots: int, capacity: int, memory: int | None = None, kv_dtype: str = "auto", ahead: int = 0
    ) -> PagedCache:
        """``capacity``: most tokens of a sequence (less, where ``memory`` holds no such). ``memory``: bytes for all
        slots together; None: as much as all of them can need. ``kv_dtype``: what keys and values are kept as.
        ``ahead``: tokens after a position that its keys and values depend on."""
        ...
