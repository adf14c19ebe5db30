"""Verify a draft up to the first confidence below a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider.errors import InvalidRequest
from outrider.scheduling.online_correction import OnlineCorrection
from outrider.types import StepCost, StepView, Values

__all__ = ["ThresholdConfig", "ThresholdPolicy"]


@dataclass(frozen=True, slots=True)
class ThresholdConfig:
    """Options of the ``threshold`` policy. Raises InvalidRequest for values out of range."""

    draft_tokens: int = 8
    """The most tokens to draft in a round; 0 decodes plainly."""
    threshold: float = 0.5
    """The least confidence of a token that is verified, between 0 and 1."""
    follow_drift: bool = False
    """Correct the confidences by what is being accepted (``scheduling.online_correction``)."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 0:
            raise InvalidRequest(f"policy threshold: draft_tokens must be at least 0, got {self.draft_tokens}")
        if not 0 <= self.threshold <= 1:
            raise InvalidRequest(f"policy threshold: threshold must be between 0 and 1, got {self.threshold}")


class ThresholdPolicy:
    """Drafts up to k tokens and keeps those before the first confidence below the threshold.

    A drafter without confidences has all its tokens kept. A correction that follows drift learns only from drafts that
    were verified; a position that it cuts in every round slowly goes back to where it was, and is tried again.
    """

    Config = ThresholdConfig

    def __init__(self, config: ThresholdConfig) -> None:
        self._draft_tokens = config.draft_tokens
        self._threshold = config.threshold
        self._correction = OnlineCorrection() if config.follow_drift else None
        self._seen: list[tuple[list[float], int]] = []  # confidences and verified drafts of this step's rows

    @classmethod
    def from_config(cls, config: ThresholdConfig, **services: Any) -> ThresholdPolicy:
        return cls(config)

    def plan(self, step: StepView) -> list[int]:
        return [self._draft_tokens] * len(step)

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        most = [min(n, self._draft_tokens) for n in lengths]
        if confidence is None:
            return most
        said = confidence.tolist()
        right = said if self._correction is None else [self._correction.adjust(row) for row in said]
        keep = [
            next((j for j in range(n) if not row[j] >= self._threshold), n)  # not: NaN is low
            for row, n in zip(right, most, strict=True)
        ]
        if self._correction is not None:
            self._seen = list(zip(said, keep, strict=True))
        return keep

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """The threshold is what the caller set; only the correction learns."""
        for (confidence, verified), held in zip(self._seen, accepted, strict=False):
            if self._correction is not None:
                self._correction = self._correction.update(confidence, verified, held)
        self._seen = []
