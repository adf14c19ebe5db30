"""Semi-autoregressive drafting: a parallel block over the target's features, then a sequential head (DSpark).

DSpark, arXiv 2026 (DeepSeek): context injected into keys and values (equations 2 and 3), Markov head (4 to 6),
confidence head (7). DFlash (arXiv 2602.06036) is the same with both heads off.

n rows that draft, K drafts, S slots of a block, D width, F feature width, r Markov rank, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base import (
    CachedDrafter,
    Drawing,
    draft_keys,
    linear,
    packed_proposal,
    rms_norm,
    rowwise,
)
from outrider.drafters.dspark_design import BlockDesign
from outrider.errors import InvalidRequest
from outrider.types import (
    Backend,
    BlockDrafter,
    BlockParts,
    Context,
    DraftsBlocks,
    MarkovParts,
    Proposal,
    RaggedBatch,
    Rng,
    TargetModel,
    Values,
)

__all__ = ["DFlashDrafter", "DSparkConfig", "DSparkDrafter", "SequentialHead", "markov_parts"]

MIXES = {"gated": "markov.gate", "rnn": "markov.joint"}


@dataclass(frozen=True, slots=True)
class DSparkConfig:
    """Options of the ``dspark`` and ``dflash`` drafters. Raises InvalidRequest for values out of range."""

    model: str
    """The trained drafter: a directory or a hub id."""
    draft_tokens: int | None = None
    """The most tokens it proposes in a round; None: as many as a block gives."""
    block_size: int | None = None
    """Slots of a block, when not those it was trained with."""
    sample_from_anchor: bool | None = None
    """Whether the anchor's slot predicts; None: as the checkpoint says."""
    target_layers: tuple[int, ...] | None = None
    """Layers of the target it reads, counted from 0; None: as the checkpoint says."""
    dtype: str = "auto"
    """Precision of the drafter alone: float32, bfloat16, int8 or int4 (its head int8); auto: int8 where the native core
    runs, else the target's. Matrices stored in 4 bits stay so with int8 and int4. Rounding changes what it proposes a
    little, and its speed a lot; never the text."""
    shortlist: int = 1024
    """On the native core: how many tokens, those of the largest base logits, a sampled draft is drawn from."""

    def __post_init__(self) -> None:
        for name in ("draft_tokens", "block_size", "shortlist"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"drafter dspark: {name} must be at least 1, got {value}")


class DSparkDrafter(CachedDrafter):
    """Drafts a block in one pass of its layers, then corrects it token by token. A block has a slot for each draft that
    is asked for, so what is drafted depends on how much is; and never on what is asked of other rows."""

    Config = DSparkConfig
    kinds = ("dspark", "dflash")

    def __init__(
        self,
        checkpoint: DraftCheckpoint,
        target: TargetModel,
        backend: Backend,
        *,
        config: Any,
        dtype: torch.dtype | str,
        max_rows: int,
    ) -> None:
        design = checkpoint.design
        assert isinstance(design, BlockDesign)
        changes = {name: getattr(config, name) for name in ("block_size", "sample_from_anchor")}
        self.design = design = replace(design, **{name: value for name, value in changes.items() if value is not None})
        checkpoint = replace(checkpoint, design=design)
        super().__init__(checkpoint, target, backend, config=config, dtype=dtype, max_rows=max_rows)
        self.block = min(self.block, design.drafts)
        self.head = SequentialHead(design, checkpoint.tensors, backend, dtype)
        self._fc = linear(backend, checkpoint.tensors["fc.weight"], dtype)
        self._hidden_norm = checkpoint.tensors["hidden_norm.weight"].float()
        self.core = self._block_drafter(checkpoint.tensors, backend, dtype, config.shortlist)

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Keep the features of committed tokens. They become keys and values at the next draft, or when many wait."""
        full = self.cache.add(batch, features)
        if full:
            self._absorb(full)

    def _block_drafter(
        self, tensors: Mapping[str, Tensor], backend: Backend, dtype: torch.dtype | str, shortlist: int
    ) -> BlockDrafter | None:
        """Drafts whole blocks in one call of the backend, where it can."""
        if not isinstance(backend, DraftsBlocks) or self.net.embedding is None or self.net.head is None:
            return None
        parts = BlockParts(
            layers=self.net.stack,
            embedding=self.net.embedding,
            head=self.net.head,
            block_size=self.design.block_size,
            first=0 if self.design.sample_from_anchor else 1,
            mask_token_id=self.design.mask_token_id,
            vocab_size=self.net.vocab_size,
            fusion=tensors["fc.weight"],
            fusion_norm=self._hidden_norm,
            markov=markov_parts(self.design, tensors, shortlist),
            confidence=self.head.confidence_weights,
            ids=self.net.target_ids,
        )
        return backend.block_drafter(parts, dtype)

    def _draft_at_once(
        self, named: list[int], last: list[int], lengths: list[int], context: Context, rng: Rng
    ) -> Proposal:
        """One call of the backend for the rows that draft."""
        rows = [b for b, n in enumerate(lengths) if n]
        params = [context.params[b] for b in rows]
        keys = draft_keys(rows, max(lengths), context, rng) if any(p.temperature for p in params) else None
        slots, counts, features = self.cache.take_features([named[b] for b in rows])
        drafts = self.core.draft(
            self.cache.kv_cache,
            slots,
            counts,
            features,
            [last[b] for b in rows],
            [lengths[b] for b in rows],
            keys,
            params,
            self.core_scalings(context, rows),
        )
        return packed_proposal(drafts, rows, lengths, self.net.vocab_size)

    def _draft_stepwise(
        self, named: list[int], last: list[int], lengths: list[int], context: Context, rng: Rng
    ) -> Proposal:
        """The block in one pass of the layers, then draft after draft."""
        drawing = Drawing(self.net, context, rng, lengths)
        rows = drawing.rows.tolist()
        anchors = torch.tensor([last[b] for b in rows])
        hidden, base = self.run_block([named[b] for b in rows], anchors, [lengths[b] for b in rows])
        before: list[Tensor] = []
        if not self.design.markov_rank:
            drawing.draw_all(base)
        else:
            before = self._draw_in_turn(drawing, anchors, hidden, base)
        confidence = self.head.confidence(hidden, before)
        return drawing.proposal(drawing.margins() if confidence is None else confidence)

    def _draw_in_turn(self, drawing: Drawing, anchors: Tensor, hidden: Tensor, base: Tensor) -> list[Tensor]:
        """Draw draft after draft from its full distribution. -> W1 of the token before each"""
        previous, state, before = anchors, self.head.start(len(anchors)), []
        for k in range(hidden.shape[1]):
            state, embedding, latent = self.head.step(state, previous, hidden[:, k])
            before.append(embedding)
            previous = drawing.draw(self.head.corrected(base[:, k], latent))
        return before

    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``TrainedDrafter.follow``."""
        hidden, base = self.run_block(slots, path[:, 0], [self.design.drafts] * len(slots))  # whole, as in training
        state, logits, before = self.head.start(len(slots)), [], []
        for k in range(path.shape[1]):
            state, embedding, latent = self.head.step(state, path[:, k], hidden[:, k])
            logits.append(self.head.corrected(base[:, k], latent))
            before.append(embedding)
        return torch.stack(logits, 1), self.head.confidence_logits(hidden[:, : path.shape[1]], before)

    def run_block(self, slots: list[int], anchors: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A block of each row, no longer than its drafts need (fewer masks change the drafts, but no more or fewer of
        them are accepted): hidden states after the final norm, and base logits, at the slots that predict. K is the
        largest length; what is beyond a row's own is meaningless.

        anchors int64 [n], lengths [n] -> [n, K, D], [n, K, Vd].
        """
        self._absorb(slots)
        mask, first, drafts = self.design.mask_token_id, 0 if self.design.sample_from_anchor else 1, max(lengths)
        cache_slots, starts = self.cache.cache_slots(slots), self.cache.held(slots)
        blocks = [[anchor, *[mask] * (first + n - 1)] for anchor, n in zip(anchors.tolist(), lengths, strict=True)]
        batch = RaggedBatch.pack(blocks, starts.tolist(), cache_slots.tolist())
        slot = first + torch.arange(drafts).minimum(torch.tensor(lengths)[:, None] - 1)
        wanted = batch.offsets[:-1, None] + slot
        output = self.net.stack.forward(
            batch, self.cache.kv_cache, hidden=self.net.embed(batch.tokens), logits_at=wanted.flatten(), mask="block"
        )
        self.cache.kv_cache.rewind(cache_slots, starts)  # the keys and values of the block itself are scratch
        shape = len(slots), drafts, -1
        return output.hidden.view(shape), self.net.logits(output).view(shape)

    def _absorb(self, slots: list[int]) -> None:
        if self.core is not None:
            self.core.absorb(self.cache.kv_cache, *self.cache.take_features(slots))
            return
        waiting = self.cache.take(slots)
        if waiting is not None:
            context = rms_norm(self._fc(waiting.features), self._hidden_norm, self.net.stack.config.norm_eps)
            self.net.stack.project(context, waiting.batch, self.cache.kv_cache)


class DFlashDrafter(DSparkDrafter):
    """The same without Markov head and confidence head: each draft depends on its own slot's logits alone."""

    kinds = ("dflash", "dspark")


class SequentialHead:
    """What makes a block's tokens depend on each other: the Markov head (equations 4 to 6), and the confidence (7)."""

    def __init__(
        self, design: BlockDesign, tensors: Mapping[str, Tensor], backend: Backend, dtype: torch.dtype | str
    ) -> None:
        self.design = design
        self.confidence_weights: tuple[Tensor, Tensor] | None = None
        if design.confidence:
            self.confidence_weights = tensors["confidence.weight"].float()[0], tensors["confidence.bias"].float()
        if not design.markov_rank:
            return
        self._w1, self._w2 = tensors["markov.w1.weight"].float(), linear(backend, tensors["markov.w2.weight"], dtype)
        if design.markov_head != "vanilla":
            name = MIXES[design.markov_head]
            self._mix = linear(backend, tensors[f"{name}.weight"], dtype, tensors[f"{name}.bias"])

    def start(self, rows: int) -> Tensor:
        """The state before a block's first token, [n, r]: the recurrent head starts from zero in every block."""
        return torch.zeros(rows, self.design.markov_rank)

    def step(self, state: Tensor, previous: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The state after a token, its embedding, and what W2 makes the bias of.

        state [n, r], previous int64 [n] (target ids), hidden [n, D] -> state, W1[previous], latent, each [n, r].
        """
        if not self.design.markov_rank:
            return state, state, None
        embedding = self._w1[previous]
        if self.design.markov_head == "vanilla":
            return state, embedding, embedding
        hidden = hidden.to(embedding.dtype)
        if self.design.markov_head == "gated":
            gate = rowwise(torch.sigmoid, self._mix(torch.cat([hidden, embedding], 1)))
            return state, embedding, gate * embedding
        gate, candidate, out = self._mix(torch.cat([state, embedding, hidden], 1)).chunk(3, 1)
        gate = rowwise(torch.sigmoid, gate)
        state = gate * state + (1 - gate) * rowwise(torch.tanh, candidate)
        return state, embedding, rowwise(torch.tanh, out)

    def corrected(self, base: Tensor, latent: Tensor | None) -> Tensor:
        """Base logits plus the Markov bias. [n, Vd]"""
        return base if latent is None else base + self._w2(latent)

    def confidence_logits(self, hidden: Tensor, before: list[Tensor]) -> Tensor | None:
        """[n, K, D] and W1 of the token before each, K of [n, r] -> float32 [n, K]; None without that head."""
        if self.confidence_weights is None:
            return None
        weight, bias = self.confidence_weights
        states = hidden.float()
        if self.design.confidence_with_markov:
            states = torch.cat([states, torch.stack(before, 1)], 2)
        return (states * weight).sum(2) + bias

    def confidence(self, hidden: Tensor, before: list[Tensor]) -> Tensor | None:
        """P(draft k is accepted | those before it were), float32 [n, K]."""
        logits = self.confidence_logits(hidden, before)
        return None if logits is None else rowwise(torch.sigmoid, logits)


def markov_parts(design: BlockDesign, tensors: Mapping[str, Tensor], shortlist: int) -> MarkovParts | None:
    """The Markov head as a backend takes it. The product of gated and recurrent heads is split into the part that
    reads the hidden states, which depends on no token, and the rest."""
    if not design.markov_rank:
        return None
    w1, w2, rank = tensors["markov.w1.weight"], tensors["markov.w2.weight"], design.markov_rank
    if design.markov_head == "vanilla":
        return MarkovParts("vanilla", w1, w2, None, None, None, shortlist)
    weight, bias = (tensors[f"{MIXES[design.markov_head]}.{end}"] for end in ("weight", "bias"))
    if design.markov_head == "gated":
        return MarkovParts("gated", w1, w2, weight[:, -rank:], weight[:, :-rank], bias, shortlist)
    return MarkovParts("rnn", w1, w2, weight[:, : 2 * rank], weight[:, 2 * rank :], bias, shortlist)
