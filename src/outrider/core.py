"""The compiled core (``outrider._native``), or None where it was not built."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["native"]

try:
    native: Any = import_module("outrider._native")
except ImportError:  # installed without a compiler: plain PyTorch and numpy do the same, slower
    native = None
