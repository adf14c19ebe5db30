"""The simplest key/value cache: one contiguous stretch per slot, reserved when the cache is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from outrider.errors import CacheFull

__all__ = ["ContiguousCache"]


class ContiguousCache:
    """Keys and values of ``slots`` sequences of up to ``capacity`` tokens each.

    The backend decides the layout: ``layer_shapes`` gives each layer's key and value shape of one slot, and the tensors
    are ``keys[layer]`` and ``values[layer]``, [slots, *shape]. Pages are touched only when they are written, so a large
    capacity costs address space, not memory. Nothing past a slot's length may be read.
    """

    def __init__(
        self,
        slots: int,
        capacity: int,
        layer_shapes: Sequence[tuple[Sequence[int], Sequence[int]]],
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self.lengths = torch.zeros(slots, dtype=torch.int64)
        self.keys: list[Tensor] = [torch.empty(slots, *key, dtype=dtype) for key, _ in layer_shapes]
        self.values: list[Tensor] = [torch.empty(slots, *value, dtype=dtype) for _, value in layer_shapes]
        self._open: set[int] = set()

    def open(self) -> int:
        """Reserve an empty slot, the lowest free one. Raises CacheFull."""
        slot = next((slot for slot in range(len(self.lengths)) if slot not in self._open), None)
        if slot is None:
            raise CacheFull(f"all {len(self.lengths)} slots are in use; close one, or make the cache with more slots")
        self._open.add(slot)
        self.lengths[slot] = 0
        return slot

    def index(self, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where positions are in ``keys`` and ``values``. int64 [T], int64 [T] -> two of [T]."""
        return slots, positions

    def stretch(self, tensor: Tensor, slot: int, first: int, last: int) -> Tensor:
        """Positions ``first:last`` of a slot, a view. [slots, Hkv, capacity, Dh] -> [Hkv, last - first, Dh]"""
        return tensor[slot].narrow(1, first, last - first)

    def require(self, slot: int, start: int, end: int) -> None:
        """Check that tokens ``start`` to ``end`` may be written: no hole before them, and room for them."""
        assert slot in self._open, f"slot {slot} is not open"
        held = int(self.lengths[slot])
        assert start <= held, f"slot {slot} holds {held} tokens; writing from {start} would leave a hole"
        if end > self.capacity:
            raise CacheFull(
                f"a sequence of {end} tokens does not fit a slot of {self.capacity}; "
                "shorten the prompt or max_tokens, or make the cache with a larger capacity"
            )

    def reserve(self, slot: int, tokens: int) -> bool:
        """Whether a sequence of ``tokens`` fits: every slot has its full capacity from the start."""
        return tokens <= self.capacity

    def rewind(self, slots: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor) -> None:
        """Drop everything past ``lengths[b]`` tokens of slot ``slots[b]``. [B], [B]."""
        slots, lengths = torch.as_tensor(slots), torch.as_tensor(lengths)
        held = self.lengths[slots]
        assert bool(((lengths >= 0) & (lengths <= held)).all()), f"cannot rewind lengths {held} to {lengths}"
        self.lengths[slots] = lengths

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot in self._open, f"slot {slot} is not open"
        self.lengths[slot] = 0
        self._open.remove(slot)
