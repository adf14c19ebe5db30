"""Do two servers write alike? Tests that need samples of both and nothing else.

``mmd`` maximum mean discrepancy with a Hamming kernel over the answers to each prompt, permuted within prompts (Gao,
Liang, Guestrin, "Model equality testing", arXiv 2410.20247: 10 answers a prompt) ``counts`` the first token after
near-tied prompts, which needs one token an answer (Chauvin et al., "Token-efficient change detection in LLM APIs",
arXiv 2602.11083) ``first_token`` log-probabilities of the first token, averaged over prompts ("Log probability
tracking of LLM APIs", arXiv 2512.03816)

Each gives a p-value by permutation, so its error rate is exact for any size of sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["counts", "first_token", "mmd"]

Floats = npt.NDArray[np.float64]
PERMUTATIONS = 9999
LONGEST = 300  # characters or tokens of an answer that are compared


def mmd(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]], *, seed: int = 0) -> tuple[float, float]:
    """(statistic, p-value). Answers of each prompt: texts, compared character by character from their beginning."""
    generator = np.random.default_rng(seed)
    total, permuted = 0.0, np.zeros(PERMUTATIONS)
    for a, b in zip(ours, theirs, strict=True):
        kernel = _hamming([*a, *b])
        n, size = len(a), len(a) + len(b)
        labels = np.zeros((PERMUTATIONS + 1, size))
        labels[0, :n] = 1
        order = generator.random((PERMUTATIONS, size)).argsort(1)
        labels[1:] = order < n
        x, y = labels, 1 - labels
        within = ((x @ kernel) * x).sum(1) / (n * (n - 1)) + ((y @ kernel) * y).sum(1) / ((size - n) * (size - n - 1))
        values = within - 2 * ((x @ kernel) * y).sum(1) / (n * (size - n))
        total += values[0]
        permuted += values[1:]
    return total / max(len(ours), 1), _p_value(total, permuted)


def _hamming(texts: Sequence[str]) -> Floats:
    """Share of equal characters at equal positions of each pair, 0 on the diagonal. [m, m]"""
    width = min(max(map(len, texts), default=1), LONGEST) or 1
    codes = np.zeros((len(texts), width), np.int64)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text[:width])] = [ord(character) for character in text[:width]]
    same: Floats = ((codes[:, None] == codes[None]) & (codes[:, None] > 0)).mean(2)
    np.fill_diagonal(same, 0)
    return same


def counts(ours: Sequence[Sequence[str]], theirs: Sequence[Sequence[str]], *, seed: int = 0) -> tuple[float, float]:
    """(statistic, p-value) of the tokens after each prompt: the sum over prompts of Pearson's statistic for two
    samples, permuted within prompts."""
    generator = np.random.default_rng(seed)
    total, permuted = 0.0, np.zeros(PERMUTATIONS)
    for a, b in zip(ours, theirs, strict=True):
        _, tokens = np.unique(np.array([*a, *b]), return_inverse=True)
        table = np.eye(tokens.max() + 1)[tokens]
        n, size = len(a), len(tokens)
        mine = np.zeros((PERMUTATIONS + 1, size))
        mine[0, :n] = 1
        mine[1:] = generator.random((PERMUTATIONS, size)).argsort(1) < n
        expected = table.sum(0) * n / size
        values = (((mine @ table) - expected) ** 2 / np.maximum(expected * (1 - n / size), 1e-12)).sum(1)
        total += values[0]
        permuted += values[1:]
    return total, _p_value(total, permuted)


def first_token(ours: Floats, theirs: Floats, *, seed: int = 0) -> tuple[float, float]:
    """(mean absolute difference, p-value) of log-probabilities [prompts, repeats] of the same tokens.

    The statistic is the mean over prompts of the difference of their means; repeats are permuted within prompts.
    """
    generator = np.random.default_rng(seed)
    both = np.concatenate([ours, theirs], 1)
    n = ours.shape[1]

    def statistic(values: Floats) -> Floats:
        found: Floats = np.abs(values[..., :n].mean(-1) - values[..., n:].mean(-1)).mean(-1)
        return found

    permuted = np.array([statistic(generator.permuted(both, axis=1)) for _ in range(PERMUTATIONS)])
    found = float(statistic(both))
    return found, _p_value(found, permuted)


def _p_value(found: float, permuted: Floats) -> float:
    return float((1 + (permuted >= found - 1e-12).sum()) / (1 + len(permuted)))
