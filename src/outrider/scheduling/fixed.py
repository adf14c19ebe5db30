"""Draft the same number of tokens in every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from outrider.errors import InvalidRequest
from outrider.types import StepCost, StepView, Values

__all__ = ["FixedConfig", "FixedPolicy"]


@dataclass(frozen=True, slots=True)
class FixedConfig:
    """Options of the ``fixed`` policy. Raises InvalidRequest for values out of range."""

    draft_tokens: int = 4
    """Tokens to draft and verify in every round; 0 decodes plainly."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 0:
            raise InvalidRequest(f"policy fixed: draft_tokens must be at least 0, got {self.draft_tokens}")


class FixedPolicy:
    """Drafts k tokens and verifies all of them."""

    Config = FixedConfig

    def __init__(self, config: FixedConfig) -> None:
        self._draft_tokens = config.draft_tokens

    @classmethod
    def from_config(cls, config: FixedConfig, **services: Any) -> FixedPolicy:
        return cls(config)

    def plan(self, step: StepView) -> list[int]:
        return [self._draft_tokens] * len(step)

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        return [min(n, self._draft_tokens) for n in lengths]

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """Nothing: k never changes."""
