"""Targets of random weights: models of any size whose speed can be measured without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.backends.layers import rope_config, weight_shapes
from outrider.config import LayerConfig, StackConfig
from outrider.errors import InvalidRequest, nearest
from outrider.models.decoder import DecoderTarget, make_spec
from outrider.models.weights import load_dtype
from outrider.types import Backend

__all__ = ["SHAPES", "RandomWeights", "Shape", "random_target"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's sizes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    tied: bool  # the embedding is the head
    head_dim: int = 64

    def stack_config(self) -> StackConfig:
        """The stack of this shape."""
        rope = rope_config({"rope_theta": 500_000.0}, self.head_dim)
        layer = LayerConfig(self.num_heads, self.num_kv_heads, self.head_dim, self.intermediate_size, rope)
        layers = (layer,) * self.num_layers
        return StackConfig(self.vocab_size, self.hidden_size, layers, norm_eps=1e-5, max_positions=131_072)


SHAPES = {
    "llama-110m": Shape(768, 12, 12, 12, 2048, 32_000, tied=False),
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128_256, tied=True),
}


class RandomWeights(Mapping[str, Tensor]):
    """Weights of a stack, cut from one block of random numbers on access, and not kept."""

    def __init__(self, config: StackConfig, tied: bool) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in weight_shapes(config).items():
            if shape.required or name == "embed.weight" or (name == "head.weight" and not tied):
                self.shapes[name] = tuple(config.vocab_size if size is None else size for size in shape.sizes)
        self._block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        size = shape[0] * shape[1]
        return self._block.repeat(-(-size // len(self._block)))[:size].view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_target(shape: str, dtype: str, backend: Backend) -> DecoderTarget:
    """A target of one of ``SHAPES``. Raises InvalidRequest for another name, or a dtype that the backend lacks."""
    if shape not in SHAPES:
        raise InvalidRequest(f"unknown shape {shape!r}; {nearest(shape, SHAPES)}")
    sizes = SHAPES[shape]
    config = sizes.stack_config()
    stack = backend.load(config, RandomWeights(config, sizes.tied), dtype)  # type: ignore[arg-type]
    return DecoderTarget(make_spec({"model_type": "llama"}, config, load_dtype(dtype), shape), stack, backend)
