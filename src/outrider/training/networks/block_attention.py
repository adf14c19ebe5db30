"""Attention masks of drafters in training, exact over packed texts; most masked products are not computed.

N packed tokens, T texts, L the longest, A anchors, S slots of a block, H heads, Hkv key/value heads, G = H / Hkv,
Dh head width, s earlier draft steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from outrider.config import LayerConfig
from outrider.training.networks.batch import TokenBatch, send

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


def _weights(past: Tensor, own: Tensor, hidden: Tensor) -> Tensor:
    """Attention weights over the context and the block itself, from their scores; what is ``hidden`` gets none."""
    scores = torch.cat([past.float().masked_fill(hidden, -torch.inf), own.float()], -1)
    return scores.softmax(-1).to(past.dtype)


class AutoregressiveAttention:
    """Draft step k attends to the first step's keys up to where drafting started, and to its own earlier steps: what is
    in its KV cache when it drafts (EAGLE-3, training-time test)."""

    def __init__(self, texts: TokenBatch, device: torch.device) -> None:
        """``device``: where attention is computed; texts are on the CPU."""
        self._texts, self._device = texts, device
        # layer -> step -> keys and values: [N, Hkv, Dh] text by text, [T, Hkv, L, Dh] padded
        self._keys: list[list[tuple[Tensor, Tensor]]] = []
        self._masks: dict[tuple[int | None, int], Tensor] = {}  # by window and step: what is not seen, padded

    def __call__(self, layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The next step of a layer. [N, H, Dh], [N, Hkv, Dh], [N, Hkv, Dh] -> [N, H, Dh]"""
        attend = self._by_text if self._device.type == "cpu" else self._padded
        return attend(layer, config, q, k, v)

    def _steps(self, layer: int, k: Tensor, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The layer's keys and values of all steps, this one's included."""
        if layer == len(self._keys):
            self._keys.append([])
        self._keys[layer].append((k, v))
        return self._keys[layer]

    def _by_text(self, layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Text by text, so that no text is compared with another's keys."""
        steps = self._steps(layer, k, v)
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

    def _hidden(self, count: int, step: int, window: int | None) -> Tensor:
        """Which positions of the first step a query does not see: bool [n, 1, n]"""
        keys = torch.arange(count, device=self._device)
        hidden = keys > keys[:, None]
        if window is not None:
            hidden = hidden | (keys[:, None] + step - keys >= window)
        return hidden[:, None]

    @cached_property
    def _layout(self) -> tuple[int, Tensor]:
        """L, and where each packed token is among texts padded at their ends. int64 [N]"""
        lengths = self._texts.offsets.diff()
        # Tensor cores want rows that begin at multiples of 16 bytes.
        longest = -(-int(lengths.max()) // 8) * 8
        where = (torch.arange(longest) < lengths[:, None]).flatten().nonzero()[:, 0]
        return longest, send(where, self._device)

    def _padded(self, layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All texts in one product, each padded to the longest: few kernels for a device.

        Every text begins at position 0, so one causal mask serves them all and hides what is padded.
        """
        longest, where = self._layout
        dtype = v.dtype

        def by_head(x: Tensor) -> Tensor:
            """[N, heads, Dh] -> [T, Hkv, L, heads / Hkv, Dh]"""
            padded = x.new_zeros(len(self._texts.keys) * longest, *x.shape[1:]).index_copy_(0, where, x)
            grouped = padded.view(-1, longest, config.num_kv_heads, x.shape[1] // config.num_kv_heads, x.shape[2])
            return grouped.transpose(1, 2).contiguous()

        queries = by_head((q * config.scale).to(dtype))
        steps = self._steps(layer, by_head(k.to(dtype)).squeeze(3), by_head(v).squeeze(3))
        keys = values = None
        if len(steps) > 1:
            keys, values = (torch.stack(parts, 3) for parts in zip(*steps[1:], strict=True))
        mixed = _mixed_steps(queries, *steps[0], self._mask(longest, len(steps) - 1, config.window), keys, values)
        return mixed.transpose(1, 2).reshape(-1, config.num_heads, mixed.shape[-1]).index_select(0, where)

    def _mask(self, longest: int, step: int, window: int | None) -> Tensor:
        """``_hidden`` of padded texts, kept for other layers and, without a window, other steps."""
        key = window, 0 if window is None else step
        if key not in self._masks:
            self._masks[key] = self._hidden(longest, step, window)
        return self._masks[key]


def _mixed_steps(
    queries: Tensor, first_k: Tensor, first_v: Tensor, hidden: Tensor, keys: Tensor | None, values: Tensor | None
) -> Tensor:
    """Padded texts over the first step, and over the later ones at each query's own position. Queries are scaled.

    [T, Hkv, L, G, Dh], the first step's [T, Hkv, L, Dh], what is not seen of it [L, 1, L], the later steps'
    [T, Hkv, L, s, Dh] or None -> [T, Hkv, L, G, Dh]
    """
    scores = (queries.flatten(2, 3) @ first_k.transpose(2, 3)).view(*queries.shape[:4], -1)
    scores = scores.masked_fill(hidden, -torch.inf)
    if keys is None or values is None:
        weights = scores.softmax(-1, dtype=torch.float32).to(first_v.dtype)
        return (weights.flatten(2, 3) @ first_v).view_as(queries)
    scores = torch.cat([scores, (queries.unsqueeze(4) * keys.float().unsqueeze(3)).sum(-1)], -1)
    past, own = scores.softmax(-1, dtype=torch.float32).split([first_k.shape[2], keys.shape[3]], -1)
    mixed = (past.to(first_v.dtype).flatten(2, 3) @ first_v).view_as(queries)
    return mixed + (own.unsqueeze(5) * values.float().unsqueeze(3)).sum(4).to(mixed.dtype)
