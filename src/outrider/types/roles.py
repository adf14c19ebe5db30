"""Contracts of targets and drafters.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from outrider.types.caches import KVCache
from outrider.types.passes import RaggedBatch, TargetOutput, Values
from outrider.types.rounds import Context, Proposal, Rng
from outrider.types.stacks import Backend

__all__ = ["Drafter", "Forgets", "ReadsHidden", "ResetsRows", "TargetModel", "TargetSpec", "readable_layers"]


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """All that a drafter may know of a target besides its tensors."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    dtype: torch.dtype
    name: str = ""
    eos_token_ids: tuple[int, ...] = ()
    defaults: dict[str, float] = field(default_factory=dict)  # sampling defaults of generation_config.json


def readable_layers(count: int) -> range:
    """Layers whose output a drafter may read from a target of ``count`` layers: -1, the embedding, and all but the last
    one, which libraries report before or after the final norm."""
    return range(-1, count - 1)


@runtime_checkable
class TargetModel(Protocol):
    """The model whose text it is."""

    spec: TargetSpec
    backend: Backend

    def new_cache(self, slots: int, capacity: int) -> KVCache: ...
    def forward(
        self, batch: RaggedBatch, cache: KVCache, aux_layers: Sequence[int] = (), logits_at: Tensor | None = None
    ) -> TargetOutput:
        """One pass. ``aux_layers`` are 0-based layers, -1 the embedding output; the last layer is refused."""
        ...

    def embed(self, tokens: Tensor) -> Tensor: ...  # int64 [...] -> [..., D]
    def unembed(self, hidden: Tensor) -> Tensor: ...  # [..., D] after the final norm -> [..., V]


@runtime_checkable
class Drafter(Protocol):
    """Proposes; is told what became of it. A slot is a row for its whole life, the engine's number for it."""

    aux_layers: tuple[int, ...]  # target layers whose features it reads; () for none
    block: int  # the most tokens it can propose

    def open(self, slot: int, capacity: int) -> None:
        """Reserve ``slot`` for a sequence of up to ``capacity`` tokens. Nothing is read yet."""
        ...

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        """Draft up to ``limit[b]`` tokens after ``last[b]``. slots, last, limit: [B]."""
        ...

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        """Committed tokens that passed through the target: every prefill chunk, and of every round the
        row's ``last`` and its accepted drafts (never the new ``last``).

        features [T, F] of ``aux_layers``, a tensor or a float32 array, or None. hidden [C, D]: the target's state
        after its final norm at the last token of each of the first C rows, from which the row's next token was
        sampled; the rows after them end in the middle of their prompt. None where the target cannot tell it.
        """
        ...

    def close(self, slot: int) -> None: ...


@runtime_checkable
class ReadsHidden(Protocol):
    """A drafter whose ``observe`` wants the target's last hidden states."""

    reads_hidden: Literal[True]


@runtime_checkable
class ResetsRows(Protocol):
    """A drafter that can close all of its slots at once, whatever state an interrupted call left them in."""

    def reset_rows(self) -> None: ...


@runtime_checkable
class Forgets(Protocol):
    """A drafter that remembers earlier requests and can forget them."""

    def forget(self) -> None: ...
