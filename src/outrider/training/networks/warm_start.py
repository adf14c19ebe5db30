"""Warm start: a drafter's layers begin as the target's layers after the last auxiliary one.

With fc passing that layer's features through, the context's keys and values are the target's own at the first step.
What is left to train is drafting without the tokens in between. On the embedded pair, step 60 of DSpark then has the
loss that a random start has at about step 100.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from outrider.config import StackConfig
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.stack import Norm

__all__ = ["Layers", "start_warm"]

Layers = tuple[StackConfig, Mapping[str, Tensor]]
"""A target's stack and its weights by canonical name."""


def start_warm(net: TrainableNet, context_norm: Norm | None, target: Layers) -> None:
    """Fill the net's layers, its fc and the norm that stands for the first layer's, where there is one, from the
    target's layers, wherever shapes agree: its last ones, if the drafter reads the layer in front of them.

    Targets with other norms than a Llama's are not copied: their layers compute something else.
    """
    config, weights = target
    stack, fc, aux_layers = net.stack, net.fc.weight, net.aux_layers
    width, count = fc.shape[0], len(config.layers)
    if config.sandwich_norms or config.norm_offset or width != config.hidden_size:
        return
    read = max((layer for layer in aux_layers if layer < count - len(stack.layers)), default=aux_layers[0])
    with torch.no_grad():
        for layer in range(len(stack.layers)):
            for name, parameter in stack.layers[layer].named_parameters():
                given = f"layers.{min(read + 1 + layer, count - 1)}.{name}"
                if given in weights:
                    _copy(parameter, weights[given])
        _copy(stack.norm.weight, weights["norm.weight"])
        if context_norm is not None:
            _copy(context_norm.weight, weights[f"layers.{read + 1}.input_norm.weight"])
        # A multi-token-prediction module's matrix has the embedding's columns first.
        block = fc.shape[1] // width - len(aux_layers) + aux_layers.index(read)
        fc.zero_()
        fc[:, block * width : (block + 1) * width] = torch.eye(width)


def _copy(parameter: Tensor, weight: Tensor) -> None:
    """EAGLE-3's first layer is twice as wide: the target's weights fill the second half, the hidden state's."""
    if parameter.shape == weight.shape:
        parameter.copy_(weight)
    elif parameter.ndim == 2 and tuple(parameter.shape) == (weight.shape[0], 2 * weight.shape[1]):
        parameter.zero_()
        parameter[:, weight.shape[1] :] = weight
