"""Log-probabilities of committed tokens, of the target's logits as they are: what speculation cannot change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.sampling.distribution import Processed
from outrider.types import DraftReport, Proposal, TokenLogprobs, Values, to_tensor

__all__ = ["draft_reports", "token_logprobs"]


def token_logprobs(
    logits: Values,
    owner: Tensor,
    tokens: Sequence[Sequence[int]],
    accepted: Sequence[int],
    params: Sequence[SamplingParams],
) -> Mapping[int, list[TokenLogprobs]]:
    """Request -> one entry for each of its ``accepted[b] + 1`` new tokens, of the requests that ask for them.

    logits [R, V], a tensor of any float dtype or a float32 array; owner int64 [R], ascending: the request of each row.
    Token i of a request was drawn from its i-th row. Each row is computed alone, so its bits depend on the row alone.
    """
    asked = [b for b in range(len(tokens)) if params[b].logprobs is not None]
    if not asked:
        return {}
    logits, owners = to_tensor(logits), owner.cpu().numpy()
    found = {}
    for b in asked:
        start, ids = int(np.searchsorted(owners, b)), tokens[b][: accepted[b] + 1]
        rows = logits[start : start + len(ids)]
        values = (rows if rows.dtype in (torch.float32, torch.float64) else rows.float()).cpu().numpy()
        found[b] = [_of_row(row, token, params[b].logprobs or 0) for row, token in zip(values, ids, strict=True)]
    return found


def draft_reports(
    proposal: Proposal, accepted: Sequence[int], params: Sequence[SamplingParams]
) -> Mapping[int, list[DraftReport]]:
    """Request -> one entry for each of its ``accepted[b]`` drafts, of the requests that ask for log-probabilities."""
    asked = [b for b, n in enumerate(accepted) if n and params[b].logprobs is not None]
    found = {}
    for b in asked:
        n, width = accepted[b], proposal.width
        sure = [None] * n if proposal.confidence is None else proposal.confidence[b, :n].tolist()
        drawn = [None] * n
        count = n if proposal.sampled is None else min(n, proposal.sampled[b])
        if params[b].temperature and isinstance(proposal.distribution, Processed):
            rows = torch.arange(b * width, b * width + count)
            drawn[:count] = proposal.distribution.at(proposal.tokens[b, :count], rows).tolist()
        found[b] = [DraftReport(p, c) for p, c in zip(drawn, sure, strict=True)]
    return found


def _of_row(row: npt.NDArray[np.floating[Any]], token: int, count: int) -> TokenLogprobs:
    logprobs = row - row.max()
    logprobs -= np.log(np.exp(logprobs).sum(dtype=np.float64)).astype(row.dtype)
    count = min(count, len(row))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        least = np.partition(logprobs, len(row) - count)[len(row) - count]
        candidates = np.flatnonzero(logprobs >= least)  # more than ``count`` where there are ties
        order = candidates[np.argsort(-logprobs[candidates], kind="stable")][:count]
        top = tuple((int(i), float(logprobs[i])) for i in order)
    return TokenLogprobs(float(logprobs[token]), top)
