"""Figures with their 95 % intervals, from counts by prompt: prompts are drawn again, a prompt stays in one piece.

Rounds of one answer resemble each other, so they are no independent draws; prompts are. Two drafters, or a drafter and
plain decoding, are compared on the same prompts drawn again (paired). The macro average weighs every domain alike, and
each domain's prompts are drawn from that domain.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

__all__ = ["Estimate", "Picks", "Statistic", "estimate", "macro", "share"]

MISSING = 0.05  # share of draws without a value from which on there is no interval
Picks = NDArray[np.int64]
"""[..., n]: indices of a domain's prompts, drawn again along the last axis."""
Statistic = Callable[[Sequence[Picks]], NDArray[np.float64]]
"""One array of picks for each domain -> [...]"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where there is nothing to take it from."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.2f}"

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def share(parts: NDArray[Any], wholes: NDArray[Any], picks: Picks) -> NDArray[np.float64]:
    """Sum of parts over sum of wholes of the prompts picked; NaN where that is 0 / 0. [n], [n], [..., n] -> [...]"""
    top, bottom = parts[picks].sum(-1, dtype=float), wholes[picks].sum(-1, dtype=float)
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def macro(domains: Sequence[Callable[[Picks], NDArray[np.float64]]]) -> Statistic:
    """The mean over domains of what each makes of its own picks."""
    return lambda picks: np.mean([one(own) for one, own in zip(domains, picks, strict=True)], axis=0)


def estimate(sizes: Sequence[int], statistic: Statistic, draws: int = 2000, seed: int = 0) -> Estimate:
    """A statistic of all prompts (``sizes`` of them in each domain), with its percentile bootstrap interval.

    There is no interval where a domain has a single prompt, or too many draws make 0 / 0.
    """
    everything = [np.arange(size) for size in sizes]
    value = float(statistic(everything))
    if np.isnan(value):
        return Estimate(None)
    if min(sizes) < 2:
        return Estimate(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # of draws that are 0 / 0, which are left out below
        found = bootstrap(
            everything,
            lambda *picks, axis: statistic(picks),
            vectorized=True,
            n_resamples=draws,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).bootstrap_distribution
    if np.isnan(found).mean() > MISSING:
        return Estimate(value)
    low, high = np.nanquantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
