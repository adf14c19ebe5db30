"""EAGLE-3: one decoder layer drafts token by token, from the target's features, then from its own hidden states.

EAGLE-3, arXiv 2503.01840, section 3: low, middle and high features are fused by one matrix (fc); the layer's input is
the fused state beside the embedding of the token that follows, each normalised, so its attention is twice as wide.

T packed tokens, F feature width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base import AutoregressiveDrafter, linear, rms_norm
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.errors import InvalidRequest
from outrider.types import Backend, TargetModel

__all__ = ["Eagle3Config", "Eagle3Drafter"]


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """Options of the ``eagle3`` drafter. Raises InvalidRequest for values out of range."""

    model: str
    """The trained drafter: a directory or a hub id."""
    draft_tokens: int | None = None
    """The most tokens it proposes in a round; None: as many as it was trained for."""
    target_layers: tuple[int, ...] | None = None
    """Layers of the target it reads, counted from 0; None: as the checkpoint says."""
    dtype: str = "auto"
    """Precision of the drafter alone: float32, bfloat16, int8 or int4 (its head int8); auto: int8 where the native core
    runs, else the target's. Matrices stored in 4 bits stay so with int8 and int4. Rounding changes what it proposes a
    little, and its speed a lot; never the text."""

    def __post_init__(self) -> None:
        if self.draft_tokens is not None and self.draft_tokens < 1:
            raise InvalidRequest(f"drafter eagle3: draft_tokens must be at least 1, got {self.draft_tokens}")


class Eagle3Drafter(AutoregressiveDrafter):
    """Drafts token by token. The keys and values of drafts are rewound; accepted tokens run again on the target's
    features."""

    Config = Eagle3Config
    kinds = ("eagle3",)

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
        assert isinstance(checkpoint.design, Eagle3Design)
        self.design, tensors = checkpoint.design, checkpoint.tensors
        self.feeds_normed = self.design.norm_output
        self._fc = linear(backend, tensors["fc.weight"], dtype)
        gains = {name.removesuffix(".weight"): gain.float() for name, gain in tensors.items() if gain.ndim == 1}
        self._embed_norm, self._hidden_norm = gains["embed_norm"], gains["hidden_norm"]
        self._feature_norm: Tensor | None = None  # [F]: one gain, or those of the auxiliary layers side by side
        if self.design.norm_before_fc:
            self._feature_norm = gains["feature_norm"]
        elif self.design.norm_each_before_fc:
            self._feature_norm = torch.cat([gains[f"feature_norms.{i}"] for i in range(len(self.aux_layers))])
        self.core = self.in_turn(
            backend,
            dtype,
            fusion=tensors["fc.weight"],
            feature_norm=self._feature_norm,
            feature_groups=self._feature_groups,
            norms=(self._embed_norm, self._hidden_norm),
            norm_residual=self.design.norm_before_residual,
        )

    @property
    def _feature_groups(self) -> int:
        """Parts of the features that are normalised each by itself."""
        return len(self.aux_layers) if self.design.norm_each_before_fc else 1

    def condition(self, features: Tensor) -> Tensor:
        """[T, F] -> [T, D]"""
        if self._feature_norm is not None:
            groups = self._feature_groups
            gain = self._feature_norm.view(groups, -1)
            features = rms_norm(features.unflatten(1, (groups, -1)), gain, self.net.stack.config.norm_eps).flatten(1)
        return self._fc(features)

    def fuse(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """int64 [T], [T, D] -> attention input [T, 2 D], residual stream [T, D]"""
        eps = self.net.stack.config.norm_eps
        embedding = rms_norm(self.net.embed(tokens), self._embed_norm, eps)
        normed = rms_norm(hidden, self._hidden_norm, eps)
        residual = normed if self.design.norm_before_residual else hidden
        return torch.cat([embedding.to(normed.dtype), normed], 1), residual
