"""Decoder layers with gradients, for training drafters: the mathematics of the reference backend, weights by the
canonical names of ``outrider.backends.layers``.

T packed tokens, D model width, H heads, Hkv key/value heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.config import LayerConfig, RopeConfig, StackConfig

__all__ = ["Angles", "Attention", "LearnedLayer", "LearnedStack", "Norm", "linear", "rotate"]

Angles = tuple[Tensor, Tensor]  # cosine and signed sine, each [T, 1, Dh]
INITIAL = 0.02  # standard deviation of new matrices

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class Attention(Protocol):
    """A drafter's attention with its own mask: one function for each pass."""

    def __call__(self, layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, H, Dh], [T, Hkv, Dh], [T, Hkv, Dh] -> [T, H, Dh]"""
        ...


class Norm(nn.Module):
    """RMS norm of the last dimension, in float32."""

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return F.rms_norm(x.float(), self.weight.shape, weight, self.eps)


class LearnedLayer(nn.Module):
    """One decoder layer. Its parameters' names are the canonical parts."""

    def __init__(self, stack: StackConfig, index: int) -> None:
        super().__init__()
        self.index, self.config = index, stack.layers[index]
        config, width, eps, offset = self.config, stack.hidden_size, stack.norm_eps, stack.norm_offset
        wide = stack.input_width if index == 0 and stack.input_width else 0
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.activation = _ACTIVATIONS[stack.activation]
        self.input_norm = None if wide else Norm(width, eps, offset)
        self.q = linear(wide or width, queries)
        self.k = linear(wide or width, keys)
        self.v = None if config.value_is_key else linear(wide or width, keys)
        self.o = linear(queries, width)
        self.q_norm = Norm(config.head_dim, eps, offset) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim, eps, offset) if config.qk_norm else None
        self.attention_out_norm = Norm(width, eps, offset) if stack.sandwich_norms else None
        self.mlp_norm = Norm(width, eps, offset)
        self.gate, self.up = linear(width, config.intermediate_size), linear(width, config.intermediate_size)
        self.down = linear(config.intermediate_size, width)
        self.mlp_out_norm = Norm(width, eps, offset) if stack.sandwich_norms else None

    def forward(self, x: Tensor, wide: Tensor | None, angles: Angles, attend: Attention) -> Tensor:
        """[T, D] -> [T, D]. ``wide`` replaces the normalised attention input (EAGLE-3)."""
        if wide is None:
            assert self.input_norm is not None
            wide = self.input_norm(x)
        wide = _narrow(wide)
        q = self._heads(self.q(wide))
        q = rotate(q if self.q_norm is None else self.q_norm(q), angles)
        mixed = self.o(attend(self.index, self.config, q, *self.keys_values(wide, angles)).flatten(1))
        x = x + (mixed if self.attention_out_norm is None else self.attention_out_norm(mixed))
        y = _narrow(self.mlp_norm(x))
        y = self.down(self.activation(self.gate(y)) * self.up(y))
        x = x + (y if self.mlp_out_norm is None else self.mlp_out_norm(y))
        return x * self.config.layer_scalar if self.config.layer_scalar != 1.0 else x

    def keys_values(self, wide: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """[T, D] -> keys, rotated, and values, each [T, Hkv, Dh]."""
        raw = self._heads(self.k(wide))
        v = raw if self.v is None else self._heads(self.v(wide))
        if self.config.v_norm:
            v = F.rms_norm(v.float(), (self.config.head_dim,), eps=self.mlp_norm.eps)
        return rotate(raw if self.k_norm is None else self.k_norm(raw), angles), v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))


class LearnedStack(nn.Module):
    """Layers and a final norm; no embedding and no head, which are the target's and frozen."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(LearnedLayer(config, index) for index in range(len(config.layers)))
        self.norm = Norm(config.hidden_size, config.norm_eps, config.norm_offset)

    def forward(
        self, x: Tensor, positions: Tensor, attend: Attention, wide: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states before and after the final norm. [T, D], int64 [T] -> [T, D], [T, D]"""
        angles = self.angles(positions)
        for layer, config in zip(self.layers, self.config.layers, strict=True):
            x = layer(x, wide, angles[config.rope], attend)
            wide = None
        return x, self.norm(x)

    def angles(self, positions: Tensor) -> dict[RopeConfig, Angles]:
        """Cosines and sines of every layer's kind. int64 [T]"""
        return {rope: _angles(rope, positions) for rope in {layer.rope for layer in self.config.layers}}


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A matrix with normal entries of standard deviation INITIAL, its bias zero."""
    made = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(made.weight, std=INITIAL)
    if bias:
        nn.init.zeros_(made.bias)
    return made


def _narrow(x: Tensor) -> Tensor:
    """What several matrices multiply, cast once where autocast would do it for each."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _angles(config: RopeConfig, positions: Tensor) -> Angles:
    angles = positions[:, None].double() * _frequencies(config, positions.device)
    cos, sin = (angles.cos() * config.scale).float(), (angles.sin() * config.scale).float()
    return torch.cat([cos, cos], 1)[:, None], torch.cat([-sin, sin], 1)[:, None]


@cache
def _frequencies(config: RopeConfig, device: torch.device) -> Tensor:
    """Kept, since bringing them to a device waits for all that it is doing."""
    return torch.tensor(config.inverse_frequencies, dtype=torch.float64, device=device)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """The sine's first half is negative: (x1, x2) -> x * cos + (x2, x1) * sin."""
    cos, sin = angles
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
