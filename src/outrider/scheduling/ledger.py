"""What speculation has gained and lost against plain decoding, in seconds, and what it may still lose.

A step that drafted is worth the seconds in which plain decoding would have given its tokens. Plain steps earn a small
share of their time; losses are paid from it, so over any time they stay below that share and what was saved up. Gains
are saved up too, but never more than a bound: an hour of gains does not license a minute of losses.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Ledger"]


@dataclass(slots=True)
class Ledger:
    """Seconds that may be lost."""

    share: float = 0.0075
    """Of the time of plain steps, what they earn."""
    most: float = 0.25
    """Seconds that can be saved up; also what it starts with."""
    balance: float = 0.25

    def earn(self, seconds: float) -> None:
        """A plain step that took so long."""
        self.balance = min(self.most, self.balance + self.share * seconds)

    def settle(self, gain: float) -> None:
        """A step that drafted: seconds that it saved, negative where it lost them."""
        self.balance = min(self.most, self.balance + gain)

    def affords(self, seconds: float) -> bool:
        """Whether so much may be lost. More than can ever be saved up is allowed once all of that is there."""
        return self.balance >= min(seconds, self.most)
