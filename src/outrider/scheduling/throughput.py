"""Draft and verify what raises tokens per second: DSpark's hardware-aware prefix scheduler, with drafting charged.

**Before drafting** (``plan``) the past alone speaks. Each row's latest drafts, as survivals, stand for what drafting
again would give; the search that schedules a step is run on them, unconstrained, with T_draft and bookkeeping in the
costs. A row whose return is below its share of the cost is not drafted for; where plain decoding gives more tokens per
second, nothing is. Rows that were left out are drafted for again from time to time, paid from an account that plain
steps fill at a small rate, and ever more rarely while it does not pay.

**Once drafted** (``choose``), T_draft is spent: Algorithm 1 starts from R / (T_draft + T_verify(R) + T_bookkeeping).
The costs are of decoding alone: chunks of prompts that share the step are paid for anyway, so the search is shown what
drafts add to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.errors import InvalidRequest, nearest
from outrider.scheduling.acceptance import AcceptanceModel, SurvivalHistory
from outrider.scheduling.cost_model import CostModel
from outrider.scheduling.ledger import Ledger
from outrider.scheduling.prefix_search import rank
from outrider.scheduling.schedule import ACCEPTED, KEEP, ROW, Form, Round, schedule
from outrider.types import StepCost, StepView

__all__ = ["ThroughputConfig", "ThroughputPolicy"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Searches = Literal["auto", "early", "lagged", "global"]
SEARCHES: tuple[Searches, ...] = ("auto", "early", "lagged", "global")

CAUGHT = 0.98  # an early stop that gives less of the best of all is caught in a dip
MARGIN = 1.005  # drafting must promise so much more than plain decoding
SAMPLED = 512  # drafts of the past that a plan is made of, about
STANDING = 64  # rows that stand for all in a plan
EVERY_LENGTH = 32  # rows up to which every draft length is tried
FIRST_WAIT, LONGEST_WAIT = 4, 512  # steps after which a row that was left out is tried again
PROBED = 4  # rows tried in one step, or an eighth of all
TRIES = 2  # times of trying for which the account need not hold enough, after ``try_again``
IN_A_ROW = 3  # steps for which rows are tried: only after the first one are weights and code in the caches
AT_START = 4  # the same when nothing is known
WHOLE = 128  # steps after which rows that draft few tokens draft as many as they can once
REUSED, MOST_REUSED = 8, 32  # steps that a plan is good for
PLANNING, WORTH = 0.4e-3, 0.005  # seconds that a plan takes, and of the time of steps what planning may take
LEARNT_AT_ONCE, LEARNT_ROWS = 16, 64  # rounds collected before they are learnt from; the most rows of one step
SELDOM, RARELY = 4, 8  # of more rows than the one and the other, only every so manyth step is learnt from
EARLY = 16  # rounds that are learnt from at once
LOOK, KNOWN = 4, 16  # every LOOK-th step's costs are looked at, where more than KNOWN passes as large were


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
        if self.search not in SEARCHES:
            raise InvalidRequest(
                f"policy throughput: search must be one of {', '.join(SEARCHES)}, got {self.search!r}; "
                f"{nearest(str(self.search), SEARCHES)}"
            )
        if not 0 <= self.probe_share <= 1:
            raise InvalidRequest(f"policy throughput: probe_share must be between 0 and 1, got {self.probe_share}")


@dataclass(slots=True)
class _Step:
    """What is known of the step under way."""

    slots: Ints  # [B]
    ready: int  # B
    tokens: int  # of the pass without drafts
    rows: int
    context: int
    limits: list[int]  # [B]
    longest: int  # of the limits
    asked: int = 0  # rows whose limit is not 0
    free: bool = False  # no row's text depends on the schedule
    probe: bool = False
    round: Round | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The limits of the latest steps, and what follows from them as long as the rows stay."""

    requests: Sequence[int]
    limits: list[int]
    slots: Ints
    longest: int = 0
    asked: int = 0
    free: bool = False


class ThroughputPolicy:
    """Algorithm 1 with everything charged. ``costs``: what steps cost; without, it is learnt from the steps alone."""

    Config = ThroughputConfig

    def __init__(self, config: ThroughputConfig, costs: CostModel | None = None) -> None:
        self.costs = costs or CostModel()
        self._config, self._block = config, config.draft_tokens
        self._acceptance = AcceptanceModel(max(self._block, 1))
        self._history = SurvivalHistory(max(self._block, 1))
        self._ledger = Ledger(share=config.probe_share, most=0.1, balance=0.1)
        self._allowed = 0  # times of trying, as said at TRIES
        self._again: tuple[int, Ints, int] = (0, np.zeros(0, dtype=np.int64), 0)  # steps, slots and drafts still tried
        self._was_drafting = False  # in the step before
        self._whole = 0  # the turn in which as much was drafted as can be
        self._owners = np.full(0, -1)  # by slot: the request that has it
        self._idle = np.zeros(0, dtype=np.int64)  # by slot: steps since it was drafted for
        self._wait = np.zeros(0, dtype=np.int64)  # by slot: steps after which it is tried again
        self._planned = np.zeros(0, dtype=np.int64)  # by slot: limits of the last plan
        self._common = 0  # the limit of rows that were drafted for in the last plan
        self._stale = 0  # the turn at which a new plan is made
        self._made = (0, 0)  # the turn at which this one was, and the rows it was made for
        self._latest = _Plan((), [], np.zeros(0, dtype=np.int64))
        self._turn = 0
        self._counted = 0  # the turn up to which ``_idle`` is counted
        self._step: _Step | None = None
        self._rounds: list[Round] = []  # not learnt from yet
        self._learnt = 0
        self._caught = False  # an early stop would have been caught in a dip of the costs
        self._past: list[tuple[Floats, int]] = []  # survivals and rows, of the last two steps that drafted

    @classmethod
    def from_config(cls, config: ThroughputConfig, costs: CostModel | None = None, **services: Any) -> ThroughputPolicy:
        return cls(config, costs)

    def try_again(self) -> None:
        """Draft for some rows once more, whether or not it paid and whatever the account holds."""
        self._idle[:] = LONGEST_WAIT
        self._allowed = TRIES
        self._stale = 0

    # ------------------------------------------------------------------------------------------ before drafting

    def plan(self, step: StepView) -> list[int]:
        ready = len(step)
        self._turn += 1
        self._step = None
        if not ready or not self._block:
            return [0] * ready
        context = step.context or sum(step.contexts)
        able = ready if step.can_draft < 0 else min(step.can_draft, ready)
        tokens, rows = max(step.tokens, ready), max(step.rows, ready)
        latest, probe = self._latest, False
        if self._turn >= self._stale or able < ready or not step.requests or step.requests != latest.requests:
            if ready != self._made[1]:  # another load
                self._stale = min(self._stale, self._made[0] + REUSED)
            slots = np.fromiter(step.slots, np.int64, ready) if step.slots else np.arange(ready)
            self._take_over(slots, step.requests)
            now = _Step(slots, ready, tokens, rows, context, [], 0)
            limits = self._limits(now, able)
            probe, longest = now.probe, max(limits)
            # A probe is for one step; the plan itself is good for some.
            requests = list(step.requests) if not probe and able == ready else ()
            asked = ready - limits.count(0)
            self._latest = latest = _Plan(requests, limits, slots, longest, asked, bool(longest) and self._free(step))
        self._step = _Step(
            latest.slots, ready, tokens, rows, context, latest.limits, latest.longest, latest.asked, latest.free, probe
        )
        return latest.limits

    def _free(self, step: StepView) -> bool:
        if self._config.search != "auto":
            return self._config.search == "global"
        different = {id(params): params for params in step.params}.values()
        return all(p.temperature == 0 or p.effective_rule == "coupled" for p in different)

    def _take_over(self, slots: Ints, requests: Sequence[int]) -> None:
        """Rows of new requests start without a past of their own."""
        missing = int(slots.max()) + 1 - len(self._owners)
        if missing > 0:
            self._owners = np.concatenate([self._owners, np.full(missing, -1)])
            self._idle = np.concatenate([self._idle, np.zeros(missing, dtype=np.int64)])
            self._wait = np.concatenate([self._wait, np.full(missing, FIRST_WAIT)])
            self._planned = np.concatenate([self._planned, np.full(missing, self._block)])
        owners = np.fromiter(requests, np.int64, len(slots)) if requests else slots
        new = self._owners[slots] != owners
        if new.any():
            self._learn()  # of the rows before them
            fresh = slots[new]
            self._owners[fresh] = owners[new]
            self._idle[fresh], self._wait[fresh] = 0, FIRST_WAIT
            self._planned[fresh] = self._common
            self._acceptance.forget_row(fresh)
            self._history.forget_row(fresh)

    def _limits(self, now: _Step, able: int) -> list[int]:
        """The most drafts of each of the B rows, of which the first ``able`` can be drafted for."""
        limits = np.zeros(now.ready, dtype=np.int64)
        slots = now.slots[:able]
        if able and self._history.empty:  # nothing is known: see what a draft is like
            limits[:able] = self._block
            now.probe = True
            self._again = (AT_START - 1, slots, self._block)
        elif able:
            if self._turn >= self._stale:
                self._learn()
                self._planned[slots] = planned = self._best_limits(now, slots)
                self._common = int(planned.max())
                seconds = self.costs.verify(now.ready, now.ready, now.context)
                reused = REUSED if now.ready <= LEARNT_ROWS else MOST_REUSED
                self._stale = self._turn + min(max(reused, round(PLANNING / (WORTH * seconds))), MOST_REUSED)
                self._made = self._turn, now.ready
            limits[:able] = planned = self._planned[slots]
            longest = int(planned.max())
            if longest == self._block:
                self._whole = self._turn
            elif longest and self._turn - self._whole >= WHOLE:
                limits[:able][planned > 0] = self._block
                self._whole, now.probe = self._turn, True
            self._probe(now, slots, limits)
        return limits.tolist()

    def _best_limits(self, now: _Step, slots: Ints) -> Ints:
        """int64 [D]: what would have been the best drafts of the past, had they been proposed now."""
        ready, rows, block, costs = now.ready, len(slots), self._block, self.costs
        samples = max(1, min(self._history.kept, SAMPLED // (rows * block)))
        past = self._history.of(slots, self._history.kept if rows <= STANDING else 2, self._turn)
        seconds = self._decode_seconds(now, rows * block)
        plain = ready / (seconds[0] + costs.bookkeeping(ready, drafting=False))
        seconds = seconds * (1 + costs.features) + costs.bookkeeping(ready, drafting=True)
        lengths = self._lengths_to_try(ready)

        def search(chosen: Bools) -> tuple[int, float, float, Bools]:
            many = int(chosen.sum())
            spent = np.array([costs.draft(many, k) for k in lengths])
            some = past[chosen, :samples][:: -(-many // STANDING)]
            share = many / (len(some) * samples)
            return (*_best_length(some, ready, seconds, lengths, spent, share), chosen)

        best = search(np.ones(rows, dtype=bool))
        if rows > 1:
            # Rows one by one: what drafting for a row gives beyond what verifying it costs, against its share of
            # T_draft. Both depend on how far is drafted.
            token, some = plain * (seconds[-1] - seconds[0]) / (rows * block), max(1, rows // 2)
            for k in sorted({best[0], block}):
                share = (costs.draft(rows, k) - costs.draft(some, k)) / (rows - some)
                chosen = np.maximum(past[:, :, :k] - token, 0).sum(2).mean(1) > plain * max(share, 0.0)
                if chosen.any() and (chosen != best[3]).any():
                    best = max(best, search(chosen), key=lambda found: found[1])
        length, rate, early, chosen = best
        self._caught = early < CAUGHT * rate
        limits = np.zeros(rows, dtype=np.int64)
        if rate > MARGIN * plain:
            limits[chosen] = length
        return limits

    def _lengths_to_try(self, ready: int) -> list[int]:
        block = self._block
        return list(range(1, block + 1)) if ready <= EVERY_LENGTH else sorted({1, 2, block // 2, block} - {0})

    def _decode_seconds(self, now: _Step, most: int) -> Floats:
        """float64 [most + 1]: seconds of the pass by drafts, less what chunks of prompts beside it cost alone."""
        curve = self.costs.verify_curve(now.tokens, most, now.rows, now.context)
        if now.tokens > now.ready:
            curve = curve + (min(self.costs.verify(now.ready, now.ready, now.context), curve[0]) - curve[0])
        return curve

    def _probe(self, now: _Step, slots: Ints, limits: Ints) -> None:
        """Let rows that were left out for long be drafted for, as far as the account reaches."""
        left_out = limits[: len(slots)] == 0
        if not left_out.any():
            self._idle[slots], self._wait[slots] = 0, FIRST_WAIT
            self._counted = self._turn
            return
        passed, self._counted = self._turn - self._counted, self._turn
        self._idle[slots] = np.where(left_out, self._idle[slots] + passed, 0)
        self._wait[slots] = np.where(left_out, self._wait[slots], FIRST_WAIT)
        more, tried, most = self._again
        if more:
            due = np.flatnonzero(left_out & np.isin(slots, tried))
            self._again = (more - 1 if len(due) else 0, tried, most)
            limits[due] = most
            now.probe = now.probe or bool(len(due))
            self._idle[slots[due]] = 0
            return
        due = np.flatnonzero(left_out & (self._idle[slots] >= self._wait[slots]))
        if not len(due):
            return
        most = self._block
        if most > 1 and left_out.all() and self.costs.known_drafts(len(slots)) == 1:
            # What one draft costs, of which the block's time says little: a drafter may be autoregressive.
            due, most = np.arange(len(slots)), 1
        else:
            due = due[np.argsort(-self._idle[slots[due]], kind="stable")][: max(PROBED, now.ready // 8)]
        seconds = self._decode_seconds(now, len(due) * most)
        if self._allowed:
            self._allowed -= 1
        elif not self._ledger.affords(self.costs.draft(len(due), most) + seconds[-1] - seconds[0]):
            return
        limits[due] = most
        now.probe = True
        self._again = (IN_A_ROW - 1, slots[due], most)
        self._idle[slots[due]] = 0
        self._wait[slots[due]] = np.minimum(2 * self._wait[slots[due]], LONGEST_WAIT)

    # ------------------------------------------------------------------------------------------ once drafted

    def choose(self, confidence: Tensor | None, lengths: Tensor) -> Tensor:
        batch, most = len(lengths), np.ascontiguousarray(lengths.numpy(), np.int64)
        if not batch:
            return lengths
        now = self._step
        if now is None or now.ready > batch:  # no plan was asked for: nothing is known but the drafts
            limits = [self._block] * batch
            free = self._config.search == "global"
            now = self._step = _Step(np.arange(batch), batch, batch, batch, 0, limits, self._block, batch, free)
            self._take_over(now.slots, ())
        rows = int(np.count_nonzero(most[: now.ready]))
        if not rows:
            return torch.zeros(batch, dtype=torch.int64)
        said = None if confidence is None else np.ascontiguousarray(confidence.numpy(), np.float32)
        drafts = int(most.max()) if said is None else said.shape[1]
        # T_draft by what was planned: how long a draft became is known only once its tokens are.
        spent = self.costs.draft(rows, now.longest) + self.costs.bookkeeping(now.ready, drafting=True)
        keep, now.round = schedule(
            said,
            most,
            now.slots,
            # Rows that are drafted for share one limit, but for those that are tried.
            now.limits if now.probe else now.longest,
            self._acceptance,
            self._decode_seconds(now, now.ready * drafts),
            spent,
            self._form(now),
            self._past[0] if self._past else None,
            drafts=drafts,
            # What is tried is tried in earnest, or nothing would be learnt; the past alone says where.
            one_each=now.probe and not self._history.empty,
        )
        self._past = [*self._past[-1:], (now.round.survival, now.ready)]
        return torch.from_numpy(keep)

    def _form(self, now: _Step) -> Form:
        search = self._config.search
        if search != "auto":
            return search
        return "global" if now.free else "lagged" if self._caught else "early"

    # ------------------------------------------------------------------------------------------ afterwards

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        now, self._step = self._step, None
        if now is None:
            return
        cold, self._was_drafting = not self._was_drafting, now.longest > 0
        ready, costs, round = now.ready, self.costs, now.round
        looks = self._turn % LOOK == 0 or costs.seen(cost.tokens) < KNOWN
        kept = 0 if round is None or not (looks or now.probe) else int(round.numbers[:, KEEP].sum())
        if looks and cost.rows == ready and cost.tokens == ready + kept:  # no chunks of prompts beside it
            costs.observe_verify(cost.tokens, cost.rows, cost.context, cost.verify, features=cost.follow > 0)
        if looks:  # plain decoding would not have shown the drafter anything
            own = cost.bookkeeping - (0.0 if now.longest else cost.follow)
            costs.observe_bookkeeping(ready, now.longest > 0, own, cold=cold and now.longest > 0)
        if not now.longest:
            self._ledger.earn(cost.draft + cost.verify + cost.bookkeeping)
            return
        if looks:
            costs.observe_draft(now.asked, now.longest, cost.draft, cold=cold)
        every = 1 if ready <= LEARNT_AT_ONCE else SELDOM if ready <= LEARNT_ROWS else RARELY
        if self._turn % every and self._learnt > EARLY and not now.probe:
            return
        gained = 0
        if round is not None:
            drafted = round.numbers[:, ROW].tolist()
            right = [accepted[b] for b in drafted]
            round.numbers[:, ACCEPTED], gained = right, sum(right)
            self._rounds.append(round)
        if round is None or len(round) < ready:
            self._nothing_drafted(now, round)
        self._learnt += 1
        collected = sum(map(len, self._rounds))
        if self._learnt <= EARLY or collected + ready > LEARNT_AT_ONCE:
            self._learn()
        if now.probe:
            plain = costs.verify(ready, ready, now.context) / ready
            more = self._decode_seconds(now, kept)
            self._ledger.settle(min(0.0, gained * plain - cost.draft - float(more[-1] - more[0])))

    def _nothing_drafted(self, now: _Step, round: Round | None) -> None:
        """Remember the rows for which the drafter was asked and had nothing to propose."""
        has = set() if round is None else set(round.numbers[:, ROW].tolist())
        empty = [b for b, n in enumerate(now.limits) if n and b not in has]
        if empty:
            nothing, none = np.zeros((len(empty), 1)), np.zeros(len(empty), dtype=np.int64)
            self._history.add(now.slots[empty], nothing, nothing, none, none + self._block)

    def _learn(self) -> None:
        """Learn from the rounds collected. Of one step with very many rows, some stand for all."""
        rounds, self._rounds = self._rounds, []
        while rounds:
            drafts = rounds[0].chances.shape[2]
            one = Round.together([one for one in rounds if one.chances.shape[2] == drafts])
            rounds = [one for one in rounds if one.chances.shape[2] != drafts]
            every = max(1, len(one) // LEARNT_ROWS)
            some = slice(self._learnt % every, None, every)
            _, slots, lengths, limits, kept, accepted = one.numbers[some].T
            logits, adjusted, survival = one.chances[:, some]
            self._acceptance.update(logits, adjusted, slots, kept, accepted)
            self._history.add(slots, adjusted, survival, lengths, limits)


def _best_length(
    past: Floats, ready: int, seconds: Floats, lengths: Sequence[int], spent: Floats, share: float
) -> tuple[int, float, float]:
    """The draft length with the most tokens per second, how many, and how many an early stop would have given.

    past [D, samples, K]: every sample is a step as it could be, and some rows stand for all, so the walk over all of
    them counts a draft as ``share`` drafts. spent [lengths]: T_draft of each.
    """
    rows, samples, drafts = past.shape
    ranking = rank(past.reshape(rows * samples, drafts))
    within = ranking.positions < np.array(lengths)[:, None]
    count = np.zeros((len(lengths), len(ranking.survival) + 1))
    tokens = np.full(count.shape, float(ready))
    np.cumsum(within * share, axis=1, out=count[:, 1:])
    tokens[:, 1:] += np.cumsum(within * (ranking.survival * share), axis=1)
    whole = np.minimum(count.astype(np.int64), len(seconds) - 2)
    verify = seconds[whole] + (count - whole) * (seconds[whole + 1] - seconds[whole])
    rate = tokens / (verify + spent[:, None])
    best, at = divmod(int(rate.argmax()), rate.shape[1])
    walk = rate[best]
    falls = walk[1:] < walk[:-1]
    early = walk[int(falls.argmax())] if falls.any() else walk[at]
    return lengths[best], float(walk[at]), float(early)
