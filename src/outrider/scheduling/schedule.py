"""A step's schedule: how likely each draft is accepted, how many of each row to verify, and what is learnt of it.

The compiled core does it in one call. After a pass the processor's caches hold the target's weights, and then each of
some thirty array operations costs several microseconds, however few rows there are. ``NumpyScheduler`` is the same in
arrays: it says what is meant, serves where there is no core, and is what tests compare the core with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from outrider.core import native
from outrider.scheduling.acceptance import AcceptanceModel, DraftHistory
from outrider.scheduling.prefix_search import SEARCHES, best_count, best_plan, rank, survivals

__all__ = ["NumpyScheduler", "Round", "RoundScheduler", "Scheduler"]

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
LEARNT_ROWS = 64  # of rounds that are learnt from together, about so many stand for all
ROW, SLOT, LENGTH, LIMIT, KEPT, ACCEPTED = range(6)


class RoundScheduler(Protocol):
    """Numbers are plain Python: right after a pass, making an array costs more than reading a list of a few rows."""

    def schedule(
        self,
        confidence: Singles | None,
        lengths: Sequence[int],
        slots: Sequence[int],
        limits: Sequence[int],
        seconds: Floats,
        spent: float,
        search: int,
        at_least: int,
    ) -> list[int]:
        """-> [batch]: the drafts of each row to verify.

        confidence: float32 [batch, K] or None. lengths: [batch], at most K. slots, limits: [B], of the rows that may
        draft, the first ones, and the most drafts that they were asked for. seconds: float64 [> B * K], of a pass by
        drafts; ``spent``: of everything else. search: its place in ``SEARCHES``. at_least: drafts to verify of each row
        that has as many, whatever the search says.
        """
        ...

    def accept(self, accepted: Sequence[int], slots: Sequence[int], limits: Sequence[int], scheduled: bool) -> int:
        """Remember what became of the step's drafts, also of rows that were asked for drafts and have none; -> how many
        were accepted. ``scheduled``: ``schedule`` was called in this step."""
        ...

    @property
    def pending(self) -> int:
        """Rounds that are not learnt from yet."""
        ...

    def learn(self, turn: int) -> None:
        """Learn from the rounds that are pending. Of very many, some stand for all, others in each turn."""
        ...

    def plan(
        self,
        slots: Sequence[int],
        batch: int,
        samples: int,
        seconds: Floats,
        plain: float,
        lengths: Sequence[int],
        draft: Callable[[int, int], float],
        turn: int,
        search: int,
        spared: float,
    ) -> tuple[int, float, bool, Sequence[int], int, float]:
        """``prefix_search.best_plan`` on so many samples of the past of each slot: (drafts, tokens per second, whether
        by a budget, 1 for each row that is to have drafts, and drafts and tokens per second where all drafts of all
        rows are verified). search: -1 where an early stop or a budget may be used."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """What was drafted, kept and accepted in a step. D rows have drafts, K at most."""

    rows: Ints  # [D, 6]: row in the step, slot, drafts, the most drafts that were asked for, verified, accepted
    logits: Floats  # [D, K], of the confidences
    adjusted: Floats  # [D, K]: corrected probabilities
    survival: Floats  # [D, K]


class Scheduler:
    """The models of acceptance and what is done with them, in the core where there is one."""

    def __init__(self, drafts: int, *, core: bool = native is not None) -> None:
        self.acceptance, self.history = AcceptanceModel(drafts), DraftHistory(drafts)
        self._widest = drafts
        self._core: Any = native.Scheduler() if core else None
        self.rounds: RoundScheduler = self._core or NumpyScheduler(self.acceptance, self.history)
        self._bind()

    def forget_rows(self, slots: Ints) -> None:
        """Other requests have these rows now."""
        if self.rounds.pending:
            self.rounds.learn(0)  # of the rows before them
        known = len(self.history.counts)
        self.acceptance.forget_row(slots)
        self.history.forget_row(slots)
        if len(self.history.counts) > known:
            self._bind()

    def widen(self, drafts: int) -> None:
        """Make room for so many drafts in a round."""
        if drafts > self._widest:
            self.rounds.learn(0)
            self._widest = drafts
            self._bind()

    def _bind(self) -> None:
        """Give the core the arrays, which it works on in place; anew where they are others."""
        if self._core is not None:
            history = self.history
            self._core.bind(
                *self.acceptance.arrays(self._widest),
                history.logits,
                history.sizes,
                history.counts,
                history.shared,
                history.shared_sizes,
                history.shared_count,
            )


class NumpyScheduler:
    """A ``RoundScheduler`` in arrays."""

    def __init__(self, acceptance: AcceptanceModel, history: DraftHistory) -> None:
        self._acceptance, self._history = acceptance, history
        self._latest: Round | None = None
        self._past: list[tuple[Floats, int]] = []  # survivals and rows, of the last two steps that drafted
        self._rounds: list[Round] = []

    def schedule(
        self,
        confidence: Singles | None,
        lengths: Sequence[int],
        slots: Sequence[int],
        limits: Sequence[int],
        seconds: Floats,
        spent: float,
        search: int,
        at_least: int,
    ) -> list[int]:
        keep = [0] * len(lengths)
        ready, drafts = len(slots), max(lengths, default=0) if confidence is None else confidence.shape[1]
        there = np.array(lengths, dtype=np.int64)[:ready]
        with_drafts = np.flatnonzero(there)
        rows = np.zeros((len(with_drafts), 6), dtype=np.int64)
        rows[:, ROW], rows[:, LENGTH] = with_drafts, there[with_drafts]
        rows[:, SLOT] = np.array(slots, dtype=np.int64)[with_drafts]
        rows[:, LIMIT] = np.maximum(np.array(limits, dtype=np.int64)[with_drafts], rows[:, LENGTH])
        said = None if confidence is None else np.asarray(confidence, np.float32)[with_drafts]
        logits, adjusted = self._acceptance.adjust(said, rows[:, SLOT], drafts)
        survival = survivals(adjusted, rows[:, LENGTH])
        self._latest = Round(rows, logits, adjusted, survival)
        if not len(rows):
            return keep
        ranking = rank(survival)
        n = len(ranking.survival)
        seconds, how = seconds[: n + 1] + spent, SEARCHES[search]
        if how != "lagged":
            count = best_count(ready, ranking.survival, seconds, how)
        elif not self._past:
            count = min(ready, n)  # about one draft a row
        else:
            then, rows_then = rank(self._past[0][0]).survival, self._past[0][1]
            count = min(n, round(best_count(rows_then, then[:n], seconds, "lagged") * ready / rows_then))
        rows[:, KEPT] = np.maximum(ranking.keep(count), np.minimum(rows[:, LENGTH], at_least))
        for b, kept in zip(with_drafts.tolist(), rows[:, KEPT].tolist(), strict=True):
            keep[b] = kept
        self._past = [*self._past[-1:], (survival, ready)]
        return keep

    def accept(self, accepted: Sequence[int], slots: Sequence[int], limits: Sequence[int], scheduled: bool) -> int:
        round = self._latest if scheduled else None
        has: list[int] = []
        if round is not None:
            has = round.rows[:, ROW].tolist()
            round.rows[:, ACCEPTED] = [accepted[b] for b in has]
            self._rounds.append(round)
        empty = [slot for b, slot in enumerate(slots) if limits[b] and b not in has]
        if empty:
            none = np.zeros(len(empty), dtype=np.int64)
            self._history.add(np.array(empty), np.zeros((len(empty), 1)), none, none + self._history.drafts)
        return sum(accepted[b] for b in has)

    @property
    def pending(self) -> int:
        return sum(len(round.rows) for round in self._rounds)

    def learn(self, turn: int) -> None:
        rounds, self._rounds = self._rounds, []
        if not rounds:
            return
        width = max(round.logits.shape[1] for round in rounds)
        padded = [np.pad([round.logits, round.adjusted], ((0, 0), (0, 0), (0, width - round.logits.shape[1])))
                  for round in rounds]  # fmt: skip
        logits, adjusted = np.concatenate(padded, axis=1)
        rows = np.concatenate([round.rows for round in rounds])
        every = max(1, len(rows) // LEARNT_ROWS)
        some = slice(turn % every, None, every)
        _, slots, lengths, limits, kept, accepted = rows[some].T
        self._acceptance.update(logits[some], adjusted[some], slots, kept, accepted)
        self._history.add(slots, logits[some], lengths, limits)

    def plan(
        self,
        slots: Sequence[int],
        batch: int,
        samples: int,
        seconds: Floats,
        plain: float,
        lengths: Sequence[int],
        draft: Callable[[int, int], float],
        turn: int,
        search: int,
        spared: float,
    ) -> tuple[int, float, bool, Sequence[int], int, float]:
        survival = self._history.of(np.array(slots), samples, turn, self._acceptance)
        how = None if search < 0 else SEARCHES[search]
        plan = best_plan(survival, batch, seconds, plain, lengths, draft, how, spared)
        chosen = plan.chosen.astype(int).tolist()
        return plan.length, plan.rate, plan.budget, chosen, plan.whole_length, plan.whole_rate

    def latest(self) -> tuple[list[list[int]], list[list[float]]]:
        """The rows of the latest round that was scheduled, and its logits, probabilities and survivals."""
        assert self._latest is not None
        round = self._latest
        return round.rows.tolist(), [part.ravel().tolist() for part in (round.logits, round.adjusted, round.survival)]
