"""Medusa (arXiv 2401.10774): parallel heads on the target's last hidden state. This file drafts; the other one trains.

Head k turns the state that gave token t into one for token t + k, by a residual block (the paper's equation 1); the
target's own head makes logits of it. Drafts are a chain, not a tree. n rows, K heads, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from outrider.backends.layers import Shape
from outrider.checkpoints import Design, Sizes
from outrider.drafters.base import Drawing, TrainedDrafter, linear, rowwise
from outrider.types import Context, Proposal, RaggedBatch, Rng, Values

__all__ = ["MedusaDesign", "MedusaDrafter"]


@dataclass(frozen=True, slots=True)
class MedusaDesign(Design):
    """Heads, and no decoder layers. Weights: heads.{k}.weight [D, D], heads.{k}.bias [D]."""

    heads: int

    @property
    def kind(self) -> str:
        return "medusa"

    @property
    def drafts(self) -> int:
        return self.heads

    def layers_of(self, decoder: Any) -> dict[str, Any]:
        return {**decoder, "num_hidden_layers": 0, "layer_types": None}

    def shapes(self, sizes: Sizes) -> dict[str, Shape]:
        parts = {"weight": Shape((sizes.width, sizes.width)), "bias": Shape((sizes.width,))}
        return {f"heads.{k}.{name}": shape for k in range(self.heads) for name, shape in parts.items()}


class MedusaDrafter(TrainedDrafter):
    """Drafts all tokens of a row at once, from the state that its last token was sampled from."""

    kinds, reads_hidden = ("medusa",), True

    def __init__(self, checkpoint: Any, target: Any, backend: Any, *, dtype: Any, **options: Any) -> None:
        super().__init__(checkpoint, target, backend, dtype=dtype, **options)
        self.block = min(self.block, checkpoint.design.drafts)
        own = [[checkpoint.tensors[f"heads.{k}.{part}"] for part in ("weight", "bias")] for k in range(self.block)]
        self._heads = [linear(backend, weight, dtype, bias) for weight, bias in own]
        self._states: dict[int, tuple[int, Tensor]] = {}  # slot -> tokens before the row's last one, state [1, D]

    def open(self, slot: int, capacity: int) -> None:
        self._states[slot] = 0, torch.empty(0)

    def close(self, slot: int) -> None:
        del self._states[slot]

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        for row, state in enumerate([] if hidden is None else hidden.split(1)):
            end = int(batch.positions[batch.offsets[row + 1] - 1]) + 1
            self._states[int(batch.slots[row])] = end, state.clone()

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """A row whose state was not seen drafts nothing."""
        lengths = [min(most, self.block) for most in limit]
        for b, slot in enumerate(slots):
            if self._states[slot][0] != len(context.history[b]) - 1:
                lengths[b] = 0
        if not any(lengths):
            return Proposal.empty(len(lengths))
        drawing = Drawing(self.net, context, rng, lengths)
        drawing.draw_all(self._logits([slots[b] for b in drawing.rows.tolist()], max(lengths)))
        return self.calibrated(drawing.proposal(drawing.margins()), context)

    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor, Tensor | None]:
        return self._logits(slots, path.shape[1]), None

    def _logits(self, slots: list[int], drafts: int) -> Tensor:
        """[n, drafts, V]"""
        state = torch.cat([self._states[slot][1] for slot in slots])
        moved = [state + rowwise(silu, head(state)).to(state.dtype) for head in self._heads[:drafts]]
        return torch.stack([self.net.unembed(one) for one in moved], 1)
