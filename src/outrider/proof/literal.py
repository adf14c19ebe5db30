"""Plain decoding of a small Markov chain, written out literally: the exact distribution that every path is held
against.

It shares no code with ``sampling``: each sampling option is one line of its definition, in float64. Legend: V
vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from outrider.config import SamplingParams

__all__ = ["Chain", "Texts", "next_token", "plain_texts", "total_variation"]

Texts = dict[tuple[int, ...], float]
"""Text -> probability."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Chain:
    """A chain of order m: ``table`` [V] * (m + 1) holds logits, as ``models.toy.ToyTarget`` reads it."""

    table: Floats
    no_repeat: int | None = None
    """A grammar of one rule: this token never follows itself. None: everything is allowed."""

    def logits(self, history: Sequence[int]) -> Floats:
        """[V], after the grammar's rule."""
        order = self.table.ndim - 1
        row = self.table[tuple([0] * (order - len(history)) + list(history[len(history) - min(order, len(history)) :]))]
        if self.no_repeat is not None and history[-1] == self.no_repeat:
            row = np.where(np.arange(len(row)) == self.no_repeat, -np.inf, row)
        return row


def next_token(logits: Floats, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """The distribution of the next token, [V]: bias, penalties, temperature, top-k, top-p, min-p, in this order."""
    z = [float(value) for value in logits]
    counts = Counter(output)
    for token, bias in params.logit_bias:
        z[token] += bias
    for token in {*prompt, *output}:
        z[token] = z[token] * params.repetition_penalty if z[token] < 0 else z[token] / params.repetition_penalty
    for token, count in counts.items():
        z[token] -= params.frequency_penalty * count + params.presence_penalty
    ranked = sorted(range(len(z)), key=lambda token: (-z[token], token))
    if params.temperature == 0:
        return np.eye(len(z))[ranked[0]]
    weights = [math.exp((value - z[ranked[0]]) / params.temperature) for value in z]
    kept = ranked[: params.top_k or len(z)]
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weights[token] / total
        if mass >= params.top_p:
            break
    kept = [token for token in nucleus if weights[token] >= params.min_p * weights[ranked[0]]]
    total = sum(weights[token] for token in kept)
    return np.array([weights[token] / total if token in kept else 0.0 for token in range(len(z))])


def plain_texts(chain: Chain, prompt: Sequence[int], params: SamplingParams, stop_ids: Collection[int] = ()) -> Texts:
    """Every text that plain decoding can give, with its probability."""
    texts: Texts = {}

    def go_on(output: tuple[int, ...], weight: float) -> None:
        if len(output) == params.max_tokens or (output and output[-1] in stop_ids):
            texts[output] = texts.get(output, 0.0) + weight
            return
        following = next_token(chain.logits([*prompt, *output]), params, prompt, output)
        for token in np.flatnonzero(following).tolist():
            go_on((*output, token), weight * float(following[token]))

    go_on((), 1.0)
    return texts


def total_variation(a: Texts, b: Texts) -> float:
    """Half the sum of absolute differences."""
    return sum(abs(a.get(text, 0.0) - b.get(text, 0.0)) for text in {*a, *b}) / 2
