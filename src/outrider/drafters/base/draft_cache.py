"""A drafter's KV cache of committed tokens, and the features that are not in it yet.

T packed tokens, F feature width, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.errors import CacheFull
from outrider.types import (
    Context,
    KVCache,
    PagedCache,
    PagedTarget,
    RaggedBatch,
    SharesPrefixes,
    Stack,
    Values,
    joined,
    to_tensor,
)

__all__ = ["DraftCache", "Waiting"]

BACKLOG = 64  # committed tokens of a row that may wait, so that plain decoding costs the drafter next to nothing


@dataclass(slots=True)
class _Row:
    """One sequence: ``held`` tokens are in the KV cache, those after them wait with their features."""

    cache_slot: int  # in the KV cache; -1: none was free
    capacity: int
    held: int = 0
    tokens: list[int] = field(default_factory=list)
    features: list[Values] = field(default_factory=list)  # together as long as ``tokens``

    @property
    def end(self) -> int:
        """Committed tokens the drafter knows the features of, from the start without a hole."""
        return self.held + len(self.tokens)

    def joined(self) -> Values:
        """[waiting, F]"""
        self.features = [joined(self.features)]
        return self.features[0]

    def truncate(self, end: int) -> None:
        """Forget the waiting tokens from position ``end`` on."""
        left = max(0, end - self.held)
        self.features = [self.joined()[:left]] if left else []
        self.tokens = self.tokens[:left]

    def drop(self, count: int) -> None:
        """The first ``count`` waiting tokens are held now."""
        self.features = [self.joined()[count:]] if count < len(self.tokens) else []
        self.tokens = self.tokens[count:]
        self.held += count


@dataclass(frozen=True, slots=True)
class Waiting:
    """Waiting tokens of some rows, packed: what a drafter turns into keys and values."""

    batch: RaggedBatch  # slots are those of the KV cache
    features: Tensor  # [T, F]


class DraftCache:
    """A drafter's KV cache of committed tokens. What a proposal adds is rewound.

    Features wait until the row drafts again (or BACKLOG of them are there), so that rows decoded plainly cost next to
    nothing. A row whose features are missing somewhere (a prefix hit in the target alone) drafts nothing until a
    catch-up pass has shown them from ``end_of`` on.
    """

    def __init__(self, stack: Stack, scratch: int, rows: int, pairs: bool = False) -> None:
        """``scratch``: positions after the committed tokens that a proposal uses. ``rows``: sequences at a time.
        ``pairs``: a position's keys and values are made of its features and the token after it (see ``take_pairs``)."""
        self._stack, self._scratch, self._slots, self._pairs = stack, scratch, rows, pairs
        self._rows: dict[int, _Row] = {}
        self.kv_cache: KVCache = self._new_cache(1, scratch)

    def open(self, slot: int, capacity: int) -> None:
        """Reserve a slot. A row beyond those the cache was made for drafts nothing."""
        if not self._rows and self.kv_cache.capacity < capacity + self._scratch:
            self.kv_cache = self._new_cache(self._slots, capacity + self._scratch)
        try:
            cache_slot = self.kv_cache.open()
        except CacheFull:
            cache_slot = -1
        self._rows[slot] = _Row(cache_slot, self.kv_cache.capacity - self._scratch if cache_slot >= 0 else 0)

    def close(self, slot: int) -> None:
        """Release a row's slot."""
        row = self._rows.pop(slot)
        if row.cache_slot >= 0:
            self.kv_cache.release(row.cache_slot)

    def reset(self) -> None:
        """Close all rows at once, with a cache made anew."""
        self._rows.clear()
        self.kv_cache = self._new_cache(len(self.kv_cache.lengths), self.kv_cache.capacity)

    def match(self, tokens: Sequence[int]) -> int:
        """See ``outrider.types.SharesPrefixes``."""
        return self.kv_cache.match(tokens) if isinstance(self.kv_cache, SharesPrefixes) else 0

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        row = self._rows[slot]
        if isinstance(self.kv_cache, SharesPrefixes) and count <= row.capacity:
            self.kv_cache.adopt(row.cache_slot, tokens, count)
            row.held = count

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``outrider.types.SharesPrefixes``. What still waits is left out."""
        row = self._rows[slot]
        if isinstance(self.kv_cache, SharesPrefixes) and row.held:
            self.kv_cache.publish(row.cache_slot, tokens[: row.held + self._pairs])

    def forget(self) -> None:
        """Drop what finished sequences have left."""
        if isinstance(self.kv_cache, PagedCache):
            self.kv_cache.forget()

    def _new_cache(self, slots: int, capacity: int) -> KVCache:
        if isinstance(self._stack, PagedTarget):
            return self._stack.paged_cache(slots, capacity, ahead=int(self._pairs))
        return self._stack.new_cache(slots, capacity)

    def end_of(self, slot: int) -> int:
        """Tokens of the row, from its start, whose features were seen: where a catch-up pass must begin."""
        return self._rows[slot].end

    def add(self, batch: RaggedBatch, features: Values | None) -> list[int]:
        """Note committed tokens. Returns the slots whose waiting tokens should be taken now."""
        if features is None:
            return []
        full = []
        tokens, positions, slots, offsets = batch.lists
        for slot, begin, end in zip(slots, offsets, offsets[1:], strict=False):
            row = self._rows[slot]
            start = positions[begin] if begin < end else row.end
            if begin == end or start > row.end or start + end - begin > row.capacity:
                continue  # nothing new, or behind a hole that is still to be filled
            self._truncate(row, start)
            row.tokens += tokens[begin:end]
            row.features.append(_copied(features[begin:end]))  # the target may use its buffer again
            if len(row.tokens) >= BACKLOG:
                full.append(slot)
        return full

    def lengths(self, slots: Sequence[int], context: Context, limit: Sequence[int], most: int) -> list[int]:
        """How many tokens each row may draft: none where features of committed tokens are missing."""
        lengths = []
        for b, (slot, wanted) in enumerate(zip(slots, limit, strict=True)):
            row, known = self._rows[slot], len(context.history[b]) - 1
            self._truncate(row, known)  # a round may have been committed in part only
            ready = row.cache_slot >= 0 and row.end == known > 0
            ready &= not self._pairs or bool(row.tokens)  # the last pair's features were not kept with a shared prefix
            ready = ready and self.kv_cache.reserve(row.cache_slot, row.end + self._scratch)
            lengths.append(max(0, min(wanted, most)) if ready else 0)
        return lengths

    def take(self, slots: Sequence[int]) -> Waiting | None:
        """All waiting tokens of some rows; from now on they count as held."""
        rows = [row for slot in slots if (row := self._rows[slot]).tokens]
        if not rows:
            return None
        self._make_room(rows)
        batch = RaggedBatch.pack(
            [row.tokens for row in rows], [row.held for row in rows], [row.cache_slot for row in rows]
        )
        features = joined([row.joined() for row in rows])
        for row in rows:
            row.drop(len(row.tokens))
        return Waiting(batch, to_tensor(features))

    def take_features(self, slots: Sequence[int]) -> tuple[list[int], list[int], list[Values]]:
        """The same in pieces, for a backend that packs them itself: each row's slot in the KV cache and number of
        waiting tokens, and all features, row after row."""
        rows = [self._rows[slot] for slot in slots]
        counts = [len(row.tokens) for row in rows]
        features = [piece for row in rows for piece in row.features]
        for row in rows:
            row.drop(len(row.tokens))
        return [row.cache_slot for row in rows], counts, features

    def take_pairs(self, slots: Sequence[int], last: Sequence[int] | None) -> Waiting:
        """Waiting features of some rows, each with the token that *follows* it; all but the final pair count as held.

        The final pair stays: its token is in doubt until it is committed. ``last``: the tokens that follow the rows'
        final features; None leaves the final pairs out.
        """
        rows = [self._rows[slot] for slot in slots]
        self._make_room(rows)
        ends = [[]] * len(rows) if last is None else [[token] for token in last]
        tokens = [[*row.tokens[1:], *end] for row, end in zip(rows, ends, strict=True)]
        batch = RaggedBatch.pack(tokens, [row.held for row in rows], [row.cache_slot for row in rows])
        features = joined([row.joined()[: len(following)] for row, following in zip(rows, tokens, strict=True)])
        for row in rows:
            row.drop(len(row.tokens) - 1)
        return Waiting(batch, to_tensor(features))

    def take_paired_features(
        self, slots: Sequence[int], last: Sequence[int]
    ) -> tuple[list[int], list[int], list[Values], list[int]]:
        """The same in pieces, for a backend that packs them itself: each row's slot in the KV cache and number of
        waiting features, all features, and the token that follows each, row after row."""
        rows = [self._rows[slot] for slot in slots]
        counts = [len(row.tokens) for row in rows]
        features = [piece for row in rows for piece in row.features]
        tokens = [token for row, end in zip(rows, last, strict=True) for token in (*row.tokens[1:], end)]
        for row in rows:
            row.drop(len(row.tokens) - 1)
        return [row.cache_slot for row in rows], counts, features, tokens

    def cache_slots(self, slots: Sequence[int]) -> Tensor:
        """int64 [n]: the rows' slots in the KV cache."""
        return torch.tensor([self._rows[slot].cache_slot for slot in slots], dtype=torch.int64)

    def held(self, slots: Sequence[int]) -> Tensor:
        """int64 [n]: tokens of the rows that the KV cache holds."""
        return torch.tensor([self._rows[slot].held for slot in slots], dtype=torch.int64)

    def _make_room(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            self.kv_cache.reserve(row.cache_slot, row.held + len(row.tokens))

    def _truncate(self, row: _Row, end: int) -> None:
        if end < row.end:
            row.truncate(end)
        if end < row.held:
            row.held = end
            self.kv_cache.rewind([row.cache_slot], [end])


def _copied(values: Values) -> Values:
    return values.copy() if not isinstance(values, Tensor) else values.clone()
