"""A smaller causal language model, trained by distillation on the target's distribution of every token.

Kim and Rush (EMNLP 2016); for speculative decoding, Zhou et al., DistillSpec (ICLR 2024): on the target's own answers.

N packed tokens, S texts, L the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from outrider.errors import InvalidRequest
from outrider.training.networks.batch import FeatureBatch, Loss, TokenBatch
from outrider.training.networks.initial import Counts, check_weights, draft_decoder
from outrider.training.networks.losses import divergence
from outrider.training.networks.warm_start import Layers
from outrider.types import TargetModel

__all__ = ["DraftModelTraining", "TrainableModel"]


@dataclass(frozen=True, slots=True)
class DraftModelTraining:
    """A new draft model: a small Qwen3 with the target's vocabulary."""

    layers: int = 1
    hidden_size: int | None = None
    """Its width; None: the target's."""
    intermediate_size: int | None = None
    """Width of its MLPs; None: the target's."""
    soft_cross_entropy: float = 1.0
    cross_entropy: float = 0.0
    total_variation: float = 0.0

    def __post_init__(self) -> None:
        """Raises InvalidRequest."""
        check_weights(self, ("soft_cross_entropy", "cross_entropy", "total_variation"))

    def start(
        self,
        target: TargetModel,
        config: Mapping[str, Any],
        tokens: Mapping[str, int],
        layers: Layers | None = None,
        counts: Counts | None = None,
    ) -> TrainableModel:
        """``config`` is the target's. Raises InvalidRequest for options that do not fit the target."""
        decoder = draft_decoder(config, target.spec, layers=self.layers, intermediate=self.intermediate_size)
        if self.hidden_size is not None:
            if self.hidden_size < decoder["head_dim"]:
                raise InvalidRequest(f"hidden_size must be at least {decoder['head_dim']}, got {self.hidden_size}")
            decoder["hidden_size"] = self.hidden_size
        decoder |= {"tie_word_embeddings": True, "eos_token_id": config.get("eos_token_id")}
        return TrainableModel(decoder, self)


class TrainableModel(nn.Module):
    """See ``outrider.training.networks.batch.TrainableDrafter``. It reads tokens only, no features."""

    aux_layers: tuple[int, ...] = ()

    def __init__(self, decoder: Mapping[str, Any], weights: DraftModelTraining) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.weights = weights
        self.model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in decoder.items() if k != "model_type"}))

    def forward(self, batch: FeatureBatch) -> Loss:
        return self.loss(batch)

    def snapshot(self) -> nn.Module:
        """The model itself."""
        return self.model

    def wanted(self, texts: TokenBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """Every position that an answer's token follows."""
        ends = torch.zeros(len(texts.tokens), dtype=torch.bool)
        ends[texts.offsets[1:] - 1] = True
        following = texts.answers.roll(-1) & ~ends
        rows = following.nonzero()[:, 0]
        return rows, rows

    def loss(self, batch: FeatureBatch) -> Loss:
        """Sums over the answers' tokens."""
        batch = batch.together()
        texts, rows = batch.texts, batch.rows
        parts = [texts.tokens[begin:end] for begin, end in texts.spans()]
        tokens = pad_sequence(parts, batch_first=True)
        lengths = texts.offsets.diff()
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [S, L]
        states = self.model.model(input_ids=tokens, attention_mask=inside.long()).last_hidden_state[inside]
        logits = self.model.lm_head(states[rows])
        distribution = batch.logits.float().softmax(-1)
        index = torch.arange(len(rows), device=rows.device)
        hard, variation, soft = divergence(logits, distribution, index, texts.tokens[rows + 1])
        terms = {"soft_cross_entropy": soft, "cross_entropy": hard, "total_variation": variation}
        total = torch.stack([getattr(self.weights, name) * term.sum() for name, term in terms.items()]).sum()
        shown = {name: term.detach().sum() for name, term in terms.items()}
        shown["acceptance"] = (1 - variation.detach() / 2).sum()
        return Loss(total, shown, torch.full((), float(len(rows)), device=rows.device))
