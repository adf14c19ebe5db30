"""Which tokens of a row of logits top-k, top-p and min-p leave, found without sorting the row."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.core import native

__all__ = ["kept_tokens", "log_sum_exp"]

_STEP = 3.5  # a nucleus is looked for among tokens of at least exp(-2 * this), then so much farther, and so on
_MANY = 4096  # candidates of a nucleus that are not worth sorting
_SAMPLED = 32  # one logit in so many is looked at first then
_BLOCK = 64  # columns summarised by their maximum when few of many are wanted


def kept_tokens(
    logits: npt.NDArray[np.floating], k: int, p: float, min_p: float, log_total: float
) -> npt.NDArray[np.int64]:
    """The tokens of one row that steps 5 to 7 leave, ascending. log_total: of the whole row, where p alone cuts.

    Nothing but the candidates above some logit is ever sorted; whether a token is kept depends on likelier ones alone,
    so a candidate set that reaches far enough gives the exact answer.
    """
    size = len(logits)
    if k == 1:
        return np.array([logits.argmax()])
    peak = float(logits.max())
    alone = k == size and p < 1  # the nucleus of the whole row, as yet of unknown size
    if alone:
        floor = log_total - _STEP
    else:
        floor = _at_most_kth_largest(logits, k) if k < size else peak + math.log(min_p) - 0.1
    while True:
        floor -= _STEP if alone else 0
        likely = logits >= floor
        if alone and np.count_nonzero(likely) > _MANY:
            return _nucleus(logits, peak, p, log_total, min_p)
        candidates = np.flatnonzero(likely)
        order = np.argsort(-logits[candidates], kind="stable")[:k]  # stable: equals stay in the order of their ids
        weights = np.exp(logits[candidates[order]].astype(np.float64) - peak)
        count = len(order)
        if p < 1:
            whole = math.exp(log_total - peak) if alone else weights.sum()
            before = int(np.searchsorted(np.cumsum(weights), whole * _slightly_less(p, logits.dtype)))
            if alone and before == count < size:
                continue
            count = min(count, before + 1)
        if min_p > 0:
            count = min(count, int((weights >= min_p).sum()))
        return np.sort(candidates[order[:count]])


def _nucleus(
    logits: npt.NDArray[np.floating], peak: float, p: float, log_total: float, min_p: float
) -> npt.NDArray[np.int64]:
    """The same for top-p and min-p where the law is so flat that thousands are kept: a sample of the row tells between
    which logits the last of them lies, and only what lies between is sorted."""
    share = _slightly_less(p, logits.dtype)
    sample = np.sort(logits[::_SAMPLED])[::-1]
    mass = np.cumsum(np.exp(sample.astype(np.float64) - peak))
    guess, off = int(np.searchsorted(mass, share * mass[-1])), 4 * math.isqrt(len(sample))
    high = sample[guess - off] if guess > off else np.inf
    low = sample[guess + off] if guess + off < len(sample) else -np.inf
    weights = np.exp(logits - peak)
    above = float((weights * (logits > high)).sum(dtype=np.float64))
    between = np.sort(logits[(logits <= high) & (logits >= low)])[::-1]
    sums = above + np.cumsum(np.exp(between.astype(np.float64) - peak))
    goal = share * math.exp(log_total - peak)
    if above >= goal or sums[-1] < goal:  # the sample is unlike its row: sort all of it
        between = np.sort(logits)[::-1]
        sums = np.cumsum(np.exp(between.astype(np.float64) - peak))
    place = min(int(np.searchsorted(sums, goal)), len(between) - 1)
    last = between[place]
    kept = logits >= last
    equal = np.flatnonzero(logits == last)
    kept[equal[place + 1 - int((between > last).sum()) :]] = False
    if min_p > 0:
        kept &= weights >= min_p
    return np.flatnonzero(kept)


def _slightly_less(p: float, dtype: np.dtype[np.floating]) -> float:
    """A mass that misses p by the rounding of its logits alone has reached it."""
    return p * (1 - 4 * float(np.finfo(dtype).eps))


def log_sum_exp(logits: Tensor) -> Tensor:
    """float64 [R], each row summed alone: the same in any batch."""
    if native is not None and logits.device.type == "cpu" and logits.dtype == torch.float32:
        totals = torch.empty(len(logits), dtype=torch.float64)
        native.logsumexp(logits.contiguous(), totals)
        return totals
    peak = logits.amax(-1, keepdim=True)
    return (logits - peak).exp_().sum(-1, dtype=torch.float64).log_() + peak[:, 0]


def _at_most_kth_largest(logits: npt.NDArray[np.floating], k: int) -> float:
    """A bound that at least k values reach, and few more: the k-th largest of the maxima of interleaved blocks (each of
    them a value of the row), or the k-th largest value itself where blocks are few."""
    blocks = len(logits) // _BLOCK
    if blocks >= 4 * k:
        logits = logits[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(0)
    return float(np.partition(logits, len(logits) - k)[len(logits) - k])
