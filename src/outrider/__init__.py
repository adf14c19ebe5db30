"""Outrider: lossless speculative decoding on one machine."""

from __future__ import annotations

from outrider.version import __version__

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    # Imported on use: `outrider --help` and the command line's own errors should not wait for torch.
    if name == "LLM":
        from outrider.engine.llm import LLM

        return LLM
    if name == "SamplingParams":
        from outrider.config import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'outrider' has no attribute {name!r}")
