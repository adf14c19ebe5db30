"""How likely drafts are accepted: a drafter's confidences corrected by the past, or the past alone.

A draft's confidence becomes sigmoid(slope_j z + shift_j + shift of its row), z being its logit. All three follow what
is accepted: one step of Newton's method each round on the log loss of the drafts that were verified, against curvature
remembered from the rounds before. A drafter without confidence has z = 0, so its probabilities are those of the past:
of each position, moved for each row as far as the row's own rounds warrant.

Whatever is said of draft j is made of confidence j and of the past, so nothing anticipates.

``OnlineCorrection`` is the same for one row at a time, in plain Python and with gradient steps; this one serves
hundreds of rows in a few array operations. K positions; slots number the rows for as long as they live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["AcceptanceModel", "SurvivalHistory"]

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

LEAST = 1e-6  # confidences are kept off 0 and 1
MEMORY = 100.0  # outcomes of a position that count
ROW_MEMORY = 40.0
PRIOR, SLOPE_PRIOR, ROW_PRIOR = 1.0, 6.0, 4.0  # curvature of what is believed before: about 4 outcomes to a unit
PULL = 0.001  # of the way back to the identity that a round goes
LEAST_SLOPE, MOST_SLOPE = 0.05, 4.0
FEW = 16  # rounds that are learnt from together may be of the same row
SHARED_ROWS = 8  # of a round, about so many rows stand for all


class AcceptanceModel:
    """P(draft j accepted | those before it were), by position and row, as it is now."""

    def __init__(self, drafts: int) -> None:
        self._slope = np.ones(drafts)
        self._shift = np.zeros(drafts)
        self._curvature = np.full(drafts, PRIOR)
        self._slope_curvature = np.full(drafts, SLOPE_PRIOR)
        self._row_shift = np.zeros(0)
        self._row_curvature = np.zeros(0)
        self._plain: tuple[list[float], list[float]] = ([], [])  # slopes and shifts, for a few rows

    def forget_row(self, slots: Ints) -> None:
        """Other requests have these rows now."""
        self._reach(slots)
        self._row_shift[slots] = 0.0
        self._row_curvature[slots] = ROW_PRIOR

    def adjust(self, confidence: npt.NDArray[np.float32] | None, slots: Ints, drafts: int) -> tuple[Singles, Singles]:
        """confidence [B, K] or None -> logits and corrected probabilities, float32 [B, K] each."""
        self._reach(slots)
        self._widen(drafts)
        if confidence is None:
            z = np.zeros((len(slots), drafts), dtype=np.float32)
        else:
            p = np.clip(confidence, LEAST, 1 - LEAST)
            z = np.log(p / (1 - p))
        moved = z * self._slope[:drafts].astype(np.float32) + self._shift[:drafts].astype(np.float32)
        moved += self._row_shift[slots, None].astype(np.float32)
        return z, np.divide(1, 1 + np.exp(-moved), dtype=np.float32)

    def adjust_row(self, confidence: Sequence[float] | None, slot: int, drafts: int) -> tuple[list[float], list[float]]:
        """The same for one row, in plain Python, which is quicker for a few."""
        if slot >= len(self._row_shift):
            self._reach(np.array([slot]))
        if len(self._plain[0]) < drafts:
            self._widen(drafts)
            self._plain = self._slope.tolist(), self._shift.tolist()
        slopes, shifts = self._plain
        row = float(self._row_shift[slot])
        if confidence is None:
            z = [0.0] * drafts
        else:
            z = [math.log(p / (1 - p)) for p in (min(max(c, LEAST), 1 - LEAST) for c in confidence[:drafts])]
        return z, [1 / (1 + math.exp(-(x * slopes[j] + shifts[j] + row))) for j, x in enumerate(z)]

    def update(
        self, logits: Floats | Singles, adjusted: Floats | Singles, slots: Ints, verified: Ints, accepted: Ints
    ) -> None:
        """After some rows' rounds: drafts 1..accepted held, and the next did not, where it was verified."""
        logits, adjusted = logits.astype(np.float64), adjusted.astype(np.float64)
        drafts = logits.shape[1]
        position = np.arange(drafts)
        seen = position < np.minimum(verified, accepted + 1)[:, None]
        error = np.where(seen, (position < accepted[:, None]) - adjusted, 0.0)
        curvature = np.where(seen, adjusted * (1 - adjusted), 0.0)
        outcomes = seen.sum(0)
        part = slice(0, drafts)
        self._slope += PULL * (1 - self._slope)
        self._shift -= PULL * self._shift
        keep = (1 - 1 / MEMORY) ** outcomes
        self._curvature[part] = np.maximum(keep * self._curvature[part], PRIOR) + curvature.sum(0)
        self._shift[part] += error.sum(0) / self._curvature[part]
        weighted = curvature * logits
        squared = (weighted * logits).sum(0)
        self._slope_curvature[part] = np.maximum(keep * self._slope_curvature[part], SLOPE_PRIOR) + squared
        self._slope[part] += (error * logits).sum(0) / self._slope_curvature[part]
        self._slope = self._slope.clip(LEAST_SLOPE, MOST_SLOPE)
        rows = len(self._row_shift)
        kept = (1 - 1 / ROW_MEMORY) ** np.bincount(slots, seen.sum(1), rows)
        self._row_curvature = np.maximum(kept * self._row_curvature, ROW_PRIOR)
        self._row_curvature += np.bincount(slots, curvature.sum(1), rows)
        self._row_shift = kept * self._row_shift + np.bincount(slots, error.sum(1), rows) / self._row_curvature
        self._plain = self._slope.tolist(), self._shift.tolist()

    def _reach(self, slots: Ints) -> None:
        missing = (int(slots.max()) + 1 if len(slots) else 0) - len(self._row_shift)
        if missing > 0:
            self._row_shift = np.concatenate([self._row_shift, np.zeros(missing)])
            self._row_curvature = np.concatenate([self._row_curvature, np.full(missing, ROW_PRIOR)])

    def _widen(self, drafts: int) -> None:
        missing = drafts - len(self._slope)
        if missing > 0:
            self._slope = np.concatenate([self._slope, np.ones(missing)])
            self._shift = np.concatenate([self._shift, np.zeros(missing)])
            self._curvature = np.concatenate([self._curvature, np.full(missing, PRIOR)])
            self._slope_curvature = np.concatenate([self._slope_curvature, np.full(missing, SLOPE_PRIOR)])


class SurvivalHistory:
    """The survivals of each row's latest drafts, and of all rows' together: what drafting again would give.

    A confidence that was low in one round and high in the next is worth more than its mean says, because only the
    second draft would be verified. So whole rounds are kept, not averages.
    """

    def __init__(self, drafts: int, kept: int = 8, shared: int = 64) -> None:
        self.drafts, self.kept = drafts, kept
        self._rows = np.zeros((0, kept, drafts))
        self._counts = np.zeros(0, dtype=np.int64)
        self._shared = np.zeros((shared, drafts))
        self._shared_count = 0
        self._conditional = np.full(drafts, 0.5)  # mean probability of each position, of drafts that reached it
        self._reached = np.zeros(drafts, dtype=np.int64)  # rounds learnt from in which any did

    @property
    def empty(self) -> bool:
        """Whether nothing was drafted yet."""
        return self._shared_count == 0

    def forget_row(self, slots: Ints) -> None:
        """Other requests have these rows now."""
        self._reach(slots)
        self._counts[slots] = 0

    def add(self, slots: Ints, adjusted: Floats | Singles, survival: Floats, lengths: Ints, limits: Ints) -> None:
        """What rows drafted, each slot once or in the order of its rounds. Positions that a row's limit cut off are
        estimated: as likely as the row's own before them, as far as that holds for all rows. Those it left out itself
        are 0."""
        if not len(slots):
            return
        self._reach(slots)
        width = min(survival.shape[1], self.drafts)
        full = np.zeros((len(slots), self.drafts))
        full[:, :width] = survival[:, :width]
        for j in range(width):
            there = lengths > j
            count = int(there.sum())
            if count:
                self._reached[j] += 1
                rate = max(0.1, 1 / self._reached[j])
                self._conditional[j] += rate * (adjusted[:, j] @ there / count - self._conditional[j])
        shortest = int(limits.min())
        cut = (lengths >= limits) & (limits > 0)
        if shortest < self.drafts and cut.any():
            last = np.minimum(np.maximum(limits, 1), width) - 1  # the last position of each row that was drafted
            own = full[np.arange(len(slots)), last] ** (1 / (last + 1))
            means = np.cumsum(self._conditional) / np.arange(1, self.drafts + 1)
            for j in range(max(shortest, 1), self.drafts):
                mine = cut & (limits <= j)
                trend = self._conditional[j] / means[last[mine]] if self._reached[j] else 1.0
                full[mine, j] = full[mine, j - 1] * np.minimum(own[mine] * trend, 0.99)
        if len(slots) <= FEW:
            for slot, row in zip(slots.tolist(), full, strict=True):
                self._rows[slot, self._counts[slot] % self.kept] = row
                self._counts[slot] += 1
        else:
            self._rows[slots, self._counts[slots] % self.kept] = full
            self._counts[slots] += 1
        for row in full[:: max(1, len(full) // SHARED_ROWS)]:
            self._shared[self._shared_count % len(self._shared)] = row
            self._shared_count += 1

    def of(self, slots: Ints, samples: int, turn: int) -> Floats:
        """[B, samples, K]: latest rounds of each row; of all rows where it has too few."""
        self._reach(slots)
        index = (turn + np.arange(samples)) % self.kept
        own = self._rows[slots[:, None], index]
        missing = index >= self._counts[slots][:, None]
        if missing.any():
            known = min(self._shared_count, len(self._shared))
            if known:
                picks = (turn + np.arange(missing.sum()) * 7) % known
                own[missing] = self._shared[picks]
        return own

    def _reach(self, slots: Ints) -> None:
        missing = (int(slots.max()) + 1 if len(slots) else 0) - len(self._counts)
        if missing > 0:
            self._rows = np.concatenate([self._rows, np.zeros((missing, self.kept, self.drafts))])
            self._counts = np.concatenate([self._counts, np.zeros(missing, dtype=np.int64)])
