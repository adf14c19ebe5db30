"""Layer stacks in plain PyTorch: the oracle for every other backend, and the fallback where none fits.

It runs on the CPU in float32, float64 or bfloat16 (then norms, softmax and logits are float32).
Letters: T packed tokens, B rows, R rows of logits, n new tokens of one row, L keys they see, D model width,
H heads, Hkv key/value heads, G = H / Hkv, Dh head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outrider.backends.layers import check_weights, weight_shapes
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.errors import InvalidRequest, nearest
from outrider.kv_cache.attention import Pass, attend
from outrider.kv_cache.gathered import BLOCK
from outrider.registry import find
from outrider.sampling.distribution import Processed
from outrider.sampling.verification import verify
from outrider.types import (
    Context,
    Distribution,
    KVCache,
    Mask,
    PagedCache,
    Proposal,
    RaggedBatch,
    Rng,
    StackOutput,
    Verification,
)

__all__ = ["ReferenceBackend", "ReferenceStack"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

Activation = Callable[[Tensor], Tensor]
Angles = tuple[Tensor, Tensor]  # cosine and signed sine, each [T, 1, Dh]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class ReferenceBackend:
    """Makes stacks that run in plain PyTorch."""

    name = "reference"
    device = torch.device("cpu")

    def load(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> ReferenceStack:
        """``weights`` by the canonical names of ``outrider.backends.layers``, read one by one and left as they are."""
        key = str(dtype).removeprefix("torch.")
        if key not in DTYPES:
            raise InvalidRequest(
                f"the reference backend has no dtype {key!r}; {nearest(key, DTYPES)} (it has {', '.join(DTYPES)})"
            )
        check_weights(config, weights)
        return ReferenceStack(config, weights, DTYPES[key])

    def verify(
        self, target: Distribution, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng
    ) -> Verification:
        """See ``outrider.types.Backend``."""
        assert isinstance(target, Processed)
        return verify(target, proposal, keep, context, rng)

    def sample(self, distribution: Distribution, keys: Tensor) -> Tensor:
        """See ``outrider.types.Backend``."""
        assert isinstance(distribution, Processed)
        return distribution.draw(keys)


class Norm:
    """RMS norm of the last dimension [..., D], in float32 at least: x / sqrt(mean(x^2) + eps) * gain.

    Written as x / hypot(|x|, sqrt(eps D)) * (gain sqrt(D)): four kernels, half the time of ``F.rms_norm`` on one row.
    """

    __slots__ = ("dtype", "floor", "gain", "wide")

    def __init__(self, gain: Tensor | None, width: int, eps: float, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.floor = torch.tensor((eps * width) ** 0.5, dtype=self.wide)
        unit = torch.ones(()) if gain is None else gain
        self.gain = (unit.double() * width**0.5).to(self.wide)

    def __call__(self, x: Tensor, first: int = 0) -> Tensor:
        """Where the gain differs by head, ``x`` [T, heads, Dh] holds heads ``first`` and up."""
        length = torch.linalg.vector_norm(x, 2, -1, True, dtype=self.wide).hypot_(self.floor)
        normed = torch.div(x, length).mul_(self.gain[first:] if first else self.gain)
        return normed if normed.dtype is self.dtype else normed.to(self.dtype)


class Rotary:
    """Cosines and sines of one RopeConfig, made for as many positions as are needed, from float64 angles."""

    def __init__(self, config: RopeConfig, dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self.table = torch.empty(0, 2, 1, 2 * len(config.inverse_frequencies), dtype=dtype)

    def grow(self, positions: int) -> None:
        """Make sure that positions 0 .. ``positions`` - 1 are in the table."""
        if positions <= len(self.table):
            return
        frequencies = torch.tensor(self.config.inverse_frequencies, dtype=torch.float64)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
        cos, sin = angles.cos() * self.config.scale, angles.sin() * self.config.scale
        # The sine's first half is negative: rotating (x1, x2) gives x * cos + (x2, x1) * (-sin, sin).
        table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1)
        self.table = table[:, :, None].to(self.dtype)

    def at(self, positions: Tensor) -> Angles:
        """int64 [T] -> cosine and signed sine, each [T, 1, Dh]."""
        cos, sin = self.table.index_select(0, positions).unbind(1)
        return cos, sin


@dataclass(slots=True)
class Layer:
    """Weights of one layer, fused where inputs are shared; None where a model has no such bias or norm."""

    config: LayerConfig
    rotary: Rotary
    input_norm: Norm | None
    qkv: Tensor  # [(H + 2 Hkv) Dh, D]; no value rows where the value is the key
    qkv_bias: Tensor | None
    qk_norm: Norm | None  # gain [H + Hkv, Dh]
    v_norm: Norm | None
    out: Tensor
    out_bias: Tensor | None
    attention_out_norm: Norm | None
    mlp_norm: Norm
    gate_up: Tensor  # [2 I, D]
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    mlp_out_norm: Norm | None
    scalar: float


class ReferenceStack:
    """A decoder stack. Its outputs are inference tensors: clone what must enter autograd or be changed in place;
    ``embed`` and ``unembed`` take part in autograd."""

    def __init__(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.config, self.dtype = config, dtype
        self._rotaries: dict[RopeConfig, Rotary] = {}
        self._activation = _ACTIVATIONS[config.activation]
        self._embedding = weights["embed.weight"].to(dtype) if "embed.weight" in weights else None
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=dtype))
        self._head = None
        if config.vocab_size:
            self._head = weights["head.weight"].to(dtype) if "head.weight" in weights else self._embedding
        self._layers = [self._load_layer(index, weights) for index in range(len(config.layers))]
        self._norm = self._load_norm(weights, "norm", config.hidden_size)

    # -------------------------------------------------------------------------------------------- loading

    def _load_layer(self, index: int, weights: Mapping[str, Tensor]) -> Layer:
        config, prefix = self.config.layers[index], f"layers.{index}."
        width = self.config.hidden_size

        def norm(name: str) -> Norm | None:
            return self._load_norm(weights, prefix + name, width) if f"{prefix}{name}.weight" in weights else None

        def linear(*names: str) -> tuple[Tensor, Tensor | None]:
            return self._fuse(weights, [f"{prefix}{name}" for name in names])

        qkv, qkv_bias = linear("q", "k") if config.value_is_key else linear("q", "k", "v")
        out, out_bias = linear("o")
        gate_up, gate_up_bias = linear("gate", "up")
        down, down_bias = linear("down")
        mlp_norm = norm("mlp_norm")
        assert mlp_norm is not None
        scalar = f"{prefix}scalar"
        return Layer(
            config=config,
            rotary=self._rotaries.setdefault(config.rope, Rotary(config.rope, self.dtype)),
            input_norm=norm("input_norm"),
            qkv=qkv,
            qkv_bias=qkv_bias,
            qk_norm=self._load_qk_norm(config, weights, prefix) if config.qk_norm else None,
            v_norm=Norm(None, config.head_dim, self.config.norm_eps, self.dtype) if config.v_norm else None,
            out=out,
            out_bias=out_bias,
            attention_out_norm=norm("attention_out_norm"),
            mlp_norm=mlp_norm,
            gate_up=gate_up,
            gate_up_bias=gate_up_bias,
            down=down,
            down_bias=down_bias,
            mlp_out_norm=norm("mlp_out_norm"),
            scalar=config.layer_scalar * (float(weights[scalar]) if scalar in weights else 1.0),
        )

    def _load_norm(self, weights: Mapping[str, Tensor], name: str, width: int) -> Norm:
        gain = weights[f"{name}.weight"].double() + self.config.norm_offset
        return Norm(gain, width, self.config.norm_eps, self.dtype)

    def _load_qk_norm(self, config: LayerConfig, weights: Mapping[str, Tensor], prefix: str) -> Norm:
        """One norm over query and key heads together: its gain differs by head."""
        q, k = (weights[f"{prefix}{name}.weight"].double() for name in ("q_norm", "k_norm"))
        heads = torch.cat([q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)])
        return Norm(heads + self.config.norm_offset, config.head_dim, self.config.norm_eps, self.dtype)

    def _fuse(self, weights: Mapping[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Linears of one input as one, filled part by part so that no second copy of the whole exists."""
        if len(names) == 1:
            bias = weights.get(f"{names[0]}.bias")
            return weights[f"{names[0]}.weight"].to(self.dtype), None if bias is None else bias.to(self.dtype)
        shapes = weight_shapes(self.config)
        rows = [shapes[f"{name}.weight"].sizes[0] or 0 for name in names]
        fused = torch.full((sum(rows), shapes[f"{names[0]}.weight"].sizes[1] or 0), torch.nan, dtype=self.dtype)
        has_bias = any(f"{name}.bias" in weights for name in names)
        fused_bias = torch.zeros(len(fused), dtype=self.dtype) if has_bias else None
        for name, part, begin in zip(names, fused.split(rows), accumulate([0, *rows]), strict=False):
            part.copy_(weights[f"{name}.weight"])
            if fused_bias is not None and f"{name}.bias" in weights:
                fused_bias[begin : begin + len(part)] = weights[f"{name}.bias"]
        return fused, fused_bias

    # -------------------------------------------------------------------------------------------- contract

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """A cache of ``slots`` sequences of up to ``capacity`` tokens, keys and values [Hkv, capacity, Dh]."""
        for rotary in self._rotaries.values():
            rotary.grow(capacity)
        shapes = [(layer.num_kv_heads, capacity, layer.head_dim) for layer in self.config.layers]
        cache: KVCache = find("kv_cache", "contiguous")(slots, capacity, [(s, s) for s in shapes], self.dtype)
        return cache

    def paged_cache(
        self, slots: int, capacity: int, memory: int | None = None, kv_dtype: str = "auto", ahead: int = 0
    ) -> PagedCache:
        """See ``outrider.types.PagedTarget``. Raises InvalidRequest for a ``kv_dtype`` that is not ``auto``."""
        if kv_dtype != "auto":
            raise InvalidRequest(
                f"the reference backend keeps keys and values in its own dtype, not as {kv_dtype!r}; use 'auto'"
            )
        for rotary in self._rotaries.values():
            rotary.grow(capacity)
        shapes = [(layer.num_kv_heads, BLOCK, layer.head_dim) for layer in self.config.layers]
        cache: PagedCache = find("kv_cache", "gathered")(
            slots, capacity, [(s, s) for s in shapes], self.dtype, memory=memory, ahead=ahead
        )
        return cache

    @torch.inference_mode()
    def forward(
        self,
        batch: RaggedBatch,
        cache: Any,
        *,
        hidden: Tensor | None = None,
        residual: Tensor | None = None,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
        mask: Mask = "causal",
    ) -> StackOutput:
        """See ``outrider.types.Stack``."""
        step = Pass(batch, cache, mask, self.dtype)
        angles = self._angles(batch)
        x = self.embed(batch.tokens) if hidden is None else hidden.to(self.dtype)
        wide = None  # layer 0's attention input, where it is not the residual stream
        if self.config.input_width:
            assert hidden is not None and residual is not None, "a stack with input_width needs hidden and residual"
            wide, x = x, residual.to(self.dtype)
        auxiliary = {-1: x}
        for index, layer in enumerate(self._layers):
            x = self._run_layer(index, layer, x, wide, angles[layer.rotary], step)
            wide = None
            if index in aux_layers:
                auxiliary[index] = x
        step.finish()
        features = torch.cat([auxiliary[aux_layer] for aux_layer in aux_layers], -1) if aux_layers else None
        last = self._norm(x if logits_at is None else x.index_select(0, logits_at))
        return StackOutput(last, None if self._head is None else self.unembed(last), features)

    @torch.inference_mode()
    def project(self, hidden: Tensor, batch: RaggedBatch, cache: Any) -> None:
        """Write every layer's keys and values of ``hidden`` [T, D], taken as it is: no layer's norm is applied."""
        step = Pass(batch, cache, "causal", self.dtype)
        angles = self._angles(batch)
        hidden = hidden.to(self.dtype)
        for index, layer in enumerate(self._layers):
            config = layer.config
            skipped = config.num_heads * config.head_dim
            bias = None if layer.qkv_bias is None else layer.qkv_bias[skipped:]
            heads = F.linear(hidden, layer.qkv[skipped:], bias).unflatten(-1, (-1, config.head_dim))
            _, keys, values = _rotate(layer, heads, angles[layer.rotary], first=config.num_heads)
            step.write(index, keys, values)
        step.finish()

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., D], scaled as the layers see it."""
        assert self._embedding is not None, "this stack has no embedding"
        x = F.embedding(tokens, self._embedding)
        return x if self._embedding_scale == 1.0 else x * self._embedding_scale

    def unembed(self, hidden: Tensor) -> Tensor:
        """[..., D] after the final norm -> logits [..., V], float32 at least, soft-capped where the model does so."""
        assert self._head is not None, "this stack has no head"
        logits = F.linear(hidden.to(self.dtype), self._head)
        if self.dtype is torch.bfloat16:
            logits = logits.float()
        cap = self.config.logit_softcap
        return torch.tanh(logits / cap) * cap if cap else logits

    # -------------------------------------------------------------------------------------------- layers

    def _angles(self, batch: RaggedBatch) -> dict[Rotary, Angles]:
        return {rotary: rotary.at(batch.positions) for rotary in self._rotaries.values()}

    def _run_layer(
        self, index: int, layer: Layer, x: Tensor, wide: Tensor | None, angles: Angles, step: Pass
    ) -> Tensor:
        """One layer on the residual stream: [T, D] -> [T, D]. ``wide`` replaces its normalised attention input."""
        if wide is None:
            assert layer.input_norm is not None
            wide = layer.input_norm(x)
        heads = F.linear(wide, layer.qkv, layer.qkv_bias).unflatten(-1, (-1, layer.config.head_dim))
        queries, keys, values = _rotate(layer, heads, angles)
        step.write(index, keys, values)
        x = _add(x, attend(queries, index, layer.config, step), layer.out, layer.out_bias, layer.attention_out_norm)
        gate, up = F.linear(layer.mlp_norm(x), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        x = _add(x, self._activation(gate).mul_(up), layer.down, layer.down_bias, layer.mlp_out_norm)
        return x if layer.scalar == 1.0 else x.mul_(layer.scalar)


def _add(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None) -> Tensor:
    """x + norm(linear(y)). [T, D], [T, in] -> [T, D]."""
    if bias is None and norm is None:
        return torch.addmm(x, y, weight.t())
    y = F.linear(y, weight, bias)
    return x + (y if norm is None else norm(y))


def _rotate(layer: Layer, heads: Tensor, angles: Angles, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Norms and rotary positions on projected heads ``first`` and up: queries, keys, values [T, heads, Dh]."""
    config = layer.config
    queries, rotated = config.num_heads - first, config.num_heads + config.num_kv_heads - first
    values = heads[:, queries:rotated] if config.value_is_key else heads[:, rotated:]
    qk = heads[:, :rotated]
    if layer.qk_norm is not None:
        qk = layer.qk_norm(qk, first)
    cos, sin = angles
    qk = torch.addcmul(qk * cos, qk.roll(config.head_dim // 2, -1), sin)
    return qk[:, :queries], qk[:, queries:], values if layer.v_norm is None else layer.v_norm(values)
