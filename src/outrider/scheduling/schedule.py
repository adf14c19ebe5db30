"""A step's schedule: how likely each draft is accepted, and how many drafts of each row to verify.

The compiled core does it in one call. After a pass the processor's caches hold the target's weights, and then each of
some thirty array operations costs several microseconds, however few rows there are. ``schedule_in_numpy`` is the same
in arrays: it says what is meant, serves where there is no core, and is what tests compare the core with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from outrider.core import native
from outrider.scheduling.acceptance import AcceptanceModel
from outrider.scheduling.prefix_search import best_count, rank, survivals

__all__ = ["ACCEPTED", "KEEP", "ROW", "Form", "Round", "schedule"]

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Form = Literal["early", "global", "lagged"]  # as prefix_search explains them; lagged: a budget
FORMS: tuple[Form, ...] = ("early", "global", "lagged")  # by the core's numbers
ROW, SLOT, LENGTH, LIMIT, KEEP, ACCEPTED = range(6)


@dataclass(frozen=True, slots=True)
class Round:
    """What was drafted, kept and accepted in a step. D rows have drafts, K at most."""

    numbers: Ints  # [D, 6]: row in the step, slot, drafts, the most drafts that were asked for, verified, accepted
    chances: Floats  # [3, D, K]: logits of the confidences, corrected probabilities, survivals

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def survival(self) -> Floats:
        """float64 [D, K]"""
        return self.chances[2]

    @staticmethod
    def together(rounds: Sequence[Round]) -> Round:
        """Several rounds of the same K, in order, as one."""
        if len(rounds) == 1:
            return rounds[0]
        return Round(
            np.concatenate([one.numbers for one in rounds]), np.concatenate([one.chances for one in rounds], axis=1)
        )


def schedule(
    confidence: Singles | None,
    lengths: Ints,
    slots: Ints,
    limits: Sequence[int] | int,
    acceptance: AcceptanceModel,
    seconds: Floats,
    spent: float,
    form: Form,
    past: tuple[Floats, int] | None,
    *,
    drafts: int,
    one_each: bool = False,
) -> tuple[Ints, Round]:
    """int64 [batch] drafts to verify, and the round of the rows that have drafts.

    confidence: float32 [batch, K] or None. lengths: int64 [batch], at most K = ``drafts``. slots: int64 [B], of the
    rows that may draft, the first ones; known to ``acceptance``. limits: [B] or one for all. seconds: float64
    [> B * K], of a pass by drafts; ``spent``: of everything else. past: for ``lagged``, survivals [D, K] two steps old
    and the rows of their step; None: this is the first step. one_each: verify at least one draft of each row that has
    any.
    """
    numbers = np.zeros((len(slots), 6), dtype=np.int64)
    numbers[:, SLOT], numbers[:, LIMIT] = slots, limits
    keep = np.zeros(len(lengths), dtype=np.int64)
    if native is None:
        round = schedule_in_numpy(
            confidence, lengths, numbers, acceptance, seconds, spent, form, past, drafts=drafts, one_each=one_each
        )
        keep[round.numbers[:, ROW]] = round.numbers[:, KEEP]
        return keep, round
    chances = np.empty((3, len(slots), drafts))
    positions, row_shifts = acceptance.corrections(drafts)
    count = native.schedule(
        confidence,
        lengths,
        positions,
        row_shifts,
        seconds,
        spent,
        FORMS.index(form),
        past,
        one_each,
        numbers,
        chances,
        keep,
    )
    if count == len(slots):
        return keep, Round(numbers, chances)
    return keep, Round(numbers[:count], chances[:, :count].copy())


def schedule_in_numpy(
    confidence: Singles | None,
    lengths: Ints,
    numbers: Ints,
    acceptance: AcceptanceModel,
    seconds: Floats,
    spent: float,
    form: Form,
    past: tuple[Floats, int] | None,
    *,
    drafts: int,
    one_each: bool,
) -> Round:
    """The round; numbers: int64 [B, 6], with slots and limits."""
    ready = len(numbers)
    rows = np.flatnonzero(lengths[:ready])
    numbers = numbers[rows]
    numbers[:, ROW], numbers[:, LENGTH] = rows, lengths[rows]
    numbers[:, LIMIT] = np.maximum(numbers[:, LIMIT], numbers[:, LENGTH])
    said = None if confidence is None else confidence[rows]
    logits, adjusted = acceptance.adjust(said, numbers[:, SLOT], drafts)
    survival = survivals(adjusted, numbers[:, LENGTH])
    ranking = rank(survival)
    n = len(ranking.survival)
    seconds = seconds[: n + 1] + spent
    if form != "lagged":
        count = best_count(ready, ranking.survival, seconds, form)
    elif past is None:
        count = min(ready, n)  # about one draft a row
    else:
        then, rows_then = rank(past[0]).survival, past[1]
        count = min(n, round(best_count(rows_then, then[:n], seconds, "global") * ready / rows_then))
    numbers[:, KEEP] = ranking.keep(count)
    if one_each:
        numbers[:, KEEP] = np.maximum(numbers[:, KEEP], np.minimum(numbers[:, LENGTH], 1))
    return Round(numbers, np.stack([logits, adjusted, survival]))
