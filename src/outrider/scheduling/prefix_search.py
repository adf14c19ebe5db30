"""How many drafts of each row to verify: the search over prefixes of DSpark's Algorithm 1.

Survival a[b, j] is the probability that draft j of row b and all before it are accepted. A row's survivals never rise,
so the drafts in descending survival are, for each row, its drafts in order. The search walks down that list; n drafts
into it, a step gives ``rows + a_1 + ... + a_n`` tokens in ``seconds[n]``.

- ``early``: Algorithm 1 as printed. The walk ends at the first draft that does not raise tokens per second. Whether
  draft j is kept depends on survivals of at least a[b, j] alone, so on nothing that its row says of later drafts, and
  the rules that sample (``rejection``, ``block``) stay lossless.
- ``global``: the first maximum over the whole walk. A later draft's confidence then decides on an earlier draft, which
  biases sampled text (Appendix A) and is for rows whose text does not depend on the schedule: greedy and ``coupled``.
- ``lagged``: a budget, that is the best drafts, so many of them. The number must come from the past (section 5.2: an
  unconstrained search over confidences two steps old); the ranking is today's. It looks past a dip in the costs and is
  lossless.

Equal survivals are taken by position, then by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["RISE", "SEARCHES", "Plan", "Ranking", "Search", "best_count", "best_plan", "rank", "survivals"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Search = Literal["early", "global", "lagged"]
SEARCHES: tuple[Search, ...] = ("early", "global", "lagged")  # by the core's numbers

RISE = 1 + 1e-12
"""Tokens per second must rise by more than rounding."""
CAUGHT = 0.995
"""An early stop that gives less of what a budget gives is caught in a dip of the costs."""
STANDING = 64
"""Rows that stand for all in a plan."""
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
    """How far to walk: survival [n] in descending order, seconds [n + 1] of a step with 0 to n drafts. A lagged search
    walks over survivals of the past as a global one does."""
    if not len(survival):
        return 0
    tokens = np.empty(len(survival) + 1)
    tokens[0] = rows
    np.cumsum(survival, out=tokens[1:])
    tokens[1:] += rows
    rate = tokens / seconds[: len(tokens)]
    if search != "early":
        best = int(rate.argmax())
        return int((rate * RISE >= rate[best]).argmax())  # the first maximum, rounding aside
    stops = ~(rate[1:] > rate[:-1] * RISE)  # also where costs are NaN
    first = int(stops.argmax())
    return first if stops[first] else len(survival)


@dataclass(frozen=True, slots=True)
class Plan:
    """How far to draft for which rows."""

    length: int
    rate: float  # tokens per second
    budget: bool  # an early stop would give less than a budget
    chosen: Bools  # [rows]
    whole_length: int = 0  # what is best where all drafts of all rows are verified
    whole_rate: float = 0.0


def best_plan(
    survival: Floats,
    batch: int,
    seconds: Floats,
    plain: float,
    lengths: Sequence[int],
    draft: Callable[[int, int], float],
    search: Search | None,
    spared: float = 0.0,
) -> Plan:
    """The plan with the most tokens per second.

    survival [rows, samples, K]: what drafting for each row may give; every sample is a step as it could be, and is
    searched as a step would be. batch: rows of the step, drafted for or not. seconds: of a step by drafts verified,
    without T_draft. plain: tokens per second without drafts. lengths: those to try. draft: T_draft of so many rows and
    drafts. search: None: an early stop or a budget, whichever gives more. spared: seconds by which a step is shorter
    where nothing is chosen.
    """
    rows, samples, drafts = survival.shape

    def found(chosen: Bools) -> Plan:
        many = int(chosen.sum())
        some = survival[chosen][:: -(-many // STANDING)]
        share = many / len(some)  # some rows stand for all, so the walk counts a draft as ``share`` drafts
        best = Plan(0, 0.0, False, chosen)
        for length in lengths:
            spent = draft(many, length)
            rate, budget, whole = _rate(some[:, :, :length], batch, share, seconds, spent, search, spared)
            if rate > best.rate:
                best = replace(best, length=length, rate=rate, budget=budget)
            if whole > best.whole_rate:
                best = replace(best, whole_length=length, whole_rate=whole)
        return best

    best = found(np.ones(rows, dtype=bool))
    if rows < 2:
        return best
    # Rows one by one: what drafting for a row gives beyond what verifying it costs, against its share of T_draft. Both
    # depend on how far is drafted.
    token, half = plain * (seconds[-1] - seconds[0]) / (rows * drafts), rows // 2
    for length in dict.fromkeys((best.length, drafts)):
        share = (draft(rows, length) - draft(half, length)) / (rows - half)
        worth = _sum(_sum(np.maximum(survival[:, :, :length] - token, 0.0)))
        chosen = worth / samples > plain * max(share, 0.0)
        if chosen.any() and (chosen != best.chosen).any():
            of_some = replace(found(chosen), whole_length=best.whole_length, whole_rate=best.whole_rate)
            best = max(best, of_some, key=lambda plan: plan.rate)
    return best


def _rate(
    survival: Floats,
    batch: int,
    share: float,
    seconds: Floats,
    spent: float,
    search: Search | None,
    spared: float,
) -> tuple[float, bool, float]:
    """Tokens per second over all samples, whether that takes a budget, and tokens per second with all drafts verified.
    survival [rows, samples, length]"""
    samples = survival.shape[1]
    walk = -np.sort(-survival.transpose(1, 0, 2).reshape(samples, -1), axis=1)
    real = walk > 0
    ends = real.sum(1)
    tokens = np.full((samples, walk.shape[1] + 1), float(batch))
    tokens[:, 1:] += np.cumsum(walk * share, axis=1)
    at = np.arange(walk.shape[1] + 1) * share
    whole = np.minimum(at.astype(np.int64), len(seconds) - 2)
    costs = seconds[whole] + (at - whole) * (seconds[whole + 1] - seconds[whole]) + spent
    rate = tokens / costs
    stops = ~((rate[:, 1:] > rate[:, :-1] * RISE) & real)
    early = np.where(stops.any(1), stops.argmax(1), ends)
    best = np.where(np.arange(rate.shape[1]) <= ends[:, None], rate, 0.0).argmax(1)

    def value(counts: Ints) -> float:
        return float(_sum(tokens[np.arange(samples), counts]) / _sum(costs[counts]))

    every = float(_sum(tokens[np.arange(samples), ends]) / _sum(costs[ends] - spared))
    if search == "global":
        return value(best), False, every
    found = 0.0 if search == "lagged" else value(early)
    if search != "early":
        budget = value(np.minimum(ends, np.roll(best, 1)))  # what was best for another step
        if found < CAUGHT * budget:
            return budget, True, every
    return found, False, every


def _sum(values: Floats) -> Floats:
    """Along the last axis, one after the other, as the core adds."""
    return np.asarray(np.cumsum(values, axis=-1)[..., -1])
