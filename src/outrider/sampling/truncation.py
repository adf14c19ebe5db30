"""Temperature, top-k, top-p and min-p: what they leave of a row of logits, found without sorting the row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.core import native
from outrider.errors import OutriderError

__all__ = ["Limits", "kept_tokens", "limited"]

_SPARSE_SHARE = 4  # keep only the kept tokens where they are at most one in so many

_STEP = 3.5  # top-p looks at tokens of at least exp(-2 * this) first, then lowers the bound by this until it has enough
_NOTHING = np.zeros(0, np.int64)
_BLOCK = 64  # columns summarised by their maximum when few of many are wanted


@dataclass(frozen=True, slots=True)
class Limits:
    """Steps 4 to 7 of ``sampling.processors`` for R rows, each array [R]. temperatures: None for 1; top_k V, top_p 1
    and min_p 0 truncate nothing, and are None where no row is truncated. Greedy rows have top_k 1."""

    temperatures: npt.NDArray[np.float64] | None
    top_k: npt.NDArray[np.int64] | None
    top_p: npt.NDArray[np.float64] | None
    min_p: npt.NDArray[np.float64] | None

    def take(self, rows: npt.NDArray[np.int64]) -> Limits:
        """These rows' limits, in this order. int64 [n]"""
        parts: list[Any] = [self.temperatures, self.top_k, self.top_p, self.min_p]
        return Limits(*(None if part is None else part[rows] for part in parts))


def limited(logits: Tensor, limits: Limits) -> tuple[Tensor, Tensor | None]:
    """What ``limits`` leave of R rows: logits [R, S], and the tokens of their columns [R, S] where few are left. Where
    truncation meets NaN or infinity it leaves no token: such a row cannot be drawn from."""
    if limits.temperatures is not None:
        logits = logits / torch.from_numpy(limits.temperatures).to(logits)[:, None]
    k, p, min_p = limits.top_k, limits.top_p, limits.min_p
    if k is None or p is None or min_p is None:
        return logits, None
    size = logits.shape[1]
    truncated = np.flatnonzero((k < size) | (p < 1) | (min_p > 0))
    if not len(truncated):  # none of these rows is truncated
        return logits, None
    rows = logits.cpu().numpy()
    finite = np.isfinite(rows.max(1))
    kept = [kept_tokens(rows[r], int(k[r]), float(p[r]), float(min_p[r])) if finite[r] else _NOTHING for r in truncated]
    width = max(1, *(len(ids) for ids in kept))
    if len(truncated) < len(rows) or width * _SPARSE_SHARE > size:
        dense = np.full_like(rows, -np.inf) if len(truncated) == len(rows) else rows.copy()
        dense[truncated] = -np.inf
        for r, ids in zip(truncated, kept, strict=True):
            dense[r, ids] = rows[r, ids]
        return torch.from_numpy(dense).to(logits.device), None
    columns = np.full((len(rows), width), size)
    values = np.full((len(rows), width), -np.inf, rows.dtype)
    for r, ids in zip(truncated, kept, strict=True):
        columns[r, : len(ids)] = ids
        values[r, : len(ids)] = rows[r, ids]
    return torch.from_numpy(values).to(logits.device), torch.from_numpy(columns).to(logits.device)


def kept_tokens(logits: npt.NDArray[np.floating], k: int, p: float, min_p: float) -> npt.NDArray[np.int64]:
    """The tokens of one row that steps 5 to 7 leave, ascending. k = len(logits), p = 1, min_p = 0 leave all.

    Nothing but the candidates above some logit is ever sorted; whether a token is kept depends on likelier ones alone,
    so a candidate set that reaches far enough gives the exact answer.
    """
    size = len(logits)
    if k >= size and p >= 1 and min_p <= 0:
        return np.arange(size)
    if native is not None and logits.dtype == np.float32:
        try:
            columns: npt.NDArray[np.int64] = native.truncate(np.ascontiguousarray(logits), min(k, size), p, min_p)
        except ValueError as error:
            raise OutriderError(str(error)) from error
        return columns
    return _kept(logits, k, p, min_p)


def _kept(logits: npt.NDArray[np.floating], k: int, p: float, min_p: float) -> npt.NDArray[np.int64]:
    """The same in numpy."""
    size = len(logits)
    if k == 1:
        return np.array([logits.argmax()])
    peak = float(logits.max())
    alone = k >= size and p < 1  # top-p of the whole row: how many tokens it needs is not known yet
    total = float(np.exp(logits.astype(np.float64) - peak).sum()) if alone else 0.0
    if alone:
        floor = peak + math.log(total) - _STEP
    else:
        floor = _at_most_kth_largest(logits, k) if k < size else peak + math.log(min_p) - 0.1
    while True:
        floor -= _STEP if alone else 0
        candidates = np.flatnonzero(logits >= floor)
        order = np.argsort(-logits[candidates], kind="stable")[:k]  # stable: equals stay in the order of their ids
        weights = np.exp(logits[candidates[order]].astype(np.float64) - peak)
        count = len(order)
        if p < 1:
            whole = total if alone else weights.sum()
            before = int(np.searchsorted(np.cumsum(weights), whole * _slightly_less(p, logits.dtype)))
            if alone and before == count < size:
                continue
            count = min(count, before + 1)
        if min_p > 0:
            count = min(count, int((weights >= min_p).sum()))
        return np.sort(candidates[order[:count]])


def _slightly_less(p: float, dtype: np.dtype[np.floating]) -> float:
    """p less the rounding of its logits: a mass that misses p by no more has reached it."""
    return p * (1 - 4 * float(np.finfo(dtype).eps))


def _at_most_kth_largest(logits: npt.NDArray[np.floating], k: int) -> float:
    """A bound that at least k values reach, and few more: the k-th largest of the maxima of interleaved blocks (each of
    them a value of the row), or the k-th largest value itself where blocks are few."""
    blocks = len(logits) // _BLOCK
    if blocks >= 4 * k:
        logits = logits[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(0)
    return float(np.partition(logits, len(logits) - k)[len(logits) - k])
