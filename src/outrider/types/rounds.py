"""What a round of drafting and verifying passes on: proposals, distributions, what sampling depends on.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.types.passes import Integers, Values, to_array, to_tensor

__all__ = ["Context", "Distribution", "Processor", "Proposal", "RequestRows", "Rng", "Verification"]


class Distribution(Protocol):
    """R distributions of the next token, each as it is really sampled from (float32 or float64)."""

    def __len__(self) -> int: ...
    def at(self, tokens: Tensor) -> Tensor:
        """Probability of ``tokens[r]`` in row r. int64 [R] -> [R]."""
        ...

    def dense(self, rows: Tensor) -> Tensor:
        """Full rows of probabilities. int64 [n] -> [n, V]."""
        ...


class Proposal:
    """What a drafter proposes for each row. It is not changed once made; tensors, arrays and lists of its numbers are
    made when they are asked for."""

    __slots__ = ("_confidence", "_counts", "_lengths", "_tokens", "distribution", "parents", "sampled")

    def __init__(
        self,
        tokens: Tensor | Integers,
        lengths: Tensor | list[int],
        distribution: Distribution | None = None,
        confidence: Values | None = None,
        parents: Tensor | None = None,
        sampled: list[int] | None = None,
    ) -> None:
        """From tensors, or arrays and a list; the properties give their shapes.

        ``distribution``: the one that each token was really drawn from: row b * K + j is token (b, j); None =
        deterministic. (lengths[b] >= j) may depend on tokens[b, :j] only. ``parents`` int64 [B, K]: a tree, the token
        each follows, -1 the row's last; None = a chain. ``sampled`` [B]: so many of a row's first drafts were drawn,
        those after them come from elsewhere and are certain in ``distribution`` where a rule reads it; None = all.
        """
        self._tokens, self._confidence = tokens, confidence
        self._lengths = lengths if isinstance(lengths, Tensor) else None
        self._counts = lengths if isinstance(lengths, list) else None
        self.distribution, self.parents, self.sampled = distribution, parents, sampled

    @property
    def tokens(self) -> Tensor:
        """int64 [B, K]; entries past ``lengths[b]`` are meaningless."""
        self._tokens = to_tensor(self._tokens)
        return self._tokens

    @property
    def lengths(self) -> Tensor:
        """int64 [B], 0 <= lengths <= limit."""
        if self._lengths is None:
            self._lengths = torch.from_numpy(np.array(self._counts, np.int64))
        return self._lengths

    @property
    def confidence(self) -> Tensor | None:
        """float32 [B, K]: P(token j accepted | those before were); from tokens[b, :j] only."""
        if self._confidence is not None:
            self._confidence = to_tensor(self._confidence)
        return self._confidence

    @property
    def counts(self) -> list[int]:
        """``lengths`` as a list. Not to be written to."""
        if self._counts is None:
            assert self._lengths is not None
            self._counts = self._lengths.tolist()
        return self._counts

    @property
    def arrays(self) -> tuple[Integers, npt.NDArray[np.float32] | None]:
        """``tokens`` and ``confidence``."""
        sure = self._confidence
        return to_array(self._tokens), None if sure is None else to_array(sure)

    @property
    def width(self) -> int:
        """K"""
        return int(self._tokens.shape[1])

    @staticmethod
    def empty(rows: int) -> Proposal:
        """No drafts at all: the step is plain decoding. Not to be written to: one proposal serves every such step."""
        return _empty(rows)

    @staticmethod
    def pack(tokens: Sequence[Sequence[int]], confidence: Sequence[Sequence[float]]) -> Proposal:
        """Pad ragged deterministic drafts, and how sure of each token the drafter is, to the longest row."""
        lengths = [len(row) for row in tokens]
        shape = len(lengths), max(lengths, default=0)
        drafts = np.array([[*row, *[0] * (shape[1] - len(row))] for row in tokens], np.int64)
        sure = np.array([[*row, *[0.0] * (shape[1] - len(row))] for row in confidence], np.float32)
        return Proposal(drafts.reshape(shape), lengths, None, sure.reshape(shape))


@cache
def _empty(rows: int) -> Proposal:
    return Proposal(np.zeros((rows, 0), np.int64), [0] * rows)


class Verification:
    """The result of verifying a proposal. It is not changed once made; the form that it was not made from, tensors or
    lists, is made when it is asked for."""

    __slots__ = ("_lists", "_tensors")

    def __init__(self, accepted: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """From tensors; the properties give their shapes."""
        self._tensors: tuple[Tensor, Tensor, Tensor] | None = (accepted, tokens, lengths)
        self._lists: tuple[list[int], list[list[int]]] | None = None

    @classmethod
    def of_lists(cls, accepted: list[int], tokens: list[list[int]]) -> Verification:
        """The same from Python's integers."""
        made = cls.__new__(cls)
        made._tensors, made._lists = None, (accepted, tokens)
        return made

    @classmethod
    def of(cls, accepted: Tensor, drafted: Tensor, bonus: Tensor) -> Verification:
        """accepted [B], drafted [B, K], bonus [B]: the token after the accepted ones."""
        tokens = torch.cat([drafted, bonus[:, None]], 1).scatter(1, accepted[:, None], bonus[:, None])
        return cls(accepted, tokens, accepted + 1)

    @property
    def lists(self) -> tuple[list[int], list[list[int]]]:
        """``accepted`` and ``tokens``."""
        if self._lists is None:
            accepted, tokens, _ = self.tensors
            self._lists = accepted.tolist(), tokens.tolist()
        return self._lists

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``accepted``, ``tokens`` and ``lengths``."""
        if self._tensors is None:
            accepted, tokens = (torch.from_numpy(np.array(part, np.int64)) for part in self.lists)
            self._tensors = accepted, tokens, accepted + 1
        return self._tensors

    @property
    def accepted(self) -> Tensor:
        """int64 [B]: drafted tokens kept."""
        return self.tensors[0]

    @property
    def tokens(self) -> Tensor:
        """int64 [B, K+1]: accepted tokens, then the bonus token (the recovered one after a rejection)."""
        return self.tensors[1]

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: accepted + 1."""
        return self.tensors[2]


@dataclass(frozen=True)
class Context:
    """What sampling depends on besides logits: each row's request and its committed tokens.

    The lists of tokens grow; everything else stays, and what follows from it is worked out once.
    """

    params: Sequence[SamplingParams]  # B
    history: Sequence[list[int]]  # B lists: prompt and output so far, the last committed token included
    prompt_lengths: Sequence[int]  # B
    processors: Sequence[Sequence[Processor]] | None = None  # B: applied after the request's own (a grammar's mask)

    @cached_property
    def stepwise(self) -> bool:
        """Whether some row's logits are changed by the tokens before it (penalties, grammars)."""
        return self.processors is not None or any(p.penalised for p in self.params)

    @cached_property
    def reports(self) -> bool:
        """Whether any row asks for log-probabilities."""
        return any(p.logprobs is not None for p in self.params)

    @cached_property
    def changed(self) -> bool:
        """Whether some row's logits are changed before temperature and truncation: ``stepwise``, or by a bias."""
        return self.stepwise or any(p.logit_bias for p in self.params)

    @cached_property
    def greedy(self) -> bool:
        """Whether all rows have temperature 0."""
        return not any(p.temperature for p in self.params)

    @cached_property
    def takes_largest(self) -> bool:
        """Whether the token of each row's largest logit is enough, and no logits are needed (``FindsLargest``)."""
        return self.greedy and not (self.changed or self.reports)

    @cached_property
    def unlimited(self) -> bool:
        """Whether all rows are sampled from the model's own distribution, at temperature 1 and not truncated."""
        return all(p.temperature == 1 and p.top_p >= 1 and not (p.top_k or p.min_p) for p in self.params)


@dataclass(frozen=True, slots=True)
class RequestRows:
    """The rows of logits that belong to one request."""

    index: npt.NDArray[np.int64]  # [n] in the logits
    depth: npt.NDArray[np.int64]  # [n] drafted tokens each row follows
    tokens: list[int]  # the request's history, then its drafts up to the largest depth
    prompt_length: int


class Processor(Protocol):
    """Changes the logits of one request's rows in place; a row may depend on the tokens it follows alone."""

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        """logits [R, V]"""
        ...


class Rng(Protocol):
    """Randomness as an argument, keyed by (request seed, round, position, purpose); see ``outrider.sampling.rng``.

    ``position`` counts the sequence's tokens from 0, so the token that follows ``history`` has position
    ``len(history)``. A row never depends on its neighbours.
    """

    def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """float64 in (0, 1), one for each (row, position). int64 [n], int64 [n] -> [n]."""
        ...

    def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """int64 [n]: the key from which a Gumbel value for every token id is derived (``rng.gumbel``)."""
        ...
