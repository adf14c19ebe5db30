"""A drafter driven by hand against a real target: prompts, rounds with any number of accepted drafts, and proposals.

The engine decides what is accepted by sampling; here a script decides, so that two drafters can be led through the same
past, and one proposal can be made again under other random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.sampling.rng import RowRng
from outrider.types import Context, Drafter, Proposal, RaggedBatch, Rng, TargetModel

__all__ = ["Draft", "DraftRow", "Row", "Session", "context_of", "drafts_of", "future_noise", "propose", "rng_of"]


class Row(Protocol):
    """What a proposal depends on, of one row."""

    seed: int
    params: SamplingParams
    prompt_length: int
    slot: int
    round: int
    history: list[int]


@dataclass
class DraftRow:
    """One row, with its prompt as history at first."""

    seed: int
    params: SamplingParams
    slot: int
    history: list[int]
    round: int = 1
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.history = list(self.history)
        self.prompt_length = len(self.history)


def rng_of(rows: Sequence[Row]) -> RowRng:
    """What the engine would give the drafter."""
    return RowRng([r.seed for r in rows], [r.round for r in rows], [r.params.effective_rule for r in rows])


def context_of(rows: Sequence[Row]) -> Context:
    return Context([r.params for r in rows], [r.history for r in rows], [r.prompt_length for r in rows])


def propose(drafter: Drafter, rows: Sequence[Row], limit: Sequence[int], rng: Rng | None = None) -> Proposal:
    """As the engine asks."""
    return drafter.propose(
        [r.slot for r in rows],
        [r.history[-1] for r in rows],
        context_of(rows),
        list(limit),
        rng or rng_of(rows),
    )


@dataclass
class Draft:
    """What was proposed to one row."""

    tokens: list[int]
    confidence: list[float] | None
    distributions: list[list[float]] | None


def drafts_of(proposal: Proposal) -> list[Draft]:
    """A proposal row by row."""
    drafts = []
    width = proposal.tokens.shape[1]
    for b, length in enumerate(proposal.lengths.tolist()):
        index = torch.arange(b * width, b * width + length)
        drafts.append(
            Draft(
                proposal.tokens[b, :length].tolist(),
                None if proposal.confidence is None else proposal.confidence[b, :length].tolist(),
                None if proposal.distribution is None else proposal.distribution.dense(index).tolist(),
            )
        )
    return drafts


class _FutureNoise:
    """The same random numbers, but of another seed from given positions on. Implements ``types.Rng``."""

    def __init__(self, rows: Sequence[Row], depth: int) -> None:
        self._here = rng_of(rows)
        rules = [r.params.effective_rule for r in rows]
        self._there = RowRng([r.seed + 77 for r in rows], [r.round for r in rows], rules)
        self._from = torch.tensor([len(r.history) + depth for r in rows])

    def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        there, here = (rng.uniform(rows, positions, purpose) for rng in (self._there, self._here))
        return torch.where(positions >= self._from[rows], there, here)

    def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
        there, here = (rng.token_keys(rows, positions, purpose) for rng in (self._there, self._here))
        return torch.where(positions >= self._from[rows], there, here)


def future_noise(rows: Sequence[Row], depth: int) -> Rng:
    """What a row's drafts before ``depth`` are drawn with stays; the rest changes."""
    return _FutureNoise(rows, depth)


class Session:
    """Some rows of a target and a drafter, led through rounds whose accepted drafts are chosen by a script."""

    def __init__(self, target: TargetModel, drafter: Drafter, rows: Sequence[DraftRow], capacity: int) -> None:
        self.target, self.drafter, self.rows = target, drafter, list(rows)
        self._cache = target.new_cache(len(rows), capacity)
        for row in self.rows:
            row.slot = self._cache.open()
            drafter.open(row.slot, capacity)

    def read(self) -> None:
        """Pass every row's history but its last token through target and drafter, one row at a time."""
        for row in self.rows:
            if len(row.history) > 1:
                self._run([row], [row.history[:-1]], [0])

    def propose(self, limit: int, rng: Rng | None = None) -> Proposal:
        return propose(self.drafter, self.rows, [min(limit, self.drafter.block)] * len(self.rows), rng)

    def commit(self, proposal: Proposal, script: random.Random) -> None:
        """Accept some of each row's drafts and add one more token."""
        kept = []
        for row, tokens, length in zip(self.rows, proposal.tokens.tolist(), proposal.lengths.tolist(), strict=True):
            accepted = tokens[: script.randint(0, length)]
            kept.append([row.history[-1], *accepted])
        starts = [len(row.history) - 1 for row in self.rows]
        self._run(self.rows, kept, starts)
        for row, tokens in zip(self.rows, kept, strict=True):
            row.history += [*tokens[1:], script.randrange(self.target.spec.vocab_size)]
            row.round += 1

    def close(self) -> None:
        for row in self.rows:
            self.drafter.close(row.slot)
            self._cache.release(row.slot)

    @torch.inference_mode()
    def _run(self, rows: Sequence[DraftRow], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        batch = RaggedBatch.pack(tokens, starts, [row.slot for row in rows])
        output = self.target.forward(batch, self._cache, self.drafter.aux_layers, batch.offsets[1:] - 1)
        self.drafter.observe(batch, output.features, output.hidden)
