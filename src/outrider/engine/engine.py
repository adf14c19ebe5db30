"""The loop: draft, schedule, verify, commit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.drafting import Drafting
from outrider.engine.finisher import Finisher
from outrider.engine.predicted_text import PredictedText
from outrider.engine.request import Commit, Request, check_request, sampling_error
from outrider.engine.rows import Admission, Candidates, Rows
from outrider.engine.totals import Totals
from outrider.engine.turns import Turns
from outrider.errors import CacheFull, InvalidRequest, RowsFailed
from outrider.sampling.grammar import GrammarMatcher, Grammars
from outrider.sampling.logprobs import token_logprobs
from outrider.sampling.processors import process
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import (
    Drafter,
    Proposal,
    RaggedBatch,
    RequestStats,
    RowRecord,
    SchedulerPolicy,
    StepCost,
    StepObserver,
    StepRecord,
    TargetModel,
    TargetOutput,
    TokenLogprobs,
)

__all__ = ["Engine"]

TAIL = 16  # tokens of a prompt that its first new token's text may depend on


class Engine:
    """Runs requests against one target with one drafter and one policy, several rows together.

    Any thread may submit, cancel and read. There is no thread of the engine's own: of those that wait for events, one
    at a time runs the next step, which serves all. An interrupt or error at any point of a step loses nothing: commits
    that were begun are completed, and what is not known to be whole is computed again.
    """

    def __init__(
        self,
        target: TargetModel,
        drafter: Drafter,
        policy: SchedulerPolicy,
        *,
        max_rows: int,
        capacity: int,
        chunk: int = 512,
        tokenizer: Tokenizer | None = None,
        observers: list[StepObserver] | None = None,
    ) -> None:
        """``capacity``: tokens of a sequence at first; a longer request makes it grow. ``tokenizer``: None = events
        without text."""
        self.target = target
        self.drafting = Drafting(drafter, policy)
        self.tokenizer = tokenizer
        self.observers = [] if observers is None else observers
        self.max_rows, self.capacity = max_rows, capacity
        self.cache = target.new_cache(max_rows, capacity)
        self.admission = Admission(max_rows, chunk)
        self._arrivals: deque[Request] = deque()  # submitted, not yet seen by a step
        self._requests: dict[int, Request] = {}  # seen and not finished: what a repair goes by
        self._numbers = count()
        self._totals = Totals()
        self._commits: list[Commit] = []  # of the step in progress, once all of them are known
        self._news = False  # whether requests were submitted or cancelled since the last step
        self._whole = True  # False while a step is under way: what it leaves behind cannot be relied on
        self._grammars: Grammars | None = None
        if tokenizer is not None:
            spec = target.spec
            self._grammars = Grammars(lambda: tokenizer.definition, spec.vocab_size, spec.eos_token_ids)
        self._turns = Turns()

    @property
    def drafter(self) -> Drafter:
        """May be set while no request runs."""
        return self.drafting.drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        self.drafting = Drafting(drafter, self.policy)

    @property
    def policy(self) -> SchedulerPolicy:
        """May be set while no request runs."""
        return self.drafting.policy

    @policy.setter
    def policy(self, policy: SchedulerPolicy) -> None:
        self.drafting = Drafting(self.drafter, policy)

    # ------------------------------------------------------------------------------------------ for any thread

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise InvalidRequest for a request that this engine cannot run."""
        check_request(self.target.spec, prompt, params)
        if params.grammar is not None:
            if self._grammars is None:
                raise InvalidRequest("a grammar needs a tokenizer, and this engine has none")
            self._grammars.check(params.grammar)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this engine has none")

    def submit(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, index: int = 0, expected: Sequence[int] = ()
    ) -> Request:
        """Queue a request. Raises InvalidRequest. ``index`` is what its events carry. ``expected``: tokens that the
        answer may be made of; they are proposed where it follows them, and change no distribution."""
        self.check(prompt, params)
        stop_ids = frozenset() if params.ignore_eos else frozenset(self.target.spec.eos_token_ids)
        grammar = GrammarMatcher(self._grammars, params) if self._grammars is not None and params.grammar else None
        finisher = Finisher(stop_ids, params.stop, self.tokenizer, tuple(prompt[-TAIL:]), grammar)
        number = next(self._numbers)
        request = Request(number, index, params, seed, finisher, list(prompt), len(prompt), pending=len(prompt))
        request.predicted = PredictedText(expected) if expected else None
        self._arrivals.append(request)
        self._news = True  # after the append: a step that clears it first has not seen the request
        return request

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Stop a request, wherever it is; what it has committed stays. At once, or at the end of a running step."""
        if request.finish_reason is None:
            request.cancelled = reason
            self._news = True
            self._turns.run_if_free(self._tidy)
        elif request.number in self._requests:  # finished in a step that was interrupted before the request left
            self._turns.run_if_free(self._tidy)

    def wait(self, requests: Sequence[Request]) -> None:
        """Until all of them have finished. Raises the first error."""
        for request in requests:
            self.advance(lambda request=request: request.finish_reason is not None)  # type: ignore[misc]
            if request.error is not None:
                raise request.error

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._requests or self._arrivals)

    @property
    def totals(self) -> tuple[int, RequestStats]:
        """Requests that have finished, and their counts together."""
        return self._totals.requests, self._totals.stats

    def advance(self, done: Callable[[], bool]) -> None:
        """Run steps, or wait while another thread runs them, until ``done()``."""
        self._turns.run_until(done, self.step)

    # ------------------------------------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> list[Commit]:
        """One round of every row that takes part; a step that only reads prompts commits nothing."""
        began = perf_counter()
        self._begin()
        rows = self._next_rows()  # who
        if not len(rows):
            self._whole = True
            return []
        planned = self.drafting.plan(rows)  # draft at all? how far?
        proposal, draft_seconds = self.drafting.propose(rows, planned, self.capacity)  # draft
        keep = self.drafting.choose(proposal)  # schedule
        kept = keep.tolist()
        run = rows.candidates(proposal, kept)
        verify_began = perf_counter()
        output = self.target.forward(run.batch, self.cache, self.drafting.aux_layers(rows), run.wanted)  # verify
        verify_seconds = perf_counter() - verify_began
        accepted, tokens = kept, []
        if rows.complete:
            try:
                distributions = process(output.logits, rows.context, run.rows, run.depth, drafted=proposal.tokens)
                result = self.target.backend.verify(distributions, proposal, keep, rows.context, rows.rng)
            except RowsFailed as error:
                return self._fail(rows, run.rows[error.rows], output.logits[error.rows])
            accepted, tokens = result.accepted.tolist(), result.tokens.tolist()
        logprobs = token_logprobs(output.logits, run.rows, tokens, accepted, rows.context.params)
        commits = self._commit(rows, kept, accepted, tokens, logprobs)  # commit, where texts may end
        self._observe(rows, run, commits, output)
        bookkeeping = perf_counter() - began - draft_seconds - verify_seconds
        cost = StepCost(draft_seconds, verify_seconds, bookkeeping, len(rows), len(run.batch.tokens), rows.cached)
        self.drafting.learn(cost, accepted)
        if self.observers:
            self._report(commits, planned, proposal, kept, cost)
        for commit in commits:
            if commit.request.finish_reason is not None:
                self._retire(commit.request)
        self._commits = []
        self._whole = True
        return commits

    def _begin(self) -> None:
        """Act on what was asked for since the last step. From here on the engine is not whole until the step ends."""
        if self._news or not self._whole:
            self._tidy()
        self._whole = False
        waiting = self.admission.waiting
        if waiting:
            needed = max(request.prompt_length + request.params.max_tokens for request in waiting)
            if needed > self.capacity:
                self.capacity = min(max(needed, 2 * self.capacity), self.target.spec.max_positions)
                self._repair()
            self.admission.admit(self._open)
        self.drafting.begin(self.admission.running, self.capacity)

    def _next_rows(self) -> Rows:
        """The rows of this step, each with memory for what it may write."""
        for request in list(self.admission.running):
            needed = min(len(request.history) + self.drafter.block + 1, self.capacity)
            # An earlier row of this loop may have preempted it.
            if request.slot >= 0 and not self.cache.reserve(request.slot, needed):
                self._make_room(request, needed)
        return self.admission.next()

    def _make_room(self, request: Request, needed: int) -> None:
        """Let the latest rows wait until there is memory for ``request``; a request that is alone fails."""
        while request.slot >= 0 and not self.cache.reserve(request.slot, needed):
            latest = self.admission.running[-1]
            if len(self.admission.running) > 1:
                self._preempt(latest)
                continue
            request.error, request.finish_reason = (
                CacheFull(
                    f"a sequence of {needed} tokens does not fit the memory of the KV cache, and no other row can make "
                    "room; shorten the prompt or lower max_tokens"
                ),
                "error",
            )
            self._retire(request)

    def _commit(
        self,
        rows: Rows,
        keep: list[int],
        accepted: list[int],
        tokens: list[list[int]],
        logprobs: Mapping[int, Sequence[TokenLogprobs]],
    ) -> list[Commit]:
        """Append each row's new tokens up to where its text ends; nothing after that is kept or counted."""
        now = perf_counter()
        commits = [
            Commit.of(request, keep[b], tokens[b], accepted[b], now - request.started, logprobs.get(b, ()))
            for b, request in enumerate(rows.requests[: rows.complete])
        ]
        self._commits = commits  # from here on the step counts, whatever interrupts it
        for commit in commits:
            commit.apply()
        return commits

    def _observe(self, rows: Rows, run: Candidates, commits: list[Commit], output: TargetOutput) -> None:
        """Take the rejected drafts back, and show the drafter what was committed of the rows that it follows."""
        batch, features = run.batch, output.features
        kept = [chunk + c.accepted for chunk, c in zip(rows.chunks, commits, strict=False)]
        for request, chunk in zip(rows.requests[rows.complete :], rows.chunks[rows.complete :], strict=True):
            request.pending -= chunk
            kept.append(chunk)
        if commits:
            ends = torch.tensor([len(c.request.history) - 1 for c in commits], dtype=torch.int64)
            self.cache.rewind(batch.slots[: rows.complete], ends)
        shown = [b for b, request in enumerate(rows.requests) if request.followed]
        if not shown:
            return
        hidden = None
        if self.drafting.reads_hidden and output.hidden is not None:
            last = [(b, commits[b].accepted) for b in shown if b < rows.complete]
            hidden = output.hidden[_last_rows(run.rows, last)]
        if len(shown) < len(rows) or sum(kept) < len(batch.tokens):
            first, tokens, positions = batch.offsets.tolist(), batch.tokens.tolist(), batch.positions.tolist()
            if features is not None:  # slices: an index would wake all of PyTorch's threads for a few rows
                parts = [features[first[b] : first[b] + kept[b]] for b in shown]
                features = parts[0] if len(parts) == 1 else torch.cat(parts)
            new = [tokens[first[b] : first[b] + kept[b]] for b in shown]
            slots = [rows.requests[b].slot for b in shown]
            batch = RaggedBatch.pack(new, [positions[first[b]] for b in shown], slots)
        self.drafting.observe([rows.requests[b] for b in shown], batch, features, hidden)

    def _report(
        self, commits: list[Commit], planned: Sequence[int], proposal: Proposal, keep: list[int], cost: StepCost
    ) -> None:
        """Show the observers the step."""
        lengths = proposal.lengths.tolist()
        sure = None if proposal.confidence is None else proposal.confidence.tolist()
        rows = tuple(
            RowRecord(
                request=commit.request.number,
                limit=planned[b] if b < len(planned) else 0,
                drafted=lengths[b],
                verified=keep[b],
                accepted=commit.accepted,
                committed=tuple(commit.tokens),
                confidence=tuple(sure[b][: lengths[b]]) if sure is not None and b < len(sure) else None,
                first=commit.round == 1,
            )
            for b, commit in enumerate(commits)
        )
        for observer in self.observers:
            observer.step(StepRecord(rows, cost))

    # ------------------------------------------------------------------------------------------ rows come and go

    def _open(self, request: Request) -> None:
        request.slot = self.cache.open()
        self.drafting.open(request, self.capacity)
        request.started = request.started or perf_counter()

    def _close(self, request: Request) -> None:
        self.drafting.close(request)
        slot, request.slot = request.slot, -1
        self.cache.release(slot)

    def _preempt(self, request: Request) -> None:
        """Give a row's memory back; its tokens are computed again when it gets a row next."""
        self._close(request)
        request.pending = len(request.history)
        self.admission.preempt(request)

    def _retire(self, request: Request) -> None:
        """A finished request leaves."""
        if request.slot >= 0:
            self._close(request)
        if request in self.admission.running:
            self.admission.running.remove(request)
        else:
            with suppress(ValueError):
                self.admission.waiting.remove(request)
        self._totals = self._totals.with_finished(request)
        self._requests.pop(request.number, None)

    @torch.inference_mode()  # caches that were made in a step can be changed in this mode only
    def _tidy(self) -> None:
        """Make good what an interrupted step left behind; queue what was submitted, retire what was cancelled."""
        whole = self._whole
        self._whole = False
        self._news = False
        if not whole:
            self._repair()
        while self._arrivals:
            request = self._arrivals[0]  # in one place at least, wherever this is interrupted
            if request.number not in self._requests:
                self._requests[request.number] = request
                self.admission.waiting.append(request)
            self._arrivals.popleft()
        for request in [r for r in self._requests.values() if r.cancelled is not None]:
            request.finish_reason = request.finish_reason or request.cancelled
            self._retire(request)
        self._whole = True

    def _fail(self, rows: Rows, failed: Tensor, logits: Tensor) -> list[Commit]:
        """End requests whose logits cannot be sampled from; the step's other rows are computed again.

        failed int64 [n]: the row of the step that each of the target's ``logits`` [n, V] belongs to.
        """
        for b, are_numbers in zip(failed.tolist(), torch.isfinite(logits.amax(1)).tolist(), strict=True):
            request = rows.requests[b]
            request.error = sampling_error(request, are_numbers)
            request.finish_reason = "error"
        self._repair()
        self._whole = True
        return []

    def _repair(self) -> None:
        """Start from what is certain: committed tokens. Every unfinished request is queued again, in order, and the
        cache and the drafter's rows are made anew, so that nothing of an interrupted step remains."""
        for commit in self._commits:
            commit.apply()
        for request in list(self._requests.values()):
            request.slot, request.followed = -1, False
            if request.finish_reason is not None:
                self._totals = self._totals.with_finished(request)
                del self._requests[request.number]
        self._commits = []
        self.drafting.reset(self.max_rows)
        self.cache = self.target.new_cache(self.max_rows, self.capacity)
        self.admission = Admission(self.max_rows, self.admission.chunk)
        for number in sorted(self._requests):
            request = self._requests[number]
            request.pending = len(request.history)
            request.finisher = request.finisher.fresh()
            if request.output:
                request.finisher.take(request.output, len(request.output), len(request.output) + 1)
            self.admission.waiting.append(request)


def _last_rows(rows: Tensor, last: Sequence[tuple[int, int]]) -> Tensor:
    """The row of logits that follows the last accepted draft. rows int64 [R]: each one's row of the step; last: rows of
    the step and how many drafts each accepted."""
    starts = torch.searchsorted(rows, torch.tensor([b for b, _ in last], dtype=torch.int64))
    return starts + torch.tensor([accepted for _, accepted in last], dtype=torch.int64)
