"""Any drafter's own signal, n-gram statistics for instance, as a probability that was measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from outrider.scheduling.calibration import Calibration
from outrider.types import (
    Context,
    Drafter,
    Forgets,
    Proposal,
    RaggedBatch,
    ReadsHidden,
    ResetsRows,
    Rng,
    SharesPrefixes,
    Values,
)

__all__ = ["CalibratedDrafter"]


class CalibratedDrafter:
    """Drafts what another drafter drafts, with its confidences put right."""

    def __init__(self, drafter: Drafter, calibration: Calibration) -> None:
        self.drafter, self.calibration = drafter, calibration
        self.aux_layers, self.block = drafter.aux_layers, drafter.block
        if isinstance(drafter, ReadsHidden):
            self.reads_hidden = drafter.reads_hidden

    def open(self, slot: int, capacity: int) -> None:
        self.drafter.open(slot, capacity)

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        return self.calibration.calibrated(self.drafter.propose(slots, last, context, limit, rng), context)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        self.drafter.observe(batch, features, hidden)

    def close(self, slot: int) -> None:
        self.drafter.close(slot)

    def match(self, tokens: Sequence[int]) -> int:
        """See ``outrider.types.SharesPrefixes``; 0 where the drafter shares nothing."""
        return self.drafter.match(tokens) if isinstance(self.drafter, SharesPrefixes) else 0

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        if isinstance(self.drafter, SharesPrefixes):
            self.drafter.adopt(slot, tokens, count)

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        if isinstance(self.drafter, SharesPrefixes):
            self.drafter.publish(slot, tokens)

    def forget(self) -> None:
        """Forget earlier requests, where the drafter remembers any."""
        if isinstance(self.drafter, Forgets):
            self.drafter.forget()

    def reset_rows(self) -> None:
        """Reset the rows, where the drafter can."""
        if isinstance(self.drafter, ResetsRows):
            self.drafter.reset_rows()
