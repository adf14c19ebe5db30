"""What a pass of a model takes and gives.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "Integers",
    "Mask",
    "RaggedBatch",
    "StackOutput",
    "TargetOutput",
    "Values",
    "joined",
    "to_array",
    "to_list",
    "to_tensor",
]

Mask = Literal["causal", "block"]
"""Who a new token attends to beside the cached ones: new tokens up to itself, or all new tokens of its row."""

Integers = npt.NDArray[np.int64]
Values = Tensor | npt.NDArray[np.float32]


class RaggedBatch:
    """Some new tokens of some rows. Prefill chunk, decode and verify are all this.

    It is not changed once made. The form that it was not made from, lists or tensors, is made when it is asked for:
    right after a pass each tensor takes several microseconds.
    """

    __slots__ = ("_lists", "_tensors")

    def __init__(self, tokens: Tensor, positions: Tensor, slots: Tensor, offsets: Tensor) -> None:
        """From tensors; the properties give their shapes."""
        self._tensors: tuple[Tensor, Tensor, Tensor, Tensor] | None = (tokens, positions, slots, offsets)
        self._lists: tuple[list[int], list[int], list[int], list[int]] | None = None

    @classmethod
    def of_lists(cls, tokens: list[int], positions: list[int], slots: list[int], offsets: list[int]) -> RaggedBatch:
        """The same from Python's integers."""
        batch = cls.__new__(cls)
        batch._lists = tokens, positions, slots, offsets
        batch._tensors = None
        return batch

    @classmethod
    def pack(cls, rows: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int]) -> RaggedBatch:
        """Pack rows of token ids, row b starting at position ``starts[b]``."""
        tokens = [token for row in rows for token in row]
        positions = [start + i for row, start in zip(rows, starts, strict=True) for i in range(len(row))]
        offsets = [0]
        for row in rows:
            offsets.append(offsets[-1] + len(row))
        return cls.of_lists(tokens, positions, list(slots), offsets)

    @property
    def lists(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, positions, slots and offsets. Not to be written to."""
        if self._lists is None:
            tokens, positions, slots, offsets = self.tensors
            self._lists = tokens.tolist(), positions.tolist(), slots.tolist(), offsets.tolist()
        return self._lists

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions, slots and offsets."""
        if self._tensors is None:
            tokens, positions, slots, offsets = (torch.from_numpy(np.array(part, np.int64)) for part in self.lists)
            self._tensors = tokens, positions, slots, offsets
        return self._tensors

    @property
    def tokens(self) -> Tensor:
        """int64 [T]"""
        return self.tensors[0]

    @property
    def positions(self) -> Tensor:
        """int64 [T]: the absolute position of each token in its sequence; consecutive within a row."""
        return self.tensors[1]

    @property
    def slots(self) -> Tensor:
        """int64 [B]: the memory slot of each row."""
        return self.tensors[2]

    @property
    def offsets(self) -> Tensor:
        """int64 [B+1]: row b owns tokens[offsets[b]:offsets[b+1]]."""
        return self.tensors[3]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: new tokens of each row."""
        return self.offsets.diff()

    def __len__(self) -> int:
        """T"""
        return len(self.tensors[0] if self._lists is None else self._lists[0])


class StackOutput:
    """What one pass through a layer stack gives, as tensors, or as arrays that become tensors when they are asked for:
    right after a pass, when PyTorch's code is in no cache, its simplest call takes tens of microseconds."""

    __slots__ = ("_features", "_hidden", "_logits", "largest")

    def __init__(
        self, hidden: Values, logits: Values | None, features: Values | None, largest: list[int] | None = None
    ) -> None:
        self._hidden, self._logits, self._features = hidden, logits, features
        self.largest = largest  # see ``FindsLargest``

    @property
    def hidden(self) -> Tensor:
        """float [R, D]: after the final norm, at ``logits_at``."""
        self._hidden = to_tensor(self._hidden)
        return self._hidden

    @property
    def logits(self) -> Tensor | None:
        """float [R, V]; None where the stack has no head, or gives ``largest`` instead."""
        if self._logits is not None:
            self._logits = to_tensor(self._logits)
        return self._logits

    @property
    def features(self) -> Tensor | None:
        """float [T, F]: raw residual after each auxiliary layer, before the final norm."""
        if self._features is not None:
            self._features = to_tensor(self._features)
        return self._features


class TargetOutput:
    """What one target pass gives, as tensors, or as arrays as in ``StackOutput``."""

    __slots__ = ("_features", "_hidden", "_logits", "largest")

    def __init__(
        self,
        logits: Values | None,
        features: Values | None,
        hidden: Values | None = None,
        largest: list[int] | None = None,
    ) -> None:
        """Give ``logits`` or, where they were asked for instead, ``largest`` (see ``FindsLargest``)."""
        self._logits, self._features, self._hidden = logits, features, hidden
        self.largest = largest

    @classmethod
    def of_stack(cls, output: StackOutput) -> TargetOutput:
        """That of a target whose layers are one stack; arrays stay arrays."""
        return cls(output._logits, output._features, output._hidden, output.largest)

    @property
    def logits(self) -> Tensor:
        """float [R, V]: of the packed tokens asked for (``logits_at``; all T of them by default)."""
        self._logits = to_tensor(self.logit_values)
        return self._logits

    @property
    def features(self) -> Tensor | None:
        """float [T, F]: raw residual after each auxiliary layer, before the final norm."""
        if self._features is not None:
            self._features = to_tensor(self._features)
        return self._features

    @property
    def hidden(self) -> Tensor | None:
        """float [R, D]: what ``unembed`` made the logits of, where the target can tell."""
        if self._hidden is not None:
            self._hidden = to_tensor(self._hidden)
        return self._hidden

    @property
    def logit_values(self) -> Values:
        """The logits as they are."""
        assert self._logits is not None, "this pass was asked for the largest logits alone"
        return self._logits

    @property
    def feature_values(self) -> Values | None:
        """The features as they are."""
        return self._features


def joined(pieces: Sequence[Values]) -> Values:
    """The rows of pieces of one kind, piece after piece; not a copy where there is one."""
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if isinstance(pieces[0], np.ndarray) else torch.cat(pieces)  # type: ignore[arg-type]


def to_tensor(values: Values | Integers) -> Tensor:
    """The same numbers, on the same memory."""
    return torch.from_numpy(values) if isinstance(values, np.ndarray) else values


def to_array(values: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same numbers, on the same memory unless that is another device's."""
    return values if isinstance(values, np.ndarray) else values.numpy(force=True)


def to_list(numbers: Sequence[int] | Tensor) -> Sequence[int]:
    """The same integers."""
    return numbers.tolist() if isinstance(numbers, Tensor) else numbers
