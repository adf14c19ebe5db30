"""EAGLE-3's layer and the multi-token-prediction module with gradients, trained by the training-time test.

EAGLE-3, arXiv 2503.01840, section 3.2: training runs as many steps as drafting does. From the second on a step
reads the hidden state of the step before it instead of the target's features, and attends to what is in the KV cache
when it drafts. Multi-token prediction (DeepSeek-V3 report, section 2.2) differs only in its first projection.

N packed tokens, A starts, n drafts that count, D width, F feature width, Vd draft vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from outrider.checkpoints import DraftCheckpoint
from outrider.config import build
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.drafters.mtp_design import MTPDesign
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.batch import FeatureBatch, Loss, TokenBatch
from outrider.training.networks.block_attention import AutoregressiveAttention
from outrider.training.networks.initial import Counts, draft_decoder, new_checkpoint, with_draft_vocabulary
from outrider.training.networks.losses import divergence
from outrider.training.networks.stack import Norm, linear
from outrider.training.networks.warm_start import Layers, start_warm
from outrider.types import TargetModel

__all__ = ["AutoregressiveLoss", "Eagle3Training", "MTPTraining", "TrainableAutoregressive"]


@dataclass(frozen=True, slots=True)
class AutoregressiveLoss:
    """The weights of the loss terms; draft step k weighs decay ** k."""

    soft_cross_entropy: float = 1.0
    """EAGLE-3's term: the cross-entropy to the target's distribution."""
    cross_entropy: float = 0.0
    total_variation: float = 0.0
    decay: float = 0.8
    starts: int | None = None
    """The most positions of a text, in one epoch, from which drafting is trained; None: all of them."""


class TrainableAutoregressive(TrainableNet):
    """A layer that reads the target's features, then its own hidden states."""

    def __init__(self, checkpoint: DraftCheckpoint, target: TargetModel, loss: AutoregressiveLoss) -> None:
        super().__init__(checkpoint, target)
        assert isinstance(checkpoint.design, (Eagle3Design, MTPDesign))
        self.design, self.weights = checkpoint.design, loss
        config = self.stack.config
        width, auxiliary = config.hidden_size, target.spec.hidden_size
        self.hidden_norm, self.embed_norm = Norm(width, config.norm_eps), Norm(width, config.norm_eps)
        self.feature_norms, self.feature_norm = nn.ModuleList(), None
        if isinstance(self.design, Eagle3Design):
            self.fc = linear(len(self.aux_layers) * auxiliary, width)
            if self.design.norm_before_fc:
                self.feature_norm = Norm(len(self.aux_layers) * auxiliary, config.norm_eps)
            if self.design.norm_each_before_fc:
                self.feature_norms.extend(Norm(auxiliary, config.norm_eps) for _ in self.aux_layers)
        else:
            self.fc = linear(2 * width, width)
        self.frozen.fill(self)

    def wanted(self, texts: TokenBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """Anchors: positions whose features drafting starts from. Rows: the positions that verify its drafts."""
        chosen: list[int] = []
        for key, (begin, end) in zip(texts.keys, texts.spans(), strict=True):
            answers = texts.answers[begin:end].nonzero()[:, 0]
            first = begin + int(answers[0]) if len(answers) else end
            possible = list(range(max(begin, first - self.design.drafts + 1), end - 1))
            if self.weights.starts is not None and len(possible) > self.weights.starts:
                possible = sorted(random.Random(f"{key} {epoch}").sample(possible, self.weights.starts))
            chosen += possible
        anchors = torch.tensor(chosen, dtype=torch.int64)
        rows = [anchors[self._valid(texts, anchors, k)] + k + 1 for k in range(self.design.drafts)]
        return anchors, torch.cat(rows).unique()

    def loss(self, batch: FeatureBatch) -> Loss:
        """Sums over all drafts, each with its step's weight."""
        batch = batch.together()
        texts, weights = batch.texts, self.weights
        starts = texts.offsets[:-1].repeat_interleave(texts.offsets.diff())
        positions = torch.arange(len(texts.tokens)) - starts
        last = len(texts.tokens) - 1
        attention, state = AutoregressiveAttention(texts), self._condition(batch.features)
        distributions = self.frozen.distribution(batch.logits)
        parts = {name: torch.zeros(()) for name in ("soft_cross_entropy", "cross_entropy", "total_variation")}
        accepted, weight = torch.zeros(()), 0.0
        for k in range(self.design.drafts):
            following = texts.tokens[(torch.arange(len(texts.tokens)) + k + 1).clamp(max=last)]
            x, wide = self._fuse(self.frozen.embed(following), state)
            raw, normed = self.stack(x, positions + k, attention, wide)
            state = normed if self._feeds_normed else raw
            valid = batch.anchors[self._valid(texts, batch.anchors, k)]
            rows = valid + k + 1  # the target's distribution of this draft
            index = torch.searchsorted(batch.rows, rows)
            drafted = self.frozen.draft_ids(texts.tokens[(rows + 1).clamp(max=last)])
            hard, variation, soft = divergence(self.frozen.unembed(normed[valid]), distributions, index, drafted)
            step = weights.decay**k
            for name, term in (("soft_cross_entropy", soft), ("cross_entropy", hard), ("total_variation", variation)):
                parts[name] = parts[name] + step * term.sum()
            accepted = accepted + step * (1 - variation.detach() / 2).sum()
            weight += step * len(rows)
        total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        shown = {name: part.detach() for name, part in parts.items()} | {"acceptance": accepted}
        return Loss(total, shown, torch.tensor(weight))

    # -------------------------------------------------------------------------------------------- parts

    @property
    def _feeds_normed(self) -> bool:
        return isinstance(self.design, Eagle3Design) and self.design.norm_output

    @staticmethod
    def _valid(texts: TokenBatch, anchors: Tensor, step: int) -> Tensor:
        """Anchors whose draft at this step is an answer's token inside the same text. bool [A]"""
        ends = texts.ends(anchors)
        at = (anchors + step).clamp(max=len(texts.tokens) - 1)
        return (anchors + step + 1 < ends) & texts.answers[at]

    def _condition(self, features: Tensor) -> Tensor:
        """The state that drafting starts from. [N, F] -> [N, D]"""
        if isinstance(self.design, MTPDesign):
            return features
        if self.feature_norm is not None:
            features = self.feature_norm(features)
        if len(self.feature_norms):
            parts = features.chunk(len(self.aux_layers), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.feature_norms, parts, strict=True)], -1)
        state: Tensor = self.fc(features)
        return state

    def _fuse(self, embedding: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and the attention input where it differs. [N, D], [N, D]"""
        embedded, normed = self.embed_norm(embedding), self.hidden_norm(state)
        both = torch.cat([embedded, normed], -1)
        if isinstance(self.design, MTPDesign):
            return self.fc(both), None
        return (normed if self.design.norm_before_residual else state), both


@dataclass(frozen=True, slots=True)
class Eagle3Training:
    """A new EAGLE-3 drafter."""

    depth: int = 7
    """Drafts of a round, and steps of the training-time test."""
    target_layers: tuple[int, ...] | None = None
    """Layers of the target it reads, counted from 0; None: EAGLE-3's low, middle and high one."""
    intermediate_size: int | None = None
    """Width of its MLP; None: the target's."""
    draft_vocab: int | None = None
    """Size of a reduced draft vocabulary: the tokens that the target writes most often. None: all of the target's."""
    warm: bool = True
    """Start from the target's layers after the last auxiliary one, where shapes fit; else from random weights."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Options of ``AutoregressiveLoss``."""

    def start(
        self,
        target: TargetModel,
        config: Mapping[str, Any],
        tokens: Mapping[str, int],
        layers: Layers | None = None,
        counts: Counts | None = None,
    ) -> TrainableAutoregressive:
        """``config`` is the target's, ``tokens`` its tokenizer's; ``layers`` give a warm start; ``counts`` choose a
        reduced draft vocabulary.

        Raises InvalidRequest for options that do not fit the target.
        """
        decoder = draft_decoder(config, target.spec, layers=1, intermediate=self.intermediate_size)
        aux_layers = tuple(self.target_layers) if self.target_layers else None
        checkpoint = new_checkpoint(Eagle3Design(depth=self.depth), decoder, target.spec, aux_layers, aux_layers=3)
        checkpoint = with_draft_vocabulary(checkpoint, self.draft_vocab, counts)
        module = TrainableAutoregressive(checkpoint, target, build(AutoregressiveLoss, self.loss, "loss of eagle3"))
        if self.warm and layers is not None:
            start_warm(module, module.hidden_norm, layers)
        return module


@dataclass(frozen=True, slots=True)
class MTPTraining:
    """A new multi-token-prediction module."""

    depth: int = 3
    """Drafts of a round: from the second on the module runs on its own output."""
    target_layer: int | None = None
    """The layer whose state it reads, counted from 0; None: the one before the last."""
    intermediate_size: int | None = None
    """Width of its MLP; None: the target's."""
    warm: bool = True
    """Start from the target's layers after the last auxiliary one, where shapes fit; else from random weights."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Options of ``AutoregressiveLoss``."""

    def start(
        self,
        target: TargetModel,
        config: Mapping[str, Any],
        tokens: Mapping[str, int],
        layers: Layers | None = None,
        counts: Counts | None = None,
    ) -> TrainableAutoregressive:
        """``config`` is the target's, ``tokens`` its tokenizer's; ``layers`` give a warm start.

        Raises InvalidRequest for options that do not fit the target.
        """
        decoder = draft_decoder(config, target.spec, layers=1, intermediate=self.intermediate_size)
        layer = target.spec.num_layers - 2 if self.target_layer is None else self.target_layer
        checkpoint = new_checkpoint(MTPDesign(depth=self.depth), decoder, target.spec, (layer,), aux_layers=1)
        module = TrainableAutoregressive(checkpoint, target, build(AutoregressiveLoss, self.loss, "loss of mtp"))
        if self.warm and layers is not None:
            start_warm(module, None, layers)  # its layer has a norm of its own
        return module
