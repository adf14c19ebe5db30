"""The loop: draft, schedule, verify, commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.engine.rows import Admission, Request, Rows
from outrider.errors import InvalidRequest
from outrider.sampling.distribution import process
from outrider.sampling.verification import truncate
from outrider.types import Drafter, Proposal, RaggedBatch, SchedulerPolicy, StepCost, TargetModel

__all__ = ["Commit", "Engine", "check_prompt"]


@dataclass(frozen=True, slots=True)
class Commit:
    """New tokens of one request: first the accepted drafts, then at most one of the target's own."""

    request: Request
    tokens: list[int]
    accepted: int


def check_prompt(prompt: Sequence[int], params: SamplingParams, *, vocab_size: int, capacity: int) -> None:
    """Raises InvalidRequest for a prompt that is empty, not in the vocabulary, or too long for ``capacity`` tokens."""
    if not prompt:
        raise InvalidRequest("the prompt is empty: got 0 tokens, expected at least 1")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise InvalidRequest(
            f"prompt token ids must be between 0 and {vocab_size - 1}, got {min(prompt)} to {max(prompt)}"
        )
    if len(prompt) + params.max_tokens > capacity:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}: together they pass the "
            f"context of {capacity} tokens; shorten the prompt or lower max_tokens"
        )


class Engine:
    """Runs requests against one target with one drafter and one policy, several rows together."""

    def __init__(
        self,
        target: TargetModel,
        drafter: Drafter,
        policy: SchedulerPolicy,
        *,
        max_rows: int,
        capacity: int,
        chunk: int = 512,
    ) -> None:
        self.target, self.drafter, self.policy = target, drafter, policy
        self.capacity = capacity
        self.cache = target.new_cache(max_rows, capacity)
        self.admission = Admission(max_rows, chunk)

    def add(self, index: int, prompt: Sequence[int], params: SamplingParams, seed: int) -> Request:
        """Queue a request. Raises InvalidRequest for a prompt that is empty, too long or not in the vocabulary."""
        spec = self.target.spec
        check_prompt(prompt, params, vocab_size=spec.vocab_size, capacity=self.capacity)
        stop_ids = frozenset() if params.ignore_eos else frozenset(spec.eos_token_ids)
        request = Request(index, params, seed, stop_ids, list(prompt), len(prompt), pending=len(prompt))
        self.admission.waiting.append(request)
        return request

    @torch.inference_mode()  # memories that were made in a step can be changed in this mode only
    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Stop a request now, wherever it is; what it has committed stays."""
        if request in self.admission.waiting:
            self.admission.waiting.remove(request)
            request.finish_reason = reason
        elif request.finish_reason is None:
            self._finish(request, reason)

    @torch.inference_mode()
    def step(self) -> list[Commit]:
        """One round of every row that takes part; a step that only reads prompts commits nothing."""
        began = perf_counter()
        rows = self.admission.next(self._open)  # who
        if not len(rows):
            return []
        draft_began = perf_counter()
        proposal = rows.pad(self._draft(rows))  # draft
        draft_ended = perf_counter()
        keep = self.policy.choose(proposal.confidence, proposal.lengths)  # schedule
        kept = keep.tolist()
        run = rows.candidates(proposal, kept)
        verify_began = perf_counter()
        output = self.target.forward(run.batch, self.cache, self.drafter.aux_layers, run.wanted)  # verify
        verify_ended = perf_counter()
        commits: list[Commit] = []
        accepted = kept
        if rows.complete:
            distributions = process(output.logits, rows.context, run.rows, run.depth, drafted=proposal.tokens)
            verification = self.target.backend.verify(distributions, proposal, keep, rows.context, rows.rng)
            accepted = verification.accepted.tolist()
            commits = self._commit(rows, kept, accepted, verification.tokens.tolist())  # commit
        self._observe(rows, run.batch, commits, output.features)
        forward_seconds = (draft_ended - draft_began) + (verify_ended - verify_began)
        self.policy.observe(
            StepCost(
                draft=draft_ended - draft_began,
                verify=verify_ended - verify_began,
                bookkeeping=perf_counter() - began - forward_seconds,
                rows=len(rows),
                tokens=len(run.batch.tokens),
                context=sum(len(r.history) for r in rows.requests),
            ),
            accepted,
        )
        for request in rows.requests:
            request.stats.seconds = perf_counter() - request.started
            if request.finish_reason is not None and request.slot >= 0:
                self._finish(request, request.finish_reason)
        return commits

    # -------------------------------------------------------------------------------------------- parts of a step

    def _open(self, request: Request) -> int:
        slot = self.cache.open()
        self.drafter.open(slot, self.capacity)
        request.started = perf_counter()
        return slot

    def _draft(self, rows: Rows) -> Proposal:
        """Propose for the rows that are past their prompt; none when the policy or their budgets say so."""
        limits = rows.limits(self.policy.plan(rows.view), self.drafter.block, self.capacity) if rows.ready else []
        if not any(limits):
            return Proposal.empty(rows.ready)
        limit = torch.tensor(limits, dtype=torch.int64)
        return self.drafter.propose(rows.slots, rows.last, rows.context, limit, rows.rng)

    def _commit(self, rows: Rows, keep: list[int], accepted: list[int], tokens: list[list[int]]) -> list[Commit]:
        """Append each row's new tokens, up to a stop id or its budget; nothing after them is kept or counted."""
        commits = []
        for b, request in enumerate(rows.requests[: rows.complete]):
            new, kept = truncate(tokens[b], accepted[b], request.stop_ids, request.left)
            if new[-1] in request.stop_ids:
                request.finish_reason = "stop"
            request.history.extend(new)
            request.pending = 1
            stats = request.stats
            stats.generated += len(new)
            if request.round:  # the first token comes from the prompt's own pass
                stats.rounds += 1
                stats.drafted += keep[b]
                stats.accepted += kept
                for counts, n in ((stats.drafted_per_position, keep[b]), (stats.accepted_per_position, kept)):
                    counts.extend([0] * (n - len(counts)))
                    for j in range(n):
                        counts[j] += 1
            request.round += 1
            if request.finish_reason is None and request.left == 0:
                request.finish_reason = "length"
            commits.append(Commit(request, new, kept))
        return commits

    def _observe(self, rows: Rows, batch: RaggedBatch, commits: list[Commit], features: Tensor | None) -> None:
        """Take the rejected drafts back, and show the drafter what was committed."""
        kept = [chunk + c.accepted for chunk, c in zip(rows.chunks, commits, strict=False)]
        for request, chunk in zip(rows.requests[rows.complete :], rows.chunks[rows.complete :], strict=True):
            request.pending -= chunk
            kept.append(chunk)
        if commits:
            ends = torch.tensor([len(c.request.history) - 1 for c in commits], dtype=torch.int64)
            self.cache.rewind(batch.slots[: rows.complete], ends)
        if sum(kept) < len(batch.tokens):
            first, tokens, positions = batch.offsets.tolist(), batch.tokens.tolist(), batch.positions.tolist()
            if features is not None:  # slices: an index would wake all threads for a few rows
                parts = [features[at : at + n] for at, n in zip(first, kept, strict=False)]
                features = parts[0] if len(parts) == 1 else torch.cat(parts)
            new = [tokens[at : at + n] for at, n in zip(first, kept, strict=False)]
            batch = RaggedBatch.pack(new, [positions[at] for at in first[: len(kept)]], batch.slots.tolist())
        self.drafter.observe(batch, features)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self.admission.running.remove(request)
        self.drafter.close(request.slot)
        self.cache.release(request.slot)
        request.slot = -1
