"""Several drafters at once: each row takes the one that gives most tokens per second now.

What a drafter is worth for a row is (1 + its expected accepted drafts) / (its seconds + those of the rest of a step).
Expected acceptance is learnt without regret where that is free: the text that is committed scores every deterministic
draft from the position it was made for, whether or not it was verified (HedgeSpec, arXiv 2510.20064). So drafters that
cost next to nothing, copying ones, propose in every round, and what was not chosen is compared with the text all the
same. Dear ones are scored when they are chosen, and tried now and then.

Which drafter a row takes follows from the past alone. Sampled drafts of one drafter and deterministic ones of another
are not mixed in one step, because their distributions have different forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.scheduling.acceptance import AcceptanceModel
from outrider.types import (
    Context,
    Drafter,
    Forgets,
    Proposal,
    RaggedBatch,
    ReadsHidden,
    ResetsRows,
    Rng,
    Values,
    to_tensor,
)

__all__ = ["SeveralDrafters"]

CHEAP = 0.03  # of a step: a drafter that takes less proposes in every round
TRY = 32  # rounds of a row after which a drafter that was not scored is tried; more after each time it was not best
LONGEST = 1024
RATE, ROW_PRIOR = 0.05, 6.0  # of a drafter's mean over all rows; how many rounds of a row weigh as much as that mean
OPTIMISM = 1.0  # accepted drafts that a drafter is believed to have before it was ever scored, as a share of its block
UNKNOWN_SECONDS = 1e-3
FIRST = 3  # rounds in which every drafter proposes, so that none is judged by a call that was interrupted


@dataclass(slots=True)
class _Draft:
    """What a drafter would have a row's text go on with."""

    start: int  # length of the history before it
    tokens: list[int]
    known: int = 0  # tokens of it that were found right
    sampled: bool = False


@dataclass(slots=True)
class _Row:
    """What is known of the drafters on one row."""

    pending: dict[int, _Draft] = field(default_factory=dict)  # by drafter: not scored yet
    mean: list[float] = field(default_factory=list)  # accepted drafts
    count: list[int] = field(default_factory=list)
    unscored: list[int] = field(default_factory=list)  # rounds since it was scored
    patience: list[int] = field(default_factory=list)


class SeveralDrafters:
    """Drafters of one target as one drafter. Raises InvalidRequest for fewer than two."""

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if len(drafters) < 2:
            raise InvalidRequest(f"several drafters need at least two, got {len(drafters)}")
        self.drafters = list(drafters)
        self.aux_layers = tuple(sorted({layer for drafter in drafters for layer in drafter.aux_layers}))
        self.block = max(drafter.block for drafter in drafters)
        if any(isinstance(drafter, ReadsHidden) for drafter in drafters):
            self.reads_hidden = True
        n = len(drafters)
        self._rows: dict[int, _Row] = {}
        self._mean = [OPTIMISM * drafter.block for drafter in drafters]  # accepted drafts a round, of all rows
        self._scored = [0] * n
        self._seconds = [0.0] * n  # of one ``propose``; 0: never asked
        self._rest = UNKNOWN_SECONDS  # of a step without drafting
        self._ended = 0.0
        self._samples = [False] * n  # whether its last drafts were drawn from a distribution
        self._acceptance = [AcceptanceModel(drafter.block) for drafter in drafters]
        self._last: dict[int, tuple[int, list[float], list[float], _Draft]] = {}  # by slot: drafter, logits, corrected

    # ------------------------------------------------------------------------------------------ rows

    def open(self, slot: int, capacity: int) -> None:
        for drafter in self.drafters:
            drafter.open(slot, capacity)
        n = len(self.drafters)
        self._rows[slot] = _Row({}, [0.0] * n, [0] * n, [0] * n, [TRY] * n)
        self._last.pop(slot, None)
        for model in self._acceptance:
            model.forget_row(np.array([slot]))

    def close(self, slot: int) -> None:
        del self._rows[slot]
        self._last.pop(slot, None)
        for drafter in self.drafters:
            drafter.close(slot)

    def reset_rows(self) -> None:
        """Close all slots at once, whatever state an interrupted call left them in."""
        slots = list(self._rows)
        self._rows.clear()
        self._last.clear()
        for drafter in self.drafters:
            if isinstance(drafter, ResetsRows):
                drafter.reset_rows()
                continue
            for slot in slots:
                try:
                    drafter.close(slot)
                except KeyError:  # the interrupt came before it was opened there
                    continue

    def forget(self) -> None:
        """Forget earlier requests, where a drafter remembers any."""
        for drafter in self.drafters:
            if isinstance(drafter, Forgets):
                drafter.forget()

    def observe(self, batch: RaggedBatch, features: Values | None, hidden: Tensor | None = None) -> None:
        width = 0 if features is None else features.shape[1] // len(self.aux_layers)
        for drafter in self.drafters:
            own = None
            if features is not None and drafter.aux_layers == self.aux_layers:
                own = features
            elif features is not None and drafter.aux_layers:
                at = [self.aux_layers.index(layer) * width for layer in drafter.aux_layers]
                own = torch.cat([to_tensor(features)[:, a : a + width] for a in at], 1)
            drafter.observe(batch, own, hidden)

    # ------------------------------------------------------------------------------------------ drafting

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        began = perf_counter()
        if self._ended:
            self._rest += 0.1 * (min(began - self._ended, 4 * self._rest + UNKNOWN_SECONDS) - self._rest)
        for b, slot in enumerate(slots):
            self._score(slot, context.history[b])
        chosen = self._choose(slots, limit)
        taken: dict[int, Proposal] = {}
        for d, drafter in enumerate(self.drafters):
            mine = [b for b, one in enumerate(chosen) if one == d and limit[b] > 0]
            cheap = 0 < self._seconds[d] < CHEAP * self._rest or self._scored[d] < FIRST
            if not mine and not (cheap and any(limit)):
                continue
            asked = limit if cheap else [limit[b] if chosen[b] == d else 0 for b in range(len(slots))]
            before = perf_counter()
            proposal = drafter.propose(slots, last, context, asked, rng)
            took = perf_counter() - before
            self._seconds[d] = _nearer(self._seconds[d], took)
            self._samples[d] = proposal.distribution is not None
            self._remember(d, slots, asked, context, proposal)
            if mine:
                taken[d] = self._corrected(d, slots, mine, context, proposal)
        self._ended = perf_counter()
        return _merged(taken, chosen, len(slots))

    def _choose(self, slots: Sequence[int], limits: Sequence[int]) -> list[int]:
        """The drafter of each row."""
        every = range(len(self.drafters))
        worth = [[self._worth(d, slot, limit) for d in every] for slot, limit in zip(slots, limits, strict=True)]
        best = [max(range(len(one)), key=one.__getitem__) for one in worth]
        for b, slot in enumerate(slots):
            row = self._rows[slot]
            for d in every:
                row.unscored[d] += 1
                if d != best[b] and row.unscored[d] > row.patience[d]:
                    row.unscored[d], row.patience[d] = 0, min(2 * row.patience[d], LONGEST)
                    best[b] = d
                    break
        kinds = {self._samples[d] for d in best} if best else set()
        if len(set(best)) > 1 and True in kinds:  # sampled drafts: one drafter for the whole step
            totals = [sum(one[d] for one in worth) for d in every]
            best = [max(range(len(totals)), key=totals.__getitem__)] * len(best)
        return best

    def _worth(self, d: int, slot: int, limit: int) -> float:
        row = self._rows[slot]
        n = min(row.count[d], 50)
        accepted = (n * row.mean[d] + ROW_PRIOR * self._mean[d]) / (n + ROW_PRIOR)
        return (1 + min(accepted, limit)) / (self._rest + self._seconds[d])

    # ------------------------------------------------------------------------------------------ learning

    def _remember(
        self, d: int, slots: Sequence[int], asked: Sequence[int], context: Context, proposal: Proposal
    ) -> None:
        """What it proposed, to be compared with the text to come."""
        tokens, lengths = proposal.arrays[0].tolist(), proposal.counts
        for b, slot in enumerate(slots):
            pending = self._rows[slot].pending
            if asked[b] and (d not in pending or self._samples[d]):  # one at a time
                pending[d] = _Draft(len(context.history[b]), tokens[b][: lengths[b]], sampled=self._samples[d])

    def _score(self, slot: int, history: Sequence[int]) -> None:
        """Compare drafts with what the text has become."""
        row = self._rows[slot]
        for d, draft in list(row.pending.items()):
            text = history[draft.start + draft.known : draft.start + len(draft.tokens)]
            wrong = False
            for token in text:
                if token != draft.tokens[draft.known]:
                    wrong = True
                    break
                draft.known += 1
            if not wrong and draft.known < len(draft.tokens) and not draft.sampled:
                continue  # the text has not come so far
            del row.pending[d]
            row.count[d] += 1
            row.unscored[d] = 0
            row.mean[d] += max(1 / row.count[d], 0.02) * (draft.known - row.mean[d])
            self._scored[d] += 1
            self._mean[d] += max(1 / self._scored[d], RATE) * (draft.known - self._mean[d])

    def _corrected(
        self, d: int, slots: Sequence[int], mine: Sequence[int], context: Context, proposal: Proposal
    ) -> Proposal:
        """The same drafts, with confidences corrected by the drafter's own past, or made of it where it gives none."""
        model, drafts = self._acceptance[d], proposal.width
        tokens, lengths = proposal.arrays[0].tolist(), proposal.counts
        confidence = np.zeros((len(tokens), drafts), np.float32)
        said = None if proposal.confidence is None else proposal.confidence.tolist()
        for b in mine:
            slot = slots[b]
            self._learn(slot, context.history[b])
            z, p = model.adjust_row(None if said is None else said[b], slot, drafts)
            confidence[b] = p
            self._last[slot] = d, z, p, _Draft(len(context.history[b]), tokens[b][: lengths[b]])
        return Proposal(proposal.arrays[0], lengths, proposal.distribution, confidence)

    def _learn(self, slot: int, history: Sequence[int]) -> None:
        """What the text says of the confidences of the row's last drafts: those it has, and the first it has not."""
        found = self._last.pop(slot, None)
        if found is None or not found[3].tokens:
            return
        d, z, p, draft = found
        text = history[draft.start : draft.start + len(draft.tokens)]
        right = next((j for j, token in enumerate(text) if token != draft.tokens[j]), len(text))
        seen = min(right + 1, len(text))
        self._acceptance[d].update(np.array([z]), np.array([p]), np.array([slot]), np.array([seen]), np.array([right]))


def _nearer(seconds: float, took: float) -> float:
    """A running estimate of a call's seconds, which one that was held up hardly moves."""
    if not seconds:
        return took
    return seconds + (0.3 if took < seconds else 0.05) * (min(took, 2 * seconds) - seconds)


def _merged(taken: dict[int, Proposal], chosen: Sequence[int], rows: int) -> Proposal:
    """One proposal of several; a row's drafts are those of its drafter."""
    if not taken:
        return Proposal.empty(rows)
    if len(taken) == 1:
        ((d, only),) = taken.items()
        counts = [n if one == d else 0 for n, one in zip(only.counts, chosen, strict=True)]
        return Proposal(only.arrays[0], counts, only.distribution, only.arrays[1])
    width = max(proposal.width for proposal in taken.values())
    tokens, confidence = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.float32)
    lengths = [0] * rows
    for d, proposal in taken.items():
        if proposal.distribution is not None:  # a drafter that began to sample in this very step: the others wait
            continue
        drafted, sure = proposal.arrays
        for b in (b for b, one in enumerate(chosen) if one == d):
            lengths[b] = proposal.counts[b]
            tokens[b, : proposal.width] = drafted[b]
            if sure is not None:
                confidence[b, : proposal.width] = sure[b]
    return Proposal(tokens, lengths, None, confidence)
