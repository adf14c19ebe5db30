"""One multi-token-prediction module, applied once or to its own output.

DeepSeek-V3 technical report (arXiv 2412.19437), section 2.2, equations 21 to 23: the state of position i and the
embedding of token i + 1, both normalised, are concatenated and projected (M_k), pass one decoder layer (TRM_k), and
the target's own head reads the result. Files put the embedding's columns first. A state here is the target's residual
stream after one auxiliary layer. The last layer, which the report takes, is not read, since libraries give its output
before or after the final norm; modules are trained on the layer before it, or on any other.

T packed tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base import AutoregressiveDrafter, linear, rms_norm
from outrider.errors import InvalidRequest
from outrider.types import Backend, TargetModel

__all__ = ["MTPConfig", "MTPDrafter"]


@dataclass(frozen=True, slots=True)
class MTPConfig:
    """Options of the ``mtp`` drafter. Raises InvalidRequest for values out of range."""

    model: str
    """The trained module: a directory or a hub id."""
    draft_tokens: int | None = None
    """The most tokens it proposes in a round, from the second on from its own state; None: as the checkpoint says."""
    target_layers: tuple[int, ...] | None = None
    """The one layer of the target it reads, counted from 0; None: as the checkpoint says."""
    dtype: str = "auto"
    """Precision of the drafter alone: float32, bfloat16, int8 or int4 (its head int8); auto: int8 where the native core
    runs, else the target's. Matrices stored in 4 bits stay so with int8 and int4. Rounding changes what it proposes a
    little, and its speed a lot; never the text."""

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise InvalidRequest(f"drafter mtp: draft_tokens must be at least 1, got {self.draft_tokens}")


class MTPDrafter(AutoregressiveDrafter):
    """Drafts with the module that was trained beside the target."""

    Config = MTPConfig
    kinds = ("mtp",)

    def __init__(
        self,
        checkpoint: DraftCheckpoint,
        target: TargetModel,
        backend: Backend,
        *,
        config: Any,
        dtype: torch.dtype | str,
        max_rows: int,
    ) -> None:
        super().__init__(checkpoint, target, backend, config=config, dtype=dtype, max_rows=max_rows)
        tensors = checkpoint.tensors
        self._project = linear(backend, tensors["fc.weight"], dtype)
        self._embed_norm, self._hidden_norm = (tensors[f"{name}_norm.weight"].float() for name in ("embed", "hidden"))
        norms = (self._embed_norm, self._hidden_norm)
        self.core = self.in_turn(backend, dtype, norms=norms, projection=tensors["fc.weight"])

    def condition(self, features: Tensor) -> Tensor:
        """The auxiliary state itself. [T, D] -> [T, D]"""
        return features

    def fuse(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [T], [T, D] -> the layer's input [T, D]"""
        eps = self.net.stack.config.norm_eps
        embedding = rms_norm(self.net.embed(tokens), self._embed_norm, eps)
        normed = rms_norm(hidden, self._hidden_norm, eps)
        return self._project(torch.cat([embedding.to(normed.dtype), normed], 1)), None
