"""Contracts of decoder stacks and of the backends that run them.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from outrider.config import StackConfig
from outrider.types.caches import KVCache
from outrider.types.passes import Mask, RaggedBatch, StackOutput, TargetOutput
from outrider.types.rounds import Context, Distribution, Proposal, Rng, Verification

__all__ = ["Backend", "DraftLoop", "FindsLargest", "HasStack", "Stack", "TiedHead", "finds_largest"]


class Stack(Protocol):
    """A decoder stack on one kind of hardware."""

    config: StackConfig

    @property
    def dtype(self) -> torch.dtype | str: ...  # of its weights, as it was loaded
    def new_cache(self, slots: int, capacity: int) -> KVCache: ...
    def forward(
        self,
        batch: RaggedBatch,
        cache: KVCache,
        *,
        hidden: Tensor | None = None,
        residual: Tensor | None = None,
        aux_layers: Sequence[int] = (),
        logits_at: Tensor | None = None,
        mask: Mask = "causal",
    ) -> StackOutput:
        """Run the batch through all layers; keys and values land at its positions, and each slot's length
        becomes its last position + 1.

        ``hidden`` [T, D] replaces the embedding of ``batch.tokens``. Where the config sets ``input_width``
        (EAGLE-3), ``hidden`` [T, input width] is layer 0's attention input as it is, already normalised, and
        ``residual`` [T, D] the residual stream. ``aux_layers`` are 0-based layers (any of them here), -1 the input.
        ``logits_at`` int64 [R] indexes the packed tokens; None = all, empty = none.
        """
        ...

    def project(self, hidden: Tensor, batch: RaggedBatch, cache: KVCache) -> None:
        """Write every layer's keys and values of ``hidden`` [T, D] without running the layers (DSpark's context)."""
        ...

    def embed(self, tokens: Tensor) -> Tensor: ...  # int64 [...] -> [..., D]
    def unembed(self, hidden: Tensor) -> Tensor: ...  # [..., D] after the final norm -> [..., V]


class Backend(Protocol):
    """Runs layer stacks on one kind of hardware, and what follows a pass on the tensors it makes."""

    name: str
    device: torch.device  # where its logits, features and hidden states are

    def load(self, config: StackConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | str) -> Stack:
        """``weights`` by the canonical names of ``outrider.backends.layers``; may keep or repack them."""
        ...

    def verify(
        self, target: Distribution, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng
    ) -> Verification:
        """``sampling.verification.verify`` on this hardware: the same tokens from the same arguments."""
        ...

    def sample(self, distribution: Distribution, keys: Tensor) -> Tensor:
        """One token a row by Gumbel-max with the keys of ``Rng.token_keys``. int64 [R] -> [R]."""
        ...


@runtime_checkable
class DraftLoop(Protocol):
    """A stack or target that drafts several tokens in one call: run the batch, then a token a row at a time."""

    def draft_loop(
        self, batch: RaggedBatch, cache: KVCache, keys: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor]:
        """keys int64 [B, K], temperatures float32 [B] (0 = greedy) -> tokens int64 [B, K], logits [B * K, V]."""
        ...


@runtime_checkable
class FindsLargest(Protocol):
    """A stack or target whose ``forward`` also takes ``largest`` where ``finds_largest`` is True: it then gives the
    token of each row's largest logit (the lowest id on ties, -1 where the largest is NaN or infinite) instead of the
    logits, and writes no V numbers for each row."""

    finds_largest: bool

    @property
    def forward(self) -> Callable[..., StackOutput | TargetOutput]: ...


def finds_largest(model: object) -> bool:
    """Whether ``forward`` of a stack or target takes ``largest``: not where a wrapper or subclass inherits the flag but
    has a ``forward`` of its own without that parameter."""
    return isinstance(model, FindsLargest) and model.finds_largest and "largest" in signature(model.forward).parameters


@runtime_checkable
class HasStack(Protocol):
    """A target whose embedding, layers and head are one stack. A drafter may share its embedding and head."""

    stack: Stack


@runtime_checkable
class TiedHead(Protocol):
    """A stack that says whether head and embedding are one matrix in memory: then ``embed`` gives the head's rows."""

    tied: bool
