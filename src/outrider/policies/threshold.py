"""Verify a draft up to the first token the drafter is not sure of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.types import StepCost

__all__ = ["ThresholdConfig", "ThresholdPolicy"]


@dataclass(frozen=True, slots=True)
class ThresholdConfig:
    """Options of the ``threshold`` policy. Raises InvalidRequest for values out of range."""

    draft_tokens: int = 8
    """The most tokens to draft in a round; 0 decodes plainly."""
    threshold: float = 0.5
    """The least confidence of a token that is verified, between 0 and 1."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 0:
            raise InvalidRequest(f"policy threshold: draft_tokens must be at least 0, got {self.draft_tokens}")
        if not 0 <= self.threshold <= 1:
            raise InvalidRequest(f"policy threshold: threshold must be between 0 and 1, got {self.threshold}")


class ThresholdPolicy:
    """Drafts up to k tokens and keeps those before the first confidence below the threshold.

    A drafter without confidences has all its tokens kept.
    """

    Config = ThresholdConfig

    def __init__(self, config: ThresholdConfig) -> None:
        self._draft_tokens = config.draft_tokens
        self._threshold = config.threshold

    @classmethod
    def from_config(cls, config: ThresholdConfig, **services: Any) -> ThresholdPolicy:
        return cls(config)

    def plan(self, rows: int) -> int:
        return self._draft_tokens

    def choose(self, confidence: Tensor | None, lengths: Tensor) -> Tensor:
        lengths = lengths.clamp(max=self._draft_tokens)
        if confidence is None:
            return lengths
        # A running product of "sure enough" is 1 up to the first doubt and 0 after it.
        sure = (confidence >= self._threshold).long().cumprod(1).sum(1)
        return lengths.minimum(sure)

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """Nothing: the threshold is what the caller set."""
