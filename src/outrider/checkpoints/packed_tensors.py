"""Matrices stored in 8 or 4 bits, in Outrider's own format: what the native core runs in anyway.

8 bits: a matrix [rows, columns] is int8 with one float32 scale a row, ``NAME_scale`` [rows]: the largest value of a row
is 127 times its scale.

4 bits: groups of 32 values of a row share one float16 scale, ``NAME_scale`` [rows, columns / 32]. A value is a whole
number of -8 to 7 times its scale; ``NAME`` is uint8 [rows, columns / 2], two numbers a byte with 8 added to each, the
first in the low half. These are the blocks that GGUF calls Q4_0.

Everything else keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from outrider.errors import CheckpointError

__all__ = ["GROUP", "SCALE", "FourBitWeights", "dequantised", "in_four_bits", "quantised"]

SCALE = "_scale"
LARGEST = 127
GROUP = 32  # values of a row that share a scale, in 4 bits
ZERO = 8  # added to a number of 4 bits


def quantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of floating point as int8 with their scales."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            stored[name] = tensor
            continue
        wide = tensor.float()
        scale = wide.abs().amax(1) / LARGEST
        stored[name] = (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def in_four_bits(name: str, matrix: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """A matrix in 4 bits as it is stored. [rows, columns], [rows, columns / 32]

    Raises CheckpointError for values that are not whole numbers of -8 to 7 times their scales.
    """
    numbers = _numbers(matrix, scales)
    return {name: numbers[:, 0::2] | numbers[:, 1::2] << 4, name + SCALE: scales}


def _numbers(matrix: Tensor, scales: Tensor) -> Tensor:
    """8 added to each number of a matrix in 4 bits. [rows, columns], [rows, columns / 32] -> uint8 [rows, columns]

    Raises CheckpointError for values that are not whole numbers of -8 to 7 times their scales.
    """
    wide = scales.float().repeat_interleave(GROUP, 1)
    numbers = torch.where(wide == 0, 0.0, matrix.float() / wide).round()
    if not torch.equal(numbers * wide, matrix.float()) or numbers.min() < -ZERO or numbers.max() >= ZERO:
        raise CheckpointError("a matrix in 4 bits holds other values than whole numbers of -8 to 7 times its scales")
    return (numbers + ZERO).to(torch.uint8)


def dequantised(name: str, tensor: Tensor, scale: Tensor | None) -> Tensor:
    """A stored matrix in float32. Raises CheckpointError for one without fitting scales."""
    rows = len(tensor) if tensor.ndim else 0
    four = tensor.dtype == torch.uint8
    expected = (rows, 2 * tensor.shape[-1] // GROUP) if four and tensor.ndim == 2 else (rows,)
    if scale is None or tensor.ndim != 2 or scale.shape != expected or not scale.is_floating_point():
        got = "there is none" if scale is None else f"it is {scale.dtype} of shape {list(scale.shape)}"
        raise CheckpointError(
            f"tensor {name!r} is {'uint8' if four else 'int8'} and needs {name + SCALE!r}, "
            f"{'float16' if four else 'float32'} of shape {list(expected)}; {got}"
        )
    if not four:
        return tensor.float() * scale.float()[:, None]
    numbers = torch.stack([tensor & 15, tensor >> 4], 2).flatten(1).float() - ZERO
    return numbers * scale.float().repeat_interleave(GROUP, 1)


class Blocks(NamedTuple):
    """Rows of a matrix in 4 bits, see ``backends.file_formats.Parts``."""

    kind: str
    values: Tensor  # uint8 [rows, columns], 8 added to each
    scale: Tensor  # float32 [rows, columns / 32]
    minimum: None = None


class FourBitWeights(Mapping[str, Tensor]):
    """Weights of a stack, some of them in 4 bits, for the native core's dtype ``file``: it takes those as they are."""

    def __init__(self, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        """``scales``: float16 [rows, columns / 32] of each matrix in 4 bits; other matrices are float32."""
        self._weights, self._scales = weights, scales
        self.kinds = {name: "Q4_0" if name in scales else "F32" for name in weights}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of a weight."""
        return self._weights[name][begin:end]

    def blocks(self, name: str, begin: int = 0, end: int | None = None) -> Blocks | None:
        """Rows of a matrix in 4 bits; None for another weight."""
        if name not in self._scales:
            return None
        scales = self._scales[name][begin:end]
        return Blocks("Q4_0", _numbers(self._weights[name][begin:end], scales), scales.float())
