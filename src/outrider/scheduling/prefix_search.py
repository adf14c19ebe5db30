"""How many drafts of each row to verify: the search over prefixes of DSpark's Algorithm 1.

Survival a[b, j] is the probability that draft j of row b and all before it are accepted. A row's survivals never rise,
so the drafts in descending survival are, for each row, its drafts in order. The search walks down that list; n drafts
into it, a step gives ``rows + a_1 + ... + a_n`` tokens in ``seconds[n]``.

- ``early``: Algorithm 1 as printed. The walk ends at the first draft that does not raise tokens per second. Whether
  draft j is kept depends on survivals of at least a[b, j] alone, so on nothing that its row says of later drafts, and
  the rules that sample (``rejection``, ``block``) stay lossless.
- ``global``: the first maximum over the whole walk. A later draft's confidence then decides on an earlier draft, which
  biases sampled text (Appendix A) and is for rows whose text does not depend on the schedule: greedy and ``coupled``.
- A ``budget``: the best drafts, so many of them. The number must come from the past (section 5.2: an unconstrained
  search over confidences two steps old); the ranking is today's. It looks past a dip in the costs and is lossless.

Equal survivals are taken by position, then by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["RISE", "Ranking", "Search", "best_count", "rank", "survivals"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Search = Literal["early", "global"]

RISE = 1 + 1e-12
"""Tokens per second must rise by more than rounding."""
_ONE = int(np.float64(1.0).view(np.int64))


def survivals(confidence: Floats | npt.NDArray[np.float32], lengths: Ints) -> Floats:
    """[B, K], [B] -> [B, K]: products of the confidences up to each draft; 0 behind a row's last draft."""
    rows, drafts = confidence.shape
    by_position = np.empty((drafts, rows))  # a position's numbers side by side: a product of rows is quick
    np.multiply(confidence.T, np.arange(drafts)[:, None] < lengths, out=by_position)
    for j in range(1, drafts):
        np.multiply(by_position[j - 1], by_position[j], out=by_position[j])
    return by_position.T


@dataclass(frozen=True, slots=True)
class Ranking:
    """All drafts in descending survival."""

    numbers: Ints  # [n]: position * B + row
    survival: Floats  # [n]
    batch: int  # rows in all

    @property
    def rows(self) -> Ints:
        """int64 [n]"""
        return self.numbers % max(self.batch, 1)

    @property
    def positions(self) -> Ints:
        """int64 [n]"""
        return self.numbers // max(self.batch, 1)

    def keep(self, count: int) -> Ints:
        """int64 [B]: drafts of each row among the first ``count``."""
        return np.bincount(self.numbers[:count] % max(self.batch, 1), minlength=self.batch)


def rank(survival: Floats) -> Ranking:
    """survival [B, K], within [0, 1] and never rising along a row; zeros are left out.

    One integer holds a survival's leading bits and the draft's number, position before row: they all differ, so the
    order depends on nothing but the two, and a plain sort is enough.
    """
    batch, drafts = survival.shape
    bits = max(1, (batch * drafts - 1).bit_length())
    by_position = np.ascontiguousarray(survival.T)
    keys = (_ONE - by_position.view(np.int64)) >> bits << bits
    keys |= np.arange(batch * drafts).reshape(drafts, batch)
    keys = keys[by_position > 0]
    keys.sort()
    keys &= (1 << bits) - 1
    return Ranking(keys, by_position.ravel()[keys], batch)


def best_count(rows: float, survival: Floats, seconds: Floats, search: Search = "early") -> int:
    """How far to walk: survival [n] in descending order, seconds [n + 1] of a step with 0 to n drafts."""
    if not len(survival):
        return 0
    tokens = np.empty(len(survival) + 1)
    tokens[0] = rows
    np.cumsum(survival, out=tokens[1:])
    tokens[1:] += rows
    rate = tokens / seconds[: len(tokens)]
    if search == "global":
        best = int(rate.argmax())
        return int((rate * RISE >= rate[best]).argmax())  # the first maximum, rounding aside
    stops = ~(rate[1:] > rate[:-1] * RISE)  # also where costs are NaN
    first = int(stops.argmax())
    return first if stops[first] else len(survival)
