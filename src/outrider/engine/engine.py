"""The loop: draft, schedule, verify, commit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, count
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from outrider.config import Grammar, SamplingParams
from outrider.engine.admission import Admission
from outrider.engine.drafting import Drafting
from outrider.engine.finisher import Finisher
from outrider.engine.memory import check_kv_dtype
from outrider.engine.predicted_text import PredictedText
from outrider.engine.request import Commit, Request, check_request, sampling_error
from outrider.engine.rows import Candidates, Rows, as_tensor
from outrider.engine.totals import Totals
from outrider.engine.turns import Turns
from outrider.errors import CacheFull, DraftsFailed, InvalidRequest, RowsFailed
from outrider.sampling.distribution import Categorical, Processed
from outrider.sampling.grammar import GrammarMatcher, Grammars
from outrider.sampling.logprobs import draft_reports, token_logprobs
from outrider.sampling.processors import process
from outrider.tokenization.tokenizer import Tokenizer
from outrider.types import (
    Drafter,
    DraftReport,
    Forgets,
    KVCache,
    PagedCache,
    PagedTarget,
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
    finds_largest,
    joined,
)

__all__ = ["Engine"]

T = TypeVar("T")
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
        beside: int = 128,
        memory: int | None = None,
        kv_dtype: str = "auto",
        tokenizer: Tokenizer | None = None,
        observers: list[StepObserver] | None = None,
    ) -> None:
        """``capacity``: tokens of a sequence at first; a longer request makes it grow. ``chunk``: most prompt tokens of
        a step; ``beside``: the same where other rows decode. ``memory``: bytes for all keys and values, None = what
        ``max_rows`` sequences can need; ``kv_dtype``: see ``PagedTarget``. ``tokenizer``: None = events without text.
        """
        self.target = target
        self.drafting = Drafting(drafter, policy)
        self.tokenizer = tokenizer
        self.observers = [] if observers is None else observers
        self.max_rows, self.capacity = max_rows, capacity
        self._memory, self._kv_dtype = memory, kv_dtype
        self.limit = target.spec.max_positions  # tokens of a sequence that there is memory for
        self._finds_largest = finds_largest(target)
        self._paged: PagedCache | None = None  # the cache, where it has blocks
        self.cache: KVCache = self._new_cache()
        self.admission = Admission(max_rows, chunk, beside)
        self._arrivals: deque[Request] = deque()  # submitted, not yet seen by a step
        self._cancelled: deque[Request] = deque()  # to be stopped by the next step
        self._requests: dict[int, Request] = {}  # seen and not finished: what a repair goes by
        self._longest = 0  # tokens that any request seen so far may grow to
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
        self._uncounted = 0.0  # seconds of the last step after its cost was known: learning from it, requests that left

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
        if len(prompt) + params.max_tokens > self.limit:
            raise InvalidRequest(self._too_long(len(prompt), params.max_tokens))
        if params.grammar is not None:
            self.check_grammar(params.grammar)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this engine has none")

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar, which is kept for requests to come. Raises InvalidRequest for one that cannot be used."""
        if self._grammars is None:
            raise InvalidRequest("a grammar needs a tokenizer, and this engine has none")
        self._grammars.check(grammar)

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
            self._cancelled.append(request)
            self._news = True
            self._turns.run_if_free(self._tidy)
        elif request.number in self._requests:  # finished in a step that was interrupted before the request left
            self._turns.run_if_free(self._tidy)

    @torch.inference_mode()  # once for all steps of this thread
    def wait(self, requests: Sequence[Request]) -> None:
        """Run steps until all of them have finished. Raises the first error."""
        for request in requests:
            self.advance(lambda request=request: request.finish_reason is not None)  # type: ignore[misc]
            if request.error is not None:
                raise request.error

    def alone(self, act: Callable[[], T], /) -> T:
        """What ``act`` returns, called between two steps, which wait for it."""
        return self._turns.run_once(act)

    def forget(self) -> None:
        """Drop what earlier requests have left in the cache and in the drafter; nothing happens while a step runs."""

        def drop() -> None:
            if self._paged is not None:
                self._paged.forget()
            if isinstance(self.drafter, Forgets):
                self.drafter.forget()

        self._turns.run_if_free(torch.inference_mode()(drop))

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._requests or self._arrivals)

    @property
    def cache_usage(self) -> float:
        """Share of the memory for keys and values that running requests hold, from 0 to 1."""
        if self._paged is not None:
            return 1 - self._paged.free_blocks / self._paged.blocks
        running = list(self.admission.running)
        return sum(len(r.history) - r.pending for r in running) / (self.max_rows * self.capacity)

    @property
    def totals(self) -> tuple[int, RequestStats]:
        """Requests that have finished, and their counts together."""
        return self._totals.requests, self._totals.stats

    def advance(self, done: Callable[[], bool]) -> None:
        """Run steps, or wait while another thread runs them, until ``done()``."""
        self._turns.run_until(done, self.step)

    # ------------------------------------------------------------------------------------------ one step

    def step(self) -> list[Commit]:
        """One round of every row that takes part; a step that only reads prompts commits nothing."""
        if torch.is_inference_mode_enabled():  # to enter it right after a pass takes tens of microseconds
            return self._step()
        with torch.inference_mode():
            return self._step()

    def _step(self) -> list[Commit]:
        began = perf_counter()
        self._begin()
        rows = self._next_rows()  # who
        if not len(rows):
            self._whole = True
            return []
        planned = self.drafting.plan(rows)  # draft at all? how far?
        proposal, draft_seconds = self.drafting.propose(rows, planned, self.capacity)  # draft
        keep = self.drafting.choose(proposal)  # schedule
        run = rows.candidates(proposal, keep)
        verify_began = perf_counter()
        output = self._verify(rows, run)  # verify
        verify_seconds = perf_counter() - verify_began
        accepted = keep
        tokens: list[list[int]] = []
        if rows.complete:
            try:
                distributions = self._distributions(output, rows, run, proposal)
                accepted, tokens = self._accept(distributions, rows, run, proposal, keep)
            except RowsFailed as error:
                return self._fail(rows, run.rows[error.rows], self._logits(output, error.rows))
        logprobs: Mapping[int, Sequence[TokenLogprobs]] = {}
        drafts: Mapping[int, Sequence[DraftReport]] = {}
        if rows.context.reports:
            logprobs = token_logprobs(output.logit_values, run.rows, tokens, accepted, rows.context.params)
            drafts = draft_reports(proposal, accepted, rows.context.params)
        commits = self._commit(rows, keep, accepted, tokens, logprobs, drafts)  # commit, where texts may end
        self._observe(rows, run, keep, commits, output)
        self._publish_prompts(rows)
        counted = perf_counter()
        cost = StepCost(
            draft=draft_seconds,
            verify=verify_seconds,
            bookkeeping=counted - began - draft_seconds - verify_seconds + self._uncounted,
            rows=len(rows),
            tokens=len(run.batch),
            context=rows.cached,
            follow=self.drafting.take_follow_seconds(),
            drafts=self.drafting.longest,
        )
        self.drafting.learn(cost, accepted)
        if self.observers:
            self._report(commits, planned, proposal, keep, cost)
        for commit in commits:
            if commit.request.finish_reason is not None:
                self._retire(commit.request)
        self._commits = []
        self._whole = True
        self._uncounted = perf_counter() - counted
        return commits

    def _verify(self, rows: Rows, run: Candidates) -> TargetOutput:
        """The target's pass over the step's tokens."""
        largest: dict[str, Any] = {"largest": True} if self._finds_largest and rows.context.takes_largest else {}
        return self.target.forward(run.batch, self.cache, self.drafting.aux_layers(rows), run.wanted, **largest)

    def _distributions(self, output: TargetOutput, rows: Rows, run: Candidates, proposal: Proposal) -> Processed:
        """The distribution that each of the pass's rows is sampled from."""
        if output.largest is not None:
            return Categorical.greedy(output.largest, self.target.spec.vocab_size)
        return process(output.logit_values, rows.context, run.rows, run.depth, drafted=proposal.arrays[0])

    def _accept(
        self, distributions: Processed, rows: Rows, run: Candidates, proposal: Proposal, keep: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        """Accepted drafts of each row, and its new tokens. Where the drafter states no number, nothing of the row is
        verified from there on, and the row goes on without drafts."""
        verify = self.target.backend.verify
        try:
            return verify(distributions, proposal, keep, rows.context, rows.rng).lists
        except DraftsFailed as error:
            self.drafting.fail([rows.requests[b] for b in error.first], error)
            keep = [error.first.get(b, n) for b, n in enumerate(keep)]
        left = (run.depth <= as_tensor(keep)[run.rows]).nonzero()[:, 0]
        try:
            return verify(distributions.take(left), proposal, keep, rows.context, rows.rng).lists
        except RowsFailed as error:
            raise RowsFailed(left[error.rows].tolist()) from error

    def _logits(self, output: TargetOutput, rows: list[int]) -> Tensor:
        """Logits of some of the pass's rows, [n, V]."""
        if output.largest is None:
            return output.logits[rows]
        assert output.hidden is not None
        return self.target.unembed(output.hidden[rows])

    def _begin(self) -> None:
        """Act on what was asked for since the last step. From here on the engine is not whole until the step ends."""
        if self._news or not self._whole:
            self._tidy()
        self._whole = False
        if self.admission.waiting:
            if self._longest > self.capacity:
                self.capacity = min(max(self._longest, 2 * self.capacity), self.target.spec.max_positions)
                self._repair()
            self.admission.admit(self._open)
            alone = None if self.admission.running else self.admission.waiting.first()
            if alone is not None:
                self._refuse(alone, len(alone.history) + 1)
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
        """Let the least urgent and latest rows wait until there is memory for ``request``; one that is alone fails."""
        while request.slot >= 0 and not self.cache.reserve(request.slot, needed):
            if len(self.admission.running) > 1:
                self._preempt(max(self.admission.running, key=lambda r: (r.params.priority, r.number)))
            else:
                self._refuse(request, needed)

    def _refuse(self, request: Request, needed: int) -> None:
        """A request that is alone has too little memory."""
        request.error = CacheFull(
            f"a sequence of {needed} tokens does not fit the memory of the KV cache, and no other row can make room; "
            "shorten the prompt or lower max_tokens"
        )
        request.finish_reason = "error"
        self._retire(request)

    def _commit(
        self,
        rows: Rows,
        keep: list[int],
        accepted: list[int],
        tokens: list[list[int]],
        logprobs: Mapping[int, Sequence[TokenLogprobs]],
        drafts: Mapping[int, Sequence[DraftReport]],
    ) -> list[Commit]:
        """Append each row's new tokens up to where its text ends; nothing after that is kept or counted."""
        now = perf_counter()
        commits = [
            Commit.of(
                request, keep[b], tokens[b], accepted[b], now - request.started, logprobs.get(b, ()), drafts.get(b, ())
            )
            for b, request in enumerate(rows.requests[: rows.complete])
        ]
        self._commits = commits  # from here on the step counts, whatever interrupts it
        for commit in commits:
            commit.apply()
        return commits

    def _observe(
        self, rows: Rows, run: Candidates, verified: list[int], commits: list[Commit], output: TargetOutput
    ) -> None:
        """Take the rejected drafts back, and show the drafter what was committed of the rows that it follows."""
        batch, features = run.batch, output.feature_values
        kept = [chunk + c.accepted for chunk, c in zip(rows.chunks, commits, strict=False)]
        for request, chunk in zip(rows.requests[rows.complete :], rows.chunks[rows.complete :], strict=True):
            request.pending -= chunk
            kept.append(chunk)
        cut = [c.request for c, n in zip(commits, verified, strict=True) if c.accepted < n]
        if cut:
            self.cache.rewind([r.slot for r in cut], [len(r.history) - 1 for r in cut])
        began = perf_counter()
        shown = [b for b, request in enumerate(rows.requests) if request.followed]
        if not shown:
            return
        hidden = None
        if self.drafting.reads_hidden and output.hidden is not None:
            last = [(b, commits[b].accepted) for b in shown if b < rows.complete]
            hidden = output.hidden[_last_rows(run.rows, last)]
        if len(shown) < len(rows) or sum(kept) < len(batch):
            tokens, positions, _, first = batch.lists
            spans = [(first[b], first[b] + kept[b]) for b in shown]
            if features is not None:  # slices: an index would wake all of PyTorch's threads for a few rows
                features = joined([features[begin:end] for begin, end in spans])
            batch = RaggedBatch.of_lists(
                [token for begin, end in spans for token in tokens[begin:end]],
                [position for begin, end in spans for position in positions[begin:end]],
                [rows.requests[b].slot for b in shown],
                [0, *accumulate(kept[b] for b in shown)],
            )
        self.drafting.observe([rows.requests[b] for b in shown], batch, features, hidden, began)

    def _report(
        self, commits: list[Commit], planned: Sequence[int], proposal: Proposal, keep: list[int], cost: StepCost
    ) -> None:
        """Show the observers the step."""
        lengths = proposal.counts
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

    def _new_cache(self) -> KVCache:
        """An empty cache for all rows, in blocks where the target can."""
        if not isinstance(self.target, PagedTarget):
            check_kv_dtype(self.target, self._kv_dtype)
            return self.target.new_cache(self.max_rows, self.capacity)
        self._paged = cache = self.target.paged_cache(self.max_rows, self.capacity, self._memory, self._kv_dtype)
        if self._memory is not None:
            blocks = max(1, self._memory // cache.block_bytes)
            self.limit = min(self.limit, blocks * cache.block_tokens)
            self.capacity = min(self.capacity, self.limit)
        return cache

    def _too_long(self, prompt: int, new: int) -> str:
        """Why there can never be memory for a request."""
        assert self._paged is not None and self._memory is not None
        blocks = -(-(prompt + new) // self._paged.block_tokens)
        needed, given = blocks * self._paged.block_bytes / 2**20, self._memory / 2**20
        return (
            f"the prompt has {prompt} tokens and max_tokens is {new}: together they need {needed:.1f} MiB of keys and "
            f"values, but {given:.1f} MiB are set aside, enough for {self.limit} tokens; shorten the prompt, lower "
            "max_tokens or raise kv_memory"
        )

    def _open(self, request: Request) -> bool:
        """Give a request a row that begins with what earlier requests have left; False: there is no memory for it."""
        slot = self.cache.open()
        shared = self._prefix(request)
        if shared:
            assert self._paged is not None
            self._paged.adopt(slot, request.history, shared)
        if not self._has_memory(slot, request):
            self.cache.release(slot)
            return False
        request.slot = slot
        request.pending = len(request.history) - shared
        self.drafting.open(request, self.capacity, shared)
        if not request.started:
            request.started = perf_counter()
            request.stats = replace(request.stats, cached_tokens=shared)
        return True

    def _prefix(self, request: Request) -> int:
        """How many tokens of a request need not be computed; its last one always is."""
        if self._paged is None:
            return 0
        found = min(self._paged.match(request.history), len(request.history) - 1)
        return self.drafting.prefix(request, found) if found else 0

    def _has_memory(self, slot: int, request: Request) -> bool:
        """Whether a request fits beside the running ones, each of which may soon need another block."""
        if not self.cache.reserve(slot, min(len(request.history) + self.drafting.block + 1, self.capacity)):
            return False
        running = len(self.admission.running)
        return not running or self._paged is None or self._paged.free_blocks >= running

    def _publish_prompts(self, rows: Rows) -> None:
        """Let later requests begin with what this step has read of prompts."""
        for request, chunk in zip(rows.requests, rows.chunks, strict=True):
            if chunk > 1:
                self._publish(request)

    def _publish(self, request: Request) -> None:
        """Let later requests begin with what a row holds."""
        if self._paged is not None:
            self._paged.publish(request.slot, request.history)
            self.drafting.publish(request)

    def _close(self, request: Request) -> None:
        self._publish(request)
        self.drafting.close(request)
        slot, request.slot = request.slot, -1
        self.cache.release(slot)
        self.admission.freed()

    def _preempt(self, request: Request) -> None:
        """Give a row's memory back; its tokens are computed again when it gets a row next."""
        self._close(request)
        self.admission.preempt(request)

    def _retire(self, request: Request) -> None:
        """A finished request leaves."""
        if request.slot >= 0:
            self._close(request)
        if request in self.admission.running:
            self.admission.running.remove(request)
        else:
            self.admission.waiting.discard(request)
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
        self._take_arrivals()
        while self._cancelled:
            request = self._cancelled[0]
            self._take_arrivals()  # another thread may have submitted and cancelled it since
            if request.number in self._requests:
                request.finish_reason = request.finish_reason or request.cancelled
                self._retire(request)
            self._cancelled.popleft()
        self._whole = True

    def _take_arrivals(self) -> None:
        """Queue what was submitted."""
        while self._arrivals:
            request = self._arrivals[0]  # in one place at least, wherever this is interrupted
            if request.number not in self._requests:
                self._requests[request.number] = request
                self.admission.waiting.add(request)
                self._longest = max(self._longest, request.prompt_length + request.params.max_tokens)
            self._arrivals.popleft()

    def _fail(self, rows: Rows, failed: Tensor, logits: Tensor) -> list[Commit]:
        """End requests whose logits cannot be sampled from; the step's other rows are computed again.

        failed int64 [n]: the row of the step that each of the target's ``logits`` [n, V] belongs to.
        """
        for b, are_numbers in zip(failed.tolist(), torch.isfinite(logits.amax(1)).tolist(), strict=True):
            request = rows.requests[b]
            request.error = sampling_error(request, are_numbers)
            request.finish_reason = "error"
        self._repair(keep_blocks=True)
        self._whole = True
        return []

    def _repair(self, keep_blocks: bool = False) -> None:
        """Start from what is certain: committed tokens. Every unfinished request is queued again, in order, and the
        cache and the drafter's rows are made anew, so that nothing of an interrupted step remains. ``keep_blocks``:
        no step was interrupted, so that what the cache has published is whole."""
        for commit in self._commits:
            commit.apply()
        for request in list(self._requests.values()):
            request.slot, request.followed = -1, False
            if request.finish_reason is not None:
                self._totals = self._totals.with_finished(request)
                del self._requests[request.number]
        self._commits = []
        self.drafting.reset(self.max_rows)
        if keep_blocks and self._paged is not None:
            self._paged.reset()
        else:
            self.cache = self._new_cache()
        self.admission = Admission(self.max_rows, self.admission.chunk, self.admission.beside)
        for number in sorted(self._requests):
            request = self._requests[number]
            request.finisher = request.finisher.fresh()
            if request.output:
                request.finisher.take(request.output, len(request.output), len(request.output) + 1)
            self.admission.waiting.add(request)


def _last_rows(rows: Tensor, last: Sequence[tuple[int, int]]) -> Tensor:
    """The row of logits that follows the last accepted draft. rows int64 [R]: each one's row of the step; last: rows of
    the step and how many drafts each accepted."""
    starts = torch.searchsorted(rows, torch.tensor([b for b, _ in last], dtype=torch.int64))
    return starts + torch.tensor([accepted for _, accepted in last], dtype=torch.int64)
