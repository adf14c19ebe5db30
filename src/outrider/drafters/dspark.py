"""Semi-autoregressive drafting: a parallel block over the target's features, then a sequential head (DSpark).

DSpark, arXiv 2026 (DeepSeek): context injected into keys and values (equations 2 and 3), Markov head (4 to 6),
confidence head (7). DFlash (arXiv 2602.06036) is the same with both heads off.

n rows that draft, K drafts, S slots of a block, D width, F feature width, r Markov rank, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from outrider.checkpoints import DraftCheckpoint
from outrider.drafters.base import CachedDrafter, Drawing, linear, rms_norm, rowwise
from outrider.drafters.dspark_design import BlockDesign
from outrider.errors import InvalidRequest
from outrider.types import Backend, BlockHead, Context, DraftsBlocks, Proposal, RaggedBatch, Rng, TargetModel

__all__ = ["DFlashDrafter", "DSparkConfig", "DSparkDrafter", "SequentialHead"]


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

    shortlist: int = 1024
    """On the native core: how many tokens, those of the largest base logits, a sampled draft is drawn from."""

    def __post_init__(self) -> None:
        for name in ("draft_tokens", "block_size", "shortlist"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"drafter dspark: {name} must be at least 1, got {value}")


class DSparkDrafter(CachedDrafter):
    """Drafts a block in one pass of its layers, then corrects it token by token."""

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
        self.head = SequentialHead(
            design, checkpoint.tensors, backend, dtype, target_ids=self.net.target_ids, shortlist=config.shortlist
        )
        self._fc = linear(backend, checkpoint.tensors["fc.weight"], dtype)
        self._hidden_norm = checkpoint.tensors["hidden_norm.weight"].float()

    def observe(self, batch: RaggedBatch, features: Tensor | None, hidden: Tensor | None = None) -> None:
        """Keep the features of committed tokens. They become keys and values at the next draft, or when many wait."""
        full = self.cache.add(batch, features)
        if full:
            self._absorb(full)

    def propose(self, slots: Tensor, last: Tensor, context: Context, limit: Tensor, rng: Rng) -> Proposal:
        """All rows in one pass. A row with missing features drafts nothing."""
        named = slots.tolist()
        lengths = self.cache.lengths(named, context, limit.tolist(), self.block)
        if not any(lengths):
            return Proposal.empty(len(named))
        drawing = Drawing(self.net, context, rng, lengths)
        anchors = last[drawing.rows]
        hidden, base = self.run_block([named[b] for b in drawing.rows.tolist()], anchors, max(lengths))
        if self.head.core is not None and drawing.plain:
            tokens, margins, distribution = self.head.draft(base, hidden, anchors, drawing.keys(), drawing.temperatures)
            drawing.record(tokens, margins, distribution)
            before = self.head.before(anchors, tokens)
        elif not self.design.markov_rank:
            drawing.draw_all(base)
            before = []
        else:
            before = self._draft_stepwise(drawing, anchors, hidden, base)
        confidence = self.head.confidence(hidden, before)
        proposal = drawing.proposal(drawing.margins() if confidence is None else confidence)
        return self.calibrated(proposal, context)

    def _draft_stepwise(self, drawing: Drawing, anchors: Tensor, hidden: Tensor, base: Tensor) -> list[Tensor]:
        """Draw draft after draft from its full distribution. -> W1 of the token before each"""
        previous, state, before = anchors, self.head.start(len(anchors)), []
        for k in range(hidden.shape[1]):
            state, embedding, latent = self.head.step(state, previous, hidden[:, k])
            before.append(embedding)
            previous = drawing.draw(self.head.corrected(base[:, k], latent))
        return before

    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``TrainedDrafter.follow``."""
        hidden, base = self.run_block(slots, path[:, 0], path.shape[1])
        state, logits, before = self.head.start(len(slots)), [], []
        for k in range(path.shape[1]):
            state, embedding, latent = self.head.step(state, path[:, k], hidden[:, k])
            logits.append(self.head.corrected(base[:, k], latent))
            before.append(embedding)
        return torch.stack(logits, 1), self.head.confidence_logits(hidden, before)

    def run_block(self, slots: list[int], anchors: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        """The block at the slots that predict: hidden states after the final norm, and base logits.

        int64 [n] -> [n, drafts, D], [n, drafts, Vd].
        """
        self._absorb(slots)
        size, first = self.design.block_size, 0 if self.design.sample_from_anchor else 1
        cache_slots, starts = self.cache.cache_slots(slots), self.cache.held(slots)
        tokens = torch.full((len(slots), size), self.design.mask_token_id, dtype=torch.int64)
        tokens[:, 0] = anchors
        block = torch.arange(size)
        batch = RaggedBatch(
            tokens.flatten(), (starts[:, None] + block).flatten(), cache_slots, torch.arange(len(slots) + 1) * size
        )
        wanted = torch.arange(len(slots))[:, None] * size + first + torch.arange(drafts)
        output = self.net.stack.forward(
            batch, self.cache.kv_cache, hidden=self.net.embed(batch.tokens), logits_at=wanted.flatten(), mask="block"
        )
        self.cache.kv_cache.rewind(cache_slots, starts)  # the keys and values of the block itself are scratch
        shape = len(slots), drafts, -1
        return output.hidden.view(shape), self.net.logits(output).view(shape)

    def _absorb(self, slots: list[int]) -> None:
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
        self,
        design: BlockDesign,
        tensors: Mapping[str, Tensor],
        backend: Backend,
        dtype: torch.dtype | str,
        *,
        target_ids: Tensor | None = None,
        shortlist: int = 1024,
    ) -> None:
        """``target_ids`` of a reduced vocabulary. A ``DraftsBlocks`` backend drafts whole blocks in one call."""
        self.design = design
        self.core: BlockHead | None = None
        self._confidence: tuple[Tensor, Tensor] | None = None
        self._mix_hidden: Callable[[Tensor], Tensor] | None = None
        if design.confidence:
            self._confidence = tensors["confidence.weight"].float()[0], tensors["confidence.bias"].float()
        if not design.markov_rank:
            return
        w1, w2, mix = tensors["markov.w1.weight"], tensors["markov.w2.weight"], None
        self._w1, self._w2 = w1.float(), linear(backend, w2, dtype)
        make = backend.markov_head if isinstance(backend, DraftsBlocks) else None
        if design.markov_head != "vanilla":
            name = "markov.gate" if design.markov_head == "gated" else "markov.joint"
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            self._mix = linear(backend, weight, dtype, bias)
            if make is not None:  # the hidden states' part of the product depends on no token
                if design.markov_head == "gated":
                    of_hidden, mix = weight[:, : -design.markov_rank], weight[:, -design.markov_rank :]
                else:
                    mix, of_hidden = weight[:, : 2 * design.markov_rank], weight[:, 2 * design.markov_rank :]
                self._mix_hidden = linear(backend, of_hidden, dtype, bias)
        ascending = target_ids is None or bool((target_ids.diff() > 0).all())
        if make is not None and ascending:
            self.core = make(design.markov_head, w1, w2, mix, target_ids, dtype, shortlist)

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

    def draft(
        self, base: Tensor, hidden: Tensor, anchors: Tensor, keys: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """A whole block in one call of the backend's ``core``: see ``NativeMarkovHead.draft``. base [n, K, Vd],
        hidden [n, K, D], anchors int64 [n], keys int64 [n, K], temperatures float32 [n]."""
        mixed = None if self._mix_hidden is None else self._mix_hidden(hidden.flatten(0, 1))
        assert self.core is not None
        return self.core.draft(base, mixed, anchors, keys, temperatures)

    def before(self, anchors: Tensor, tokens: Tensor) -> list[Tensor]:
        """W1 of the token before each draft, if the confidence head reads it. int64 [n], int64 [n, K] -> K of [n, r]"""
        if not self.design.confidence_with_markov:
            return []
        return list(self._w1[torch.cat([anchors[:, None], tokens[:, :-1]], 1)].unbind(1))

    def confidence_logits(self, hidden: Tensor, before: list[Tensor]) -> Tensor | None:
        """[n, K, D] and W1 of the token before each, K of [n, r] -> float32 [n, K]; None without that head."""
        if self._confidence is None:
            return None
        weight, bias = self._confidence
        states = hidden.float()
        if self.design.confidence_with_markov:
            states = torch.cat([states, torch.stack(before, 1)], 2)
        return (states * weight).sum(2) + bias

    def confidence(self, hidden: Tensor, before: list[Tensor]) -> Tensor | None:
        """P(draft k is accepted | those before it were), float32 [n, K]."""
        logits = self.confidence_logits(hidden, before)
        return None if logits is None else rowwise(torch.sigmoid, logits)
