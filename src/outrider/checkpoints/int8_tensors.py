"""Matrices stored in 8 bits, in Outrider's own format: a quarter of float32, and what the native core runs in anyway.

A matrix [rows, columns] is int8 with one float32 scale a row, ``NAME_scale`` [rows]: the largest value of a row is 127
times its scale. Everything else keeps its dtype.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from outrider.errors import CheckpointError

__all__ = ["SCALE", "dequantised", "quantised"]

SCALE = "_scale"
LARGEST = 127


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


def dequantised(name: str, tensor: Tensor, scale: Tensor | None) -> Tensor:
    """A stored matrix in float32. Raises CheckpointError for one without a fitting scale."""
    rows = len(tensor) if tensor.ndim else 0
    if scale is None or tensor.ndim != 2 or scale.shape != (rows,) or not scale.is_floating_point():
        got = "there is none" if scale is None else f"it is {scale.dtype} of shape {list(scale.shape)}"
        raise CheckpointError(f"tensor {name!r} is int8 and needs {name + SCALE!r}, float32 of shape [{rows}]; {got}")
    return tensor.float() * scale.float()[:, None]
