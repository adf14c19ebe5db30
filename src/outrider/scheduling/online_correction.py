"""Online correction of calibrated confidences that have drifted, from what is being accepted now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from outrider.scheduling.calibration import logit, sigmoid

__all__ = ["OnlineCorrection"]


@dataclass(frozen=True, slots=True)
class OnlineCorrection:
    """A logistic correction of each position, sigmoid(slope z + shift), that follows what is being accepted.

    Each outcome moves both by one step of gradient descent on its log loss. Each round draws both back to the identity
    a little, so that a position that is not verified any more ends where it began.
    """

    slopes: tuple[float, ...] = ()  # of the positions seen so far; the others are left as they are
    shifts: tuple[float, ...] = ()
    rate: float = 0.05
    """Step: about 1 / rate outcomes are remembered."""
    pull: float = 0.001
    """Share of the way back to the identity that each round goes."""

    def adjust(self, confidence: Sequence[float]) -> list[float]:
        """One row's probabilities, corrected, element by element."""
        known = len(self.slopes)
        return [
            sigmoid(self.slopes[j] * logit(c) + self.shifts[j]) if j < known else c for j, c in enumerate(confidence)
        ]

    def update(self, confidence: Sequence[float], verified: int, accepted: int) -> OnlineCorrection:
        """After one row's round: drafts 1..accepted held, and the next one did not, where it was verified.

        ``confidence`` as it was given to ``adjust``.
        """
        seen = min(verified, accepted + 1)
        missing = max(0, seen - len(self.slopes))
        slopes, shifts = [*self.slopes, *[1.0] * missing], [*self.shifts, *[0.0] * missing]
        for j in range(len(slopes)):
            slopes[j] += self.pull * (1 - slopes[j])
            shifts[j] -= self.pull * shifts[j]
            if j < seen:
                z = logit(confidence[j])
                error = int(j < accepted) - sigmoid(slopes[j] * z + shifts[j])
                step = self.rate * error / (1 + z * z)  # normalised: a logit of 10 must not change the slope by much
                slopes[j] = max(0.05, slopes[j] + step * z)  # the order of confidences is kept
                shifts[j] += step
        return replace(self, slopes=tuple(slopes), shifts=tuple(shifts))
