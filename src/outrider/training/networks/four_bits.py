"""A trained network's matrices in 4 bits: each rounded so that what it makes of real states changes least.

GPTQ, arXiv 2210.17323: the columns of a matrix are rounded one after the other, and what rounding one changes is
made good by those that follow, as the second moments of the matrix's inputs say (algorithm 1). The scale of a group is
the best of a few, an error in a column weighing what cannot be made good.

R rows of a matrix, C columns, G columns of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from outrider.checkpoints import DraftCheckpoint
from outrider.checkpoints.packed_tensors import GROUP
from outrider.errors import InvalidRequest
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.batch import FeatureBatch

__all__ = ["in_four_bits", "matrices_of", "rounded", "second_moments"]

HEAD = "head.weight"
DAMPINGS = (0.01, 0.1, 1.0)  # of the mean second moment, added to each; the first with which there is an inverse
LEAST = 1e-9  # mean second moment, where no state was seen
SIDES = (8.0, 7.7, 7.4, 7.0, 8.4, -7.0, -7.3)  # what the value of largest magnitude may become, in steps


def matrices_of(module: nn.Module) -> dict[str, nn.Linear]:
    """What is rounded, but for the head: the matrices of its layers, by their neutral names.

    Raises InvalidRequest for a network without layers of its own, or whose matrices have no multiple of 32 columns.
    """
    if not isinstance(module, TrainableNet) or not hasattr(module, "stack"):
        raise InvalidRequest("four_bits rounds the decoder layers of a trained drafter; this kind has none")
    layers = module.stack.layers.named_modules()
    found = {f"layers.{name}.weight": part for name, part in layers if isinstance(part, nn.Linear)}
    for name, part in found.items():
        if part.in_features % GROUP:
            raise InvalidRequest(
                f"four_bits needs matrices whose columns are a multiple of {GROUP}; {name} has {part.in_features}"
            )
    return found


def second_moments(module: TrainableNet, batches: Iterable[FeatureBatch]) -> dict[str, Tensor]:
    """Sums of x x^T over the inputs x of every matrix that is rounded. -> float64 [C, C] by its neutral name"""
    moments: dict[str, Tensor] = {}
    hooks = [module.stack.norm.register_forward_hook(lambda part, given, made: _add(moments, HEAD, made))]
    hooks += [part.register_forward_hook(_inputs_of(name, moments)) for name, part in matrices_of(module).items()]
    with torch.no_grad():
        for batch in batches:
            module(batch)
    for hook in hooks:
        hook.remove()
    return moments


def in_four_bits(module: TrainableNet, moments: Mapping[str, Tensor]) -> DraftCheckpoint:
    """The drafter with the matrices of its layers in 4 bits, and the target's head, unless it has one of its own."""
    checkpoint = module.snapshot()
    tensors, scales = dict(checkpoint.tensors), {}
    for name, sums in moments.items():
        if name == HEAD and HEAD in tensors:
            continue
        matrix = module.frozen.head if name == HEAD else tensors[name]
        tensors[name], scales[name] = rounded(matrix.float(), sums.to(matrix.device))
    return replace(checkpoint, tensors=tensors, four_bits=scales)


def rounded(matrix: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as whole numbers of -8 to 7 times the scale of their group, in float32, and the scales in float16.

    ``moments``: sums over the matrix's inputs x of x x^T. float32 [R, C], float64 [C, C] -> [R, C], [R, C / 32]
    """
    rest, columns = matrix.clone(), matrix.shape[1]
    # Row j: what an error of 1 in column j moves the best values of the columns after it by, divided by its diagonal.
    spread = torch.linalg.cholesky(_inverse(moments), upper=True).to(matrix.dtype)
    made, scales = torch.empty_like(matrix), []
    for first in range(0, columns, GROUP):
        within = slice(first, first + GROUP)
        scale = _scale(rest[:, within], spread.diag()[within].square().reciprocal())
        scales.append(scale)
        wide, off = scale.float(), torch.empty_like(rest[:, within])
        for j in range(first, first + GROUP):
            made[:, j] = _nearest(rest[:, j], wide)
            off[:, j - first] = (rest[:, j] - made[:, j]) / spread[j, j]
            rest[:, j + 1 : first + GROUP] -= off[:, j - first, None] * spread[j, j + 1 : first + GROUP]
        rest[:, first + GROUP :] -= off @ spread[within, first + GROUP :]
    return made, torch.stack(scales, 1)


def _inverse(moments: Tensor) -> Tensor:
    """Of the moments, damped as much as it needs: sums of products in float32 may have no inverse without."""
    mean, unit = moments.diag().mean().clamp(min=LEAST), torch.eye(len(moments), device=moments.device).double()
    for damping in DAMPINGS:
        factor, failed = torch.linalg.cholesky_ex(moments + damping * mean * unit)
        if not failed:
            return torch.cholesky_inverse(factor)
    return unit  # states that are not finite say nothing


def _scale(group: Tensor, weight: Tensor) -> Tensor:
    """The scale of each row with the least error. [R, G], weight of an error [G] -> float16 [R]"""
    largest = group.gather(1, group.abs().argmax(1, keepdim=True))[:, 0]
    sides = torch.tensor(SIDES, device=group.device)
    scales = (largest[:, None] / -sides).half()  # [R, sides]
    error = ((group[:, None] - _nearest(group[:, None], scales[:, :, None].float())).square() * weight).sum(2)
    return scales.gather(1, error.argmin(1, keepdim=True))[:, 0]


def _nearest(values: Tensor, scale: Tensor) -> Tensor:
    """The nearest of the values that 4 bits can hold."""
    return torch.where(scale == 0, 0.0, values / scale).round().clamp(-8, 7) * scale


def _inputs_of(name: str, moments: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    return lambda part, given, made: _add(moments, name, given[0])


def _add(moments: dict[str, Tensor], name: str, states: Tensor) -> None:
    rows = states.flatten(0, -2).float()
    moments[name] = moments.get(name, 0) + (rows.T @ rows).double()
