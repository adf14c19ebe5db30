"""Verification in the compiled core: one call a step, for float32 logits on a CPU.

``sampling.verification`` defines the rules; the core computes only what a step needs. Rejection stops at the first
draft that fails, coupled drafts at the first that differs, and ``block`` works out residuals from the longest prefix
down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from outrider.core import native
from outrider.sampling.distribution import Processed
from outrider.sampling.rng import RowRng, purpose_word
from outrider.sampling.verification import verify
from outrider.types import Context, Distribution, Proposal, Rng, Verification

__all__ = ["verify_native"]

_RULES = {"coupled": 0, "rejection": 1, "block": 2}
_PURPOSES = purpose_word("accept"), purpose_word("own"), purpose_word("", tokens=True)  # the names fix the streams


def verify_native(
    target: Processed, proposal: Proposal, keep: Sequence[int], context: Context, rng: Rng
) -> Verification:
    """``sampling.verification.verify`` with the same results; by it where the core cannot read the distributions, or
    cannot sample from one of them."""
    forms = _core_forms(target, proposal.distribution)
    if not forms or not isinstance(rng, RowRng):
        return verify(target, proposal, keep, context, rng)
    drafts = np.ascontiguousarray(proposal.arrays[0])
    control, start = [], 0
    for b, (params, history, count) in enumerate(zip(context.params, context.history, keep, strict=True)):
        rule = _RULES[params.effective_rule] if params.temperature else 0  # the cheapest one for greedy rows
        control.append((start, b * proposal.width, count, rule, len(history), *rng.rows[b]))
        start += count + 1
    assert len(forms[0][0]) == start, "one distribution for each kept draft and one more for each row"
    try:
        return Verification.of_lists(*native.verify(*forms, control, drafts, _PURPOSES))
    except ValueError:  # logits that are no numbers: which rows of the batch reach them?
        return verify(target, proposal, keep, context, rng)


def _core_forms(target: Processed, drafter: Distribution | None) -> tuple[Any, ...]:
    """Both sides' distributions as the core reads them (None: deterministic drafts); empty where it cannot."""
    mine = target.core_form if native is not None else None
    if mine is None:
        return ()
    if drafter is None:
        return mine, None
    theirs = drafter.core_form if isinstance(drafter, Processed) else None
    return () if theirs is None else (mine, theirs)
