"""What speculation has gained and lost against plain decoding, in seconds, and what it may still lose.

A step that drafted is worth the seconds in which plain decoding would have given its tokens. Losses are paid from what
the ledger holds: a credit at the start, which plain steps fill up again with a small share of their time, and gains. So
over any time losses stay below that share and what was saved up. Gains are saved up too, but never more than a bound:
an hour of gains does not license a minute of losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Ledger"]


@dataclass(slots=True)
class Ledger:
    """Seconds that may be lost."""

    share: float = 0.0075
    """Of the time of plain steps, what they earn."""
    most: float = 0.25
    """Seconds that gains can save up."""
    credit: float = 0.25
    """Seconds that it starts with, and that plain steps can save up; at most ``most``."""
    balance: float = field(init=False)

    def __post_init__(self) -> None:
        self.balance = self.credit = min(self.credit, self.most)

    def limit(self, credit: float) -> None:
        """Another credit, of which as much is left as of the one before."""
        credit, left = min(credit, self.most), min(self.balance, self.credit)
        self.balance = self.balance - left + credit * (left / self.credit)
        self.credit = credit

    def earn(self, seconds: float) -> None:
        """A plain step that took so long."""
        if self.balance < self.credit:
            self.balance = min(self.credit, self.balance + self.share * seconds)

    def settle(self, gain: float) -> None:
        """A step that drafted: seconds that it saved, negative where it lost them."""
        self.balance = min(self.most, self.balance + gain)

    def affords(self, seconds: float) -> bool:
        """Whether so much may be lost. More than the credit is allowed once all of that is there."""
        return self.balance >= min(seconds, self.credit)
