"""Several drafters at once: each row takes, round by round, the one that gives most tokens per second.

What a drafter is worth for a row is (1 + its expected accepted drafts) / (its seconds + those of the rest of a step).
Drafters that cost next to nothing, copying ones, propose in every round, and what each would bring is read off their
drafts' confidences, corrected by what became of earlier ones (as SuffixDecoding combines its trees with a model's
drafts, arXiv 2411.04975, section 4.2). The text that is committed scores them for nothing, whether or not they were
verified (HedgeSpec, arXiv 2510.20064). An expensive drafter is worth what it was in earlier rounds in which the cheap
ones promised as much: what is easy for one is easy for the other. It is scored when it is chosen, and tried at times.

Which drafter a row takes follows from the past alone: of drafts that were drawn at random nothing is looked at before
that. Sampled drafts of one drafter and deterministic ones of another are not mixed in one step, because their
distributions have different forms.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from outrider.errors import InvalidRequest
from outrider.scheduling.acceptance import AcceptanceModel, expected_accepted
from outrider.types import (
    Context,
    Drafter,
    Forgets,
    Proposal,
    RaggedBatch,
    ReadsHidden,
    ResetsRows,
    Rng,
    SharesPrefixes,
    Values,
    to_tensor,
)

__all__ = ["SeveralDrafters"]

CHEAP = 0.03  # of a step: a drafter that takes less proposes in every round
TRY = 12  # rounds of a row after which a drafter that was not scored is tried; more after each time it was not best,
TRIED = 0.03  # and so many that trying takes less than this share of the time
LONGEST = 1024  # rounds after which it is tried at the latest
RATE, ROW_PRIOR = 0.05, 6.0  # least step of the means over all rows; rounds of a row that weigh as much as those means
BELIEVED, BELIEF = 1.0, 10  # accepted drafts a round before any was scored, and the rounds that this weighs
UNKNOWN_SECONDS = 1e-3
FIRST = 3  # rounds in which every drafter proposes, so that none is judged by a call that was interrupted
FORGET = 0.96  # of what a row's scores count, each round: a drafter that had bad luck gets another chance
# Of its speed, what a round is worth in which cheap drafters promise hardly anything: whether to draft is for the
# policy to say, which knows what passes cost.
HARDLY = 0.6
BANDS = (0.3, 0.8, 1.6, 3.0)  # accepted drafts that a cheap drafter promises: rounds between two are alike
BAND_PRIOR = 6.0  # how many rounds of a band weigh as much as the mean of all


@dataclass(slots=True)
class _Draft:
    """What a drafter would have a row's text go on with."""

    start: int  # length of the history before it
    tokens: list[int]
    logits: list[float] | None  # of its own confidences, where they were corrected
    confidence: list[float]
    sampled: bool
    band: int  # what cheap drafters promised then
    known: int = 0  # tokens of it that were found right


@dataclass(slots=True)
class _Row:
    """What is known of the drafters on one row."""

    pending: dict[int, _Draft] = field(default_factory=dict)  # by drafter: not scored yet
    excess: list[float] = field(default_factory=list)  # accepted drafts, less those of all rows in the same band
    count: list[float] = field(default_factory=list)  # scores; those of long ago count less
    unscored: list[int] = field(default_factory=list)  # rounds since it was scored
    patience: list[int] = field(default_factory=list)  # rounds without a score after which each is tried


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
        self._mean = [BELIEVED] * n  # accepted drafts a round, of all rows
        self._mean_in = [[0.0] * (len(BANDS) + 1) for _ in drafters]  # the same of each band
        self._scored_in = [[0] * (len(BANDS) + 1) for _ in drafters]
        self._scored = [0] * n
        self._asked = [0] * n  # times
        self._seconds = [0.0] * n  # of one ``propose``; 0: never asked
        self._rest = UNKNOWN_SECONDS  # of a step without drafting
        self._steps = 0
        self._ended = 0.0
        self._samples = [False] * n  # whether its last drafts were drawn from a distribution
        self._acceptance = [AcceptanceModel(drafter.block) for drafter in drafters]

    # ------------------------------------------------------------------------------------------ rows

    def open(self, slot: int, capacity: int) -> None:
        for drafter in self.drafters:
            drafter.open(slot, capacity)
        n = len(self.drafters)
        self._rows[slot] = _Row({}, [0.0] * n, [0.0] * n, [0] * n, [TRY] * n)
        for model in self._acceptance:
            model.forget_row(np.array([slot]))

    def close(self, slot: int) -> None:
        del self._rows[slot]
        for drafter in self.drafters:
            drafter.close(slot)

    def reset_rows(self) -> None:
        """Close all slots at once, whatever state an interrupted call left them in."""
        slots = list(self._rows)
        self._rows.clear()
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

    def match(self, tokens: Sequence[int]) -> int:
        """See ``outrider.types.SharesPrefixes``: what all have that read more than tokens."""
        readers = [drafter for drafter in self.drafters if drafter.aux_layers or isinstance(drafter, ReadsHidden)]
        return min((_match(drafter, tokens) for drafter in readers), default=0)

    def adopt(self, slot: int, tokens: Sequence[int], count: int) -> None:
        """See ``outrider.types.SharesPrefixes``; drafters that read tokens alone are shown what they do not have."""
        for drafter in self.drafters:
            known = min(count, _match(drafter, tokens))
            if known and isinstance(drafter, SharesPrefixes):
                drafter.adopt(slot, tokens, known)
            if known < count:
                drafter.observe(RaggedBatch.pack([tokens[known:count]], [known], [slot]), None)

    def publish(self, slot: int, tokens: Sequence[int]) -> None:
        """See ``outrider.types.SharesPrefixes``."""
        for drafter in self.drafters:
            if isinstance(drafter, SharesPrefixes):
                drafter.publish(slot, tokens)

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
            self._steps += 1
            rest = began - self._ended
            self._rest += max(1 / self._steps, 0.1) * (min(rest, 4 * self._rest + UNKNOWN_SECONDS) - self._rest)
        for b, slot in enumerate(slots):
            self._score(slot, context.history[b])
        made: dict[int, _Drafts] = {}
        promised: list[dict[int, float]] = [{} for _ in slots]
        for d in range(len(self.drafters)):
            if 0 < self._seconds[d] < CHEAP * self._rest or self._asked[d] < FIRST:
                made[d] = one = self._ask(d, slots, last, context, limit, rng, cheap=True)
                if not self._samples[d] and one.proposal.arrays[1] is not None:
                    for b, n in enumerate(one.proposal.counts):
                        promised[b][d] = expected_accepted(one.confidence[b][:n])
        bands = [bisect(BANDS, max(one.values(), default=0.0)) for one in promised]
        chosen = self._choose(slots, limit, promised, bands)
        for d in set(chosen) - made.keys():
            asked = [limit[b] if one == d else 0 for b, one in enumerate(chosen)]
            if any(asked):
                made[d] = self._ask(d, slots, last, context, asked, rng, cheap=False)
        for d, one in made.items():
            self._remember(d, slots, chosen, context, one, bands)
        taken = {d: one.as_corrected() for d, one in made.items() if d in chosen}
        self._ended = perf_counter()
        return _merged(taken, chosen, len(slots))

    def _ask(
        self,
        d: int,
        slots: list[int],
        last: list[int],
        context: Context,
        asked: list[int],
        rng: Rng,
        *,
        cheap: bool,
    ) -> _Drafts:
        """A drafter's drafts; a cheap one's confidences are corrected by its past, or are that where it has none."""
        before = perf_counter()
        proposal = self.drafters[d].propose(slots, last, context, asked, rng)
        self._seconds[d] = _nearer(self._seconds[d], perf_counter() - before)
        self._asked[d] += 1
        self._samples[d] = proposal.distribution is not None
        sure = proposal.arrays[1]
        said = None if sure is None else sure.tolist()
        if said is not None and not cheap:  # left as they are: its worth comes from its scores
            return _Drafts(proposal, asked, said, None)
        logits = [[0.0] * proposal.width] * len(slots)
        corrected = list(logits)
        for b, n in enumerate(proposal.counts):
            if n:
                one = None if said is None else said[b]
                logits[b], corrected[b] = self._acceptance[d].adjust_row(one, slots[b], proposal.width)
        return _Drafts(proposal, asked, corrected, logits)

    def _choose(
        self, slots: Sequence[int], limits: Sequence[int], promised: Sequence[Mapping[int, float]], bands: Sequence[int]
    ) -> list[int]:
        """The drafter of each row. ``promised``: accepted drafts that it is expected to have, of those that were asked
        already."""
        every = range(len(self.drafters))
        worth = [
            [self._worth(d, slot, limits[b], promised[b].get(d), bands[b]) for d in every]
            for b, slot in enumerate(slots)
        ]
        best = [max(every, key=one.__getitem__) for one in worth]
        for b, slot in enumerate(slots):
            row = self._rows[slot]
            row.patience[best[b]] = TRY
            for d in every:
                row.unscored[d] += 1
                row.count[d] *= FORGET
                due = max(row.patience[d], self._seconds[d] / (TRIED * self._rest))
                if d != best[b] and d not in promised[b] and row.unscored[d] > due:
                    row.unscored[d], row.patience[d] = 0, min(2 * row.patience[d], LONGEST)
                    best[b] = d
                    break
        kinds = {self._samples[d] for d in best}
        if len(set(best)) > 1 and True in kinds:  # sampled drafts: one drafter for the whole step
            totals = [sum(one[d] for one in worth) for d in every]
            best = [max(every, key=totals.__getitem__)] * len(best)
        return best

    def _worth(self, d: int, slot: int, limit: int, promised: float | None, band: int) -> float:
        """Tokens per second."""
        if promised is None:
            row = self._rows[slot]
            n = row.count[d]
            promised = self._of_all_rows(d, band) + n * row.excess[d] / (n + ROW_PRIOR)
            promised = max(0.0, min(promised, limit))
        elif promised < BANDS[0]:
            return HARDLY * (1 + promised) / self._rest
        return (1 + promised) / (self._rest + self._seconds[d])

    def _of_all_rows(self, d: int, band: int) -> float:
        """Accepted drafts of a drafter where cheap ones promise as much."""
        n = min(self._scored_in[d][band], 50)
        return (n * self._mean_in[d][band] + BAND_PRIOR * self._mean[d]) / (n + BAND_PRIOR)

    # ------------------------------------------------------------------------------------------ learning

    def _remember(
        self,
        d: int,
        slots: Sequence[int],
        chosen: Sequence[int],
        context: Context,
        drafts: _Drafts,
        bands: Sequence[int],
    ) -> None:
        """What it proposed, to be compared with the text to come: one draft of a row at a time, rather a chosen one."""
        proposal = drafts.proposal
        tokens, lengths = proposal.arrays[0].tolist(), proposal.counts
        for b, slot in enumerate(slots):
            row, n = self._rows[slot], lengths[b]
            pending = row.pending
            if not n:
                if drafts.asked[b] and proposal.arrays[1] is None:
                    self._count(d, row, bands[b], 0)
                continue
            if chosen[b] != d and (d in pending or self._samples[d]):  # unverified draws say little of acceptance
                continue
            if d in pending:
                self._learn(d, slot, pending[d], wrong=False)
            pending[d] = _Draft(
                len(context.history[b]),
                tokens[b][:n],
                None if drafts.logits is None else drafts.logits[b][:n],
                drafts.confidence[b][:n],
                self._samples[d],
                bands[b],
            )

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
            self._learn(d, slot, draft, wrong)
            self._count(d, row, draft.band, draft.known)

    def _count(self, d: int, row: _Row, band: int, accepted: int) -> None:
        self._scored[d] += 1
        self._mean[d] += max(1 / (self._scored[d] + BELIEF), RATE) * (accepted - self._mean[d])
        self._scored_in[d][band] += 1
        self._mean_in[d][band] += max(1 / self._scored_in[d][band], RATE) * (accepted - self._mean_in[d][band])
        row.unscored[d] = 0
        row.count[d] += 1
        row.excess[d] += 1 / row.count[d] * (accepted - self._of_all_rows(d, band) - row.excess[d])

    def _learn(self, d: int, slot: int, draft: _Draft, wrong: bool) -> None:
        """What the text says of a draft's confidences: of the tokens that it has, and of the first that it has not."""
        seen = draft.known + wrong
        if seen and draft.logits is not None:
            self._acceptance[d].update(
                np.array([draft.logits]),
                np.array([draft.confidence]),
                np.array([slot]),
                np.array([seen]),
                np.array([draft.known]),
            )


@dataclass(frozen=True, slots=True)
class _Drafts:
    """A drafter's drafts for the rows it was asked for, and their confidences."""

    proposal: Proposal
    asked: list[int]
    confidence: list[list[float]]
    logits: list[list[float]] | None  # of its own confidences, where they were corrected

    def as_corrected(self) -> Proposal:
        made = self.proposal
        if self.logits is None:
            return made
        confidence = np.array(self.confidence, np.float32).reshape(len(self.confidence), made.width)
        return Proposal(made.arrays[0], made.counts, made.distribution, confidence)


def _match(drafter: Drafter, tokens: Sequence[int]) -> int:
    return drafter.match(tokens) if isinstance(drafter, SharesPrefixes) else 0


def _nearer(seconds: float, took: float) -> float:
    """A running estimate of a call's seconds, hardly moved by a call that took longer: it may have been interrupted."""
    if not seconds:
        return took
    return seconds + (0.7 if took < seconds else 0.05) * (min(took, 2 * seconds) - seconds)


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
