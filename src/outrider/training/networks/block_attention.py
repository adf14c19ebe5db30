"""Attention masks of drafters in training, exact over packed texts; most masked products are not computed.

N packed tokens, A anchors, S slots of a block, H heads, Hkv key/value heads, G = H / Hkv, Dh head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from outrider.config import LayerConfig
from outrider.training.networks.batch import TokenBatch, send
from outrider.training.networks.fused import fused

__all__ = ["AutoregressiveAttention", "BlockAttention"]


@dataclass(frozen=True, slots=True)
class _Span:
    """One text and the blocks anchored in it."""

    begin: int
    end: int
    anchors: Tensor  # int64 [a]   counted from ``begin``
    first: int  # of its anchors among all


@dataclass(frozen=True, slots=True)
class _Layout:
    """All spans padded to the most anchors and the longest reach."""

    most: int
    reach: int
    seen: Tensor  # int64 [texts * reach]  packed positions of each text's context
    where: Tensor  # int64 [A]  each anchor among texts * most
    anchors: Tensor  # int64 [texts * most]  counted from its text's beginning
    hidden: dict[int | None, Tensor] = field(default_factory=dict)  # by window: what a block does not see


class BlockAttention:
    """Each slot sees its text before the anchor, and its whole block (DSpark paper, section 3.1)."""

    def __init__(self, texts: TokenBatch, anchors: Tensor, slots: int, device: torch.device) -> None:
        """``device``: where attention is computed; texts and anchors are on the CPU."""
        self.slots, self._device = slots, device
        bounds = torch.searchsorted(anchors, texts.offsets).tolist()
        self._spans = [
            _Span(begin, end, anchors[low:high] - begin, low)
            for (begin, end), low, high in zip(texts.spans(), bounds, bounds[1:], strict=False)
            if high > low
        ]

    def __call__(
        self, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor
    ) -> Tensor:
        """q [A S, H, Dh], k and v [A S, Hkv, Dh], the context's [N, Hkv, Dh] -> [A S, H, Dh]"""
        attend = self._by_text if self._device.type == "cpu" else self._padded
        return attend(config, q, k, v, context_k, context_v)

    def _by_text(
        self, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor
    ) -> Tensor:
        """Text by text, so that no text is compared with another's blocks."""
        out = []
        slots, groups = self.slots, config.num_heads // config.num_kv_heads
        for span in self._spans:
            count = len(span.anchors)
            rows = slice(span.first * slots, (span.first + count) * slots)
            reach = int(span.anchors[-1])  # no block sees beyond the last anchor
            seen = slice(span.begin, span.begin + reach)
            # [Hkv, a, S G, Dh]: all queries that share keys side by side
            queries = q[rows].view(count, slots, config.num_kv_heads, groups, -1).permute(2, 0, 1, 3, 4)
            queries = queries.reshape(config.num_kv_heads, count, slots * groups, -1) * config.scale
            past = queries.flatten(1, 2) @ context_k[seen].permute(1, 2, 0)
            past = past.view(config.num_kv_heads, count, slots * groups, reach)
            hidden = self._hidden(span.anchors, reach, config.window)
            if config.window is None:
                past = past.masked_fill(hidden, -torch.inf)
            else:
                past = past.masked_fill(hidden.repeat_interleave(groups, 1), -torch.inf)
            own = queries @ k[rows].view(count, slots, config.num_kv_heads, -1).permute(2, 0, 3, 1)
            weights = torch.cat([past, own], -1).float().softmax(-1).to(v.dtype)
            mixed = (weights[..., :reach].flatten(1, 2) @ context_v[seen].transpose(0, 1)).view_as(queries)
            values = v[rows].view(count, slots, config.num_kv_heads, -1).permute(2, 0, 1, 3)
            mixed = mixed + weights[..., reach:] @ values
            mixed = mixed.view(config.num_kv_heads, count, slots, groups, -1).permute(1, 2, 0, 3, 4)
            out.append(mixed.reshape(count * slots, config.num_heads, -1))
        return torch.cat(out)

    def _hidden(self, anchors: Tensor, reach: int, window: int | None) -> Tensor:
        """Which context positions a block does not see: bool [a, 1 or S, reach]."""
        keys = torch.arange(reach, device=anchors.device)
        hidden = (keys >= anchors[:, None])[:, None]
        if window is None:
            return hidden
        positions = anchors[:, None] + torch.arange(self.slots, device=anchors.device)
        return hidden | (positions[:, :, None] - keys >= window)

    @cached_property
    def _layout(self) -> _Layout:
        """One for all layers, made of few tensors."""
        most = max(len(span.anchors) for span in self._spans)
        reach = max(int(span.anchors[-1]) for span in self._spans)
        with torch.device("cpu"):
            last = self._spans[-1].end - 1
            seen = torch.tensor([span.begin for span in self._spans])[:, None] + torch.arange(reach)
            counts = torch.tensor([len(span.anchors) for span in self._spans])
            first = torch.tensor([span.first for span in self._spans])
            owner = torch.arange(len(counts)).repeat_interleave(counts)
            where = owner * most + torch.arange(len(owner)) - first[owner]
            anchors = torch.zeros(len(counts) * most, dtype=torch.int64)
            anchors[where] = torch.cat([span.anchors for span in self._spans])
        seen, where, anchors = (send(x, self._device) for x in (seen.clamp(max=last).flatten(), where, anchors))
        return _Layout(most, reach, seen, where, anchors)

    def _padded(
        self, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor
    ) -> Tensor:
        """All texts in one product, each padded to the longest reach and the most anchors: few kernels for a device."""
        slots, layout, count = self.slots, self._layout, len(self._spans)
        most, reach, groups = layout.most, layout.reach, config.num_heads // config.num_kv_heads

        def blocks(x: Tensor) -> Tensor:
            """[A S, heads, Dh] -> [texts, Hkv, a, S G, Dh]"""
            rows = x.view(-1, slots, *x.shape[1:])
            padded = x.new_zeros(count * most, *rows.shape[1:]).index_copy(0, layout.where, rows)
            grouped = padded.view(count, most, slots, config.num_kv_heads, -1, x.shape[-1])
            return grouped.permute(0, 3, 1, 2, 4, 5).flatten(3, 4)

        queries = blocks(q.to(v.dtype)) * config.scale
        keys, values = (x.to(v.dtype).index_select(0, layout.seen) for x in (context_k, context_v))
        keys, values = (x.view(count, reach, *x.shape[1:]).transpose(1, 2) for x in (keys, values))
        hidden = layout.hidden.get(config.window)
        if hidden is None:
            hidden = self._hidden(layout.anchors, reach, config.window).view(count, 1, most, -1, reach)
            if config.window is not None:
                hidden = hidden.repeat_interleave(groups, 3)
            layout.hidden[config.window] = hidden
        past = (queries.flatten(2, 3) @ keys.transpose(2, 3)).view(*queries.shape[:4], reach)
        weights = _weights(past, queries @ blocks(k.to(v.dtype)).transpose(3, 4), hidden)
        mixed = (weights[..., :reach].flatten(2, 3) @ values).view_as(queries)
        mixed = mixed + weights[..., reach:] @ blocks(v)
        mixed = mixed.unflatten(3, (slots, groups)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
        return mixed.index_select(0, layout.where).reshape(-1, config.num_heads, mixed.shape[-1])


@fused
def _weights(past: Tensor, own: Tensor, hidden: Tensor) -> Tensor:
    """Attention weights over the context and the block itself, from their scores; what is ``hidden`` gets none."""
    scores = torch.cat([past.float().masked_fill(hidden, -torch.inf), own.float()], -1)
    return scores.softmax(-1).to(past.dtype)


class AutoregressiveAttention:
    """Draft step k attends to the first step's keys up to where drafting started, and to its own earlier steps: what is
    in its KV cache when it drafts (EAGLE-3, training-time test)."""

    def __init__(self, texts: TokenBatch) -> None:
        self._texts = texts
        self._keys: list[list[tuple[Tensor, Tensor]]] = []  # layer -> step -> keys and values [N, Hkv, Dh]

    def __call__(self, layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The next step of a layer. [N, H, Dh], [N, Hkv, Dh], [N, Hkv, Dh] -> [N, H, Dh]"""
        if layer == len(self._keys):
            self._keys.append([])
        steps = self._keys[layer]
        steps.append((k, v))
        groups = config.num_heads // config.num_kv_heads
        out = []
        for begin, end in self._texts.spans():
            rows, count = slice(begin, end), end - begin
            # [Hkv, n, G, Dh]
            queries = q[rows].view(count, config.num_kv_heads, groups, -1).transpose(0, 1) * config.scale
            first_k, first_v = steps[0]
            past = (queries.flatten(1, 2) @ first_k[rows].permute(1, 2, 0)).view(*queries.shape[:3], count)
            past = past.masked_fill(self._hidden(count, len(steps) - 1, config.window), -torch.inf)
            later = [(step_k[rows].transpose(0, 1), step_v[rows].transpose(0, 1)) for step_k, step_v in steps[1:]]
            own = [(queries * step_k[:, :, None]).sum(-1, keepdim=True) for step_k, _ in later]
            weights = torch.cat([past, *own], -1).float().softmax(-1).to(v.dtype)
            mixed = (weights[..., :count].flatten(1, 2) @ first_v[rows].transpose(0, 1)).view_as(queries)
            for i, (_, step_v) in enumerate(later):
                mixed = mixed + weights[..., count + i, None] * step_v[:, :, None]
            out.append(mixed.transpose(0, 1).reshape(count, config.num_heads, -1))
        return torch.cat(out)

    @staticmethod
    def _hidden(count: int, step: int, window: int | None) -> Tensor:
        """bool [n, 1, n]"""
        keys = torch.arange(count)
        hidden = keys > keys[:, None]
        if window is not None:
            hidden = hidden | (keys[:, None] + step - keys >= window)
        return hidden[:, None]
