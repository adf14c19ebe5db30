"""EAGLE-3's layer and the multi-token-prediction module with gradients, trained by the training-time test.

EAGLE-3, arXiv 2503.01840, section 3.2: training runs as many steps as drafting does. From the second on a step
reads the hidden state of the step before it instead of the target's features, and attends to what is in the KV cache
when it drafts. Multi-token prediction (DeepSeek-V3 report, section 2.2) differs only in its first projection.

N packed tokens, A starts, K steps, n drafts that count in all steps, D width, F feature width, Vd draft vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from outrider.checkpoints import DraftCheckpoint
from outrider.config import build
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.drafters.mtp_design import MTPDesign
from outrider.errors import InvalidRequest
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.batch import FeatureBatch, Loss, TokenBatch, send
from outrider.training.networks.block_attention import AutoregressiveAttention
from outrider.training.networks.initial import (
    Counts,
    check_weights,
    draft_decoder,
    new_checkpoint,
    with_draft_vocabulary,
)
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

    def __post_init__(self) -> None:
        """Raises InvalidRequest."""
        check_weights(self, ("soft_cross_entropy", "cross_entropy", "total_variation"))
        if not 0 <= self.decay < math.inf:
            raise InvalidRequest(f"loss: decay must be 0 or above, got {self.decay}")
        if self.starts is not None and self.starts < 1:
            raise InvalidRequest(f"loss: starts must be at least 1, got {self.starts}")


@dataclass(frozen=True, slots=True)
class _Steps:
    """Indices of a batch's draft steps, on the features' device: worked out on the CPU, so that no step waits for
    it. Drafts that count are step by step."""

    attention: AutoregressiveAttention
    counts: list[int]  # K            drafts that count in each step
    tokens: Tensor  # int64 [K N]     what each step reads at each position
    positions: Tensor  # int64 [K N]  positions in their texts
    counted: Tensor  # int64 [n]      where drafting started, among the packed tokens
    rows: Tensor  # int64 [n]         the row of the target's logits that verifies each
    drafted: Tensor  # int64 [n]      its token, -1 behind the text's last
    weight: Tensor  # float32 [n]     of its step


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
        answers = texts.answers.nonzero()[:, 0]
        begins, ends = texts.offsets[:-1], texts.offsets[1:]
        after = torch.cat([answers, ends[-1:]])[torch.searchsorted(answers, begins)]  # where the next answer begins
        firsts = (torch.minimum(after, ends) - self.design.drafts + 1).maximum(begins)
        chosen: list[int] = []
        for key, first, end in zip(texts.keys, firsts.tolist(), ends.tolist(), strict=True):
            possible: Sequence[int] = range(first, end - 1)
            if self.weights.starts is not None and len(possible) > self.weights.starts:
                possible = sorted(random.Random(f"{key} {epoch}").sample(possible, self.weights.starts))
            chosen += possible
        anchors = torch.tensor(chosen, dtype=torch.int64)
        steps, which = self._valid(texts, anchors, torch.arange(self.design.drafts)[:, None]).nonzero(as_tuple=True)
        return anchors, (anchors[which] + steps + 1).unique()

    def loss(self, batch: FeatureBatch) -> Loss:
        """Sums over all drafts, each with its step's weight."""
        weights, steps = self.weights, self._steps(batch)
        state, distributions = self._condition(batch.features), self.frozen.distribution(batch.logits)
        embedded = self.embed_norm(self.frozen.embed(steps.tokens)).chunk(self.design.drafts)
        positions = steps.positions.chunk(self.design.drafts)
        drafts = [
            part.split(steps.counts) for part in (steps.counted, steps.rows, self.frozen.draft_ids(steps.drafted))
        ]
        measured = []
        for k, (counted, rows, drafted) in enumerate(zip(*drafts, strict=True)):
            x, wide = self._fuse(embedded[k], state)
            raw, normed = self.stack(x, positions[k], steps.attention, wide)
            state = normed if self._feeds_normed else raw
            # Step by step, as all steps' logits at once would take too much memory.
            logits = self.frozen.unembed(normed.index_select(0, counted))
            measured.append(divergence(logits, distributions, rows, drafted))
        hard, variation, soft = (torch.cat(step) for step in zip(*measured, strict=True))
        terms = {"soft_cross_entropy": soft, "cross_entropy": hard, "total_variation": variation}
        weight = steps.weight
        parts = {name: (weight * term).sum() for name, term in terms.items()}
        used = [getattr(weights, name) * part for name, part in parts.items() if getattr(weights, name)]
        parts["acceptance"] = (weight * (1 - variation / 2)).sum()
        return Loss(torch.stack(used).sum(), {name: part.detach() for name, part in parts.items()}, weight.sum())

    # -------------------------------------------------------------------------------------------- parts

    def _steps(self, batch: FeatureBatch) -> _Steps:
        texts, anchors, device = batch.texts, batch.anchors, batch.features.device
        every, last = torch.arange(self.design.drafts)[:, None], len(texts.tokens) - 1
        starts = texts.offsets[:-1].repeat_interleave(texts.offsets.diff())
        packed = torch.arange(len(texts.tokens))
        valid = self._valid(texts, anchors, every)
        steps, which = valid.nonzero(as_tuple=True)
        counted = anchors[which]
        rows = counted + steps + 1  # the target's distribution of each draft
        drafted = texts.tokens[(rows + 1).clamp(max=last)]
        indices = (
            texts.tokens[(packed + every + 1).clamp(max=last)].flatten(),
            (packed - starts + every).flatten(),
            counted,
            torch.searchsorted(batch.rows, rows),
            torch.where(rows + 1 < texts.ends(counted), drafted, -1),
            self.weights.decay ** steps.float(),
        )
        attention = AutoregressiveAttention(texts, device)
        return _Steps(attention, valid.sum(1).tolist(), *(send(index, device) for index in indices))

    @property
    def _feeds_normed(self) -> bool:
        return isinstance(self.design, Eagle3Design) and self.design.norm_output

    @staticmethod
    def _valid(texts: TokenBatch, anchors: Tensor, step: Tensor | int) -> Tensor:
        """Anchors whose draft at this step is an answer's token inside the same text. One step -> bool [A],
        int64 [K, 1] -> bool [K, A]"""
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

    def _fuse(self, embedded: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The residual stream, and the attention input where it differs; the embedding is normalised. [N, D], [N, D]"""
        normed = self.hidden_norm(state)
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

    def __post_init__(self) -> None:
        build(AutoregressiveLoss, self.loss, "loss")  # refused now, not once training starts

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

    def __post_init__(self) -> None:
        build(AutoregressiveLoss, self.loss, "loss")  # refused now, not once training starts

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
