"""A drafter and a policy as the engine uses them: which rows are drafted for, and what happens when either fails.

The drafter *follows* a row when it has seen all of the row's committed tokens; only such rows are drafted for. While
the policy steps aside (``types.StepsAside``) nothing is followed: no auxiliary features are computed, nothing is
proposed or shown. When it comes back, new requests are followed from their prompts on, and a drafter that reads tokens
alone is shown the texts of the rows that are there; one that reads features leaves those to plain decoding until they
end.

An error of the drafter ends drafting for the rows that it happened on, an error of the policy ends it for all. Texts go
on without drafts, and a warning says so, once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import perf_counter

from torch import Tensor

from outrider.engine.predicted_text import CONFIDENCE
from outrider.engine.request import Request
from outrider.engine.rows import Rows
from outrider.sampling.added_drafts import with_drafts
from outrider.sampling.grammar_drafts import fit_drafts, to_draft
from outrider.types import (
    Drafter,
    Proposal,
    RaggedBatch,
    ReadsHidden,
    ResetsRows,
    SchedulerPolicy,
    SharesPrefixes,
    StepCost,
    StepsAside,
    Values,
)

__all__ = ["Drafting"]

CATCH_UP = 4  # prompt tokens that are worth reading again for each new token that is then drafted for
FAILURES = 8  # rows on which a drafter may fail before it is not asked any more


class Drafting:
    """What an engine asks of its drafter and its policy."""

    def __init__(self, drafter: Drafter, policy: SchedulerPolicy) -> None:
        self.drafter, self.policy = drafter, policy
        self.block = drafter.block
        self.reads_hidden = isinstance(drafter, ReadsHidden)
        self._reads_tokens_alone = not drafter.aux_layers and not self.reads_hidden
        self._sharing = drafter if isinstance(drafter, SharesPrefixes) else None
        self._aside = policy if isinstance(policy, StepsAside) else None
        self._followed: dict[int, Request] = {}  # by slot
        self._failures = 0
        self._policy_failed = False
        self._unwanted = False  # in this step, no row of which wants drafts
        self._warned: set[str] = set()
        self.longest = 0  # drafts asked for in a row of this step, at most
        self._take_up_seconds = 0.0  # spent in this step on rows that the drafter had not followed
        self._follow_seconds = 0.0  # spent on following rows, and not yet part of a step's cost

    @property
    def follows(self) -> bool:
        """Whether rows are to be followed now."""
        if self._failures >= FAILURES or self._policy_failed:
            return False
        return self._aside is None or self._aside.follows

    # ------------------------------------------------------------------------------------------ rows come and go

    def prefix(self, request: Request, found: int) -> int:
        """How many of the ``found`` tokens that the target's cache holds of a request's beginning it is to begin with.

        A drafter that reads features cannot follow a row in whose prefix they are missing. The part that it does not
        hold itself is computed again, unless that takes longer than drafting can make good.
        """
        if not self.drafter.aux_layers or not self.follows:
            return found
        known = min(found, self._sharing.match(request.history)) if self._sharing is not None else 0
        return known if found - known <= CATCH_UP * request.left else found

    def open(self, request: Request, capacity: int, shared: int = 0) -> None:
        """A request has got its slot, and the target's cache holds its first ``shared`` tokens, of an earlier one."""
        if not self.follows or request.params.draft_tokens == 0 or request.drafter_failed:
            request.followed = False
            return
        began = perf_counter()
        request.followed = self._try([request], lambda: self.drafter.open(request.slot, capacity), closes=False)
        if request.followed:
            self._followed[request.slot] = request
            if shared:
                self._try([request], lambda: self._begin_with(request, shared))
        self._follow_seconds += perf_counter() - began

    def _begin_with(self, request: Request, shared: int) -> None:
        """Let the drafter take over what it holds of a prefix; one that reads tokens alone is shown the rest."""
        known = 0
        if self._sharing is not None:
            known = min(shared, self._sharing.match(request.history))
            if known:
                self._sharing.adopt(request.slot, request.history, known)
        if known == shared:
            return
        if self._reads_tokens_alone:
            batch = RaggedBatch.pack([request.history[known:shared]], [known], [request.slot])
            self.drafter.observe(batch, None)
        elif self.drafter.aux_layers:
            self.close(request)

    def publish(self, request: Request) -> None:
        """Let later requests begin with what the drafter holds of this one."""
        if request.followed and self._sharing is not None:
            sharing, began = self._sharing, perf_counter()
            self._try([request], lambda: sharing.publish(request.slot, request.history))
            self._follow_seconds += perf_counter() - began

    def close(self, request: Request) -> None:
        """Before a request's slot is released."""
        if self._followed.pop(request.slot, None) is None:
            return
        request.followed = False
        try:
            self.drafter.close(request.slot)
        except Exception as error:
            self._warn("drafter", error)

    def reset(self, slots: int) -> None:
        """No slot is in use any more, whatever state an interrupted call has left."""
        self._followed.clear()
        if isinstance(self.drafter, ResetsRows):
            self.drafter.reset_rows()
            return
        for slot in range(slots):
            with suppress(KeyError):
                self.drafter.close(slot)

    def begin(self, running: Sequence[Request], capacity: int) -> None:
        """Before a step: leave all rows, or take rows up again, as the policy says."""
        self._take_up_seconds = 0.0
        if not self.follows:
            for request in list(self._followed.values()):
                self.close(request)
        elif self._reads_tokens_alone and len(self._followed) < len(running):
            began, following = perf_counter(), self._follow_seconds
            for request in running:
                if not request.followed and request.slot >= 0:
                    self._take_up(request, capacity)
            self._take_up_seconds, self._follow_seconds = perf_counter() - began, following

    def _take_up(self, request: Request, capacity: int) -> None:
        """Show the drafter what is in the cache of a row that it did not follow."""
        self.open(request, capacity)
        known = len(request.history) - request.pending
        if request.followed and known:
            batch = RaggedBatch.pack([request.history[:known]], [0], [request.slot])
            self._try([request], lambda: self.drafter.observe(batch, None))

    # ------------------------------------------------------------------------------------------ one step

    def plan(self, rows: Rows) -> Sequence[int]:
        """The most drafts of each row that is ready, by the policy; it has no part in steps whose rows want none."""
        ready = rows.requests[: rows.ready]
        self._unwanted = bool(ready) and all([r.params.draft_tokens == 0 for r in ready])
        if not ready or self._unwanted or self._policy_failed:
            return []
        try:
            return self.policy.plan(rows.view)
        except Exception as error:
            self._policy_fails(error)
            return []

    def propose(self, rows: Rows, planned: Sequence[int], capacity: int) -> tuple[Proposal, float]:
        """Drafts for the rows that are followed and past their prompt, and the seconds they took; none where the policy
        or their budgets say so."""
        limits = rows.limits(planned, self.block, capacity) if any(planned) else []
        self.longest = max(limits, default=0)
        if not self.longest:
            return rows.pad(Proposal.empty(rows.drafting)), self._take_up_seconds
        began = perf_counter()
        proposal = self._propose(rows, limits)
        return rows.pad(proposal), perf_counter() - began + self._take_up_seconds

    def _propose(self, rows: Rows, limits: list[int]) -> Proposal:
        """The drafter's, an expected text's where the output follows one, and both as the rows' grammars have them."""
        grammars = rows.grammars[: rows.drafting]
        wanted = to_draft(grammars, limits) if any(grammars) else limits
        predicted = rows.predicted(wanted)
        if predicted:
            wanted = [0 if b in predicted else limit for b, limit in enumerate(wanted)]
        proposal = Proposal.empty(rows.drafting)
        if any(wanted):
            try:
                proposal = self.drafter.propose(rows.slots, rows.last, rows.context, wanted, rows.rng)
            except Exception as error:
                self._warn("drafter", error)
                self._leave_out(rows, wanted)
        if predicted:
            proposal = with_drafts(proposal, predicted, CONFIDENCE)
        return fit_drafts(proposal, grammars, limits, rows.context) if any(grammars) else proposal

    def _leave_out(self, rows: Rows, limits: list[int]) -> None:
        """Find the rows that a proposal fails on, one by one; the others are drafted for again from the next step."""
        slots, last = rows.slots, rows.last
        for b in [b for b, n in enumerate(limits) if n]:
            alone = [0] * len(limits)
            alone[b] = limits[b]
            if rows.requests[b].followed:
                self._try(
                    [rows.requests[b]],
                    lambda limit=alone: self.drafter.propose(slots, last, rows.context, limit, rows.rng),  # type: ignore[misc]
                )

    def choose(self, proposal: Proposal) -> list[int]:
        """Drafts of each row to verify."""
        if not self._policy_failed and proposal.width:
            try:
                return self.policy.choose(proposal.arrays[1], proposal.counts)
            except Exception as error:
                self._policy_fails(error)
        return [0] * len(proposal.counts)

    def aux_layers(self, rows: Rows) -> tuple[int, ...]:
        """The layers whose features this step's pass is to give."""
        return self.drafter.aux_layers if any(r.followed for r in rows.requests) else ()

    def observe(
        self,
        requests: Sequence[Request],
        batch: RaggedBatch,
        features: Values | None,
        hidden: Tensor | None,
        began: float,
    ) -> None:
        """Show the drafter what was committed, of rows that it follows. ``began``: when that was being prepared."""
        if len(batch):
            self._try(requests, lambda: self.drafter.observe(batch, features, hidden))
        self._follow_seconds += perf_counter() - began

    def take_follow_seconds(self) -> float:
        """Seconds spent on following rows since this was last asked."""
        seconds, self._follow_seconds = self._follow_seconds, 0.0
        return seconds

    def learn(self, cost: StepCost, accepted: Sequence[int]) -> None:
        """Show the policy what the step cost."""
        if not (self._policy_failed or self._unwanted):
            try:
                self.policy.observe(cost, accepted)
            except Exception as error:
                self._policy_fails(error)

    # ------------------------------------------------------------------------------------------ errors

    def _try(self, requests: Sequence[Request], call: Callable[[], object], closes: bool = True) -> bool:
        try:
            call()
        except Exception as error:
            self.fail(requests if closes else [], error)
            return False
        return True

    def fail(self, requests: Sequence[Request], error: Exception) -> None:
        """These rows are not drafted for any more, for an error of the drafter."""
        self._failures += 1
        self._warn("drafter", error)
        for request in requests:
            self.close(request)
            request.drafter_failed = True

    def _policy_fails(self, error: Exception) -> None:
        self._policy_failed = True
        self._warn("policy", error)

    def _warn(self, what: str, error: Exception) -> None:
        if what in self._warned:
            return
        self._warned.add(what)
        kind = type(self.drafter if what == "drafter" else self.policy).__name__
        rows = "the rows concerned go" if what == "drafter" else "decoding goes"
        warnings.warn(
            f"the {what} {kind} failed: {type(error).__name__}: {error}; {rows} on without drafts",
            RuntimeWarning,
            stacklevel=2,
        )
