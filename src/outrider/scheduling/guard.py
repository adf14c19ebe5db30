"""Never slower than plain decoding: an account of what speculation gains and loses, around any policy.

A step that drafted is worth the time in which plain decoding would have given its tokens, which is known because plain
steps are taken now and then (a *control*: some in a row, for the first ones still pay for the drafts before them, whose
weights and tables are in the processor's caches instead of the target's). Losses are paid from a ``Ledger``; when it
is empty, or when the policy itself has long seen no use in drafting, the guard steps aside: nothing is drafted, and
after a while the drafter is not even shown what is committed (``follows``), so that steps cost what plain steps cost.
Coming back, after a pause or with other texts, is another draft like any other: paid from the ledger, and ever more
rarely while it does not pay. Single drafts that take many times the usual, which another process interrupted or which
read their code for the first time, are paid from a small ledger of their own.

Everything that a step takes longer because there is a drafter is charged: drafting, verifying, bookkeeping, and also in
steps without drafts, prompts included, the features that passes give and the time in which the drafter is shown what
was committed or takes rows up again, and the policy's own work where it was asked and drafted nothing. "Plain" means a
step with none of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log2
from statistics import median_high
from typing import Protocol, runtime_checkable

from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.ledger import Ledger
from outrider.types import SchedulerPolicy, StepCost, StepView, Values

__all__ = ["GuardedPolicy", "Repeats", "TriesAgain"]

CONTROL, LOOKED_AT = 8, 4  # plain steps of a control, and of these the last ones, whose median is learnt from
CONTROLLED = 0.005  # of the time of steps that draft, what controls may cost: the less drafting gains, the more of them
OFTEN, SELDOM = 48, 768  # steps that draft between two controls, at least and at most
AT_FIRST, KNOWN = 24, 5  # the most, until so many were taken of about as many rows,
UNKNOWN = 3  # and until one was
CLEARLY = 1.1  # an advantage that needs no more of them than it takes to be believed
BELIEVED, ENOUGH = 5, 3  # the latest ones: their median is what plain decoding costs, whatever the cost model says
CHANGING = 0.25  # what one settlement counts for in how slow the machine is
BESIDE = 4  # times as many where chunks of prompts are beside the rows, which says less of plain decoding
ALIKE = 3  # to an octave: numbers of rows that one control speaks for
TOGETHER, SOON = 8, 0.02  # steps that draft, or seconds of their passes, after which they are settled
LOST = 125  # plain steps of one row, whose time is the credit: what may be lost before anything was gained
LOSSES = 2  # in a row, behind which the policy is asked in every step, to see what has changed
STALL = 2.0  # a pass that took longer than so many times what it should was held up by others
HELD_UP = 4.0  # what a draft takes beyond so many times its usual seconds is put down to others,
PROMPT = 0.25  # and so is what showing the drafter a prompt takes beyond this share of the pass,
HELD_UP_MOST, HELD_UP_SHARE = 0.05, 0.0025  # up to so many seconds, and this share of the time of plain steps
STEADY = log(1.2)  # less than this is no change of the machine's speed
IDLE = 32  # plain steps after which the drafter is left out, where it can take rows up again
RESTING = 0.1  # of the credit, what one that cannot may cost in plain steps before it is left out
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096  # steps that it is left out for
RENEWALS = 8  # or until there are other texts: all rows have new requests, so many times over where much was lost
SEEN = 64  # plain steps whose cost is always looked at; later every LOOK-th is enough
LOOK = 4
LOOK_ASIDE = 16  # the same while the drafter is left out: each step is to cost what a plain step costs


@runtime_checkable
class TriesAgain(Protocol):
    """A policy that has its own times for trying what did not pay, and can be told that now is one."""

    def try_again(self) -> None: ...


@runtime_checkable
class Repeats(Protocol):
    """A policy that need not be asked in every step: being asked takes time."""

    def repeat(self) -> int:
        """How many steps may go like the latest one as long as the rows stay: drafts as planned, all of them verified,
        nothing observed. They count as taken."""
        ...


@dataclass(slots=True)
class _Drafted:
    """Steps in a row that drafted for as many rows, to be settled together: behind a pass, all that settling reads has
    left the processor's caches, and one step costs as much as several."""

    ready: int
    base: int  # tokens of the passes without drafts
    longest: float  # seconds of a draft that nobody held up, at most
    steps: int = 0
    accepted: int = 0
    draft: float = 0.0  # seconds
    verify: float = 0.0
    bookkeeping: float = 0.0
    repeated: int = 0  # steps that the policy was not asked about
    unasked: float = 0.0  # seconds of their bookkeeping
    tokens: int = 0
    rows: int = 0
    context: int = 0

    def add(self, cost: StepCost, draft: float, accepted: int, repeated: bool) -> None:
        self.steps += 1
        if repeated:
            self.repeated += 1
            self.unasked += cost.bookkeeping
        self.accepted += accepted
        self.draft += draft
        self.verify += cost.verify
        self.bookkeeping += cost.bookkeeping
        self.tokens += cost.tokens
        self.rows, self.context = cost.rows, cost.context


class GuardedPolicy:
    """Another policy, as long as it does not make decoding slower."""

    def __init__(
        self, policy: SchedulerPolicy, costs: CostModel, *, takes_up: bool = True, ledger: Ledger | None = None
    ) -> None:
        """``costs``: the policy's own, where it has any. ``takes_up``: the drafter can take up a row in the middle of
        its text."""
        self.policy, self.costs = policy, costs
        self.ledger = ledger or Ledger()
        self._held_up = Ledger(share=HELD_UP_SHARE, most=HELD_UP_MOST)
        self._limit_credit()
        self._learns = getattr(policy, "costs", None) is not costs
        self._takes_up = takes_up
        self._repeat = policy.repeat if isinstance(policy, Repeats) else None
        self._suspended = False  # the ledger is empty
        self._needed = 0.0  # seconds that it must hold for another try
        self._follows = True
        self._idle = 0  # plain steps in a row
        self._unearned = 0.0  # seconds of those that the ledger was not told of
        self._resting = 0.0  # seconds that following has cost in them
        self._pause = FIRST_PAUSE
        self._newest_then = -1  # the latest request when the drafter was left out
        self._since_control = [0, 0]  # steps that drafted: without chunks of prompts beside the rows, and with them
        self._left = 0  # plain steps of the control under way
        self._control: list[tuple[StepView, StepCost]] = []  # those of them that are looked at
        self._controls: dict[tuple[int, bool], int] = {}  # how many were taken: by rows, about, and chunks beside
        self._proven: dict[int, deque[tuple[StepView, StepCost, float]]] = {}  # controls, slowness then: by rows, about
        self._slowness: float | None = None  # log: passes of the latest steps that drafted, over what they cost usually
        self._table = costs.table
        self._advantage = 1.0  # tokens per second over plain decoding's, while drafting
        self._plain_steps = 0
        self._asked = False  # the policy planned this step
        self._unsettled: _Drafted | None = None
        self._repeating = False  # this step goes like an earlier one
        self._losses = 0  # in a row, of the latest steps that were settled together
        self._repeats = 0  # steps that may still go like the latest one that the policy was asked about
        self._repeated: StepView | None = None  # that one
        self._view: StepView | None = None
        self._planned: Sequence[int] = ()
        self._plain_seconds, self._plain_rows, self._plain_steps_left = (0.0, 0.0, 0.0), 0, 0

    @property
    def follows(self) -> bool:
        """Whether the drafter is to be shown what is committed."""
        return self._follows

    @property
    def advantage(self) -> float:
        """Tokens per second over plain decoding's, of the latest steps that drafted."""
        return self._advantage

    def plan(self, step: StepView) -> Sequence[int]:
        self._view = step
        if self._repeats and _same_rows(step, self._repeated):
            self._repeats -= 1
            self._repeating = True
            return self._planned
        self._repeats, self._repeating = 0, False
        self._asked = self._unsettled is not None or self._may_draft(step)
        self._planned = self.policy.plan(step) if self._asked else [0] * len(step)
        return self._planned

    def _may_draft(self, step: StepView) -> bool:
        if not self._follows:
            renewals = 1 if 2 * self.ledger.balance > self.ledger.credit else RENEWALS
            others = _newest(step) - self._newest_then >= renewals * len(step)
            if (self._idle < self._pause and not others) or not self.ledger.affords(self._needed):
                return False
            self._follows, self._suspended = True, False  # rows are followed from the next step on
            self._idle, self._resting = 0, 0.0
            if isinstance(self.policy, TriesAgain):
                self.policy.try_again()
        if self._suspended:
            if not self.ledger.affords(self._needed):
                return False
            self._suspended = False
        beside = step.tokens > len(step)
        if self._since_control[beside] >= self._until_control(step):
            self._since_control[beside], self._left = 0, CONTROL
            self._control.clear()
            self._controls[_alike(step)] = self._controls.get(_alike(step), 0) + 1
        return not self._left

    def _until_control(self, step: StepView) -> float:
        """Steps that draft since the latest control, so that this is to be one."""
        alike = _alike(step)
        taken = self._controls.get(alike, 0)
        wait = min(max(OFTEN, CONTROL * (self._advantage - 1) / CONTROLLED), SELDOM)
        known = KNOWN
        if self._advantage > CLEARLY:
            known = 1 if alike[1] else ENOUGH
        if taken < known:
            return min(wait, AT_FIRST if taken else UNKNOWN)
        return BESIDE * wait if alike[1] else wait

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        if self._repeating:
            return list(lengths)
        return self.policy.choose(confidence, lengths) if self._asked else [0] * len(lengths)

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        view, self._view = self._view, None
        if self._repeating and view is not None:
            self._count(view, cost, sum(accepted))
            return
        if not self._follows and view is not None and self._plain_steps > SEEN and self._plain_steps % LOOK_ASIDE:
            self._plain_steps += 1
            self._idle += 1
            self._unearned += cost.draft + cost.verify + cost.bookkeeping
            return
        if self._asked:
            self.policy.observe(cost, accepted)
        if view is None or not len(view):  # prompts alone
            shown = self._own(cost.draft + cost.follow, PROMPT * cost.verify)
            self.ledger.settle(self._featureless(cost) - cost.verify - shown)
            return
        drafted = any(self._planned)
        if self._left and not drafted:
            self._look(view, cost)
        elif self._learns or not self._asked:
            self._learn(view, cost, drafted)
        if drafted:
            self._count(view, cost, sum(accepted))
            if self._repeat is not None and self._losses < LOSSES and not self._suspended:
                self._repeats, self._repeated = self._repeat(), view
        else:
            self._settle()
            self._rest(view, cost, self._plain(len(view), cost.context)[2] if self._asked else 0.0)

    # ------------------------------------------------------------------------------------------ parts

    def _look(self, view: StepView, cost: StepCost) -> None:
        """A step of a control, of which the last ones are one observation: seen among drafts, it tells what plain steps
        cost beside them, as it would not among its like."""
        self._left -= 1
        if self._left < LOOKED_AT:
            self._control.append((view, cost))
        if self._left:
            return
        about, beside = kind = _alike(view)
        alike = [seen for seen in self._control if _alike(seen[0]) == kind]
        alike.sort(key=lambda seen: seen[1].verify + seen[1].bookkeeping)
        middle = alike[len(alike) // 2]
        if not beside and self._slowness is not None:
            proven = self._proven.setdefault(about, deque(maxlen=BELIEVED))
            proven.append((*middle, self._slowness))
        self._learn(*middle, drafted=False, control=True)

    def _learn(self, view: StepView, cost: StepCost, drafted: bool, control: bool = False) -> None:
        self._plain_steps += not drafted
        often = self._plain_steps > SEEN and self._follows and (self._asked or self._suspended)
        if not drafted and not control and often and self._plain_steps % LOOK:
            return
        planned = (sum(n > 0 for n in self._planned), max(self._planned)) if drafted else (0, 0)
        worth = LOOKED_AT if control else 1
        beside = view.tokens > len(view)
        self.costs.observe_step(cost, len(view), planned, beside=beside, asked=self._asked, worth=worth)

    def _count(self, view: StepView, cost: StepCost, accepted: int) -> None:
        """A step that drafted."""
        ready, base = len(view), max(view.tokens, len(view))
        drafted = self._unsettled
        if drafted is None or drafted.ready != ready or drafted.base != base:
            self._settle()
            usual = self.costs.draft(sum(n > 0 for n in self._planned), cost.drafts or max(self._planned))
            drafted = self._unsettled = _Drafted(ready, base, HELD_UP * usual)
        drafted.add(cost, self._own(cost.draft, drafted.longest), accepted, self._repeating)
        if drafted.steps >= TOGETHER or drafted.draft + drafted.verify >= SOON:
            self._settle()

    def _own(self, seconds: float, most: float) -> float:
        """The seconds that the drafter has to answer for: beyond ``most`` others held it up, or it was its first call,
        as far as the account of such times reaches."""
        if not 0 < seconds - most < self._held_up.balance:
            return seconds
        self._held_up.settle(most - seconds)
        return most

    def _settle(self) -> None:
        """What the latest steps took, against what plain decoding would have taken for their tokens."""
        drafted, self._unsettled = self._unsettled, None
        if drafted is None:
            return
        ready, base, steps, costs, context = drafted.ready, drafted.base, drafted.steps, self.costs, drafted.context
        verify, bookkeeping = self._pass(drafted), drafted.bookkeeping / steps
        self._plain_steps_left = 0
        plain, own, _ = self._plain(ready, context)
        without = plain
        if base != ready:  # chunks of prompts beside it
            without = self._now(max(base, 1), drafted.rows, context) + own
        if bookkeeping > STALL * own:
            bookkeeping = min(bookkeeping, STALL * costs.bookkeeping(ready, drafting=True))
        if drafted.repeated:
            costs.observe_bookkeeping(ready, True, drafted.unasked / drafted.repeated, asked=False)
        took = drafted.draft / steps + verify + bookkeeping
        worth = without + drafted.accepted / (steps * ready) * plain
        self.ledger.settle(steps * (worth - took))
        self._advantage += 0.02 * steps * (worth / took - self._advantage)
        self._idle, self._resting = 0, 0.0
        self._since_control = [since + steps for since in self._since_control]
        if self._advantage > 1:
            self._pause = FIRST_PAUSE
        lost = max(0.0, steps * (took - worth))
        self._losses = self._losses + 1 if lost else 0
        if self._losses >= LOSSES:
            self._repeats = 0
        if self.ledger.balance <= lost:  # others like them would overdraw the account
            self._suspended, self._repeats = True, 0
            self._needed = max(2 * lost, 0.25 * self.ledger.credit)
            self._since_control = [0, 0]

    def _limit_credit(self) -> None:
        """A quarter of a second is nothing to a large model, and all of a short answer to a small one."""
        self.ledger.limit(LOST * (self.costs.verify(1, 1, 0) + self.costs.bookkeeping(1, drafting=False)))

    def _now(self, tokens: int, rows: int, context: int) -> float:
        """Seconds of a pass with chunks of prompts, on the machine as slow as it is now."""
        if self._slowness is None:
            return self.costs.verify(tokens, rows, context, beside=True)
        return self.costs.usual(tokens, rows, context, beside=True) * exp(self._slowness)

    def _pass(self, drafted: _Drafted) -> float:
        """Seconds of one of its passes, but for what held it up; alone, they show how slow the machine is now."""
        if self._table is not self.costs.table:  # all of that was relative to another one
            self._table, self._slowness = self.costs.table, None
            self._proven.clear()
            self._limit_credit()
        alone, tokens = drafted.base == drafted.ready, drafted.tokens // drafted.steps
        usual = self.costs.usual(tokens, drafted.rows, drafted.context, beside=not alone) * (1 + self.costs.features)
        ratio = max(drafted.verify / drafted.steps, 1e-9) / usual
        if self._slowness is not None:
            ratio = min(ratio, STALL * exp(self._slowness))
        if alone:
            slow = log(ratio)
            self._slowness = slow if self._slowness is None else self._slowness + CHANGING * (slow - self._slowness)
        return ratio * usual

    def _plain(self, rows: int, context: int) -> tuple[float, float, float]:
        """Seconds of a plain step of so many rows, of its bookkeeping alone, and of the policy's work where it is asked
        and drafts nothing; worked out anew every few steps."""
        if self._plain_rows != rows or self._plain_steps_left <= 0:
            own = self.costs.bookkeeping(rows, drafting=False, asked=False)
            off, own = self._proven_costs(rows, own)
            self._plain_seconds = self.costs.verify(rows, rows, context) * off + own, own, self.costs.deciding(rows)
            self._plain_rows, self._plain_steps_left = rows, LOOK
        self._plain_steps_left -= 1
        return self._plain_seconds

    def _proven_costs(self, rows: int, own: float) -> tuple[float, float]:
        """How many times what the cost model says plain passes took in the latest controls, and their bookkeeping, on
        the machine as slow as it is now; 1 and ``own`` while there are too few. The model shares what it sees among
        passes of all sizes, and may be far off while it knows few. Now and then are compared by steps that drafted
        alone: what is wrong of them is wrong of both."""
        proven, now = self._proven.get(_about(rows), ()), self._slowness
        if len(proven) < ENOUGH or now is None:
            return 1.0, own
        times, owns = [], []
        for view, cost, then in proven:
            expected = self.costs.verify(len(view), len(view), cost.context)
            since = exp(now - then) if abs(now - then) > STEADY else 1.0
            times.append(self._featureless(cost) * since / expected if expected > 0 else 1.0)
            owns.append((cost.bookkeeping - cost.follow) * since)
        return median_high(times), median_high(owns)

    def _rest(self, view: StepView, cost: StepCost, deciding: float) -> None:
        """A plain step. Where it followed from what was seen, the drafter is left out before long."""
        following = self._following(cost) + deciding
        plain = cost.draft + cost.verify + cost.bookkeeping - following + self._unearned
        self.ledger.earn(plain)
        self._held_up.earn(plain)
        self.ledger.settle(-following)
        self._unearned = 0.0
        self._idle += 1
        self._resting += following
        if not self._follows:
            return
        enough = self._idle >= IDLE if self._takes_up else self._resting >= RESTING * self.ledger.credit
        if enough or self.ledger.balance <= 0:
            self._follows = False
            self._idle = 0
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._newest_then = _newest(view)

    def _following(self, cost: StepCost) -> float:
        """Seconds by which a step without drafts was longer than a plain one, because rows are followed."""
        return cost.draft + cost.follow + cost.verify - self._featureless(cost)

    def _featureless(self, cost: StepCost) -> float:
        """Seconds that its pass would have taken without giving features."""
        return cost.verify / (1 + self.costs.features) if cost.follow > 0 else cost.verify


def _alike(step: StepView) -> tuple[int, bool]:
    """The same for steps whose plain costs are about the same: by rows, and whether chunks of prompts are beside."""
    return _about(len(step)), step.tokens > len(step)


def _about(rows: int) -> int:
    """The same for numbers of rows that one control speaks for."""
    return round(ALIKE * log2(max(rows, 1)))


def _same_rows(step: StepView, earlier: StepView | None) -> bool:
    """Whether a step has the rows of an earlier one, and as many tokens of prompts beside them."""
    return (
        earlier is not None
        and step.requests == earlier.requests
        and step.tokens == earlier.tokens
        and step.can_draft == earlier.can_draft
    )


def _newest(step: StepView) -> int:
    """The latest of its requests."""
    return max(step.requests, default=-1)
