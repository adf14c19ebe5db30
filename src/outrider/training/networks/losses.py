"""Distances between a drafter's distribution and the target's, row by row, with gradients.

n rows of logits, R distributions, V vocabulary (the drafter's), p the target's distribution, q = softmax(logits) the
drafter's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Divergence", "divergence", "negative_log_acceptance", "position_weights"]

PART = 2**17  # logits worked on at a time
SMALLEST = 1e-6  # acceptance below this counts as this, so that its logarithm stays finite


class Divergence(NamedTuple):
    """What ``divergence`` gives, each float32 [n]."""

    cross_entropy: Tensor  # -log q(token)
    total_variation: Tensor  # sum |p - q|, between 0 and 2
    soft_cross_entropy: Tensor  # -sum p log q: KL(p || q) up to p's own entropy


def divergence(logits: Tensor, distributions: Tensor, index: Tensor, tokens: Tensor) -> Divergence:
    """Three measures from one softmax; only p and q are kept for their gradients.

    DSpark's terms (paper, equations 9 and 10) and the one of EAGLE-3 (arXiv 2503.01840, section 3.2).
    logits [n, V] with a gradient; distributions [R, V] probabilities without one, whose sum may be below 1 for a
    reduced draft vocabulary; index int64 [n]: the row of ``distributions`` each is compared with; tokens int64 [n], -1
    where the token is not in the draft vocabulary (its term is 0).
    """
    return Divergence(*_Divergence.apply(logits, distributions, index, tokens))  # type: ignore[no-untyped-call]


class _Divergence(torch.autograd.Function):
    """d/dlogits of the three: q - 1[token], q * (s - s.q) with s = sign(q - p), and q * sum(p) - p.

    On a CPU rows are processed a few at a time, so that intermediate results stay in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, distributions: Tensor, index: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(logits)
        q = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        hard, variation, soft = (q.new_empty(count) for _ in range(3))
        for rows in _parts(logits):
            p, wide = distributions[index[rows]], logits[rows].float()
            log_q = torch.sub(wide, wide.logsumexp(-1, keepdim=True), out=q[rows])
            hard[rows] = log_q.gather(1, tokens[rows].clamp(min=0)[:, None])[:, 0].neg_()
            soft[rows] = torch.linalg.vecdot(p, log_q).neg_()
            missing = (1 - p.sum(-1)).clamp_(min=0)  # mass on tokens that cannot be drafted
            variation[rows] = p.sub_(log_q.exp_()).abs_().sum(-1).add_(missing)
        ctx.save_for_backward(q, distributions, index, tokens)
        ctx.set_materialize_grads(False)
        ctx.dtype = logits.dtype
        return torch.where(tokens >= 0, hard, 0), variation, soft

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, hard: Tensor | None, variation: Tensor | None, soft: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        """Gradients are None for what the loss does not use."""
        saved, distributions, index, tokens = ctx.saved_tensors
        gradient = torch.empty(saved.shape, dtype=ctx.dtype, device=saved.device)
        nothing = saved.new_zeros(len(saved))
        hard = torch.where(tokens >= 0, nothing if hard is None else hard, 0)[:, None]
        variation = (nothing if variation is None else variation)[:, None]
        for rows in _parts(saved):
            q, p, slope = saved[rows], distributions[index[rows]], variation[rows]
            part = torch.sign(q - p)
            common = hard[rows] - slope * torch.linalg.vecdot(part, q)[:, None]
            if soft is not None:
                common = common + soft[rows, None] * p.sum(-1, keepdim=True)
            part.mul_(slope).add_(common).mul_(q)
            if soft is not None:
                part.addcmul_(soft[rows, None], p, value=-1)
            gradient[rows] = part.scatter_add_(1, tokens[rows].clamp(min=0)[:, None], -hard[rows])
        return gradient, None, None, None


def _parts(rows: Tensor) -> list[slice]:
    step = len(rows) if rows.is_cuda else max(1, PART // rows.shape[1])
    return [slice(begin, begin + step) for begin in range(0, len(rows), max(1, step))]


def negative_log_acceptance(variation: Tensor) -> Tensor:
    """-log of the chance that one drafted token is accepted, 1 - TV = sum min(p, q), from ``total_variation`` [n]."""
    return -torch.log((1 - variation / 2).clamp(min=SMALLEST))


def position_weights(positions: int, gamma: float | None) -> Tensor:
    """Weight of each position of a block, exp(-k / gamma) for k = 0, 1, ... (DSpark, equation 12); None: all the same.

    Early drafts matter more: one counts only when all before it were accepted. float32 [positions]
    """
    return torch.ones(positions) if gamma is None else torch.exp(-torch.arange(positions) / gamma)
