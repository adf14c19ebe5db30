"""Block drafters in the compiled core: features in, drafts and their distributions out, in one call.

Greedy drafts are the largest of all corrected logits; where a Markov head corrects them, sampled drafts are drawn from
a shortlist of the tokens whose base logits are largest, and that distribution is the one reported.

n rows, K drafts, D width, F feature width, r Markov rank, V and Vd vocabularies of target and drafter, S entries of a
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outrider.core import native
from outrider.errors import CacheFull, InvalidRequest
from outrider.types import BlockDrafts, BlockParts, MarkovParts

__all__ = ["NativeBlockDrafter", "block_parts", "markov_head"]


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


class NativeBlockDrafter:
    """See ``outrider.types.BlockDrafter``."""

    def __init__(self, parts: Any) -> None:
        self.core = native.BlockDrafter(parts)
        self._width, self._lists_ids = self.core.width, self.core.lists_ids

    def absorb(self, cache: Any, slots: Sequence[int], counts: Sequence[int], features: Sequence[Tensor]) -> None:
        """Append the keys and values of waiting features. Raises InvalidRequest, and CacheFull past the capacity."""
        try:
            self.core.absorb(cache.core, slots, counts, _arrays(features))
        except (ValueError, IndexError) as error:
            raise _explained(error) from error

    def draft(
        self,
        cache: Any,
        slots: Sequence[int],
        counts: Sequence[int],
        features: Sequence[Tensor],
        anchors: Sequence[int],
        drafts: int,
        keys: Tensor | None,
        temperatures: Sequence[float],
    ) -> BlockDrafts:
        """The same, then K drafts a row. Raises InvalidRequest, and CacheFull past the capacity."""
        count = len(slots)
        tokens, confidence = np.empty((count, drafts), np.int64), np.empty((count, drafts), np.float32)
        ids = logits = None
        if keys is not None:
            shape = count * drafts, self._width
            logits = np.empty(shape, np.float32)
            ids = np.empty(shape, np.int64) if self._lists_ids else None
        try:
            self.core.draft(
                cache.core,
                slots,
                counts,
                _arrays(features),
                anchors,
                None if keys is None else keys.numpy(),
                temperatures,
                tokens,
                confidence,
                ids,
                logits,
            )
        except (ValueError, IndexError) as error:
            raise _explained(error) from error
        return BlockDrafts(
            torch.from_numpy(tokens),
            torch.from_numpy(confidence),
            None if ids is None else torch.from_numpy(ids),
            None if logits is None else torch.from_numpy(logits),
        )


def _arrays(features: Sequence[Tensor]) -> list[Any]:
    """numpy arrays on the same memory: they cross to the core several times faster than tensors."""
    return [piece.numpy() for piece in features]


def _explained(error: Exception) -> InvalidRequest | CacheFull:
    if isinstance(error, IndexError):
        return CacheFull(f"{error}; shorten the sequence, or make the drafter's cache with a larger capacity")
    return InvalidRequest(str(error))
