"""Prompt lookup: what followed the last few tokens the last time they were seen in this text.

Saxena, "Prompt lookup decoding", 2023. Costs no model, pays where text repeats itself: summaries, edits, code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.types import Context, Proposal, RaggedBatch, Rng, TargetModel, Values

__all__ = ["NgramConfig", "NgramDrafter"]

EVIDENCE = 32  # tokens compared behind a match; beyond this more agreement hardly changes the confidence


@dataclass(frozen=True, slots=True)
class NgramConfig:
    """Options of the ``ngram`` drafter. Raises InvalidRequest for values out of range."""

    max_ngram: int = 4
    """Longest n-gram looked up; tried first."""
    min_ngram: int = 2
    """Shortest n-gram looked up."""
    draft_tokens: int = 8
    """The most tokens it proposes in a round."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise InvalidRequest(
                f"drafter ngram: min_ngram {self.min_ngram} and max_ngram {self.max_ngram} must satisfy "
                "1 <= min_ngram <= max_ngram"
            )
        if self.draft_tokens < 1:
            raise InvalidRequest(f"drafter ngram: draft_tokens must be at least 1, got {self.draft_tokens}")


@dataclass(slots=True)
class _Index:
    """Where each n-gram of one row ended most recently, among those that have a continuation."""

    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    indexed: int = 0  # tokens of the history that were read


class NgramDrafter:
    """Copies the continuation of the most recent earlier occurrence of the row's longest known n-gram."""

    Config = NgramConfig
    aux_layers: tuple[int, ...] = ()

    def __init__(self, config: NgramConfig) -> None:
        self.block = config.draft_tokens
        self._sizes = range(config.min_ngram, config.max_ngram + 1)
        self._rows: dict[int, _Index] = {}

    @classmethod
    def from_config(cls, config: NgramConfig, target: TargetModel, **services: Any) -> NgramDrafter:
        return cls(config)

    def open(self, slot: int, capacity: int) -> None:
        self._rows[slot] = _Index()

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """Deterministic (no distribution). Confidence is Laplace's rule of succession: a copy that has agreed with the
        text for m tokens agrees once more with probability (m + 1) / (m + 2)."""
        drafts: list[list[int]] = []
        confidence: list[list[float]] = []
        for b, (slot, most) in enumerate(zip(slots, limit, strict=True)):
            history, most = context.history[b], min(most, self.block)
            start = self._continuation(self._rows[slot], history) if most > 0 else None
            if start is None:
                drafts.append([])
                confidence.append([])
                continue
            # The copy may run into what it writes (as in LZ77), so that a loop is drafted to full length.
            copied = history[start : start + most]
            drafts.append([copied[i % len(copied)] for i in range(most)])
            agreed = _agreement(history, start)
            confidence.append([(agreed + j + 1) / (agreed + j + 2) for j in range(most)])
        return Proposal.pack(drafts, confidence)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Nothing: the history that ``propose`` is shown holds every committed token."""

    def reset_rows(self) -> None:
        """Close all slots at once."""
        self._rows.clear()

    def close(self, slot: int) -> None:
        del self._rows[slot]

    def _continuation(self, row: _Index, history: list[int]) -> int | None:
        """Index of the first token to copy, or None where no n-gram of the row's end was seen before."""
        # The last token is left out until something follows it: an n-gram must not find itself.
        for end in range(row.indexed, len(history) - 1):
            for n in self._sizes:
                if n <= end + 1:
                    row.ends[tuple(history[end + 1 - n : end + 1])] = end
        row.indexed = max(row.indexed, len(history) - 1)
        for n in reversed(self._sizes):
            if n < len(history) and (found := row.ends.get(tuple(history[-n:]))) is not None:
                return found + 1
        return None


def _agreement(history: list[int], start: int) -> int:
    """How many tokens just before ``start`` equal the last ones, at most EVIDENCE."""
    most = min(EVIDENCE, start)
    return next((i for i in range(most) if history[start - 1 - i] != history[-1 - i]), most)
