"""From logits to the distribution that is really sampled from: one function, for target and drafter alike.

``process`` applies, in this order (that of Hugging Face's and vLLM's processors):

    1. logit bias                   added
    2. repetition penalty           tokens of prompt and output: positive logits divided, negative ones multiplied
    3. frequency, presence penalty  tokens of the output: minus frequency * count, minus presence
    4. temperature                  0 is greedy: all mass on the largest logit of step 3
    5. top-k                        the k likeliest
    6. top-p                        the fewest likeliest, of the distribution after step 5, whose mass reaches p
    7. min-p                        those at least min_p times as likely as the likeliest

Steps 1 to 3 are ``Processor`` objects, each a function of one request's rows; others (a grammar's mask) may follow them
through ``Context.processors``. Ties go to the lowest token id everywhere, so that a distribution is a function of its
row alone.

Legend: R rows of logits, V vocabulary, B requests, K drafts, n rows of one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest
from outrider.sampling.distribution import Categorical, Processed, ProcessedLogits, argmax
from outrider.sampling.truncation import Limits
from outrider.types import Context, Integers, Processor, RequestRows, Values, to_tensor

__all__ = ["COLD", "LogitBias", "OccurrencePenalty", "RepetitionPenalty", "process", "processors_of"]

COLD = 1e-3  # temperatures below it: logits / temperature may overflow


# ------------------------------------------------------------------------------------------------ steps 1 to 3


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Step 1."""

    bias: tuple[tuple[int, float], ...]

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        """Raises InvalidRequest for a token that the vocabulary does not have."""
        ids, amounts = zip(*self.bias, strict=True)
        size = logits.shape[1]
        if min(ids) < 0 or max(ids) >= size:
            wrong = next(i for i in ids if not 0 <= i < size)
            raise InvalidRequest(
                f"logit_bias names token {wrong}, but the vocabulary has ids 0 to {size - 1}; remove it"
            )
        index = (torch.from_numpy(rows.index)[:, None], torch.tensor(ids)[None])
        logits.index_put_(index, logits.new_tensor(amounts).expand(len(rows.index), -1), accumulate=True)


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Step 2 (CTRL, arXiv 1909.05858, section 4.1)."""

    penalty: float

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        ids, seen, _ = _occurrences(rows)
        index = torch.from_numpy(rows.index)[:, None], torch.from_numpy(ids)
        values = logits[index]
        penalised = torch.where(values < 0, values * self.penalty, values / self.penalty)
        logits[index] = torch.where(torch.from_numpy(seen).to(values.device), penalised, values)


@dataclass(frozen=True, slots=True)
class OccurrencePenalty:
    """Step 3."""

    frequency: float
    presence: float

    def __call__(self, logits: Tensor, rows: RequestRows) -> None:
        ids, _, counts = _occurrences(rows)
        index = torch.from_numpy(rows.index)[:, None], torch.from_numpy(ids)
        amount = self.frequency * counts + self.presence * (counts > 0)
        logits[index] = logits[index] - torch.from_numpy(amount).to(logits)


def _occurrences(
    rows: RequestRows,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Different tokens [m] of a request; whether each row has seen each of them, and how often in the output: [n, m].

    Row i has seen all of ``rows.tokens`` but the last ``max(depth) - depth[i]``.
    """
    ids, column = np.unique(np.array(rows.tokens, np.int64), return_inverse=True)
    before = len(rows.tokens) - int(rows.depth.max())
    counts = np.bincount(column[rows.prompt_length : before], minlength=len(ids))[None].repeat(len(rows.index), 0)
    seen = np.zeros((len(rows.index), len(ids)), bool)
    seen[:, column[:before]] = True
    for i, draft in enumerate(column[before:]):
        counts[rows.depth > i, draft] += 1
        seen[rows.depth > i, draft] = True
    return ids, seen, counts


@lru_cache(maxsize=1024)
def processors_of(params: SamplingParams) -> tuple[Processor, ...]:
    """Steps 1 to 3 of a request, those that do something."""
    found: list[Processor] = []
    if params.logit_bias:
        found.append(LogitBias(params.logit_bias))
    if params.repetition_penalty != 1:
        found.append(RepetitionPenalty(params.repetition_penalty))
    if params.frequency_penalty or params.presence_penalty:
        found.append(OccurrencePenalty(params.frequency_penalty, params.presence_penalty))
    return tuple(found)


# ------------------------------------------------------------------------------------------------ all steps


def process(
    logits: Values,
    context: Context,
    rows: Tensor | None = None,
    depth: Tensor | None = None,
    *,
    drafted: Tensor | Integers | None = None,
) -> Processed:
    """R distributions of the next token, as each row's request asks.

    logits [R, V], a tensor of any float dtype or a float32 array, never written to; rows int64 [R]: the request of
    ``context`` each row belongs to (None: row r to request r); depth int64 [R], drafted int64 [B, K]: row r follows the
    first ``depth[r]`` drafted tokens of its request, which count for its penalties like its history (None: it follows
    the history alone).
    Raises InvalidRequest for a logit bias on a token that the vocabulary does not have.
    """
    params, size = context.params, logits.shape[1]
    if context.greedy and not context.changed:
        return Categorical.greedy(argmax(logits), size)
    if isinstance(logits, Tensor) and logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if context.changed:
        logits = _changed(to_tensor(logits), context, None if rows is None else rows.cpu().numpy(), depth, drafted)
        if context.greedy:
            return Categorical.greedy(argmax(logits), size)
    if context.unlimited:
        return Categorical.of(logits)
    # A greedy row among sampled ones is a row with top_k = 1: ties go to the lowest id there too.
    k = [1 if p.temperature == 0 else min(p.top_k or size, size) for p in params]
    temperature = [p.temperature or 1.0 for p in params]
    truncated = any(n < size or p.top_p < 1 or p.min_p > 0 for n, p in zip(k, params, strict=True))
    if not truncated and all(t == 1 for t in temperature):
        return Categorical.of(logits)
    mine = slice(None) if rows is None else rows.cpu().numpy()
    temperatures = np.array(temperature)[mine] if any(t != 1 for t in temperature) else None
    if temperatures is not None and (temperatures.min() < COLD or context.changed):  # the model's own are not so large
        logits, temperatures = _divided(to_tensor(logits), temperatures), None
    limits = Limits(
        temperatures,
        np.array(k)[mine] if truncated else None,
        np.array([p.top_p for p in params])[mine] if truncated else None,
        np.array([p.min_p for p in params])[mine] if truncated else None,
    )
    return ProcessedLogits(logits, limits)


def _changed(
    logits: Tensor,
    context: Context,
    owner: npt.NDArray[np.int64] | None,
    depth: Tensor | None,
    drafted: Tensor | Integers | None,
) -> Tensor:
    """A copy of the logits after each request's processors."""
    logits = logits.clone()
    owner = np.arange(len(logits)) if owner is None else owner
    depths = np.zeros(len(logits), np.int64) if depth is None else depth.cpu().numpy()
    for b, params in enumerate(context.params):
        more: Sequence[Processor] = () if context.processors is None else context.processors[b]
        index = np.flatnonzero(owner == b)
        if not len(index) or not (processors_of(params) or more):
            continue
        follows = depths[index]
        drafts = [] if drafted is None else drafted[b, : follows.max()].tolist()
        rows = RequestRows(index, follows, context.history[b] + drafts, context.prompt_lengths[b])
        for processor in (*processors_of(params), *more):
            processor(logits, rows)
    return logits


def _divided(logits: Tensor, temperatures: npt.NDArray[np.float64]) -> Tensor:
    """logits / temperature where that might overflow: cold rows, and those of a large bias, are shifted first, so that
    their largest is 0."""
    divisor = torch.from_numpy(temperatures).to(logits)[:, None]
    largest = logits.amax(1, keepdim=True)
    shifted = (divisor < COLD) | torch.isinf(largest / divisor)
    return (logits - torch.where(shifted, largest, 0)) / divisor
