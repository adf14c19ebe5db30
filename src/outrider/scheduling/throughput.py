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
from outrider.scheduling.prefix_search import Search, best_count, rank, survivals
from outrider.types import StepCost, StepView

__all__ = ["ThroughputConfig", "ThroughputPolicy"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Form = Literal["auto", "early", "lagged", "global"]
FORMS: tuple[Form, ...] = ("auto", "early", "lagged", "global")

MARGIN = 1.005  # drafting must promise so much more than plain decoding
SAMPLED = 512  # drafts of the past that a plan is made of, about
EVERY_LENGTH = 32  # rows up to which every draft length is tried
FIRST_WAIT, LONGEST_WAIT = 4, 512  # steps after which a row that was left out is tried again
REUSED = 4  # steps that a plan for few rows is good for


@dataclass(frozen=True, slots=True)
class ThroughputConfig:
    """Options of the ``throughput`` policy. Raises InvalidRequest for values out of range."""

    draft_tokens: int = 8
    """The most tokens to draft in a round; 0 decodes plainly."""
    search: Form = "auto"
    """early: Algorithm 1, which stops at the first draft that does not pay. lagged: a budget from confidences two steps
    old, which looks past dips of the costs and is lossless too. global: the best of all, for text that does not depend
    on the schedule. auto: global where every row is greedy or coupled, else early."""
    probe_share: float = 0.005
    """Of the time of plain steps, what may be spent on trying rows that drafting did not pay for."""

    def __post_init__(self) -> None:
        if self.draft_tokens < 0:
            raise InvalidRequest(f"policy throughput: draft_tokens must be at least 0, got {self.draft_tokens}")
        if self.search not in FORMS:
            raise InvalidRequest(
                f"policy throughput: search must be one of {', '.join(FORMS)}, got {self.search!r}; "
                f"{nearest(str(self.search), FORMS)}"
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
    free: bool = False  # no row's text depends on the schedule
    limits: Ints | None = None  # [B]
    probe: bool = False
    # from ``choose``
    logits: Floats | None = None  # [D, K]
    adjusted: Floats | None = None
    survival: Floats | None = None
    drafted: Ints | None = None  # [D] rows with drafts
    lengths: Ints | None = None  # [D]
    keep: Ints | None = None  # [all rows of choose]


class ThroughputPolicy:
    """Algorithm 1 with everything charged. ``costs``: what steps cost; without, it is learnt from the steps alone."""

    Config = ThroughputConfig

    def __init__(self, config: ThroughputConfig, costs: CostModel | None = None) -> None:
        self.costs = costs or CostModel()
        self._config, self._block = config, config.draft_tokens
        self._acceptance = AcceptanceModel(max(self._block, 1))
        self._history = SurvivalHistory(max(self._block, 1))
        self._ledger = Ledger(share=config.probe_share, most=0.1, balance=0.1)
        self._owners = np.full(0, -1)  # by slot: the request that has it
        self._idle = np.zeros(0, dtype=np.int64)  # by slot: steps since it was drafted for
        self._wait = np.zeros(0, dtype=np.int64)  # by slot: steps after which it is tried again
        self._turn = 0
        self._step: _Step | None = None
        self._reusable: tuple[Sequence[int], Ints, int] | None = None  # requests, limits, turn of the last plan
        self._past: list[tuple[Floats, int]] = []  # survivals in order and rows, of the last two steps that drafted

    @classmethod
    def from_config(cls, config: ThroughputConfig, costs: CostModel | None = None, **services: Any) -> ThroughputPolicy:
        return cls(config, costs)

    def try_again(self) -> None:
        """Draft for every row once more, whether or not it paid."""
        self._idle[:] = LONGEST_WAIT
        self._ledger.balance = self._ledger.most

    # ------------------------------------------------------------------------------------------ before drafting

    def plan(self, step: StepView) -> list[int]:
        ready = len(step)
        self._turn += 1
        if not ready or not self._block:
            self._step = None
            return [0] * ready
        slots = np.fromiter(step.slots, np.int64, ready) if step.slots else np.arange(ready)
        context = step.context or sum(step.contexts)
        now = _Step(slots, ready, max(step.tokens, ready), max(step.rows, ready), context)
        self._step = now
        self._take_over(slots, step.requests)
        able = ready if step.can_draft < 0 else min(step.can_draft, ready)
        now.limits = self._limits(now, slots[:able], step.requests)
        now.free = self._free(step)
        return now.limits.tolist()

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
        owners = np.fromiter(requests, np.int64, len(slots)) if requests else slots
        new = self._owners[slots] != owners
        if new.any():
            fresh = slots[new]
            self._owners[fresh] = owners[new]
            self._idle[fresh], self._wait[fresh] = 0, FIRST_WAIT
            self._acceptance.forget_row(fresh)
            self._history.forget_row(fresh)
            self._reusable = None

    def _limits(self, now: _Step, slots: Ints, requests: Sequence[int]) -> Ints:
        """int64 [B]: the most drafts of each row."""
        limits = np.zeros(now.ready, dtype=np.int64)
        if not len(slots):
            return limits
        if self._history.empty:  # nothing is known: see what a draft is like
            limits[: len(slots)] = self._block
            now.probe = True
            return limits
        if self._reusable is not None and self._reusable[2] > self._turn and self._reusable[0] == requests:
            planned = self._reusable[1]
        else:
            planned = self._best_limits(now, slots)
            if requests and now.ready <= EVERY_LENGTH:
                self._reusable = (list(requests), planned, self._turn + REUSED)
        limits[: len(slots)] = planned
        self._probe(now, slots, limits)
        return limits

    def _best_limits(self, now: _Step, slots: Ints) -> Ints:
        """int64 [D]: what would have been the best drafts of the past, had they been proposed now."""
        ready, rows, block, costs = now.ready, len(slots), self._block, self.costs
        samples = max(1, min(self._history.kept, SAMPLED // (rows * block)))
        past = self._history.of(slots, self._history.kept if rows <= 64 else 2, self._turn)
        seconds = self._decode_seconds(now, rows * block)
        plain = ready / (seconds[0] + costs.bookkeeping(ready, drafting=False))
        seconds = seconds + costs.bookkeeping(ready, drafting=True)
        # Rows one by one: what drafting for a row gives beyond what verifying it costs, against its share of T_draft.
        token = plain * (seconds[-1] - seconds[0]) / (rows * block)
        worth = np.maximum(past - token, 0).sum(2).mean(1)
        chosen = np.ones(rows, dtype=bool)
        if rows > 1:
            some = max(1, rows // 2)
            share = (costs.draft(rows, block) - costs.draft(some, block)) / (rows - some)
            chosen = worth > plain * max(share, 0.0)
        drafting = int(chosen.sum())
        limits = np.zeros(rows, dtype=np.int64)
        if not drafting:
            return limits
        lengths = self._lengths_to_try(ready)
        spent = np.array([costs.draft(drafting, k) for k in lengths])
        length, rate = _best_length(past[chosen, :samples], ready, seconds, lengths, spent)
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
        self._idle[slots] = np.where(left_out, self._idle[slots] + 1, 0)
        self._wait[slots] = np.where(left_out, self._wait[slots], FIRST_WAIT)
        due = np.flatnonzero(left_out & (self._idle[slots] >= self._wait[slots]))
        if not len(due):
            return
        due = due[np.argsort(-self._idle[slots[due]], kind="stable")][: max(1, now.ready // 8)]
        most = self._block
        seconds = self._decode_seconds(now, len(due) * most)
        if not self._ledger.affords(self.costs.draft(len(due), most) + seconds[-1] - seconds[0]):
            return
        limits[due] = most
        now.probe = True
        self._idle[slots[due]] = 0
        self._wait[slots[due]] = np.minimum(2 * self._wait[slots[due]], LONGEST_WAIT)

    # ------------------------------------------------------------------------------------------ once drafted

    def choose(self, confidence: Tensor | None, lengths: Tensor) -> Tensor:
        batch = len(lengths)
        now = self._step
        if now is None or now.ready > batch:  # no plan was asked for: nothing is known but the drafts
            now = self._step = _Step(np.arange(batch), batch, batch, batch, 0, free=self._config.search == "global")
        most = lengths.numpy()
        width = 0 if confidence is None else confidence.shape[1]
        longest = int(most.max()) if batch else 0
        if not longest:
            now.drafted = None
            return torch.zeros(batch, dtype=torch.int64)
        drafted = np.flatnonzero(most[: now.ready])
        raw = None if confidence is None else confidence.numpy()[drafted]
        slots, its = now.slots[drafted], most[drafted]
        z = self._acceptance.logits(raw, len(drafted), width or longest)
        p = self._acceptance.adjust(z, slots)
        survival = survivals(p, its)
        ranking = rank(survival)
        seconds = self._decode_seconds(now, len(ranking.survival))
        # T_draft by what was planned: how long a draft became is known only once its tokens are.
        spent = self.costs.draft(len(drafted), self._block if now.limits is None else int(now.limits.max()))
        seconds = seconds + spent + self.costs.bookkeeping(now.ready, drafting=True)
        if self._config.search == "lagged":
            count = self._budget(ranking.survival, batch, now.ready, seconds)
        else:
            form: Search = "global" if now.free else "early"
            count = best_count(now.ready, ranking.survival, seconds, form)
        keep = np.zeros(batch, dtype=np.int64)
        keep[drafted] = ranking.keep(count)
        now.logits, now.adjusted, now.survival = z, p, survival
        now.drafted, now.lengths, now.keep = drafted, its, keep
        return torch.from_numpy(keep)

    def _budget(self, survival: Floats, batch: int, ready: int, seconds: Floats) -> int:
        """Drafts to verify, from confidences two steps old: today's only rank."""
        today = (survival, ready)
        self._past = [*self._past[-2:], today]
        then, rows = self._past[0]  # two steps old, or the oldest there is
        if then is survival:
            return 0 if not len(survival) else min(ready, len(survival))  # the first step: one draft a row
        most = min(len(then), len(seconds) - 1)
        count = best_count(rows, then[:most], seconds, "global")
        return min(len(survival), round(count * ready / rows))

    # ------------------------------------------------------------------------------------------ afterwards

    def observe(self, cost: StepCost, accepted: Sequence[int]) -> None:
        now, self._step = self._step, None
        if now is None:
            return
        rows, costs = now.ready, self.costs
        kept = 0 if now.keep is None or now.drafted is None else int(now.keep.sum())
        if cost.rows == rows and cost.tokens == rows + kept:  # no chunks of prompts beside it
            costs.observe_verify(cost.tokens, cost.rows, cost.context, cost.verify)
        planned = 0 if now.limits is None else int(now.limits.max())
        asked = 0 if now.limits is None else int(np.count_nonzero(now.limits))
        if asked:
            costs.observe_draft(asked, planned, cost.draft)
        costs.observe_bookkeeping(rows, asked > 0, cost.bookkeeping)
        if asked == 0:
            self._ledger.earn(cost.draft + cost.verify + cost.bookkeeping)
            return
        if now.drafted is not None and now.keep is not None:
            self._learn(now, np.asarray(accepted))
        asked_rows = np.flatnonzero(now.limits) if now.limits is not None else np.zeros(0, dtype=np.int64)
        empty = asked_rows if now.drafted is None else np.setdiff1d(asked_rows, now.drafted, assume_unique=True)
        if len(empty):  # the drafter had nothing to propose
            nothing, none = np.zeros((len(empty), 1)), np.zeros(len(empty), dtype=np.int64)
            self._history.add(now.slots[empty], nothing, nothing, none, none + self._block)
        if now.probe:
            gained = 0 if now.drafted is None else int(np.asarray(accepted)[now.drafted].sum())
            plain = costs.verify(rows, rows, now.context) / rows
            self._ledger.settle(min(0.0, gained * plain - cost.draft - kept * self._token_seconds(now, kept)))

    def _token_seconds(self, now: _Step, kept: int) -> float:
        seconds = self._decode_seconds(now, kept)
        return float(seconds[-1] - seconds[0]) / max(kept, 1)

    def _learn(self, now: _Step, accepted: Ints) -> None:
        assert now.drafted is not None and now.keep is not None and now.logits is not None
        assert now.adjusted is not None and now.survival is not None and now.lengths is not None
        slots, kept = now.slots[now.drafted], now.keep[now.drafted]
        self._acceptance.update(now.logits, now.adjusted, slots, kept, accepted[now.drafted])
        limits = now.lengths if now.limits is None else now.limits[now.drafted]
        self._history.add(slots, now.adjusted, now.survival, now.lengths, np.maximum(limits, now.lengths))


def _best_length(past: Floats, ready: int, seconds: Floats, lengths: Sequence[int], spent: Floats) -> tuple[int, float]:
    """The draft length with the most tokens per second, and how many.

    past [D, samples, K]: every sample is a step as it could be, and the walk over all of them counts a draft as the
    part of a token that one sample is. spent [lengths]: T_draft of each.
    """
    rows, samples, drafts = past.shape
    ranking = rank(past.reshape(rows * samples, drafts))
    within = ranking.positions < np.array(lengths)[:, None]
    count = np.zeros((len(lengths), len(ranking.survival) + 1))
    tokens = np.full(count.shape, float(ready))
    np.cumsum(within / samples, axis=1, out=count[:, 1:])
    tokens[:, 1:] += np.cumsum(within * (ranking.survival / samples), axis=1)
    whole = np.minimum(count.astype(np.int64), len(seconds) - 2)
    verify = seconds[whole] + (count - whole) * (seconds[whole + 1] - seconds[whole])
    rate = tokens / (verify + spent[:, None])
    best = int(rate.argmax())
    return lengths[best // rate.shape[1]], float(rate.flat[best])
