"""DSpark's network with gradients, DFlash's with both heads off, and their loss.

DSpark, arXiv 2026 (DeepSeek), section 3: the block over injected context (equations 2 and 3), heads (4 to 7), loss
(9 to 12). Texts are packed, anchors are drawn from the answers, and every block sees what it will see when it drafts.

N packed tokens, A anchors, S slots of a block, K drafts of a block, n drafts that count, D width, F feature width,
r Markov rank, Vd draft vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outrider.checkpoints import DraftCheckpoint
from outrider.config import LayerConfig, build
from outrider.drafters.dspark_design import BlockDesign, MarkovHead
from outrider.errors import InvalidRequest
from outrider.training.networks.base import TrainableNet
from outrider.training.networks.batch import FeatureBatch, Loss, TokenBatch, send
from outrider.training.networks.block_attention import BlockAttention
from outrider.training.networks.initial import (
    Counts,
    check_weights,
    draft_decoder,
    mask_token,
    new_checkpoint,
    with_draft_vocabulary,
)
from outrider.training.networks.losses import divergence, negative_log_acceptance, position_weights
from outrider.training.networks.stack import LearnedLayer, Norm, linear
from outrider.training.networks.warm_start import Layers, start_warm
from outrider.types import TargetModel

__all__ = ["BlockLoss", "DFlashTraining", "DSparkTraining", "TrainableBlock"]


@dataclass(frozen=True, slots=True)
class BlockLoss:
    """Weights of the loss terms (DSpark, equation 11, and two more), and of the positions in a block."""

    cross_entropy: float = 0.1
    total_variation: float = 0.9
    confidence: float = 1.0
    soft_cross_entropy: float = 0.0
    negative_log_acceptance: float = 0.0
    gamma: float | None = 4.0
    """Position k of a block weighs exp(-k / gamma)."""
    anchors: int = 64
    """The most blocks trained on from one text in one epoch."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest."""
        check_weights(self, ("cross_entropy", "total_variation", "soft_cross_entropy", "negative_log_acceptance"))
        if not 0 <= self.confidence < math.inf:
            raise InvalidRequest(
                f"loss: confidence is the weight of a term and must be 0 or above, got {self.confidence}"
            )
        if self.gamma is not None and not self.gamma > 0:
            raise InvalidRequest(f"loss: gamma must be above 0, got {self.gamma}")
        if self.anchors < 1:
            raise InvalidRequest(f"loss: anchors must be at least 1, got {self.anchors}")


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Indices of a batch's blocks, on the features' device: worked out on the CPU, so that no step waits for it."""

    attention: BlockAttention
    tokens: Tensor  # int64 [A S]     what fills the slots
    positions: Tensor  # int64 [A S]  their positions in their texts
    context: Tensor  # int64 [N]      positions of the packed tokens in theirs
    previous: Tensor  # int64 [A, K]  the token before each draft, along the true path
    counted: Tensor  # int64 [n]      the drafts that count, among all A K
    rows: Tensor  # int64 [n]         the row of the target's logits that verifies each
    drafted: Tensor  # int64 [n]      its token
    weight: Tensor  # float32 [n]     of its position in the block


def _chosen(values: Tensor, blocks: _Blocks) -> Tensor:
    """Those of the drafts that count. [A, K, ...] -> [n, ...]"""
    return values.flatten(0, 1).index_select(0, blocks.counted)


class TrainableBlock(TrainableNet):
    """A block over injected context, and the heads its design asks for."""

    def __init__(self, checkpoint: DraftCheckpoint, target: TargetModel, loss: BlockLoss) -> None:
        super().__init__(checkpoint, target)
        design = checkpoint.design
        assert isinstance(design, BlockDesign)
        self.design, self.weights = design, loss
        config = self.stack.config
        width, rank = config.hidden_size, design.markov_rank
        self.fc = linear(len(self.aux_layers) * target.spec.hidden_size, width)
        self.hidden_norm = Norm(width, config.norm_eps)
        self.markov = nn.ModuleDict()
        if rank:
            self.markov["w1"] = linear(rank, checkpoint.vocab_size)
            self.markov["w2"] = linear(rank, checkpoint.draft_vocab_size)
        if rank and design.markov_head == "gated":
            self.markov["gate"] = linear(width + rank, rank, bias=True)
        if rank and design.markov_head == "rnn":
            self.markov["joint"] = linear(2 * rank + width, 3 * rank, bias=True)
        self.confidence = None
        if design.confidence:
            self.confidence = linear(width + (rank if design.confidence_with_markov else 0), 1, bias=True)
        self.frozen.fill(self)

    def wanted(self, texts: TokenBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """Anchors: answer tokens that another one follows. Rows: the positions that verify their drafts."""
        chosen: list[int] = []
        answers = texts.answers.numpy()
        followed = answers[:-1] & answers[1:]
        for key, (begin, end) in zip(texts.keys, texts.spans(), strict=True):
            # An anchor at a text's beginning has no context at all, which never happens in drafting.
            possible = (followed[begin + 1 : end - 1].nonzero()[0] + (begin + 1)).tolist()
            if len(possible) > self.weights.anchors:
                possible = sorted(random.Random(f"{key} {epoch}").sample(possible, self.weights.anchors))
            chosen += possible
        anchors = torch.tensor(chosen, dtype=torch.int64)
        valid = self._valid(texts, anchors)
        return anchors, self._positions(anchors)[valid].unique()

    def loss(self, batch: FeatureBatch) -> Loss:
        """Sums over all drafts of all blocks, each with the weight of its position."""
        weights, blocks = self.weights, self._blocks(batch)
        logits, sure = self._predict(batch, blocks)
        distributions, drafted = self.frozen.distribution(batch.logits), self.frozen.draft_ids(blocks.drafted)
        hard, variation, soft = divergence(logits, distributions, blocks.rows, drafted)
        terms = {
            "cross_entropy": hard,
            "total_variation": variation,
            "soft_cross_entropy": soft,
            "negative_log_acceptance": negative_log_acceptance(variation),
        }
        if sure is not None:
            accepted = (1 - variation.detach() / 2).clamp(0, 1)
            terms["confidence"] = F.binary_cross_entropy_with_logits(sure, accepted, reduction="none")
        weight = blocks.weight
        parts = {name: (weight * term).sum() for name, term in terms.items()}
        used = [getattr(weights, name) * part for name, part in parts.items() if getattr(weights, name)]
        parts["acceptance"] = (weight * (1 - variation / 2)).sum()
        return Loss(torch.stack(used).sum(), {name: part.detach() for name, part in parts.items()}, weight.sum())

    def predict(self, batch: FeatureBatch) -> tuple[Tensor, Tensor | None]:
        """Logits of every draft that counts, block by block, and of its confidence where there is that head.
        [n, Vd], [n]"""
        return self._predict(batch, self._blocks(batch))

    # -------------------------------------------------------------------------------------------- parts

    def _predict(self, batch: FeatureBatch, blocks: _Blocks) -> tuple[Tensor, Tensor | None]:
        hidden = self._block(batch, blocks)  # [A, K, D]
        latent, before = self._markov(blocks.previous, hidden)
        logits = self.frozen.unembed(_chosen(hidden, blocks))
        if latent is not None:
            logits = logits + self.markov["w2"](_chosen(latent, blocks))
        if self.confidence is None:
            return logits, None
        return logits, _chosen(self._confidence(hidden, before), blocks)

    def _blocks(self, batch: FeatureBatch) -> _Blocks:
        texts, anchors, slots, device = batch.texts, batch.anchors, self.design.block_size, batch.features.device
        starts = texts.offsets[:-1].repeat_interleave(texts.offsets.diff())
        tokens = torch.full((len(anchors), slots), self.design.mask_token_id)
        tokens[:, 0] = texts.tokens[anchors]
        positions = (anchors - starts[anchors])[:, None] + torch.arange(slots)
        known, valid = self._positions(anchors), self._valid(texts, anchors)
        rows = known[valid]
        weight = position_weights(self.design.drafts, self.weights.gamma).expand(valid.shape)[valid]
        indices = (
            tokens.flatten(),
            positions.flatten(),
            torch.arange(len(texts.tokens)) - starts,
            texts.tokens[known.clamp(max=len(texts.tokens) - 1)],
            valid.flatten().nonzero()[:, 0],
            torch.searchsorted(batch.rows, rows),
            texts.tokens[rows + 1],
            weight,
        )
        attention = BlockAttention(texts, anchors, slots, device)
        return _Blocks(attention, *(send(index, device) for index in indices))

    def _positions(self, anchors: Tensor) -> Tensor:
        """Position of the target's distribution of each draft: draft k follows the token at anchor + k. int64 [A, K]"""
        return anchors[:, None] + torch.arange(self.design.drafts)

    def _valid(self, texts: TokenBatch, anchors: Tensor) -> Tensor:
        """Drafts whose token, and all before it in the block, are the answer's. bool [A, K]"""
        following = self._positions(anchors) + 1
        ends = texts.ends(anchors)
        inside = following < ends[:, None]
        answer = texts.answers[following.clamp(max=len(texts.tokens) - 1)]
        return (inside & answer).cumprod(1).bool()

    def _block(self, batch: FeatureBatch, blocks: _Blocks) -> Tensor:
        """Hidden states of the slots that predict, after the final norm. [A, K, D]"""
        context = self.hidden_norm(self.fc(batch.features))
        context_angles = self.stack.angles(blocks.context)

        def attend(layer: int, config: LayerConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            own = cast(LearnedLayer, self.stack.layers[layer])
            return blocks.attention(config, q, k, v, *own.keys_values(context, context_angles[config.rope]))

        x = self.frozen.embed(blocks.tokens)
        _, hidden = self.stack(x, blocks.positions, attend)
        first = 0 if self.design.sample_from_anchor else 1
        return hidden.view(len(batch.anchors), self.design.block_size, -1)[:, first:]

    def _markov(self, previous: Tensor, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What W2 makes the bias of, and W1 of the token before, along the true path. int64 [A, K] -> [A, K, r]"""
        if not self.design.markov_rank:
            return None, None
        before = F.embedding(previous, cast(nn.Linear, self.markov["w1"]).weight)
        if self.design.markov_head == "vanilla":
            return before, before
        if self.design.markov_head == "gated":
            return torch.sigmoid(self.markov["gate"](torch.cat([hidden, before], -1))) * before, before
        state, outputs = torch.zeros_like(before[:, 0]), []
        for k in range(hidden.shape[1]):
            joint = self.markov["joint"](torch.cat([state, before[:, k], hidden[:, k]], -1))
            gate, candidate, out = joint.chunk(3, -1)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            outputs.append(torch.tanh(out))
        return torch.stack(outputs, 1), before

    def _confidence(self, hidden: Tensor, before: Tensor | None) -> Tensor:
        """Logits. [A, K]"""
        assert self.confidence is not None
        states = hidden
        if self.design.confidence_with_markov:
            assert before is not None
            states = torch.cat([hidden, before], -1)
        logits: Tensor = self.confidence(states)[..., 0].float()
        return logits


@dataclass(frozen=True, slots=True)
class DSparkTraining:
    """A new DSpark drafter."""

    layers: int = 1
    """Layers of the block. The paper takes 5 for targets of 36; small targets want 1 or 2."""
    block_size: int = 7
    """Slots of a block: the drafts of a round, and one more where the anchor's slot does not predict."""
    sample_from_anchor: bool = True
    """Whether the anchor's slot predicts the first draft, as in DSpark and DeepSpec's DFlash; false: masks alone do, as
    in z-lab's, SpecForge's and SGLang's DFlash."""
    target_layers: tuple[int, ...] | None = None
    """Layers of the target it reads, counted from 0; None: ``aux_layers`` of them, spread evenly."""
    aux_layers: int = 5
    intermediate_size: int | None = None
    """Width of its MLPs; None: the target's."""
    markov_rank: int = 256
    """0: no Markov head."""
    markov_head: MarkovHead = "vanilla"
    confidence: bool = True
    confidence_with_markov: bool = True
    mask_token_id: int | None = None
    """Fills the slots behind the anchor; None: the tokenizer's mask token, else an id that no text uses."""
    draft_vocab: int | None = None
    """Size of a reduced draft vocabulary: the tokens that the target writes most often. None: all of the target's."""
    warm: bool = True
    """Start from the target's layers after the last auxiliary one, where shapes fit; else from random weights."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """Options of ``BlockLoss``."""

    def __post_init__(self) -> None:
        """Raises InvalidRequest, CheckpointError: now, not once training starts."""
        build(BlockLoss, self.loss, "loss")
        self.design(mask_token_id=0)

    def design(self, mask_token_id: int) -> BlockDesign:
        """What the drafter is made of. Raises CheckpointError."""
        return BlockDesign(
            block_size=self.block_size,
            mask_token_id=mask_token_id,
            sample_from_anchor=self.sample_from_anchor,
            markov_rank=self.markov_rank,
            markov_head=self.markov_head,
            confidence=self.confidence,
            confidence_with_markov=self.confidence and self.confidence_with_markov and self.markov_rank > 0,
        )

    def start(
        self,
        target: TargetModel,
        config: Mapping[str, Any],
        tokens: Mapping[str, int],
        layers: Layers | None = None,
        counts: Counts | None = None,
    ) -> TrainableBlock:
        """``config`` is the target's, ``tokens`` its tokenizer's; ``layers`` give a warm start; ``counts`` choose a
        reduced draft vocabulary.

        Raises InvalidRequest for options that do not fit the target.
        """
        design = self.design(mask_token(self.mask_token_id, target.spec, tokens))
        decoder = draft_decoder(config, target.spec, layers=self.layers, intermediate=self.intermediate_size)
        aux_layers = tuple(self.target_layers) if self.target_layers else None
        checkpoint = new_checkpoint(design, decoder, target.spec, aux_layers, self.aux_layers)
        checkpoint = with_draft_vocabulary(checkpoint, self.draft_vocab, counts)
        module = TrainableBlock(checkpoint, target, build(BlockLoss, self.loss, f"loss of {design.kind}"))
        if self.warm and layers is not None:
            start_warm(module, module.hidden_norm, layers)
        return module


@dataclass(frozen=True, slots=True)
class DFlashTraining(DSparkTraining):
    """A new DFlash drafter: no heads, and its own loss, the cross-entropy alone."""

    markov_rank: int = 0
    confidence: bool = False
    loss: Mapping[str, Any] = field(default_factory=lambda: {"cross_entropy": 1.0, "total_variation": 0.0})
