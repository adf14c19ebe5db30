"""Medusa's heads with gradients; the target's own head stays frozen (Medusa-1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from medusa_drafter import MedusaDesign
from torch import Tensor, nn
from torch.nn.functional import silu

from outrider.errors import InvalidRequest
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.batch import FeatureBatch, Loss, TokenBatch
from outrider.training.networks.initial import draft_decoder, new_checkpoint
from outrider.training.networks.losses import divergence

__all__ = ["MedusaNetwork", "MedusaTraining"]

DECAY = 0.8  # head k weighs DECAY ** k in the loss (section 2.2)


class MedusaNetwork(TrainableNet):
    def __init__(self, checkpoint: Any, target: Any) -> None:
        super().__init__(checkpoint, target)
        self.heads = nn.ModuleList(nn.Linear(*2 * [checkpoint.hidden_size]) for _ in range(checkpoint.design.heads))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)  # so that each head begins as the target's
        self.frozen.fill(self)

    def wanted(self, texts: TokenBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """Anchors: positions whose state drafts. Rows: those, and the positions that verify their drafts."""
        positions = torch.arange(len(texts.tokens) - 2)
        anchors = positions[texts.answers[2:] & (positions + 2 < texts.ends(positions))]
        rows = [anchors] + [anchors[anchors + k + 1 < texts.ends(anchors)] + k for k in range(1, len(self.heads) + 1)]
        return anchors, torch.cat(rows).unique()

    def loss(self, batch: FeatureBatch) -> Loss:
        if batch.hidden is None:
            raise InvalidRequest("medusa reads the target's last hidden state, which this target does not give")
        texts, distributions = batch.texts, self.frozen.distribution(batch.logits)
        sums = torch.zeros(3)  # loss, acceptance, weight
        for k, head in enumerate(self.heads, 1):  # its draft is the token k + 1 behind the anchor
            anchors = batch.anchors[batch.anchors + k + 1 < texts.ends(batch.anchors)]
            state = batch.hidden[torch.searchsorted(batch.rows, anchors)]
            logits, rows = self.frozen.unembed(state + silu(head(state))), torch.searchsorted(batch.rows, anchors + k)
            terms = divergence(logits, distributions, rows, texts.tokens[anchors + k + 1])
            accepted = (1 - terms.total_variation.detach() / 2).sum()
            sums = sums + DECAY**k * torch.stack([terms.soft_cross_entropy.sum(), accepted, torch.tensor(len(rows))])
        return Loss(sums[0], {"acceptance": sums[1].detach(), "cross_entropy": sums[0].detach()}, sums[2].detach())


@dataclass(frozen=True, slots=True)
class MedusaTraining:
    """New heads."""

    heads: int = 3

    def start(self, target: Any, config: Any, tokens: Any, layers: Any = None, counts: Any = None) -> MedusaNetwork:
        decoder = draft_decoder(config, target.spec, layers=1, intermediate=None)
        return MedusaNetwork(new_checkpoint(MedusaDesign(self.heads), decoder, target.spec, (), 0), target)
