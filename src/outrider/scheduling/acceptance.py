"""How likely drafts are accepted: a drafter's confidences corrected by the past, or the past alone.

A draft's confidence becomes sigmoid(slope_j z + shift_j + shift of its row), z being its logit. All three follow what
is accepted: one step of Newton's method each round on the log loss of the drafts that were verified, against curvature
remembered from the rounds before. A drafter without confidence has z = 0, so its probabilities are those of the past:
of each position, moved for each row as far as the row's own rounds warrant.

Whatever is said of draft j is made of confidence j and of the past, so nothing anticipates.

``OnlineCorrection`` is the same for one row at a time, in plain Python and with gradient steps; this one serves
hundreds of rows in one call of the core. K positions; slots number the rows for as long as they live.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from outrider.core import native

__all__ = ["AcceptanceModel", "SurvivalHistory"]

Floats = npt.NDArray[np.float64]
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
        self._positions = _new_positions(drafts)  # [4, K]: slopes, shifts, curvatures of the shifts and of the slopes
        self._row_shift = np.zeros(0)
        self._row_curvature = np.zeros(0)
        self._plain: tuple[list[float], list[float]] = ([], [])  # slopes and shifts, for a few rows

    def forget_row(self, slots: Ints) -> None:
        """Other requests have these rows now."""
        self._reach(slots)
        self._row_shift[slots] = 0.0
        self._row_curvature[slots] = ROW_PRIOR

    def corrections(self, drafts: int) -> tuple[Floats, Floats]:
        """float64 [4, >= K], its first two rows slopes and shifts, and float64 [slots known so far] shifts of rows; to
        read."""
        self._widen(drafts)
        return self._positions, self._row_shift

    def adjust(self, confidence: npt.NDArray[np.float32] | None, slots: Ints, drafts: int) -> tuple[Floats, Floats]:
        """confidence [B, K] or None -> logits and corrected probabilities, float64 [B, K] each."""
        self._reach(slots)
        positions, rows = self.corrections(drafts)
        if confidence is None:
            z = np.zeros((len(slots), drafts))
        else:
            p = np.fmin(np.fmax(confidence.astype(np.float64), LEAST), 1 - LEAST)  # no number: as unlikely as can be
            z = np.log(p / (1 - p))
        slope, shift = positions[:2, :drafts]
        return z, 1 / (1 + np.exp(-(z * slope + shift + rows[slots, None])))

    def adjust_row(self, confidence: Sequence[float] | None, slot: int, drafts: int) -> tuple[list[float], list[float]]:
        """The same for one row, in plain Python, which is quicker for a few."""
        if slot >= len(self._row_shift):
            self._reach(np.array([slot]))
        if len(self._plain[0]) < drafts:
            self._widen(drafts)
            self._plain = self._positions[0].tolist(), self._positions[1].tolist()
        slopes, shifts = self._plain
        row = float(self._row_shift[slot])
        if confidence is None:
            z = [0.0] * drafts
        else:
            z = [math.log(p / (1 - p)) for p in (min(max(LEAST, c), 1 - LEAST) for c in confidence[:drafts])]
        return z, [1 / (1 + math.exp(-(x * slopes[j] + shifts[j] + row))) for j, x in enumerate(z)]

    def update(self, logits: Floats, adjusted: Floats, slots: Ints, verified: Ints, accepted: Ints) -> None:
        """After some rows' rounds: drafts 1..accepted held, and the next did not, where it was verified."""
        if native is None:
            self._update_in_numpy(logits, adjusted, slots, verified, accepted)
        else:
            native.learn_acceptance(
                logits, adjusted, slots, verified, accepted, self._positions, self._row_shift, self._row_curvature
            )
        self._plain = [], []

    def _update_in_numpy(self, logits: Floats, adjusted: Floats, slots: Ints, verified: Ints, accepted: Ints) -> None:
        drafts = logits.shape[1]
        position = np.arange(drafts)
        seen = position < np.minimum(verified, accepted + 1)[:, None]
        error = np.where(seen, (position < accepted[:, None]) - adjusted, 0.0)
        curvature = np.where(seen, adjusted * (1 - adjusted), 0.0)
        outcomes = seen.sum(0)
        self._positions[0] += PULL * (1 - self._positions[0])
        self._positions[1] -= PULL * self._positions[1]
        slope, shift, known, slope_known = self._positions[:, :drafts]  # views
        keep = (1 - 1 / MEMORY) ** outcomes
        known[:] = np.maximum(keep * known, PRIOR) + curvature.sum(0)
        shift += error.sum(0) / known
        weighted = curvature * logits
        squared = (weighted * logits).sum(0)
        slope_known[:] = np.maximum(keep * slope_known, SLOPE_PRIOR) + squared
        slope += (error * logits).sum(0) / slope_known
        np.clip(slope, LEAST_SLOPE, MOST_SLOPE, out=slope)
        rows = len(self._row_shift)
        kept = (1 - 1 / ROW_MEMORY) ** np.bincount(slots, seen.sum(1), rows)
        self._row_curvature = np.maximum(kept * self._row_curvature, ROW_PRIOR)
        self._row_curvature += np.bincount(slots, curvature.sum(1), rows)
        self._row_shift = kept * self._row_shift + np.bincount(slots, error.sum(1), rows) / self._row_curvature

    def _reach(self, slots: Ints) -> None:
        missing = (int(slots.max()) + 1 if len(slots) else 0) - len(self._row_shift)
        if missing > 0:
            self._row_shift = np.concatenate([self._row_shift, np.zeros(missing)])
            self._row_curvature = np.concatenate([self._row_curvature, np.full(missing, ROW_PRIOR)])

    def _widen(self, drafts: int) -> None:
        missing = drafts - self._positions.shape[1]
        if missing > 0:
            self._positions = np.concatenate([self._positions, _new_positions(missing)], axis=1)


def _new_positions(drafts: int) -> Floats:
    """Corrections that change nothing yet: float64 [4, K]."""
    return np.repeat([[1.0], [0.0], [PRIOR], [SLOPE_PRIOR]], drafts, axis=1)


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

    def add(self, slots: Ints, adjusted: Floats, survival: Floats, lengths: Ints, limits: Ints) -> None:
        """What rows drafted, each slot once or in the order of its rounds. Positions that a row's limit cut off are
        estimated: as likely as the row's own before them, as far as that holds for all rows. Those it left out itself
        are 0."""
        if not len(slots):
            return
        self._reach(slots)
        if native is None:
            self._add_in_numpy(slots, adjusted, survival, lengths, limits)
            return
        self._shared_count = native.learn_survivals(
            slots,
            adjusted,
            survival,
            lengths,
            limits,
            self._rows,
            self._counts,
            self._shared,
            self._shared_count,
            self._conditional,
            self._reached,
        )

    def _add_in_numpy(self, slots: Ints, adjusted: Floats, survival: Floats, lengths: Ints, limits: Ints) -> None:
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
