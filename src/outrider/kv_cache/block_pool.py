"""Blocks of keys and values that sequences share: reference counts, and blocks found again by what they hold.

A block is ``size`` consecutive positions of one sequence, in every layer. What it holds follows from the tokens up to
its end (and ``ahead`` tokens after it, for drafters that pair a position with the token that follows), so its name is a
digest of those: a later sequence that begins alike finds it under that name.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

__all__ = ["BlockPool", "digests"]


def digests(tokens: Sequence[int], size: int, ahead: int = 0, after: Sequence[bytes] = ()) -> Iterator[bytes]:
    """The name of every full block of a sequence, in order; ``after``: the names of its first blocks, left out."""
    name = after[-1] if after else b""
    for index in range(len(after), (len(tokens) - ahead) // size):
        begin, end = index * size + (ahead if index else 0), (index + 1) * size + ahead
        name = blake2b(name + array("q", tokens[begin:end]).tobytes(), digest_size=16).digest()
        yield name


class BlockPool:
    """``count`` blocks. Each is held by some sequences, or idle (held by none, but its content may be asked for again),
    or free. Idle blocks are given out when no free one is left, the least recently used first."""

    def __init__(self, count: int, size: int, ahead: int = 0, retained: int | None = None) -> None:
        """``retained``: the most idle blocks that are kept; None: all."""
        assert count > 0 and size > 0, f"a pool of {count} blocks of {size} tokens holds nothing"
        self.count, self.size, self.ahead = count, size, ahead
        self.retained = count if retained is None else retained
        self._holders: list[int] = []  # of the blocks that were ever used, which are the first ones
        self._free: list[int] = []  # used before; the last one given back is the first one used again
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}
        self._named: dict[bytes, list[int]] = {}  # blocks of the same content; the first one is found

    @property
    def available(self) -> int:
        """Blocks that ``take`` can still give."""
        return self.count - len(self._holders) + len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Blocks that no sequence holds, kept for one that begins alike."""
        return len(self._idle)

    def holders(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._holders[block]

    def is_named(self, block: int) -> bool:
        """Whether a block can be found by its content."""
        return block in self._names

    def take(self) -> int:
        """A block that nothing else holds."""
        if self._free:
            block = self._free.pop()
        elif len(self._holders) < self.count:
            block = len(self._holders)
            self._holders.append(0)
        else:
            block, _ = self._idle.popitem(last=False)
            self.forget(block)
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more sequence holds a block."""
        self._holders[block] += 1
        self._idle.pop(block, None)

    def drop(self, block: int) -> None:
        """One sequence less holds a block."""
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block not in self._names or len(self._named[self._names[block]]) > 1:  # another one is found in its place
            self.forget(block)
            self._free.append(block)
            return
        self._idle[block] = None
        if len(self._idle) > self.retained:
            oldest, _ = self._idle.popitem(last=False)
            self.forget(oldest)
            self._free.append(oldest)

    def name(self, block: int, name: bytes) -> None:
        """Let a block be found by its content; of several blocks of that content, while the ones before it are not."""
        assert block not in self._names, f"block {block} has a name"
        self._names[block] = name
        self._named.setdefault(name, []).append(block)

    def forget(self, block: int) -> None:
        """A block's content is about to change: nobody may find it any more."""
        name = self._names.pop(block, None)
        if name is not None:
            self._named[name].remove(block)
            if not self._named[name]:
                del self._named[name]

    def forget_idle(self) -> None:
        """Give up every block that no sequence holds."""
        for block in list(self._idle):
            self.forget(block)
            del self._idle[block]
            self._free.append(block)

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of a sequence."""
        found = []
        for name in digests(tokens, self.size, self.ahead):
            blocks = self._named.get(name)
            if blocks is None:
                break
            found.append(blocks[0])
        return found
