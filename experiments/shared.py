"""Helpers of ``benchmarks/support.py`` for the scripts in this folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from support import facts, say, table  # noqa: E402

__all__ = ["facts", "say", "table"]
