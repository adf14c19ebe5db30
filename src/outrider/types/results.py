"""What users get: events, pieces of text, finished requests and their counts.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["DraftReport", "Event", "Output", "Piece", "RequestStats", "TokenLogprobs"]


@dataclass(slots=True)
class RequestStats:
    """Counts of one request. The token that prefill gives belongs to no round."""

    rounds: int = 0  # target passes after prefill
    drafted: int = 0  # drafted tokens that were verified
    accepted: int = 0
    generated: int = 0  # committed tokens
    seconds: float = 0.0  # from the first prefill to the last commit
    accepted_per_position: list[int] = field(default_factory=list)  # rounds that accepted at least j + 1 drafts
    drafted_per_position: list[int] = field(default_factory=list)  # rounds that verified at least j + 1 drafts
    cached_tokens: int = 0  # of the prompt: taken over from an earlier request instead of computed

    @property
    def acceptance_length(self) -> float:
        """Mean tokens a round commits: accepted drafts plus the bonus token."""
        return (self.generated - 1) / self.rounds if self.rounds else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the target's probabilities at one position: softmax of its logits as they are."""

    logprob: float  # of the committed token
    top: tuple[tuple[int, float], ...]  # token ids with theirs, the likeliest first; on ties the lowest id


@dataclass(frozen=True, slots=True)
class DraftReport:
    """What the drafter said of a draft."""

    probability: float | None  # with which it was drawn; None: it was not sampled
    confidence: float | None  # that it would be accepted; None: the drafter reports none


class Piece(NamedTuple):
    """Text of one committed token (may be empty while a character is incomplete)."""

    token_id: int
    text: str
    drafted: bool  # the drafter proposed it and the target accepted it
    logprobs: TokenLogprobs | None = None  # where the request asked for them
    draft: DraftReport | None = None  # of an accepted draft, where the request asked for log-probabilities


class Event(NamedTuple):
    """New text of one request."""

    request: int  # index of the prompt
    pieces: tuple[Piece, ...]
    finish_reason: str | None = None  # "stop" | "length" | "cancelled"; set on the last event

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Output:
    """One finished request."""

    prompt: str
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RequestStats
