"""How likely drafts are accepted: a drafter's confidences corrected by the past, or the past alone.

A draft's confidence becomes sigmoid(slope_j z + shift_j + shift of its row), z being its logit. All three follow what
is accepted: one step of Newton's method each round on the log loss of the drafts that were verified, against curvature
remembered from the rounds before. A drafter without confidence has z = 0, so its probabilities are those of the past:
of each position, moved for each row as far as the row's own rounds warrant. A position that was hardly ever verified is
corrected like the one before it.

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

__all__ = ["AcceptanceModel", "DraftHistory", "expected_accepted", "sigmoid"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEAST = 1e-6  # confidences are kept off 0 and 1
MEMORY = 100.0  # outcomes of a position that count
ROW_MEMORY = 40.0
PRIOR, SLOPE_PRIOR, ROW_PRIOR = 1.0, 6.0, 4.0  # curvature of what is believed before: about 4 outcomes to a unit
PULL = 0.001  # of the way back to no correction that the first position goes each time
FOLLOW = 0.1  # of the way to the correction of the position before that a position without outcomes goes each time
LEAST_SLOPE, MOST_SLOPE = 0.05, 4.0
KEPT, SHARED = 16, 128  # latest rounds that are remembered of each row, and of all rows together
SHARED_ROWS = 8  # rows of a round, about, that are added to the history of all rows


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

    def arrays(self, drafts: int) -> tuple[Floats, Floats, Floats]:
        """float64 [4, >= K], [slots] and [slots]: what it knows of positions and rows, to be worked on in place until
        there are more of either."""
        self._widen(drafts)
        return self._positions, self._row_shift, self._row_curvature

    def adjust(self, confidence: npt.NDArray[np.float32] | None, slots: Ints, drafts: int) -> tuple[Floats, Floats]:
        """confidence [B, K] or None -> logits and corrected probabilities, float64 [B, K] each."""
        self._reach(slots)
        positions, rows = self.corrections(drafts)
        if confidence is None:
            z = np.zeros((len(slots), drafts))
        else:
            p = np.fmin(np.fmax(confidence.astype(np.float64), LEAST), 1 - LEAST)  # NaN counts as LEAST
            z = np.log(p / (1 - p))
        slope, shift = positions[:2, :drafts]
        return z, sigmoid(z * slope + shift + rows[slots, None])

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
        for values, known, prior, first in ((0, 3, SLOPE_PRIOR, 1.0), (1, 2, PRIOR, 0.0)):
            before = np.concatenate([[first], self._positions[values, :-1]])
            rate = FOLLOW * prior / self._positions[known]
            rate[0] = PULL
            self._positions[values] += rate * (before - self._positions[values])
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
        """Make room for these slots."""
        missing = (int(slots.max()) + 1 if len(slots) else 0) - len(self._row_shift)
        if missing > 0:
            self._row_shift = np.concatenate([self._row_shift, np.zeros(missing)])
            self._row_curvature = np.concatenate([self._row_curvature, np.full(missing, ROW_PRIOR)])

    def _widen(self, drafts: int) -> None:
        """Make room for so many positions."""
        missing = drafts - self._positions.shape[1]
        if missing > 0:
            self._positions = np.concatenate([self._positions, _new_positions(missing)], axis=1)


def expected_accepted(confidence: Sequence[float]) -> float:
    """Mean accepted drafts of a round that verifies them all: the sum of the survivals, prod_{i<=j} confidence[i]."""
    total, survival = 0.0, 1.0
    for one in confidence:
        survival *= one
        total += survival
    return total


def sigmoid(logits: Floats) -> Floats:
    """float64 [...] -> [...], elementwise"""
    return np.asarray(1 / (1 + np.exp(-logits)))


def _new_positions(drafts: int) -> Floats:
    """Corrections that change nothing yet: float64 [4, K]."""
    return np.repeat([[1.0], [0.0], [PRIOR], [SLOPE_PRIOR]], drafts, axis=1)


class DraftHistory:
    """Each row's latest drafts, and some of all rows: what drafting again would give.

    A confidence that was low in one round and high in the next is worth more than its mean says, because only the
    second draft would be verified. So whole rounds are kept, not averages; and their confidences, not probabilities,
    so that they are always seen as corrected now: at the start corrections change within a few rounds.
    """

    def __init__(self, drafts: int) -> None:
        self.drafts, self.kept = drafts, KEPT
        self.logits = np.zeros((0, KEPT, drafts))
        self.sizes = np.zeros((0, KEPT, 2), dtype=np.int64)  # drafts, and the most that were asked for
        self.counts = np.zeros(0, dtype=np.int64)
        self.shared = np.zeros((SHARED, drafts))
        self.shared_sizes = np.zeros((SHARED, 2), dtype=np.int64)
        self.shared_count = np.zeros(1, dtype=np.int64)

    @property
    def empty(self) -> bool:
        """Whether nothing was drafted yet."""
        return not self.shared_count[0]

    def forget_row(self, slots: Ints) -> None:
        """Other requests have these rows now."""
        self._reach(slots)
        self.counts[slots] = 0

    def add(self, slots: Ints, logits: Floats, lengths: Ints, limits: Ints) -> None:
        """What rows drafted, slots in the order of their rounds. logits [D, K]"""
        self._reach(slots)
        width = min(logits.shape[1], self.drafts)
        full = np.zeros((len(slots), self.drafts))
        full[:, :width] = np.where(np.arange(width) < lengths[:, None], logits[:, :width], 0.0)
        sizes = np.stack([lengths, limits], axis=1)
        every = max(1, len(slots) // SHARED_ROWS)
        for i, slot in enumerate(slots.tolist()):
            at = self.counts[slot] % self.kept
            self.logits[slot, at], self.sizes[slot, at] = full[i], sizes[i]
            self.counts[slot] += 1
            if i % every == 0:
                at = self.shared_count[0] % SHARED
                self.shared[at], self.shared_sizes[at] = full[i], sizes[i]
                self.shared_count[0] += 1

    def of(self, slots: Ints, samples: int, turn: int, model: AcceptanceModel) -> Floats:
        """Survivals [B, samples, K] of the latest rounds of each row; of all rows' where it has too few.

        Positions that a row's limit cut off are as likely as they are in general, as far as that holds for those
        before them in this round. Those that the row left out itself are 0.
        """
        self._reach(slots)
        index = (turn + np.arange(samples)) % self.kept
        logits, sizes = self.logits[slots[:, None], index], self.sizes[slots[:, None], index]
        known = min(int(self.shared_count[0]), SHARED)
        missing = index >= self.counts[slots][:, None]
        if known and missing.any():
            picks = (turn + np.arange(missing.sum()) * 7) % known
            logits[missing], sizes[missing] = self.shared[picks], self.shared_sizes[picks]
        slope, shift = model.corrections(self.drafts)[0][:2, : self.drafts]
        row_shift = model.corrections(self.drafts)[1][slots]
        p = sigmoid(logits * slope + shift + row_shift[:, None, None])
        usual = self._means(slope, shift, known)
        lengths, limits = sizes[..., :1], sizes[..., 1:]
        there = np.arange(self.drafts) < lengths
        own = np.cumsum(np.where(there, p, 0.0), axis=-1)[..., -1:]
        general = np.cumsum(np.where(there, usual, 0.0), axis=-1)[..., -1:]
        guess = np.minimum(own / np.maximum(general, 1e-9) * usual, 0.99)
        cut_off = (limits > 0) & (lengths >= limits)
        return np.multiply.accumulate(np.where(there, p, np.where(cut_off, guess, 0.0)), axis=-1)

    def _means(self, slope: Floats, shift: Floats, known: int) -> Floats:
        """float64 [K]: the mean probability of each position, with two of the position before's."""
        p = sigmoid(self.shared[:known] * slope + shift + 0.0)
        means = np.zeros(self.drafts)
        for j in range(self.drafts):
            reached = p[self.shared_sizes[:known, 0] > j, j]
            here = (np.cumsum(reached)[-1] if len(reached) else 0.0) / max(len(reached), 1)
            means[j] = (len(reached) * here + 2 * means[j - 1]) / (len(reached) + 2) if j else here
        return means

    def _reach(self, slots: Ints) -> None:
        """Make room for these slots."""
        missing = (int(slots.max()) + 1 if len(slots) else 0) - len(self.counts)
        if missing > 0:
            self.logits = np.concatenate([self.logits, np.zeros((missing, self.kept, self.drafts))])
            self.sizes = np.concatenate([self.sizes, np.zeros((missing, self.kept, 2), dtype=np.int64)])
            self.counts = np.concatenate([self.counts, np.zeros(missing, dtype=np.int64)])
