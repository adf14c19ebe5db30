"""Drafting token by token with a small stack that reads the target's features, then its own hidden states.

Position i of the KV cache stands for the target's features at position i together with token i + 1: the token is
known one step later than the features, so the final pair of a row is run again when it is certain.
n rows, T packed tokens, F feature width, D width, K drafts, Vd draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.drafters.base.draft_sampling import Drawing, draft_keys, packed_proposal
from outrider.drafters.base.trained import CachedDrafter
from outrider.types import (
    AutoregressiveParts,
    Backend,
    Context,
    DraftsInTurn,
    InTurnDrafter,
    Proposal,
    RaggedBatch,
    Rng,
    Values,
)

__all__ = ["AutoregressiveDrafter", "AutoregressiveState"]


@dataclass(frozen=True, slots=True)
class AutoregressiveState:
    """The state of some rows between two drafts."""

    slots: Tensor  # int64 [n]        slots of the KV cache
    positions: Tensor  # int64 [n]    of the next input
    hidden: Tensor  # [n, D]          what the next input is made of
    logits: Tensor  # [n, Vd]         of the next draft


class AutoregressiveDrafter(CachedDrafter):
    """The part that EAGLE-3 and multi-token prediction have in common. They differ in what enters the stack."""

    pairs = True
    feeds_normed = False
    """Whether the state fed back is the one after the final norm."""

    def in_turn(
        self,
        backend: Backend,
        dtype: torch.dtype | str,
        *,
        norms: tuple[Tensor, Tensor],
        fusion: Tensor | None = None,
        feature_norm: Tensor | None = None,
        feature_groups: int = 1,
        projection: Tensor | None = None,
        norm_residual: bool = False,
    ) -> InTurnDrafter | None:
        """``core`` of a backend that has it: see ``AutoregressiveParts``. ``norms``: of embedding and state."""
        net = self.net
        if not isinstance(backend, DraftsInTurn) or net.embedding is None or net.head is None:
            return None
        parts = AutoregressiveParts(
            net.stack,
            net.embedding,
            net.head,
            fusion=fusion,
            feature_norm=feature_norm,
            feature_groups=feature_groups,
            embed_norm=norms[0],
            hidden_norm=norms[1],
            projection=projection,
            norm_residual=norm_residual,
            feeds_normed=self.feeds_normed,
            ids=net.target_ids,
        )
        return backend.autoregressive_drafter(parts, dtype)

    @abstractmethod
    def condition(self, features: Tensor) -> Tensor:
        """The state that drafting starts from. [T, F] -> [T, D]"""

    @abstractmethod
    def fuse(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """``hidden`` and ``residual`` of ``Stack.forward``, from a state and the token that follows it."""

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Keep the features of committed tokens. They become keys and values at the next draft, or when many wait."""
        full = self.cache.add(batch, features)
        if full:
            waiting = self.cache.take_pairs(full, None)
            hidden, residual = self.fuse(waiting.batch.tokens, self.condition(waiting.features))
            nothing = waiting.batch.offsets[:0]
            self.net.stack.forward(
                waiting.batch, self.cache.kv_cache, hidden=hidden, residual=residual, logits_at=nothing
            )

    def _draft_at_once(
        self, named: list[int], last: list[int], lengths: list[int], context: Context, rng: Rng
    ) -> Proposal:
        """One call of the backend for the rows that draft."""
        rows = [b for b, n in enumerate(lengths) if n]
        params = [context.params[b] for b in rows]
        keys = draft_keys(rows, max(lengths), context, rng) if any(p.temperature for p in params) else None
        taken = self.cache.take_paired_features([named[b] for b in rows], [last[b] for b in rows])
        drafts = self.core.draft(
            self.cache.kv_cache, *taken, max(lengths), keys, params, self.core_scalings(context, rows)
        )
        return packed_proposal(drafts, rows, lengths, self.net.vocab_size)

    def _draft_stepwise(
        self, named: list[int], last: list[int], lengths: list[int], context: Context, rng: Rng
    ) -> Proposal:
        """One pass of the layers a draft."""
        drawing = Drawing(self.net, context, rng, lengths)
        drafting = drawing.rows.tolist()
        rows = [named[b] for b in drafting]
        state = self.begin(rows, [last[b] for b in drafting])
        for _ in range(max(lengths) - 1):
            state = self.feed(state, drawing.draw(state.logits))
        drawing.draw(state.logits)
        self.rewind(rows)
        return drawing.proposal(drawing.margins())

    def follow(self, slots: list[int], path: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``TrainedDrafter.follow``."""
        state = self.begin(slots, path[:, 0].tolist())
        logits = [state.logits]
        for tokens in path.T[1:]:
            state = self.feed(state, tokens)
            logits.append(state.logits)
        self.rewind(slots)
        return torch.stack(logits, 1), None

    def begin(self, slots: list[int], last: Sequence[int]) -> AutoregressiveState:
        """Run the waiting tokens, up to the rows' last ones, on the target's features. [n]"""
        waiting = self.cache.take_pairs(slots, last)
        return self._run(waiting.batch, self.condition(waiting.features), waiting.batch.offsets[1:] - 1)

    def feed(self, state: AutoregressiveState, tokens: Tensor) -> AutoregressiveState:
        """Run a draft of each row on the stack's own state. int64 [n]"""
        rows = torch.arange(len(tokens) + 1)
        return self._run(RaggedBatch(tokens, state.positions, state.slots, rows), state.hidden, rows[:-1])

    def rewind(self, slots: list[int]) -> None:
        """Rewind the keys and values of everything that is not committed."""
        self.cache.kv_cache.rewind(self.cache.cache_slots(slots), self.cache.held(slots))

    def _run(self, batch: RaggedBatch, hidden: Tensor, ends: Tensor) -> AutoregressiveState:
        fused, residual = self.fuse(batch.tokens, hidden)
        aux_layers = () if self.feeds_normed else (len(self.net.stack.config.layers) - 1,)
        output = self.net.stack.forward(
            batch, self.cache.kv_cache, hidden=fused, residual=residual, aux_layers=aux_layers, logits_at=ends
        )
        state = output.hidden if output.features is None else output.features[ends]
        return AutoregressiveState(batch.slots, batch.positions[ends] + 1, state, self.net.logits(output))
