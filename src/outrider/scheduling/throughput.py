"""Draft and verify what raises tokens per second: DSpark's hardware-aware prefix scheduler, with drafting charged.

**Before drafting** (``plan``) the past alone speaks. Each row's latest drafts, as survivals, stand for what drafting
again would give; the searches that schedule a step are run on them, one sample of all rows after the other, with
T_draft and bookkeeping in the costs. A row whose return is below its share of the cost is not drafted for; where plain
decoding gives more tokens per second, nothing is. Rows that were left out are drafted for again from time to time, paid
from an account that plain steps fill at a small rate, and ever more rarely while it does not pay.

**Once drafted** (``choose``), T_draft is spent: Algorithm 1 starts from R / (T_draft + T_verify(R) + T_bookkeeping).
The costs are of decoding alone: chunks of prompts that share the step are paid for anyway, so the search is shown what
drafts add to them.

**Repeated** (``repeat``): being asked takes time too. Where choosing hardly saves any, a plan goes on for some steps by
itself, with all its drafts verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from outrider.errors import InvalidRequest, nearest
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.ledger import Ledger
from outrider.scheduling.prefix_search import SEARCHES, Search
from outrider.scheduling.schedule import Scheduler
from outrider.types import StepCost, StepView, Values, to_array

__all__ = ["ThroughputConfig", "ThroughputPolicy"]

Floats = npt.NDArray[np.float64]
Searches = Literal["auto", "early", "lagged", "global"]
CHOICES: tuple[Searches, ...] = ("auto", *SEARCHES)

MARGIN = 1.005  # drafting must promise so much more than plain decoding
CHOICE = 1.02  # and choosing so much more than not: among many counts some look cheaper than they are
SAMPLED = 512  # drafts of the past that a plan is made of, about
EVERY_LENGTH = 32  # rows up to which every draft length is tried
FIRST_WAIT, LONGEST_WAIT = 4, 512  # steps after which a row that was left out is tried again
PROBED = 4  # rows tried in one step, or an eighth of all
TRIES = 2  # times of trying for which the account need not hold enough, after ``try_again``
IN_A_ROW = 3  # steps for which rows are tried: only after the first one are weights and code in the caches
AT_START = 4  # the same when nothing is known
FEW, ROUNDS = 48, 12  # and as many as give so many rounds, until a few were learnt from
WHOLE = 128  # steps after which rows that draft few tokens draft as many as they can once
UNSEEN = 6  # passes as large as all drafts of a try: where fewer were seen, all are verified
REUSED, MOST_REUSED = 8, 32  # steps that a plan is good for
PLANNING, WORTH = 0.2e-3, 0.005  # seconds that a plan takes, and of the time of steps what planning may take
KEPT_PLANS = 64
LEARNT_AT_ONCE, MANY_ROWS = 16, 64  # rounds collected before they are learnt from; rows that are many
SELDOM, RARELY = 4, 8  # of more rows than the one and the other, only every so manyth step is learnt from
EARLY = 16  # steps that are learnt from at once
LOOK, TOGETHER = 4, 4  # every LOOK-th step's costs are looked at, and so many learnt from at a time,
KNOWN, LONG = 16, 0.02  # where more than KNOWN passes as large were seen, and none took so many seconds
ASKING = 2e-4  # seconds that a step is longer in which the policy is asked, until that was seen
REPEATED = 15  # steps at most for which a plan is repeated


@dataclass(frozen=True, slots=True)
class ThroughputConfig:
    """Options of the ``throughput`` policy. Raises InvalidRequest for values out of range."""

    draft_tokens: int = 8
    """The most tokens to draft in a round; 0 decodes plainly."""
    search: Searches = "auto"
    """early: Algorithm 1, which stops at the first draft that does not pay. lagged: a budget from confidences two steps
    old, which looks past dips of the costs and is lossless too. global: the best of all, for text that does not depend
    on the schedule. auto: global where every row is greedy or coupled, else early, or lagged while the past says that
    an early stop would be caught in a dip."""
    probe_share: float = 0.005
    """Of the time of plain steps, what may be spent on trying rows that drafting did not pay for."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 0:
            raise InvalidRequest(f"policy throughput: draft_tokens must be at least 0, got {self.draft_tokens}")
        if self.search not in CHOICES:
            raise InvalidRequest(
                f"policy throughput: search must be one of {', '.join(CHOICES)}, got {self.search!r}; "
                f"{nearest(str(self.search), CHOICES)}"
            )
        if not 0 <= self.probe_share <= 1:
            raise InvalidRequest(f"policy throughput: probe_share must be between 0 and 1, got {self.probe_share}")


@dataclass(slots=True)
class _Row:
    """What the policy knows of a slot."""

    request: int
    drafted: int  # the turn in which it was last drafted for, as far as plans go
    wait: int = FIRST_WAIT  # turns after which it is tried again


@dataclass(frozen=True, slots=True)
class _Belief:
    """How far to draft at one load, for some steps."""

    made: int  # the turn
    stale: int  # the turn at which it is worked out anew
    length: int
    budget: bool  # an early stop would be caught in a dip of the costs
    whole: bool  # choosing among the drafts is not worth the time it takes
    left_out: Mapping[int, int]  # slot -> request, of rows that are not drafted for


@dataclass(slots=True)
class _Plan:
    """The limits of the latest steps, and what follows from them as long as the rows stay."""

    requests: Sequence[int] = ()
    slots: list[int] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    load: tuple[int, bool] = (0, False)
    stale: int = 0
    longest: int = 0  # of the limits
    asked: int = 0  # rows whose limit is not 0
    search: int = 0
    probe: bool = False
    whole: bool = False  # of the belief
    seconds: Floats | None = None  # of passes by drafts, once needed
    spent: float = 0.0  # T_draft and bookkeeping


@dataclass(slots=True)
class _Step:
    """What is known of the step under way."""

    plan: _Plan
    ready: int  # B
    tokens: int  # of the pass without drafts
    rows: int
    context: int
    scheduled: bool = False


class ThroughputPolicy:
    """Algorithm 1 with everything charged. ``costs``: what steps cost; without, it is learnt from the steps alone."""

    Config = ThroughputConfig

    def __init__(self, config: ThroughputConfig, costs: CostModel | None = None) -> None:
        self.costs = costs or CostModel()
        self._config, self._block = config, config.draft_tokens
        self._scheduler = Scheduler(max(self._block, 1))
        self._rounds, self._history = self._scheduler.rounds, self._scheduler.history
        self._ledger = Ledger(share=config.probe_share, most=0.1)
        self._allowed = 0  # times of trying, as said at TRIES
        self._again: tuple[int, list[int], int] = (0, [], 0)  # steps, slots and drafts still tried
        self._tries = 0  # while no row is drafted for
        self._was_drafting = False  # in the step before
        self._whole = 0  # the turn in which as much was drafted as can be
        self._rows: dict[int, _Row] = {}  # by slot
        self._all_drafted = 0  # the turn in which all of them were last drafted for; 0: as the rows say
        self._beliefs: dict[tuple[int, bool], _Belief] = {}  # by load
        self._latest = _Plan()
        self._turn = 0
        self._step: _Step | None = None
        self._learnt, self._learnt_rounds = 0, 0  # steps; rounds, one of each row
        self._learnt_last, self._look_next = 0, 0  # turns
        self._looked: list[tuple[_Step, StepCost, bool]] = []  # steps whose costs are to be learnt from; cold

    @classmethod
    def from_config(cls, config: ThroughputConfig, costs: CostModel | None = None, **services: Any) -> ThroughputPolicy:
        return cls(config, costs)

    def try_again(self) -> None:
        """Draft for some rows once more, whether or not it paid and whatever the account holds."""
        for row in self._rows.values():
            row.drafted = self._turn - LONGEST_WAIT
        self._all_drafted = 0
        self._allowed = TRIES
        self._beliefs.clear()
        self._latest = _Plan()

    def repeat(self) -> int:
        """As of ``guard.Repeats``: none while little is known, or where choosing is worth its time."""
        plan = self._latest
        if not plan.requests or not plan.longest or not plan.whole or self._learnt_rounds < FEW:
            return 0
        steps = max(0, min(REPEATED, plan.stale - self._turn - 1))
        self._turn += steps
        return steps

    # ------------------------------------------------------------------------------------------ before drafting

    def plan(self, step: StepView) -> list[int]:
        ready = len(step.contexts)
        self._turn += 1
        self._step = None
        if not ready or not self._block:
            return [0] * ready
        plan, tokens, rows = self._latest, max(step.tokens, ready), max(step.rows, ready)
        able = ready if step.can_draft < 0 else min(step.can_draft, ready)
        now = _Step(plan, ready, tokens, rows, step.context or sum(step.contexts))
        if (
            self._turn >= plan.stale
            or (ready, tokens > ready) != plan.load
            or able < ready
            or not step.requests
            or step.requests != plan.requests
        ):
            self._latest = now.plan = self._new_plan(now, step, able)
        self._step = now
        return now.plan.limits

    def _new_plan(self, now: _Step, step: StepView, able: int) -> _Plan:
        """For rows of which the first ``able`` can be drafted for."""
        slots = list(step.slots) or list(range(now.ready))
        self._take_over(slots, step.requests or slots)
        plan = _Plan((), slots, [0] * now.ready, (now.ready, now.tokens > now.ready))
        free = self._free(step)
        if able and self._history.empty:  # nothing is known: see what a draft is like
            first = min(able, max(PROBED, able // 8))
            plan.limits[:first] = [self._block] * first
            plan.probe, plan.search = True, SEARCHES.index(self._search(free, budget=False))
            self._again = (max(AT_START, ROUNDS // first) - 1, slots[:first], self._block)
        elif able:
            belief = self._belief(now, slots[:able], free)
            left_out = belief.left_out or not belief.length  # rows that may soon be due for a try
            plan.stale = min(belief.stale, self._turn + REUSED) if left_out else belief.stale
            plan.search, plan.whole = SEARCHES.index(self._search(free, belief.budget)), belief.whole
            rows = self._rows
            if not belief.left_out or not belief.length:
                plan.limits[:able] = [belief.length] * able
            else:
                for b, slot in enumerate(slots[:able]):
                    if belief.left_out.get(slot) != rows[slot].request:
                        plan.limits[b] = belief.length
            if belief.length == self._block:
                self._whole = self._turn
            elif belief.length and self._turn - self._whole >= WHOLE:
                plan.limits = [self._block if n else 0 for n in plan.limits]
                self._whole, plan.probe = self._turn, True
            self._probe(now, plan, able)
        if not plan.probe and able == now.ready and step.requests:  # a probe is for one step
            plan.requests = list(step.requests)
        plan.longest = max(plan.limits)
        plan.asked = now.ready - plan.limits.count(0)
        return plan

    def _free(self, step: StepView) -> bool:
        """Whether no row's text depends on the schedule."""
        if self._config.search != "auto":
            return self._config.search == "global"
        different = {id(params): params for params in step.params}.values()
        return all(p.temperature == 0 or p.effective_rule == "coupled" for p in different)

    def _search(self, free: bool, budget: bool) -> Search:
        search = self._config.search
        if search != "auto":
            return search
        return "global" if free else "lagged" if budget else "early"

    def _take_over(self, slots: Sequence[int], requests: Sequence[int]) -> None:
        """Rows of new requests start without a past of their own."""
        rows, fresh = self._rows, []
        for slot, request in zip(slots, requests, strict=True):
            row = rows.get(slot)
            if row is None or row.request != request:
                rows[slot] = _Row(request, self._turn)
                fresh.append(slot)
        if fresh:
            self._scheduler.forget_rows(np.array(fresh))

    def _belief(self, now: _Step, slots: Sequence[int], free: bool) -> _Belief:
        """What would have been the best drafts of the past, had they been proposed now."""
        ready, rows, block, costs = now.ready, len(slots), self._block, self.costs
        load = (_alike(ready), now.tokens > ready)
        belief = self._beliefs.get(load)
        if belief is not None and self._turn < belief.stale:
            return belief
        if self._rounds.pending:
            self._rounds.learn(self._turn)
        seconds = self._decode_seconds(now, rows * block)
        alone = float(seconds[0])  # less what chunks of prompts beside it cost
        plain = ready / (alone + costs.bookkeeping(ready, drafting=False))
        search = -1 if self._config.search == "auto" else SEARCHES.index(self._config.search)
        length, rate, budget, chosen, whole_length, whole_rate = self._rounds.plan(
            slots,
            ready,
            min(self._history.kept, max(2, SAMPLED // (rows * block))),
            seconds * (1 + costs.features) + costs.bookkeeping(ready, drafting=True),
            plain,
            self._lengths_to_try(ready),
            costs.draft,
            self._turn,
            SEARCHES.index("global") if free else search,
            costs.deciding(ready, drafting=True, unknown=ASKING) * REPEATED / (REPEATED + 1),
        )
        whole = CHOICE * whole_rate >= rate
        if whole:
            length, rate, budget, chosen = whole_length, whole_rate, False, [1] * rows
        if rate <= MARGIN * plain:
            length = 0
        left_out = {slot: self._rows[slot].request for slot, there in zip(slots, chosen, strict=True) if not there}
        wait = round(PLANNING / (WORTH * alone))
        reused = min(max(REUSED if ready <= MANY_ROWS else MOST_REUSED, wait), MOST_REUSED)
        if len(self._beliefs) >= KEPT_PLANS:
            self._beliefs.clear()
        belief = self._beliefs[load] = _Belief(self._turn, self._turn + reused, length, budget, whole, left_out)
        return belief

    def _lengths_to_try(self, ready: int) -> list[int]:
        block = self._block
        return list(range(1, block + 1)) if ready <= EVERY_LENGTH else sorted({1, 2, block // 2, block} - {0})

    def _decode_seconds(self, now: _Step, most: int) -> Floats:
        """float64 [most + 1]: seconds of the pass by drafts, less what chunks of prompts beside it cost alone."""
        beside = now.tokens > now.ready
        curve = self.costs.verify_curve(now.tokens, most, now.rows, now.context, beside=beside)
        if beside:
            curve = curve + (min(self.costs.verify(now.ready, now.ready, now.context), curve[0]) - curve[0])
        return curve

    def _probe(self, now: _Step, plan: _Plan, able: int) -> None:
        """Let rows that were left out for long be drafted for, as far as the account reaches."""
        rows, turn, limits = self._rows, self._turn, plan.limits
        if 0 not in limits:
            self._all_drafted = turn
            return
        if self._all_drafted:
            for row in rows.values():
                row.drafted, row.wait = max(row.drafted, self._all_drafted), FIRST_WAIT
            self._all_drafted = 0
        left_out = []
        for b, slot in enumerate(plan.slots[:able]):
            if limits[b]:
                rows[slot].drafted, rows[slot].wait = turn, FIRST_WAIT
            else:
                left_out.append(b)
        if not left_out:
            return
        more, tried, most = self._again
        if more:
            due = [b for b in left_out if plan.slots[b] in tried]
            self._again = (more - 1 if due else 0, tried, most)
        else:
            due, most = self._due(plan, left_out, able)
            if not due:
                return
            seconds = self._decode_seconds(now, len(due) * most)
            if self._allowed:
                self._allowed -= 1
            elif not self._ledger.affords(self.costs.draft(len(due), most) + float(seconds[-1] - seconds[0])):
                return
            steps = IN_A_ROW if self._learnt_rounds >= FEW else max(IN_A_ROW, ROUNDS // len(due))
            self._again = (steps - 1, [plan.slots[b] for b in due], most)
            for b in due:
                rows[plan.slots[b]].wait = min(2 * rows[plan.slots[b]].wait, LONGEST_WAIT)
        for b in due:
            limits[b] = most
            rows[plan.slots[b]].drafted = turn
        plan.probe = plan.probe or bool(due)

    def _due(self, plan: _Plan, left_out: Sequence[int], able: int) -> tuple[list[int], int]:
        """The rows that are to be tried now, and with how many drafts."""
        rows = [self._rows[slot] for slot in plan.slots]
        due = [b for b in left_out if self._turn - rows[b].drafted >= rows[b].wait]
        if not due:
            return [], 0
        most = self._block
        if len(left_out) == able:
            # What a few drafts cost, of which the block's time says little: a drafter may be autoregressive.
            known = self.costs.known_drafts(able)
            if known in (1, 2) and most > known:
                return list(left_out), 1 if known == 1 else (most + 1) // 2
            # What a draft of all costs, of which that of a few says little either: every second, fourth, eighth ... try
            self._tries += 1
            if self._tries.bit_count() == 1 < self._tries:
                return list(left_out), most
        due.sort(key=lambda b: rows[b].drafted)
        return due[: max(PROBED, len(rows) // 8)], most

    # ------------------------------------------------------------------------------------------ once drafted

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        now = self._step
        if now is None or now.ready > len(lengths):  # no plan was asked for: nothing is known but the drafts
            now = self._step = self._without_plan(len(lengths))
        plan, ready = now.plan, now.ready
        rows = ready - lengths[:ready].count(0)
        if not rows:
            return [0] * len(lengths)
        said = None if confidence is None else to_array(confidence)
        drafts = max(lengths) if said is None else said.shape[1]
        if drafts > self._block:
            self._scheduler.widen(drafts)
        if plan.seconds is not None and now.tokens == ready and drafts <= self._block:
            seconds = plan.seconds
        else:
            seconds = self._decode_seconds(now, ready * max(drafts, self._block))
            if now.tokens == ready and drafts <= self._block:
                plan.seconds, plan.spent = seconds, self._spent(plan.asked, now)
        at_least = 0
        if plan.probe and not self._history.empty:
            # What is tried is tried in earnest, or nothing would be learnt; the past alone says where.
            tokens = now.tokens + sum(lengths[:ready])
            at_least = drafts if self.costs.seen(tokens, beside=now.tokens > ready) < UNSEEN else 1
        now.scheduled = True
        return self._rounds.schedule(
            said,
            lengths,
            plan.slots,
            plan.limits,
            seconds,
            # T_draft by what was planned: how long a draft became is known only once its tokens are.
            plan.spent if plan.spent and rows == plan.asked else self._spent(rows, now),
            plan.search,
            at_least,
        )

    def _spent(self, rows: int, now: _Step) -> float:
        return self.costs.draft(rows, now.plan.longest) + self.costs.bookkeeping(now.ready, drafting=True)

    def _without_plan(self, batch: int) -> _Step:
        slots = list(range(batch))
        self._take_over(slots, slots)
        search = 0 if self._config.search == "auto" else SEARCHES.index(self._config.search)
        limits = [self._block] * batch
        plan = _Plan((), slots, limits, (batch, False), 0, self._block, batch, search)
        return _Step(plan, batch, batch, batch, 0)

    # ------------------------------------------------------------------------------------------ afterwards

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        now, self._step = self._step, None
        if now is None:
            return
        plan, ready, drafting = now.plan, now.ready, now.plan.longest > 0
        cold, self._was_drafting = not self._was_drafting, drafting
        soon = cost.verify > LONG or self.costs.seen(cost.tokens, beside=now.tokens > ready) < KNOWN
        if soon or self._turn >= self._look_next:
            self._look_next = self._turn + LOOK
            self._looked.append((now, cost, cold and drafting))
            if soon or len(self._looked) >= TOGETHER:
                self._learn_costs()
        if not drafting:
            self._ledger.earn(cost.draft + cost.verify + cost.bookkeeping)
            return
        every = 1 if ready <= LEARNT_AT_ONCE else SELDOM if ready <= MANY_ROWS else RARELY
        if self._turn < self._learnt_last + every and self._learnt > EARLY and not plan.probe:
            return
        self._learnt_last = self._turn
        gained = self._rounds.accept(accepted, plan.slots, plan.limits, now.scheduled)
        self._learnt += 1
        self._learnt_rounds += plan.asked
        if self._learnt <= EARLY or self._rounds.pending + ready > LEARNT_AT_ONCE:
            self._rounds.learn(self._turn)
        if plan.probe:
            plain = self.costs.verify(ready, ready, now.context) / ready
            more = self._decode_seconds(now, max(0, cost.tokens - now.tokens))
            self._ledger.settle(min(0.0, gained * plain - cost.draft - float(more[-1] - more[0])))

    def _learn_costs(self) -> None:
        """Of a few steps at a time: behind a pass, all that this reads has left the processor's caches, and one step
        costs as much as all."""
        for now, cost, cold in self._looked:
            beside = now.tokens > now.ready  # chunks of prompts
            self.costs.observe_step(cost, now.ready, (now.plan.asked, now.plan.longest), beside=beside, cold=cold)
        self._looked.clear()


def _alike(ready: int) -> int:
    """The same for numbers of rows that one plan speaks for: to a quarter of an octave for few of them, to an octave
    for many. As requests come and go, rows are hardly ever as many as in the step before."""
    return round(4 * log2(ready)) if ready <= LEARNT_AT_ONCE else ready.bit_length() + 4 * LEARNT_AT_ONCE
