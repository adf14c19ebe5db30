"""A head start: a drafter's layers begin as the target's layers behind the last tap, which already know how to read it.

With fc passing that tap through, the context's keys and values are the target's own at the first step; what is left to
learn is to do without the text in between. On the embedded pair, step 60 of DSpark then stands where a random start
stands at about step 100.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from outrider.config import StackConfig
from outrider.learning.stack import LearnedStack, Norm

__all__ = ["Layers", "start_warm"]

Layers = tuple[StackConfig, Mapping[str, Tensor]]
"""A target's stack and its weights by canonical name."""


def start_warm(
    stack: LearnedStack, fc: Tensor, context_norm: Norm | None, taps: tuple[int, ...], target: Layers
) -> None:
    """Fill ``stack``, ``fc`` [D, n D] and the norm that stands for the first layer's, where there is one, from the
    target's layers, wherever shapes agree.

    Targets with other norms than a Llama's are left alone: their layers mean something else here.
    """
    config, weights = target
    if config.sandwich_norms or config.norm_offset or fc.shape[0] != config.hidden_size:
        return
    first, last = taps[-1] + 1, len(config.layers) - 1
    with torch.no_grad():
        for layer in range(len(stack.layers)):
            for name, parameter in stack.layers[layer].named_parameters():
                given = f"layers.{min(first + layer, last)}.{name}"
                if given in weights:
                    _copy(parameter, weights[given])
        _copy(stack.norm.weight, weights["norm.weight"])
        if context_norm is not None:
            _copy(context_norm.weight, weights[f"layers.{first}.input_norm.weight"])
        fc.zero_()
        fc[:, -fc.shape[0] :] = torch.eye(fc.shape[0])  # the last tap


def _copy(parameter: Tensor, weight: Tensor) -> None:
    if parameter.shape == weight.shape:
        parameter.copy_(weight)
    elif parameter.ndim == 2 and parameter.shape == (
        weight.shape[0],
        2 * weight.shape[1],
    ):  # EAGLE-3: [embedding; state]
        parameter.zero_()
        parameter[:, weight.shape[1] :] = weight
