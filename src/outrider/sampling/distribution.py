"""Distributions of the next token: normalised when they are asked, or still logits with what truncation is to leave.

Legend: R rows of logits, V vocabulary, S columns of a distribution (V, or as many as were kept), n rows asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.errors import RowsFailed
from outrider.sampling.rng import gumbel_argmax
from outrider.sampling.truncation import Limits, limited
from outrider.types import Integers, Values, to_array, to_tensor

__all__ = ["Categorical", "Processed", "ProcessedLogits", "argmax", "failed_rows", "settled"]

CoreForm = tuple[Any, ...]
"""logits, ids, temperatures, top_k, top_p, min_p: arrays or None."""


class Categorical:
    """R distributions of the next token (``types.Distribution``): float32, or float64 where the logits were.

    One of three forms: one certain token a row (all rows greedy); dense logits; or sparse ones, whose column s stands
    for token ``ids[r, s]``. ``at``, ``lookup`` and ``dense`` read the very distribution that ``draw`` and ``pick``
    sample. Tensors are kept, not copied: their owner must not write to them while the distribution is in use.
    """

    __slots__ = ("_ids", "_logits", "_probabilities", "_tokens", "vocab_size")

    def __init__(
        self,
        vocab_size: int,
        *,
        logits: Values | None = None,
        probabilities: Tensor | None = None,
        ids: Tensor | Integers | None = None,
        tokens: Tensor | list[int] | None = None,
    ) -> None:
        """Give ``tokens`` int64 [R], or else ``logits`` or ``probabilities`` [R, S]; S = V unless ``ids`` int64 [R, S]
        name the columns: ascending in each row, distinct, V (with no mass) where a row has fewer."""
        self.vocab_size = vocab_size
        self._tokens = tokens
        self._ids = ids
        self._logits = logits
        self._probabilities = probabilities

    @staticmethod
    def greedy(tokens: Tensor | list[int], vocab_size: int) -> Categorical:
        """All mass on ``tokens[r]``; -1: the row has no largest logit, and cannot be drawn from."""
        return Categorical(vocab_size, tokens=tokens)

    @staticmethod
    def of(logits: Values) -> Categorical:
        """softmax(logits), [R, V]."""
        return Categorical(logits.shape[1], logits=logits)

    def __len__(self) -> int:
        columns = self._probabilities if self._logits is None else self._logits
        return len(self._tokens if columns is None else columns)  # type: ignore[arg-type]

    @property
    def core_form(self) -> CoreForm | None:
        """What the compiled core reads, None where it is not float32 logits on a CPU."""
        return _core_form(self._logits, self._ids, None)

    @property
    def ids(self) -> Tensor | None:
        """int64 [R, S]: the token of each column; None where column v is token v."""
        if self._ids is not None:
            self._ids = to_tensor(self._ids)
        return self._ids

    @property
    def is_greedy(self) -> bool:
        """Every row is certain (a batch that mixes greedy and sampled rows is not)."""
        return self._tokens is not None

    @property
    def tokens(self) -> Tensor | None:
        """int64 [R]: each row's certain token (-1: none can be drawn); None where rows are distributions."""
        if isinstance(self._tokens, list):
            self._tokens = torch.tensor(self._tokens)
        return self._tokens

    @property
    def certain(self) -> list[int]:
        """``tokens`` as a list; only where every row is certain."""
        assert self._tokens is not None
        return self._tokens if isinstance(self._tokens, list) else self._tokens.tolist()

    @property
    def _columns(self) -> Tensor:
        if self._logits is None:
            assert self._probabilities is not None
            return self._probabilities
        return self.logits

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_greedy else self._columns.dtype

    @property
    def probabilities(self) -> Tensor:
        """[R, S], by column; not of certain tokens."""
        if self._probabilities is None:
            self._probabilities = torch.softmax(self._columns, -1)  # each row summed alone: the same in any batch
        return self._probabilities

    @property
    def logits(self) -> Tensor:
        """[R, S], by column, up to a constant per row; not of certain tokens."""
        if self._logits is None:
            self._logits = self._columns.log()
        self._logits = to_tensor(self._logits)
        return self._logits

    def at(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Probability of ``tokens[i]`` in row ``rows[i]``, by default row i. int64 [n] -> [n]."""
        if self.tokens is not None:
            mine = self.tokens if rows is None else self.tokens[rows]
            return (mine == tokens.to(mine.device)).to(self.dtype)
        if self.ids is None:
            index = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
            return self.probabilities[index, tokens]
        ids, inside = (x if rows is None else x[rows] for x in (self.ids, self.probabilities))
        return torch.where(ids == tokens[:, None].to(ids.device), inside, 0).sum(1)

    def lookup(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Probabilities of several tokens of a row. int64 [n], int64 [n, S'] (V counts as no token) -> [n, S']."""
        if self.tokens is not None:
            return (self.tokens[rows, None] == ids).to(self.dtype)
        if self.ids is None:
            inside = self.probabilities[rows[:, None], ids.clamp_max(self.vocab_size - 1)]
            return torch.where(ids < self.vocab_size, inside, 0)
        mine = self.ids[rows]
        column = torch.searchsorted(mine, ids).clamp_max_(mine.shape[1] - 1)
        found = self.probabilities[rows[:, None], column]
        return torch.where(mine.gather(1, column) == ids, found, 0)

    def dense(self, rows: Tensor) -> Tensor:
        """Full rows of probabilities. int64 [n] -> [n, V]."""
        if self.tokens is None and self.ids is None:
            return self.probabilities[rows]
        if self.tokens is not None:
            dense = torch.zeros(len(rows), self.vocab_size, dtype=self.dtype, device=self.tokens.device)
            return dense.scatter_(1, self.tokens[rows, None], 1.0)
        assert self.ids is not None
        dense = self.probabilities.new_zeros(len(rows), self.vocab_size + 1)  # the last column takes the padding
        return dense.scatter_(1, self.ids[rows], self.probabilities[rows])[:, :-1]

    def columns(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """A copy of some rows as they are stored: probabilities [n, S], ids [n, S] (None: column v is token v)."""
        if self.tokens is not None:
            return torch.ones(len(rows), 1, dtype=self.dtype, device=self.tokens.device), self.tokens[rows, None]
        return self.probabilities[rows], None if self.ids is None else self.ids[rows]

    def argmax(self) -> Tensor:
        """int64 [R]: the likeliest token, the lowest id on ties. Raises RowsFailed for rows without one."""
        found = self._tokens if self._tokens is not None else argmax(self._columns)
        columns = torch.tensor(found) if isinstance(found, list) else found
        if bool((columns < 0).any()):
            raise RowsFailed(torch.nonzero(columns < 0)[:, 0].tolist())
        return self._token_of(columns)

    def draw(self, keys: Tensor) -> Tensor:
        """One token a row by Gumbel-max: the same token from the same key whatever the form. int64 [R] -> [R].
        Raises OutriderError for rows that cannot be drawn from."""
        if self.is_greedy:
            return self.argmax()
        return self._token_of(gumbel_argmax(self.logits, keys, self.ids))

    def pick(self, uniforms: Tensor) -> Tensor:
        """One token a row by inversion of the distribution function: one number in (0, 1) a row, cheaper than
        ``draw`` where nothing has to be shared. float64 [R] -> int64 [R]."""
        if self.tokens is not None:
            return self.tokens
        below = self.probabilities.cumsum(-1, dtype=torch.float64)
        uniforms = uniforms.to(below.device).clamp_max(1 - 2.0**-50)  # the product stays under the total, rounded too
        goal = uniforms[:, None] * below[:, -1:]
        return self._token_of(torch.searchsorted(below, goal, right=True)[:, 0])  # right: never a token of no mass

    def take(self, rows: Tensor) -> Categorical:
        """These rows, in this order. int64 [n]."""
        own = None if self._logits is None else self.logits
        taken = (x if x is None else x[rows] for x in (own, self._probabilities, self.ids, self.tokens))
        logits, probabilities, ids, tokens = taken
        return Categorical(self.vocab_size, logits=logits, probabilities=probabilities, ids=ids, tokens=tokens)

    @staticmethod
    def concatenate(parts: Sequence[Categorical | ProcessedLogits]) -> Categorical:
        """All rows of all parts, one part after the other, in the simplest form that holds them all."""
        distributions = [settled(part) for part in parts]
        if len(distributions) == 1:
            return distributions[0]
        size = distributions[0].vocab_size
        if all(distribution.is_greedy for distribution in distributions):
            return Categorical.greedy(torch.cat([distribution.argmax() for distribution in distributions]), size)
        dtype = next(distribution.dtype for distribution in distributions if not distribution.is_greedy)
        if any(not distribution.is_greedy and distribution.ids is None for distribution in distributions):
            return Categorical.of(torch.cat([distribution._spread().to(dtype) for distribution in distributions]))
        sparse = [distribution._as_sparse(dtype) for distribution in distributions]
        width = max(ids.shape[1] for ids, _ in sparse)
        ids = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=size) for ids, _ in sparse]
        logits = [torch.nn.functional.pad(z, (0, width - z.shape[1]), value=-torch.inf) for _, z in sparse]
        return Categorical(size, logits=torch.cat(logits), ids=torch.cat(ids))

    @staticmethod
    def stack(steps: Sequence[Categorical | ProcessedLogits]) -> Categorical:
        """K steps of B rows each, drafted one after the other, in the order of a ``Proposal``: row b * K + j."""
        count, rows = len(steps), len(steps[0])
        joined = Categorical.concatenate(steps)
        if rows == 1 or count == 1:
            return joined
        return joined.take(torch.arange(count * rows).view(count, rows).T.reshape(-1))

    def _token_of(self, columns: Tensor) -> Tensor:
        return columns if self.ids is None else self.ids.gather(1, columns[:, None])[:, 0]

    def _as_sparse(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.tokens is not None:
            return self.tokens[:, None], torch.zeros(len(self), 1, dtype=dtype, device=self.tokens.device)
        assert self.ids is not None
        return self.ids, self.logits.to(dtype)

    def _spread(self) -> Tensor:
        """[R, V] logits, -inf where there is no mass."""
        if self.tokens is None and self.ids is None:
            return self.logits
        ids, logits = self._as_sparse(self.dtype)
        rows = logits.new_full((len(self), self.vocab_size + 1), -torch.inf)
        return rows.scatter_(1, ids, logits)[:, :-1]


@dataclass(frozen=True)
class ProcessedLogits:
    """Logits after bias and penalties, and the temperature and truncation that are still to be applied.

    The compiled core verifies drafts from this form and computes only the rows it needs. Anything else asked of it
    computes all rows once, as a ``Categorical``.
    """

    scores: Values  # [R, V]
    limits: Limits

    @cached_property
    def logits(self) -> Tensor:
        """[R, V]"""
        return to_tensor(self.scores)

    @cached_property
    def distribution(self) -> Categorical:
        logits, ids = limited(self.logits, self.limits)
        return Categorical(self.vocab_size, logits=logits, ids=ids)

    @property
    def vocab_size(self) -> int:
        return self.scores.shape[1]

    @property
    def core_form(self) -> CoreForm | None:
        """What the compiled core reads, None where it is not float32 logits on a CPU: rows that were drawn from are
        truncated already, and are not truncated again."""
        computed: Categorical | None = self.__dict__.get("distribution")
        return _core_form(self.scores, None, self.limits) if computed is None else computed.core_form

    is_greedy = False

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: Tensor) -> ProcessedLogits:
        """These rows, in this order. int64 [n]."""
        return ProcessedLogits(self.logits[rows], self.limits.take(rows.cpu().numpy()))

    def at(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        """See ``Categorical.at``."""
        return self.distribution.at(tokens, rows)

    def dense(self, rows: Tensor) -> Tensor:
        """See ``Categorical.dense``."""
        return self.distribution.dense(rows)

    def argmax(self) -> Tensor:
        """See ``Categorical.argmax``."""
        return self.distribution.argmax()

    def draw(self, keys: Tensor) -> Tensor:
        """See ``Categorical.draw``."""
        return self.distribution.draw(keys)


Processed = Categorical | ProcessedLogits
"""What ``sampling.processors.process`` gives."""


def settled(distribution: Processed) -> Categorical:
    """The same as a ``Categorical``."""
    return distribution.distribution if isinstance(distribution, ProcessedLogits) else distribution


def _core_form(logits: Values | None, ids: Tensor | Integers | None, limits: Limits | None) -> CoreForm | None:
    if isinstance(logits, np.ndarray):
        values = logits
    elif logits is None or logits.dtype != torch.float32 or logits.device.type != "cpu":
        return None
    else:
        values = logits.contiguous().numpy()
    names = None if ids is None else to_array(ids)
    if limits is None:
        return values, names, None, None, None, None
    temperatures = None if limits.temperatures is None else limits.temperatures.astype(np.float32)
    return values, names, temperatures, limits.top_k, limits.top_p, limits.min_p


def argmax(scores: Values) -> Tensor | list[int]:
    """The first of the largest of each row: R numbers, or int64 [R] where the scores are on another device. -1 where
    the largest is no number: both libraries take NaN for the largest. numpy's is several times faster on a CPU."""
    if isinstance(scores, Tensor):
        if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.float64):
            best = scores.max(1)
            return torch.where(torch.isfinite(best.values), best.indices, -1)
        scores = scores.numpy()
    found: list[int] = scores.argmax(1).tolist()
    return [column if isfinite(scores.item(r, column)) else -1 for r, column in enumerate(found)]


def failed_rows(logits: Tensor) -> list[int]:
    """Rows with NaN or +inf, or with nothing but -inf, which cannot be drawn from. [R, S]"""
    finite = torch.isfinite(logits.amax(1))
    return [] if bool(finite.all()) else torch.nonzero(~finite)[:, 0].tolist()
