"""Contracts of backends that draft several tokens in one call, and what trained drafters are made of.

Shapes: the legend of ``outrider.types``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.types.caches import KVCache
from outrider.types.passes import Integers, Values
from outrider.types.stacks import Stack

__all__ = [
    "AutoregressiveParts",
    "BlockDrafter",
    "BlockParts",
    "CoreScaling",
    "Drafts",
    "DraftsBlocks",
    "DraftsInTurn",
    "InTurnDrafter",
    "MarkovParts",
]

CoreScaling = tuple[Sequence[float], Sequence[float], float]
"""A row's scaling of confidences (``scheduling.calibration.Scaling``): temperatures, shifts, and the largest logit."""


@dataclass(frozen=True, slots=True)
class MarkovParts:
    """The sequential head of a block drafter (DSpark, equations 4 to 6). r: its rank."""

    kind: str  # vanilla, gated or rnn
    w1: Tensor  # [V, r]
    w2: Tensor  # [Vd, r]
    mix: Tensor | None  # the part of the product that reads no hidden states: [r, r] gated, [3 r, 2 r] rnn
    mix_hidden: Tensor | None  # the part that does: [r, D] gated, [3 r, D] rnn
    mix_bias: Tensor | None  # [r] gated, [3 r] rnn
    shortlist: int  # tokens that a sampled draft is drawn from, those of the largest base logits


@dataclass(frozen=True, slots=True)
class BlockParts:
    """What a block drafter is made of. Vd: tokens it can draft."""

    layers: Stack
    embedding: Stack  # the stack whose embedding it reads, and the one whose head it uses: its own or the target's
    head: Stack
    block_size: int
    first: int  # slot of the first draft: 0 or 1
    mask_token_id: int
    vocab_size: int  # V
    fusion: Tensor  # [D, F]: features to the context's hidden states, before ``fusion_norm`` [D]
    fusion_norm: Tensor
    markov: MarkovParts | None
    confidence: tuple[Tensor, Tensor] | None  # weight [D], or [D + r] where it reads W1 of the token before; bias [1]
    ids: Tensor | None  # int64 [Vd]: target id of each draft id; None: the same


class Drafts(NamedTuple):
    """Drafts of n rows, K each."""

    tokens: Tensor | Integers  # int64 [n, K]
    confidence: Values  # float32 [n, K]
    ids: Tensor | Integers | None  # int64 [n K, S], ascending, filled up with V: the distributions' tokens; None: all
    logits: Values | None  # float32 [n K, S] after temperature; None: all rows are greedy


@runtime_checkable
class DraftsBlocks(Protocol):
    """A backend that drafts a whole block in one call."""

    def block_drafter(self, parts: BlockParts, dtype: torch.dtype | str) -> BlockDrafter | None:
        """None where it cannot: a part is on another backend, for instance."""
        ...


class BlockDrafter(Protocol):
    """A block drafter on one kind of hardware. Rows whose features wait come in order, ``counts`` tokens each."""

    def absorb(self, cache: KVCache, slots: Sequence[int], counts: Sequence[int], features: Sequence[Values]) -> None:
        """Append the keys and values of waiting features, [tokens, F] in pieces, row after row."""
        ...

    def draft(
        self,
        cache: KVCache,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Values],
        anchors: Sequence[int],
        lengths: Sequence[int],
        keys: list[list[int]] | None,
        params: Sequence[SamplingParams],
        scalings: Sequence[CoreScaling | None],
    ) -> Drafts:
        """The same, then as many drafts for each of n rows as ``lengths`` [n] says, in a block of so many slots; what
        is beyond, up to the K of the longest, means nothing. Nothing of them stays in the cache. anchors [n]: the rows'
        last tokens; keys [n][K] of ``Rng.token_keys``, None where all rows are greedy; ``params`` [n]: of which
        temperature and truncation are applied; ``scalings`` [n] of the confidences, empty: of none."""
        ...


@dataclass(frozen=True, slots=True)
class AutoregressiveParts:
    """What an autoregressive drafter that reads features is made of. Vd: tokens it can draft."""

    layers: Stack
    embedding: Stack  # the stack whose embedding it reads, and the one whose head it uses: its own or the target's
    head: Stack
    fusion: Tensor | None  # [D, F]: features to a state; None: they are one
    feature_norm: Tensor | None  # [F], before the fusion
    feature_groups: int  # parts of the features that are normalised each by itself
    embed_norm: Tensor  # [D]
    hidden_norm: Tensor  # [D]
    projection: Tensor | None  # [D, 2 D]; None: the layers take embedding and state side by side, and a residual
    norm_residual: bool  # whether that residual is the normalised state
    feeds_normed: bool  # whether the state fed back is the one after the final norm
    ids: Tensor | None  # int64 [Vd]: target id of each draft id; None: the same


@runtime_checkable
class DraftsInTurn(Protocol):
    """A backend that drafts several tokens, each from the state of the one before, in one call."""

    def autoregressive_drafter(self, parts: AutoregressiveParts, dtype: torch.dtype | str) -> InTurnDrafter | None:
        """None where it cannot: a part is on another backend, for instance."""
        ...


class InTurnDrafter(Protocol):
    """An autoregressive drafter on one kind of hardware."""

    def draft(
        self,
        cache: KVCache,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Values],
        tokens: Sequence[int],
        drafts: int,
        keys: list[list[int]] | None,
        params: Sequence[SamplingParams],
        scalings: Sequence[CoreScaling | None],
    ) -> Drafts:
        """Run the waiting features of n rows, then draft K ``drafts`` a row.

        ``counts`` [n], at least 1: waiting features of each row; ``features`` [T, F] in pieces and ``tokens`` [T], the
        one that follows each of them, row after row. All but each row's last one stay in the cache. ``keys``,
        ``params`` and ``scalings`` as in ``BlockDrafter.draft``.
        """
        ...
