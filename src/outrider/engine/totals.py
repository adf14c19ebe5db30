"""Counts of the requests that have finished."""

from __future__ import annotations

from dataclasses import dataclass, field

from outrider.engine.request import Request
from outrider.types import RequestStats

__all__ = ["Totals"]


@dataclass(frozen=True, slots=True)
class Totals:
    """Replaced as a whole, so that an interrupt neither loses a request nor counts it twice."""

    requests: int = 0
    stats: RequestStats = field(default_factory=RequestStats)
    latest: int = -1  # number of the request that was counted last

    def with_finished(self, request: Request) -> Totals:
        """One more request; those that never committed a token do not count."""
        one, new = self.stats, request.stats
        if request.number == self.latest or not new.generated:
            return self
        total = RequestStats(
            rounds=one.rounds + new.rounds,
            drafted=one.drafted + new.drafted,
            accepted=one.accepted + new.accepted,
            generated=one.generated + new.generated,
            seconds=one.seconds + new.seconds,
            accepted_per_position=_added(one.accepted_per_position, new.accepted_per_position),
            drafted_per_position=_added(one.drafted_per_position, new.drafted_per_position),
            cached_tokens=one.cached_tokens + new.cached_tokens,
        )
        return Totals(self.requests + 1, total, request.number)


def _added(one: list[int], other: list[int]) -> list[int]:
    """Counts by position, together."""
    width = max(len(one), len(other))
    return [sum(counts[j] for counts in (one, other) if j < len(counts)) for j in range(width)]
