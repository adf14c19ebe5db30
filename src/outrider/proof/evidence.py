"""Sequential tests: evidence against a known distribution that may be looked at after every sample.

An *e-process* is a product of bets whose expectation is at most 1 while the distribution is the stated one, so the
chance that it ever reaches 1 / a is at most a (Ville's inequality; Ramdas, Grünwald, Vovk, Shafer, "Game-theoretic
statistics and safe anytime-valid inference", arXiv 2210.01948). A test therefore stops as soon as the answer is clear,
and its error rate holds wherever it stops.

The bet here is a Dirichlet mixture around the stated distribution p: with counts n_i of N samples,

    E = [ prod_i (c p_i) (c p_i + 1) ... (c p_i + n_i - 1) ] / [ c (c + 1) ... (c + N - 1) ] / prod_i p_i ** n_i

that is, the likelihood of the counts under probabilities drawn from Dirichlet(c p), over their likelihood under p. The
concentration c says how far from p the bet looks: half a squared distance of about 1 / c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp

__all__ = ["Budget", "Evidence", "mean_of", "power", "samples_needed"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """A rate of false alarms, shared out evenly among the tests of a certificate."""

    tests: int
    alpha: float = 1e-3

    @property
    def threshold(self) -> float:
        """The natural logarithm of the evidence that rejects one test."""
        return math.log(self.tests / self.alpha)


@dataclass
class Evidence:
    """Evidence that samples in k categories do not follow ``expected``, for each of several contexts.

    Samples of different contexts (the token before, say) have different distributions; the e-processes are multiplied.
    """

    expected: Floats  # [contexts, k]
    concentration: float  # c of all contexts together: of each it is in proportion to its samples
    counts: Floats = field(init=False)
    impossible: bool = False  # a sample that has probability 0

    def __post_init__(self) -> None:
        self.expected = np.atleast_2d(np.asarray(self.expected, np.float64))
        self.counts = np.zeros_like(self.expected)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def add(self, categories: npt.ArrayLike, contexts: npt.ArrayLike = 0) -> None:
        """More samples: int [n] of categories, and of contexts."""
        where = np.broadcast_arrays(np.asarray(contexts, np.int64), np.asarray(categories, np.int64))
        np.add.at(self.counts, (where[0], where[1]), 1)
        self.impossible |= bool((self.counts[self.expected <= 0] > 0).any())

    @property
    def log_value(self) -> float:
        """The natural logarithm of the evidence now."""
        if self.impossible:
            return math.inf
        c = self.concentration / len(self.expected)
        total = 0.0
        for p, n in zip(self.expected, self.counts, strict=True):
            use = p > 0
            p, n = p[use], n[use]
            total += float((gammaln(c * p + n) - gammaln(c * p) - n * np.log(p)).sum())
            total -= float(gammaln(c + n.sum()) - gammaln(c))
        return total

    @property
    def distance(self) -> float:
        """Total variation between the frequencies and what was expected, over the samples; noise included."""
        rows = self.counts.sum(1, keepdims=True)
        return float(np.abs(self.counts - rows * self.expected).sum() / 2 / max(self.samples, 1))


def mean_of(log_values: list[float]) -> float:
    """The logarithm of the mean of several pieces of evidence, which is evidence too."""
    return float(logsumexp(log_values) - math.log(len(log_values)))


def power(
    expected: Floats,
    bias: float,
    samples: int,
    threshold: float,
    concentration: float,
    *,
    repetitions: int = 200,
    looks: int = 20,
    seed: int = 0,
) -> float:
    """Share of simulated runs in which a distribution ``bias`` away in total variation is rejected within ``samples``.

    The bias is the one that is hardest to find: spread over all categories, in the proportion of their probabilities.
    """
    generator = np.random.default_rng(seed)
    expected = np.atleast_2d(expected)
    caught = 0
    for _ in range(repetitions):
        biased = np.stack([_biased(p, bias, generator) for p in expected])
        evidence = Evidence(expected, concentration)
        share = samples // (looks * len(expected))
        for _ in range(looks):
            for context, p in enumerate(biased):
                evidence.counts[context] += generator.multinomial(share, p)
            if evidence.log_value >= threshold:
                caught += 1
                break
    return caught / repetitions


def _biased(p: Floats, bias: float, generator: np.random.Generator) -> Floats:
    """``p`` with ``bias`` of its mass moved from about half of the categories to the others."""
    order = generator.permutation(len(p))
    up = np.zeros(len(p), bool)
    for i in order:
        if p[up].sum() + p[i] <= 0.5 or not up.any():
            up[i] = True
    moved = np.where(up, bias / p[up].sum(), -bias / p[~up].sum())
    found: Floats = p * np.maximum(1 + moved, 0)
    return found / found.sum()


def samples_needed(expected: Floats, bias: float, threshold: float) -> int:
    """About how many samples find a bias that is spread as thinly as it can be.

    A thinly spread bias adds 2 * bias**2 to the evidence with each sample; the mixture takes a quarter of it and costs
    about 0.6 for each free probability, and 2.5 standard deviations of the evidence are allowed for.
    """
    expected = np.atleast_2d(expected)
    degrees = int((expected > 0).sum()) - len(expected)
    return math.ceil((threshold + 0.6 * degrees + 2.5 * math.sqrt(threshold)) / (2 * 0.75 * bias**2))
