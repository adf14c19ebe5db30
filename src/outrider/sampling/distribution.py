"""From logits to the distribution that is really sampled from: one function, for target and drafter alike.

``process`` applies, in this order (that of Hugging Face's and vLLM's processors):

    1. logit bias                   added
    2. repetition penalty           tokens of prompt and output: positive logits divided, negative ones multiplied
    3. frequency, presence penalty  tokens of the output: minus frequency * count, minus presence
    4. temperature                  0 is greedy: all mass on the largest logit of step 3
    5. top-k                        the k likeliest
    6. top-p                        the fewest likeliest, of the distribution after step 5, whose mass reaches p
    7. min-p                        those at least min_p times as likely as the likeliest

Ties go to the lowest token id everywhere, so that the distribution is a function of its row alone. The result is a
``Categorical``: unnormalised logits, dense or cut to the kept tokens, normalised when somebody asks.

Legend: R places (rows of logits), V vocabulary, S columns of a distribution (V, or as many as were kept), B requests, K drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest, RowsFailed
from outrider.sampling.rng import gumbel_argmax
from outrider.sampling.truncation import Limits, limited
from outrider.types import Context

__all__ = ["Categorical", "check_rows", "process"]

_COLD = 1e-3  # a temperature under which a quotient may overflow


# ------------------------------------------------------------------------------------------------ the distribution


class Categorical:
    """The distributions of the next token at R places (``types.Distribution``): float32, or float64 where the logits were.

    One of three forms: certain tokens (all places greedy); a dense row of logits; or a sparse one, whose column s
    stands for token ``ids[r, s]``. Everything else follows from the form: ``at``, ``lookup`` and ``dense`` read the
    very distribution that ``draw`` and ``pick`` sample. Tensors are kept, not copied: their owner must not write to them while
    the distribution is in use.

    A distribution that ``process`` made is ``raw`` at first, logits and ``limits``: the compiled core verifies drafts from that
    and works out no place that it need not look at. Whoever asks for anything else gets one of the three forms.
    """

    __slots__ = ("_ids", "_logits", "_probabilities", "limits", "raw", "tokens", "vocab_size")

    def __init__(
        self,
        vocab_size: int,
        *,
        logits: Tensor | None = None,
        probabilities: Tensor | None = None,
        ids: Tensor | None = None,
        tokens: Tensor | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Give ``tokens`` int64 [R], or else ``logits`` or ``probabilities`` [R, S]; S = V unless ``ids`` int64 [R, S]
        name the columns: ascending in each row, distinct, V (with no mass) where a row has fewer. ``limits`` are of
        dense ``logits``."""
        self.vocab_size = vocab_size
        self.tokens = tokens
        self.raw = logits if limits is not None else None
        self.limits = limits
        self._ids = ids
        self._logits = logits if limits is None else None
        self._probabilities = probabilities

    @staticmethod
    def greedy(tokens: Tensor, vocab_size: int) -> Categorical:
        """All mass on ``tokens[r]``."""
        return Categorical(vocab_size, tokens=tokens)

    @staticmethod
    def of(logits: Tensor) -> Categorical:
        """softmax(logits), [R, V]."""
        return Categorical(logits.shape[1], logits=logits)

    def __len__(self) -> int:
        if self.raw is not None:
            return len(self.raw)
        return len(self._columns if self.tokens is None else self.tokens)

    @property
    def core_form(self) -> tuple[Any, ...] | None:
        """What the compiled core reads a distribution from: logits, ids, temperatures, top_k, top_p, min_p, arrays or None. None
        where these are not float32 numbers on a CPU."""
        logits, limits = (self._logits, None) if self.raw is None else (self.raw, self.limits)
        if logits is None or logits.dtype != torch.float32 or logits.device.type != "cpu":
            return None
        ids = None if self._ids is None else self._ids.numpy()
        values = np.ascontiguousarray(logits.numpy())
        if limits is None:
            return values, ids, None, None, None, None
        temperatures = None if limits.temperatures is None else limits.temperatures.astype(np.float32)
        return values, ids, temperatures, limits.top_k, limits.top_p, limits.min_p

    @property
    def is_greedy(self) -> bool:
        """Every place is certain (a batch that mixes greedy and sampled rows is not)."""
        return self.tokens is not None

    def _settle(self) -> None:
        """From raw logits to a form."""
        if self.raw is not None:
            assert self.limits is not None
            self._logits, self._ids = limited(self.raw, self.limits)
            self.raw = self.limits = None

    @property
    def ids(self) -> Tensor | None:
        """int64 [R, S]: the tokens of the columns; None: column v is token v."""
        self._settle()
        return self._ids

    @property
    def _columns(self) -> Tensor:
        self._settle()
        columns = self._probabilities if self._logits is None else self._logits
        assert columns is not None
        return columns

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tokens is not None else self._columns.dtype

    @property
    def probabilities(self) -> Tensor:
        """[R, S], by column; not of certain tokens."""
        if self._probabilities is None:
            self._probabilities = torch.softmax(self._columns, -1)  # each row summed alone: the same in any batch
        return self._probabilities

    @property
    def logits(self) -> Tensor:
        """[R, S], by column, up to a constant per row; not of certain tokens."""
        self._settle()
        if self._logits is None:
            self._logits = self._columns.log()
        return self._logits

    def at(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Probability of ``tokens[i]`` at place ``places[i]``, by default place i. int64 [n] -> [n]."""
        if self.tokens is not None:
            mine = self.tokens if places is None else self.tokens[places]
            return (mine == tokens.to(mine.device)).to(self.dtype)
        if self.ids is None:
            index = torch.arange(len(tokens), device=tokens.device) if places is None else places
            return self.probabilities[index, tokens]
        ids, inside = (x if places is None else x[places] for x in (self.ids, self.probabilities))
        return torch.where(ids == tokens[:, None].to(ids.device), inside, 0).sum(1)

    def lookup(self, places: Tensor, ids: Tensor) -> Tensor:
        """Probabilities of several tokens a place. int64 [n], int64 [n, S'] (V counts as no token) -> [n, S']."""
        if self.tokens is not None:
            return (self.tokens[places, None] == ids).to(self.dtype)
        if self.ids is None:
            inside = self.probabilities[places[:, None], ids.clamp_max(self.vocab_size - 1)]
            return torch.where(ids < self.vocab_size, inside, 0)
        mine = self.ids[places]
        column = torch.searchsorted(mine, ids).clamp_max_(mine.shape[1] - 1)
        found = self.probabilities[places[:, None], column]
        return torch.where(mine.gather(1, column) == ids, found, 0)

    def dense(self, places: Tensor) -> Tensor:
        """Full rows of probabilities. int64 [n] -> [n, V]."""
        if self.tokens is None and self.ids is None:
            return self.probabilities[places]
        if self.tokens is not None:
            rows = torch.zeros(len(places), self.vocab_size, dtype=self.dtype, device=self.tokens.device)
            return rows.scatter_(1, self.tokens[places, None], 1.0)
        assert self.ids is not None
        rows = self.probabilities.new_zeros(len(places), self.vocab_size + 1)  # the last column takes the padding
        return rows.scatter_(1, self.ids[places], self.probabilities[places])[:, :-1]

    def columns(self, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """A copy of the distributions as they are kept: probabilities [n, S], ids [n, S] (None: column v is token v)."""
        if self.tokens is not None:
            return torch.ones(len(places), 1, dtype=self.dtype, device=self.tokens.device), self.tokens[places, None]
        return self.probabilities[places], None if self.ids is None else self.ids[places]

    def argmax(self) -> Tensor:
        """int64 [R]: the likeliest token, the lowest id on ties."""
        return self.tokens if self.tokens is not None else self._token_of(_argmax(self._columns))

    def draw(self, keys: Tensor) -> Tensor:
        """One token per place by Gumbel-max: the same token from the same key whatever the form. int64 [R] -> [R]."""
        if self.tokens is not None:
            return self.tokens
        return self._token_of(gumbel_argmax(self.logits, keys, self.ids))

    def pick(self, uniforms: Tensor) -> Tensor:
        """One token per place by inversion of the distribution function: one number in (0, 1) a place, cheaper than
        ``draw`` where nothing has to be shared. float64 [R] -> int64 [R]."""
        if self.tokens is not None:
            return self.tokens
        below = self.probabilities.cumsum(-1, dtype=torch.float64)
        goal = (
            uniforms.to(below.device).clamp_max(1 - 2.0**-50)[:, None] * below[:, -1:]
        )  # under the total, rounded too
        return self._token_of(torch.searchsorted(below, goal, right=True)[:, 0])  # right: never a token of no mass

    def take(self, places: Tensor) -> Categorical:
        """The distributions at these places, in this order. int64 [n]."""
        if self.raw is not None and self.limits is not None:
            limits = self.limits.take(places.cpu().numpy())
            return Categorical(self.vocab_size, logits=self.raw[places], limits=limits)
        taken = (x if x is None else x[places] for x in (self._logits, self._probabilities, self._ids, self.tokens))
        logits, probabilities, ids, tokens = taken
        return Categorical(self.vocab_size, logits=logits, probabilities=probabilities, ids=ids, tokens=tokens)

    @staticmethod
    def concatenate(distributions: Sequence[Categorical]) -> Categorical:
        """All places of all distributions, one distribution after the other, in the simplest form that holds them all."""
        if len(distributions) == 1:
            return distributions[0]
        size = distributions[0].vocab_size
        if all(distribution.tokens is not None for distribution in distributions):
            return Categorical.greedy(torch.cat([distribution.argmax() for distribution in distributions]), size)
        dtype = next(distribution.dtype for distribution in distributions if distribution.tokens is None)
        if any(distribution.tokens is None and distribution.ids is None for distribution in distributions):
            return Categorical.of(torch.cat([distribution._spread().to(dtype) for distribution in distributions]))
        sparse = [distribution._as_sparse(dtype) for distribution in distributions]
        width = max(ids.shape[1] for ids, _ in sparse)
        ids = [torch.nn.functional.pad(ids, (0, width - ids.shape[1]), value=size) for ids, _ in sparse]
        logits = [torch.nn.functional.pad(z, (0, width - z.shape[1]), value=-torch.inf) for _, z in sparse]
        return Categorical(size, logits=torch.cat(logits), ids=torch.cat(ids))

    @staticmethod
    def stack(steps: Sequence[Categorical]) -> Categorical:
        """K distributions of B places, drafted one after the other, as ``Proposal.distribution`` wants them: place b * K + j."""
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


def _argmax(scores: Tensor) -> Tensor:
    """int64 [R]: the first of the largest. numpy's is several times faster than torch's on a CPU.

    Raises RowsFailed where the largest is no number: both libraries take NaN for the largest.
    """
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        values = scores.numpy()
        found = values.argmax(1)
        largest = values[np.arange(len(values)), found]
        if not np.isfinite(largest).all():
            raise RowsFailed(np.flatnonzero(~np.isfinite(largest)).tolist())
        return torch.from_numpy(found)
    found_there = scores.argmax(1)
    check_rows(scores.gather(1, found_there[:, None]))
    return found_there


def check_rows(logits: Tensor) -> None:
    """Raise RowsFailed for rows with NaN or +inf, or with nothing but -inf. [R, S]"""
    finite = torch.isfinite(logits.amax(1))
    if not bool(finite.all()):
        raise RowsFailed(torch.nonzero(~finite)[:, 0].tolist())


# ------------------------------------------------------------------------------------------------ logits -> distribution


def process(
    logits: Tensor,
    context: Context,
    rows: Tensor | None = None,
    depth: Tensor | None = None,
    *,
    drafted: Tensor | None = None,
) -> Categorical:
    """The distribution of the next token at R places, as each place's request asks.

    logits [R, V], any float dtype, never written to; rows int64 [R]: the row of ``context`` a place belongs to (None:
    place r is row r); depth int64 [R], drafted int64 [B, K]: place r follows the first ``depth[r]`` drafted tokens of
    its row, which count for its penalties like its history (None: it follows the history alone).
    Raises InvalidRequest for a logit bias on a token that the vocabulary does not have.
    """
    params, size = context.params, logits.shape[1]
    biased = any(p.logit_bias or p.penalised for p in params)
    greedy = all(p.temperature == 0 for p in params)
    if greedy and not biased:
        return Categorical.greedy(_argmax(logits), size)
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    place_rows = None if rows is None else rows.cpu().numpy()
    if biased:
        index = np.arange(len(logits)) if place_rows is None else place_rows
        place_depth = np.zeros(len(logits), np.int64) if depth is None else depth.cpu().numpy()
        logits = logits.clone()
        for row, p in enumerate(params):
            places = np.flatnonzero(index == row)
            if len(places) and p.logit_bias:
                _add_bias(logits, places, p)
            if len(places) and p.penalised:
                follows = place_depth[places]
                drafts = [] if drafted is None else drafted[row, : follows.max()].tolist()
                _penalise(logits, places, p, context.history[row] + drafts, context.prompt_lengths[row], follows)
        if greedy:
            return Categorical.greedy(_argmax(logits), size)
    # A greedy row among sampled ones is a row with top_k = 1: ties at the cut go to the lowest id there too.
    k = [1 if p.temperature == 0 else min(p.top_k or size, size) for p in params]
    temperature = [p.temperature or 1.0 for p in params]
    cuts = any(n < size or p.top_p < 1 or p.min_p > 0 for n, p in zip(k, params, strict=True))
    if not cuts and all(t == 1 for t in temperature):
        return Categorical.of(logits)
    mine = slice(None) if place_rows is None else place_rows
    temperatures = np.array(temperature)[mine] if any(t != 1 for t in temperature) else None
    if temperatures is not None and temperatures.min() < _COLD:
        logits, temperatures = _chill(logits, temperatures), None
    limits = Limits(
        temperatures,
        np.array(k)[mine] if cuts else None,
        np.array([p.top_p for p in params])[mine] if cuts else None,
        np.array([p.min_p for p in params])[mine] if cuts else None,
    )
    return Categorical(size, logits=logits, limits=limits)


def _add_bias(logits: Tensor, places: npt.NDArray[np.int64], params: SamplingParams) -> None:
    ids, amounts = zip(*params.logit_bias, strict=True)
    size = logits.shape[1]
    if min(ids) < 0 or max(ids) >= size:
        wrong = next(i for i in ids if not 0 <= i < size)
        raise InvalidRequest(f"logit_bias names token {wrong}, but the vocabulary has ids 0 to {size - 1}; remove it")
    index = (torch.from_numpy(places)[:, None], torch.tensor(ids)[None])
    logits.index_put_(index, logits.new_tensor(amounts).expand(len(places), -1), accumulate=True)


def _penalise(
    logits: Tensor,
    places: npt.NDArray[np.int64],
    params: SamplingParams,
    tokens: list[int],
    prompt_length: int,
    depth: npt.NDArray[np.int64],
) -> None:
    """Steps 2 and 3 on one row's places: place i has seen all but the last ``max(depth) - depth[i]`` tokens."""
    ids, column = np.unique(np.array(tokens, np.int64), return_inverse=True)
    before = len(tokens) - int(depth.max())
    counts = np.bincount(column[prompt_length:before], minlength=len(ids))[None].repeat(len(places), 0)
    seen = np.zeros((len(places), len(ids)), bool)
    seen[:, column[:before]] = True
    for i, draft in enumerate(column[before:]):
        counts[depth > i, draft] += 1
        seen[depth > i, draft] = True
    index = torch.from_numpy(places)[:, None], torch.from_numpy(ids)
    values = logits[index]
    if params.repetition_penalty != 1:
        penalised = torch.where(values < 0, values * params.repetition_penalty, values / params.repetition_penalty)
        values = torch.where(torch.from_numpy(seen).to(values.device), penalised, values)
    amount = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    logits[index] = values - torch.from_numpy(amount).to(values)


def _chill(logits: Tensor, temperatures: npt.NDArray[np.float64]) -> Tensor:
    """logits / temperature where that might overflow: cold rows are shifted first, so that their largest is 0."""
    divisor = torch.from_numpy(temperatures).to(logits)[:, None]
    return (logits - torch.where(divisor < _COLD, logits.amax(1, keepdim=True), 0)) / divisor
