"""The rows of a step: which requests take part, what the target runs for each, and where logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from outrider.config import Rule
from outrider.engine.request import Request
from outrider.sampling.grammar import GrammarMatcher
from outrider.sampling.rng import RowRng
from outrider.types import Context, Proposal, RaggedBatch, StepView

__all__ = ["Candidates", "Rows", "as_tensor"]


class Candidates(NamedTuple):
    """One target pass: the batch, and for each row of logits its packed token, its row and the drafts before it."""

    batch: RaggedBatch
    wanted: Tensor | None  # int64 [R]; None: of all tokens
    rows: Tensor  # int64 [R]
    depth: Tensor  # int64 [R]


@dataclass(frozen=True, slots=True)
class _Sampled:
    """What sampling needs of a step's requests. It is kept while the same requests get tokens."""

    requests: list[Request]
    grammars: list[GrammarMatcher | None]
    context: Context
    seeds: list[int]
    rules: list[Rule]

    @staticmethod
    def of(requests: list[Request]) -> _Sampled:
        grammars = [r.finisher.grammar for r in requests]
        context = Context(
            [r.params for r in requests],
            [r.history for r in requests],
            [r.prompt_length for r in requests],
            [() if grammar is None else (grammar,) for grammar in grammars] if any(grammars) else None,
        )
        rules = [r.params.effective_rule for r in requests]
        return _Sampled(requests, grammars, context, [r.seed for r in requests], rules)


def as_tensor(numbers: Sequence[int]) -> Tensor:
    """int64 [n], by numpy: it reads a short list several times faster than torch."""
    return torch.from_numpy(np.array(numbers, np.int64))


class Rows:
    """The requests of one step, in order: ready to go on (those that the drafter follows first), then finishing their
    prompt, then in its middle."""

    def __init__(self, requests: list[Request], chunks: list[int], before: Rows | None = None) -> None:
        """``before``: the rows of an earlier step. Where the same requests take part, what stays is taken from it."""
        self.ready = self.complete = len(requests)
        if not all([r.pending == 1 and r.round > 0 for r in requests]):
            stages = [
                (r.pending > 1, r.pending > chunk, r.round == 0, not r.followed)
                for r, chunk in zip(requests, chunks, strict=True)
            ]
            order = sorted(range(len(requests)), key=stages.__getitem__)
            requests, chunks = [requests[i] for i in order], [chunks[i] for i in order]
            self.ready = sum(r.pending == 1 and r.round > 0 for r in requests)
            self.complete = sum(r.pending == c for r, c in zip(requests, chunks, strict=True))
        followed = [r.followed for r in requests[: self.ready]]
        self.drafting = sum(followed)
        if not all(followed[: self.drafting]):  # all are ready, and some are not followed
            order = sorted(range(len(requests)), key=lambda i: not followed[i])
            requests, chunks = [requests[i] for i in order], [chunks[i] for i in order]
        self.requests, self.chunks = requests, chunks
        verified = requests if self.complete == len(requests) else requests[: self.complete]
        same = before is not None and before._sampled.requests == verified
        sampled = before._sampled if before is not None and same else _Sampled.of(verified)
        self._sampled: _Sampled = sampled
        self.grammars, self.context = sampled.grammars, sampled.context
        self.rng = RowRng(sampled.seeds, [r.round for r in verified], sampled.rules)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def slots(self) -> list[int]:
        """[drafting]"""
        return [r.slot for r in self.requests[: self.drafting]]

    @property
    def last(self) -> list[int]:
        """[drafting]: the token each row goes on from."""
        return [r.history[-1] for r in self.requests[: self.drafting]]

    @property
    def view(self) -> StepView:
        """What the policy may know before drafting: the past of the rows that are ready to draft."""
        ready = self.requests[: self.ready]
        return StepView(
            [len(r.history) for r in ready],
            [r.stats for r in ready],
            [r.params for r in ready],
            slots=[r.slot for r in ready],
            requests=[r.number for r in ready],
            can_draft=self.drafting,
            tokens=sum(self.chunks),
            rows=len(self.requests),
            context=self.cached,
        )

    @property
    def cached(self) -> int:
        """Committed tokens of all rows, the ``context`` of a step's costs."""
        return sum(len(r.history) for r in self.requests)

    def limits(self, planned: Sequence[int], block: int, capacity: int) -> list[int]:
        """Drafts within the drafter's block, the request's own limit, its budget (less the bonus token) and the slot.
        [drafting]"""
        return [
            min(_at_most(drafts, r.params.draft_tokens), block, r.left - 1, capacity - len(r.history))
            for drafts, r in zip(planned, self.requests[: self.drafting], strict=False)
        ]

    def predicted(self, limits: Sequence[int]) -> dict[int, list[int]]:
        """Row -> drafts from the request's expected text, for rows whose output follows one."""
        found = {}
        for b, (request, most) in enumerate(zip(self.requests, limits, strict=False)):
            if request.predicted is not None:
                drafts = request.predicted.drafts(request.history, request.prompt_length, most)
                if drafts:
                    found[b] = drafts
        return found

    def pad(self, proposal: Proposal) -> Proposal:
        """The same proposal with no drafts for rows that cannot be drafted for, or finish their prompt in this step."""
        extra = self.complete - len(proposal.counts)
        if extra == 0:
            return proposal
        if not proposal.width:
            return Proposal.empty(self.complete)
        (tokens, sure), more = proposal.arrays, ((0, extra), (0, 0))
        return Proposal(
            np.pad(tokens, more),
            [*proposal.counts, *[0] * extra],
            proposal.distribution,
            None if sure is None else np.pad(sure, more),
            sampled=None if proposal.sampled is None else [*proposal.sampled, *[0] * extra],
        )

    def candidates(self, proposal: Proposal, keep: list[int]) -> Candidates:
        """What the target runs: each row's next chunk, then the drafts to check; and where logits are wanted."""
        slots = [request.slot for request in self.requests]
        rows, depth = _logits_of(tuple(keep))
        if self.ready == len(slots) and not any(keep):  # plain decoding
            last, ends = [r.history[-1] for r in self.requests], [len(r.history) - 1 for r in self.requests]
            return Candidates(RaggedBatch.of_lists(last, ends, slots, list(range(len(slots) + 1))), None, rows, depth)
        drafted = proposal.arrays[0].tolist()
        tokens: list[int] = []
        positions: list[int] = []
        offsets = [0]
        for b, (request, chunk) in enumerate(zip(self.requests, self.chunks, strict=True)):
            start = len(request.history) - request.pending
            tokens += request.history[start : start + chunk]
            if b < self.complete:
                tokens += drafted[b][: keep[b]]
            positions += range(start, start + len(tokens) - offsets[-1])
            offsets.append(len(tokens))
        batch = RaggedBatch.of_lists(tokens, positions, slots, offsets)
        if sum(keep) + len(keep) == len(tokens):  # not len(rows): PyTorch's simplest calls are slow here
            return Candidates(batch, None, rows, depth)
        wanted = [at for end, n in zip(offsets[1:], keep, strict=False) for at in range(end - 1 - n, end)]
        return Candidates(batch, as_tensor(wanted), rows, depth)


@lru_cache(maxsize=256)
def _logits_of(keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``rows`` and ``depth`` of candidates; not to be written to."""
    with torch.inference_mode(False):  # ordinary tensors, for callers in any mode
        return (
            as_tensor([b for b, n in enumerate(keep) for _ in range(n + 1)]),
            as_tensor([j for n in keep for j in range(n + 1)]),
        )


def _at_most(drafts: int, limit: int | None) -> int:
    return drafts if limit is None else min(drafts, limit)
