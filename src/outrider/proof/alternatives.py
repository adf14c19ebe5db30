"""Bets that sampled tokens come from a distribution near the stated one: another temperature, a truncation, other
weights.

For each token the probabilities it should have been drawn from are known, of all tokens or of the likeliest ones and
the rest together. Each alternative turns them into others; the likelihood ratio of the tokens, multiplied up, is
evidence (see ``evidence``), and so is the mean over all alternatives. A bias that is like one of them is found
soonest; any other is found as far as it resembles one.

Legend: n tokens, k columns: probabilities in descending order, then the rest as one column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from outrider.proof.evidence import mean_of

__all__ = ["Bets", "alternatives_of"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
POWERS = (0.8, 0.9, 0.95, 0.975, 1.025, 1.05, 1.1, 1.25)  # of the probabilities: 1 / temperature
NUCLEI = (0.5, 0.8, 0.9, 0.95, 0.98)
GREEDY = (0.02, 0.1, 0.3)  # share of tokens that are the likeliest
PERIODS = (10, 16, 20, 25, 32, 50, 64, 100)  # every so many tokens one is the likeliest
HEDGE = 0.02  # of each alternative that is the stated distribution, so that no single token ends a bet


def alternatives_of(p: Floats, rest: bool, positions: Ints) -> dict[str, Floats]:
    """Name -> other probabilities [n, k], of probabilities ``p`` [n, k] in descending order.

    rest: the last column stands for all other tokens. positions: of each token in its answer, from 0.
    """
    tail = p[:, -1:] if rest else p[:, :0]
    head = p[:, : p.shape[1] - tail.shape[1]]
    found: dict[str, Floats] = {}
    typical = np.minimum(head[:, -1:], np.maximum(tail, 1e-9)) / 2 if rest else tail  # of one token of the rest
    logs = np.log(np.maximum(head, 1e-300))
    for power in POWERS:
        changed = np.concatenate([np.exp(power * logs), tail * typical ** (power - 1) if rest else tail], 1)
        found[f"temperature {1 / power:.3g}"] = changed
    before = head.cumsum(1) - head
    for nucleus in NUCLEI:
        left = np.clip(nucleus - head.sum(1, keepdims=True), 0, None)
        found[f"top-p {nucleus}"] = np.concatenate([np.where(before < nucleus, head, 0), np.minimum(tail, left)], 1)
    likeliest = np.zeros_like(p)
    likeliest[:, 0] = 1
    for share in GREEDY:
        found[f"{share:.0%} greedy"] = (1 - share) * p + share * likeliest
    for period in PERIODS:
        turn = (positions % period == period - 1)[:, None]
        found[f"every {period}th greedy"] = np.where(turn, likeliest, p)
    return {
        name: (1 - HEDGE) * q / np.maximum(q.sum(1, keepdims=True), 1e-300) + HEDGE * p for name, q in found.items()
    }


@dataclass
class Bets:
    """The evidence of all alternatives so far."""

    samples: int = 0
    log_values: dict[str, float] = field(default_factory=dict)
    impossible: int = 0
    """Tokens of no probability."""

    def add(
        self, p: Floats, rest: bool, columns: Ints, positions: Ints, more: Mapping[str, Floats] | None = None
    ) -> None:
        """Tokens with the columns they fell in, [n]. ``more``: other alternatives, [n, k] each."""
        rows = np.arange(len(columns))
        stated = p[rows, columns]
        self.impossible += int((stated < 1e-12).sum())
        for name, q in {**alternatives_of(p, rest, positions), **(more or {})}.items():
            ratio = np.log(np.maximum(q[rows, columns], 1e-300)) - np.log(np.maximum(stated, 1e-300))
            self.log_values[name] = self.log_values.get(name, 0.0) + float(ratio.sum())
        self.samples += len(columns)

    @property
    def log_value(self) -> float:
        """The natural logarithm of the mean over the alternatives."""
        return mean_of(list(self.log_values.values())) if self.log_values else 0.0

    @property
    def best(self) -> tuple[str, float]:
        """The alternative with the most evidence, and its logarithm."""
        if not self.log_values:
            return "", -math.inf
        name = max(self.log_values, key=lambda one: self.log_values[one])
        return name, self.log_values[name]
