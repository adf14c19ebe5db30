"""Training batch and loss types.

N packed tokens, S texts, A anchors, R rows of logits, F feature width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["FeatureBatch", "Loss", "TokenBatch", "TrainableDrafter", "send"]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, without waiting for work that runs there."""
    return tensor if tensor.device == device else tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Some training texts, packed. On the CPU, where indices are worked out, also when a device trains."""

    tokens: Tensor  # int64 [N]
    offsets: Tensor  # int64 [S+1]    text s owns tokens[offsets[s]:offsets[s+1]]
    answers: Tensor  # bool [N]       the target wrote the token: only these are trained on
    keys: tuple[int, ...]  # S        seeds of a text's random choices, the same in any batch

    def spans(self) -> list[tuple[int, int]]:
        """Where each text begins and ends."""
        ends = self.offsets.tolist()
        return list(zip(ends, ends[1:], strict=False))

    def ends(self, positions: Tensor) -> Tensor:
        """Where the text of each position ends. int64 [n] -> [n]"""
        return self.offsets[torch.searchsorted(self.offsets, positions, right=True)]


@dataclass(frozen=True, slots=True)
class FeatureBatch:
    """Texts with the target's features, logits and hidden states, which may be on another device than the texts."""

    texts: TokenBatch
    anchors: Tensor  # int64 [A]       positions in the pack from which drafting is trained, ascending
    rows: Tensor  # int64 [R]          positions whose distribution the loss asks for, ascending
    features: Tensor  # [N, F]
    logits: Tensor  # float32 [R, V]   the target's, at ``rows``: the distribution of the token after each
    hidden: Tensor | None = None  # [R, D]  the target's state after its final norm, at ``rows``; None: it cannot tell

    def together(self) -> FeatureBatch:
        """With texts, anchors and rows on the features' device."""
        device, texts = self.features.device, self.texts
        tokens, offsets, answers = (send(x, device) for x in (texts.tokens, texts.offsets, texts.answers))
        texts = TokenBatch(tokens, offsets, answers, texts.keys)
        return replace(self, texts=texts, anchors=send(self.anchors, device), rows=send(self.rows, device))


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over a batch; divided by ``weight`` they are means. So parts of a batch, and processes, add up exactly."""

    total: Tensor  # scalar with a gradient
    parts: dict[str, Tensor]  # scalars for the log
    weight: Tensor  # scalar without a gradient


class TrainableDrafter(Protocol):
    """A drafter's network with gradients; a ``torch.nn.Module`` whose ``forward`` is ``loss``."""

    aux_layers: tuple[int, ...]

    def snapshot(self) -> Any:
        """The drafter with its present weights: a checkpoint, or a Hugging Face model. Where weights are sharded over
        processes, all of them must call it."""
        ...

    def wanted(self, texts: TokenBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """Anchors and rows of a ``FeatureBatch``: chosen by the texts' keys and the epoch alone."""
        ...

    def loss(self, batch: FeatureBatch) -> Loss: ...
