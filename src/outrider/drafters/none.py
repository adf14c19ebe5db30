"""No drafting: plain decoding through the same loop, the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from outrider.types import Context, Proposal, RaggedBatch, Rng, TargetModel, Values

__all__ = ["NoConfig", "NoDrafter"]


@dataclass(frozen=True, slots=True)
class NoConfig:
    """Nothing to choose."""


class NoDrafter:
    """Proposes nothing."""

    Config = NoConfig
    aux_layers: tuple[int, ...] = ()
    block = 0

    @classmethod
    def from_config(cls, config: NoConfig, target: TargetModel, **services: Any) -> NoDrafter:
        return cls()

    def open(self, slot: int, capacity: int) -> None:
        """Nothing to reserve."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        return Proposal.empty(len(slots))

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Nothing to learn."""

    def reset_rows(self) -> None:
        """Nothing to free."""

    def close(self, slot: int) -> None:
        """Nothing to free."""
