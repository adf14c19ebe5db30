"""Figures with 95 % bootstrap intervals that resample prompts.

Rounds of one answer are not independent, prompts are: so all rounds of a prompt are resampled together. Two drafters,
or a drafter and plain decoding, are compared on the same resampled prompts (paired). The macro average gives every
domain the same weight, and prompts are resampled within their domain.
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

MISSING = 0.05  # no interval if more than this share of the resamples has no value
Picks = NDArray[np.int64]
"""[..., n]: indices of a domain's prompts, resampled along the last axis."""
Statistic = Callable[[Sequence[Picks]], NDArray[np.float64]]
"""One array of picks for each domain -> [...]"""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{self.value:.2f}"

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def share(parts: NDArray[Any], wholes: NDArray[Any], picks: Picks) -> NDArray[np.float64]:
    """Sum of parts / sum of wholes over the picked prompts; NaN for 0 / 0. [n], [n], [..., n] -> [...]"""
    top, bottom = parts[picks].sum(-1, dtype=float), wholes[picks].sum(-1, dtype=float)
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def macro(domains: Sequence[Callable[[Picks], NDArray[np.float64]]]) -> Statistic:
    """The mean over domains of one statistic per domain."""
    return lambda picks: np.mean([one(own) for one, own in zip(domains, picks, strict=True)], axis=0)


def estimate(sizes: Sequence[int], statistic: Statistic, draws: int = 2000, seed: int = 0) -> Estimate:
    """A statistic of all prompts (``sizes`` of them in each domain), with its percentile bootstrap interval.

    There is no interval if a domain has a single prompt, or too many resamples give 0 / 0.
    """
    everything = [np.arange(size) for size in sizes]
    value = float(statistic(everything))
    if np.isnan(value):
        return Estimate(None)
    if min(sizes) < 2:
        return Estimate(value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # resamples with 0 / 0 are left out below
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
