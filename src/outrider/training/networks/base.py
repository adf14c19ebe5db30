"""What every trained drafter has in training: its layers, if any, and the target's frozen embedding and head."""

from __future__ import annotations

from torch import nn

from outrider.checkpoints import DraftCheckpoint
from outrider.training.networks.batch import FeatureBatch, Loss
from outrider.training.networks.frozen import Frozen
from outrider.training.networks.stack import LearnedStack
from outrider.types import TargetModel

__all__ = ["TrainableNet"]


class TrainableNet(nn.Module):
    """See ``outrider.training.networks.batch.TrainableDrafter``. Embedding and head are the target's, frozen."""

    fc: nn.Linear
    stack: LearnedStack  # where its design has layers

    def __init__(self, checkpoint: DraftCheckpoint, target: TargetModel) -> None:
        """Raises IncompatibleDrafter for another target's drafter."""
        super().__init__()
        self.aux_layers = checkpoint.layers_for(target.spec)
        checkpoint.check_target(target.spec, self.aux_layers)
        config = checkpoint.stack(head=False)
        if config.layers:
            self.stack = LearnedStack(config)
        self.frozen = Frozen(checkpoint, target)

    def forward(self, batch: FeatureBatch) -> Loss:
        return self.loss(batch)

    def loss(self, batch: FeatureBatch) -> Loss:
        """Sums over the batch's drafts."""
        raise NotImplementedError

    def snapshot(self) -> DraftCheckpoint:
        """The drafter with its present weights. Where they are sharded over processes, all must call it."""
        return self.frozen.checkpoint(self)
