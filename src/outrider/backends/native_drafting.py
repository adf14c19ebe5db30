"""Drafters that read features in the compiled core: features in, drafts and their distributions out, in one call.

A block is drafted at once, or tokens in turn. Greedy drafts are the largest of all logits. Where a Markov head corrects
a block's logits, sampled drafts are drawn from a shortlist of the tokens whose base logits are largest, and that
distribution is the one reported.

n rows, K drafts, D width, F feature width, r Markov rank, V and Vd vocabularies of target and drafter, S entries of a
distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.core import native
from outrider.errors import CacheFull, InvalidRequest
from outrider.types import AutoregressiveParts, BlockParts, CoreScaling, Drafts, MarkovParts, Values

__all__ = ["NativeBlockDrafter", "NativeInTurnDrafter", "autoregressive_parts", "block_parts", "markov_head"]

NO_LIMIT = 1 << 62  # a top-k that keeps everything


def markov_head(parts: MarkovParts, ids: Tensor | None, isa: str, dtype: torch.dtype | str) -> Any:
    """The core's Markov head. ids int64 [Vd]: the target id of each draft id, ascending; None where they are the same.

    It is kept as float32 with ``float32``, else as bfloat16: only a few rows are read, so fewer bits save nothing.
    """
    spec = native.MarkovSpec()
    spec.isa, spec.kind, spec.rank = isa, getattr(native.MarkovKind, parts.kind), parts.w1.shape[1]
    spec.dtype = native.DType.f32 if str(dtype).removeprefix("torch.") == "float32" else native.DType.bf16
    spec.vocabulary, spec.drafted, spec.shortlist = len(parts.w1), len(parts.w2), parts.shortlist
    matrices = [None if m is None else m.detach().float().contiguous() for m in (parts.w1, parts.w2, parts.mix)]
    return native.MarkovHead(spec, *matrices, ids)


def block_parts(parts: BlockParts, stacks: dict[str, Any], isa: str, dtype: torch.dtype | str) -> Any:
    """A drafter's parts as the core takes them. ``stacks``: the core's ``layers``, ``embedding``, ``head``, ``fusion``
    and, where the Markov head reads hidden states, ``mix``."""
    made = native.BlockParts()
    made.size, made.first, made.mask_token = parts.block_size, parts.first, parts.mask_token_id
    made.vocabulary = parts.vocab_size
    for name, stack in stacks.items():
        setattr(made, name, stack)
    made.fusion_norm = parts.fusion_norm.float().tolist()
    if parts.markov is not None:
        made.markov = markov_head(parts.markov, parts.ids, isa, dtype)
        if parts.markov.mix_bias is not None:
            made.mix_bias = parts.markov.mix_bias.float().tolist()
    if parts.confidence is not None:
        weight, bias = parts.confidence
        made.confidence, made.confidence_bias = weight.float().tolist(), float(bias)
    if parts.ids is not None:
        made.ids = parts.ids.tolist()
    return made


def autoregressive_parts(parts: AutoregressiveParts, stacks: dict[str, Any]) -> Any:
    """A drafter's parts as the core takes them. ``stacks``: the core's ``layers``, ``embedding``, ``head`` and, where
    there are any, ``fusion`` and ``projection``."""
    made = native.AutoregressiveParts()
    for name, stack in stacks.items():
        setattr(made, name, stack)
    if parts.feature_norm is not None:
        made.feature_norm, made.feature_groups = parts.feature_norm.float().tolist(), parts.feature_groups
    made.embed_norm, made.hidden_norm = parts.embed_norm.float().tolist(), parts.hidden_norm.float().tolist()
    made.norm_residual, made.feeds_normed = parts.norm_residual, parts.feeds_normed
    if parts.ids is not None:
        made.ids = parts.ids.tolist()
    return made


class NativeBlockDrafter:
    """See ``outrider.types.BlockDrafter``."""

    def __init__(self, parts: Any) -> None:
        self.core = native.BlockDrafter(parts)
        self._size = parts.size

    def absorb(self, cache: Any, slots: Sequence[int], counts: Sequence[int], features: Sequence[Values]) -> None:
        """Append the keys and values of waiting features. Raises InvalidRequest, and CacheFull past the capacity."""
        arguments = (cache.core, slots, counts, _arrays(features))
        _with_room(self.core.absorb, arguments, cache, slots, counts, 0)

    def draft(
        self,
        cache: Any,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Values],
        anchors: Sequence[int],
        lengths: Sequence[int],
        keys: list[list[int]] | None,
        params: Sequence[SamplingParams],
        scalings: Sequence[CoreScaling | None],
    ) -> Drafts:
        """The same, then up to K drafts a row. Raises InvalidRequest, and CacheFull past the capacity."""
        rows = (cache, slots, counts, features, (anchors, lengths))
        return _draft(self.core, *rows, max(lengths), keys, params, scalings, self._size)


class NativeInTurnDrafter:
    """See ``outrider.types.InTurnDrafter``."""

    def __init__(self, parts: Any) -> None:
        self.core = native.AutoregressiveDrafter(parts)

    def draft(
        self,
        cache: Any,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Values],
        tokens: Sequence[int],
        drafts: int,
        keys: list[list[int]] | None,
        params: Sequence[SamplingParams],
        scalings: Sequence[CoreScaling | None],
    ) -> Drafts:
        """Raises InvalidRequest, and CacheFull past the capacity."""
        rows = (cache, slots, counts, features, (tokens,))
        return _draft(self.core, *rows, drafts, keys, params, scalings, drafts)


def _draft(
    core: Any,
    cache: Any,
    slots: Sequence[int],
    counts: Sequence[int],
    features: Sequence[Values],
    given: tuple[Sequence[int], ...],
    drafts: int,
    keys: list[list[int]] | None,
    params: Sequence[SamplingParams],
    scalings: Sequence[CoreScaling | None],
    scratch: int,
) -> Drafts:
    """One call of a drafter in the core; ``given``: the tokens that it drafts from, and for a block how many drafts;
    ``scratch``: positions after a row's waiting features that it writes."""
    count = len(slots)
    tokens, confidence = np.empty((count, drafts), np.int64), np.empty((count, drafts), np.float32)
    ids = logits = None
    if keys is not None:
        shape = count * drafts, core.width
        logits = np.empty(shape, np.float32)
        ids = np.empty(shape, np.int64) if core.lists_ids else None
    sampling = [(p.temperature, p.top_k or NO_LIMIT, p.top_p, p.min_p) for p in params]
    drawing = (keys, sampling, scalings, tokens, confidence, ids, logits)
    arguments = (cache.core, slots, counts, _arrays(features), *given, *drawing)
    _with_room(core.draft, arguments, cache, slots, counts, scratch)
    return Drafts(tokens, confidence, ids, logits)


def _with_room(
    call: Callable[..., None],
    arguments: tuple[Any, ...],
    cache: Any,
    slots: Sequence[int],
    counts: Sequence[int],
    scratch: int,
) -> None:
    """Call the core; where a slot has no page yet for what is written, give it some and call again."""
    try:
        try:
            call(*arguments)
        except native.NoRoom:
            for slot, count in zip(slots, counts, strict=True):
                held = int(cache.lengths[slot])
                cache.require(slot, held, held + count + scratch)
            call(*arguments)
    except (ValueError, IndexError) as error:
        raise _explained(error) from error


def _arrays(features: Sequence[Values]) -> list[Any]:
    """numpy arrays on the same memory: they cross to the core several times faster than tensors."""
    return [piece.numpy() if isinstance(piece, Tensor) else piece for piece in features]


def _explained(error: Exception) -> InvalidRequest | CacheFull:
    if isinstance(error, IndexError):
        return CacheFull(f"{error}; shorten the sequence, or make the drafter's cache with a larger capacity")
    return InvalidRequest(str(error))
