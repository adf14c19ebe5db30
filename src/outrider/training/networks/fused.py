"""Functions of many small operations, compiled where calling the operations takes longer than their work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._triton import has_triton

__all__ = ["fused"]

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` as it is on a CPU; where one of its positional arguments is on a CUDA device, compiled for any
    number of rows: one call and few kernels instead of one for each operation. Sums may round differently there."""

    @cache
    def compiled() -> Callable[P, R]:
        return torch.compile(function, dynamic=True) if has_triton() else function

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        on_device = any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
        return (compiled() if on_device else function)(*args, **kwargs)

    return call
