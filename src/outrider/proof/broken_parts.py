"""Parts of the engine that are broken in one way each: what ``controls`` gives an audit to catch.

Each is a small subclass of the sound part, given where the sound part is given; nothing of the product is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine.finisher import End, Finisher
from outrider.engine.request import Request
from outrider.models.toy import ToyTarget
from outrider.proof.enumeration import EnumeratingBackend, EnumeratingDraftModel, dense_rows
from outrider.proof.toy_world import GrammarEngine, NoRepeat, ToyWorld
from outrider.sampling.distribution import Categorical
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng
from outrider.sampling.verification import AcceptanceProbabilities, DraftRound
from outrider.scheduling.fixed import FixedConfig, FixedPolicy
from outrider.types import (
    Context,
    Distribution,
    KVCache,
    PagedCache,
    Proposal,
    RaggedBatch,
    Rng,
    SchedulerPolicy,
    TargetModel,
    TargetOutput,
    Values,
    to_tensor,
)

__all__ = [
    "Bfloat16Q",
    "BonusFromTheDraft",
    "BonusPastTheSampler",
    "ClippedAtTheWrongSide",
    "CutsAtForbidden",
    "EngineEndsLate",
    "LeaksThroughPadding",
    "MaskOnTheTargetOnly",
    "NoRenormalising",
    "PenaltiesOnOneSide",
    "ReusesNoise",
    "SameNoiseBackend",
    "SameNoiseEachRound",
    "SampledUnprocessedQ",
    "ToyRewindsOneShort",
    "UnprocessedQ",
    "in_world",
    "peeking",
]


# ------------------------------------------------------------------------------------------------ what drafts say


def _prefixes(context: Context, proposal: Proposal) -> list[list[int]]:
    """The text before each draft, row b * K + j."""
    return [[*context.history[b], *row[:j]] for b, row in enumerate(proposal.tokens.tolist()) for j in range(len(row))]


def _rows(model: TargetModel, prefixes: Sequence[Sequence[int]]) -> Tensor:
    """Logits of a toy model after each text, [n, V]."""
    assert isinstance(model, ToyTarget)
    order = model.table.ndim - 1
    padded = [[0] * (order - len(text)) + list(text[-order:]) for text in prefixes]
    return model.table[tuple(torch.tensor(padded).view(-1, order).T)]


class UnprocessedQ(EnumeratingDraftModel):
    """States the probabilities before temperature."""

    def stated(self, drafted: Proposal, context: Context) -> Distribution:
        return Categorical.of(_rows(self.model, _prefixes(context, drafted)))


class Bfloat16Q(EnumeratingDraftModel):
    """States its probabilities rounded to bfloat16."""

    def stated(self, drafted: Proposal, context: Context) -> Distribution:
        assert drafted.distribution is not None
        rows = dense_rows(drafted.distribution)
        return Categorical(rows.shape[1], probabilities=rows.bfloat16().double())


class _UnmaskedDrafts(EnumeratingDraftModel):
    """Samples without the grammar's mask."""

    def seen(self, context: Context) -> Context:
        return replace(context, processors=None)


class CutsAtForbidden(_UnmaskedDrafts):
    """Ends the draft before the first token that the grammar forbids."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        drafted = super().propose(slots, last, context, limit, rng)
        lengths = []
        for b, (row, length) in enumerate(zip(drafted.tokens.tolist(), drafted.lengths.tolist(), strict=True)):
            before = [context.history[b][-1], *row]
            wrong = [j for j in range(length) if before[j] == before[j + 1] == GRAMMAR]
            lengths.append(wrong[0] if wrong else length)
        return Proposal(drafted.tokens, lengths, drafted.distribution, drafted.confidence)


class MaskOnTheTargetOnly(_UnmaskedDrafts):
    """States the probabilities that the mask would give."""

    def stated(self, drafted: Proposal, context: Context) -> Distribution:
        prefixes = _prefixes(context, drafted)
        params = [context.params[i // drafted.tokens.shape[1]] for i in range(len(prefixes))]
        mask = Context(params, prefixes, [1] * len(prefixes), [[NoRepeat(GRAMMAR)]] * len(prefixes))
        return process(_rows(self.model, prefixes), mask)


class SameNoiseEachRound(EnumeratingDraftModel):
    """Draws with the noise of round 0 in every round."""

    def noise(self, rng: RowRng) -> RowRng:
        return _RoundZero(rng)


class _RoundZero(RowRng):
    """The same rows in their first round."""

    def __init__(self, rng: RowRng) -> None:
        super().__init__([0] * len(rng.rows), [0] * len(rng.rows), rng.rules)
        self._first = [(word, min(round, 1)) for word, round in rng.rows]

    @property
    def rows(self) -> list[tuple[int, int]]:
        return self._first


GRAMMAR = 1
"""The token that never follows itself in the worlds with a grammar."""


# ------------------------------------------------------------------------------------------------ verification


class ReusesNoise(EnumeratingBackend):
    """The recovered token is drawn with the number that rejected the draft."""

    class _OnePurpose:
        def __init__(self, rng: Rng) -> None:
            self._rng = rng

        def uniform(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
            return self._rng.uniform(rows, positions, "accept")

        def token_keys(self, rows: Tensor, positions: Tensor, purpose: str) -> Tensor:
            return self._rng.token_keys(rows, positions, purpose)

    def rng(self, rng: Rng) -> Rng:
        return self._OnePurpose(rng)


class SameNoiseBackend(EnumeratingBackend):
    """Verifies with the noise of round 0 in every round."""

    def rng(self, rng: Rng) -> Rng:
        assert isinstance(rng, RowRng)
        return _RoundZero(rng)


class NoRenormalising(EnumeratingBackend):
    """The residual is not divided by its mass: inversion runs off its end, onto the last token."""

    sound = False

    def bonus_rows(self, rows: Tensor, round: DraftRound, accepted: npt.NDArray[np.int64], context: Context) -> Tensor:
        for b, count in enumerate(accepted.tolist()):
            if count < round.keep[b]:
                p, q = _target_row(round, b, count), _drafted_row(round, b, count)
                rows[b] = (p - q).clamp_min(0)
                rows[b, -1] += 1 - rows[b].sum()
        return rows


class BonusFromTheDraft(EnumeratingBackend):
    """The token after a fully accepted draft is drawn from the drafter's last distribution."""

    sound = False

    def bonus_rows(self, rows: Tensor, round: DraftRound, accepted: npt.NDArray[np.int64], context: Context) -> Tensor:
        for b, count in enumerate(accepted.tolist()):
            if count == round.keep[b] > 0:
                rows[b] = _drafted_row(round, b, count - 1)
        return rows


def _target_row(round: DraftRound, b: int, depth: int) -> Tensor:
    """The target's probabilities at a position of a row, [V]."""
    return round.target.dense(torch.tensor([int(round.starts[b]) + depth]))[0].double()


def _drafted_row(round: DraftRound, b: int, depth: int) -> Tensor:
    """The drafter's, [V]."""
    assert round.distribution is not None
    return round.distribution.dense(torch.tensor([int(round.drafted[b]) + depth]))[0].double()


class _WithTarget(EnumeratingBackend):
    """A backend that knows the toy target's logits, to do what is wrong with them."""

    sound = False
    world: ToyWorld

    def raw(self, context: Context, tokens: npt.NDArray[np.int64], counts: Sequence[int]) -> Tensor:
        """The target's own logits after the first ``counts[b]`` drafts of each row."""
        prefixes = [[*context.history[b], *tokens[b, :n].tolist()] for b, n in enumerate(counts)]
        return _rows(self.world.target(), prefixes)


class BonusPastTheSampler(_WithTarget):
    """The token after a fully accepted draft is drawn from the target's own logits: no temperature, no grammar."""

    def bonus_rows(self, rows: Tensor, round: DraftRound, accepted: npt.NDArray[np.int64], context: Context) -> Tensor:
        raw = self.raw(context, round.tokens, accepted.tolist()).softmax(-1)
        all_accepted = torch.from_numpy((accepted == round.keep) & (round.keep > 0))
        return torch.where(all_accepted[:, None], raw, rows)


class PenaltiesOnOneSide(_WithTarget):
    """Penalties are applied to the drafter's logits and not to the target's."""

    def target(self, target: Categorical, proposal: Proposal, keep: Sequence[int], context: Context) -> Categorical:
        params = [
            replace(p, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0) for p in context.params
        ]
        owner = [b for b, n in enumerate(keep) for _ in range(n + 1)]
        depth = [j for n in keep for j in range(n + 1)]
        tokens = proposal.tokens.numpy()
        prefixes = [[*context.history[b], *tokens[b, :j].tolist()] for b, j in zip(owner, depth, strict=True)]
        rows = process(_rows(self.world.target(), prefixes), replace(context, params=params), torch.tensor(owner))
        return Categorical(self.world.size, probabilities=dense_rows(rows))


class ClippedAtTheWrongSide(EnumeratingBackend):
    """Accepts with min(1, q / p)."""

    sound = False

    def acceptance(self, round: DraftRound, block: npt.NDArray[np.bool_]) -> AcceptanceProbabilities:
        right = super().acceptance(round, block)
        probability = right.probability.copy()
        for b, kept in enumerate(round.keep.tolist()):
            for j in range(kept):
                token = round.tokens[b, j]
                p, q = (float(of(round, b, j)[token]) for of in (_target_row, _drafted_row))
                probability[b, j] = min(1.0, q / p) if p > 0 else 0.0
        return replace(right, probability=probability)


def in_world(kind: type[_WithTarget], world: ToyWorld) -> Callable[[], EnumeratingBackend]:
    def make() -> EnumeratingBackend:
        backend = kind()
        backend.world = world
        return backend

    return make


# ------------------------------------------------------------------------------------------------ schedule, cache, ends


class _LooksOneAhead(FixedPolicy):
    """Keeps a token only where the confidence of the token after it is high."""

    def choose(self, confidence: Values | None, lengths: Sequence[int]) -> list[int]:
        if confidence is None or not confidence.shape[1]:
            return list(lengths)
        sure = to_tensor(confidence)
        following = torch.cat([sure[:, 1:], torch.ones(len(sure), 1)], 1)
        return torch.tensor(lengths).minimum((following > 0.7).long().cumprod(1).sum(1)).tolist()


def peeking(name: str, drafts: int) -> SchedulerPolicy:
    return _LooksOneAhead(FixedConfig(draft_tokens=drafts))


def _rewinding_one_short(cache: Any) -> Any:
    """A toy cache whose last kept entry, after a rewind, is the one that should be gone."""
    rewind = cache.rewind

    def rewind_one_short(slots: Sequence[int], lengths: Sequence[int]) -> None:
        held = cache.lengths[slots].tolist()
        for slot, before, length in zip(slots, held, lengths, strict=True):
            if before > length > 0:
                first, second = cache.index(torch.tensor([slot, slot]), torch.tensor([length - 1, length]))
                for keys in cache.keys:
                    keys[first[0], 0, second[0]] = keys[first[1], 0, second[1]]
        rewind(slots, lengths)

    cache.rewind = rewind_one_short
    return cache


class ToyRewindsOneShort(ToyTarget):
    def new_cache(self, slots: int, capacity: int) -> KVCache:
        cache: KVCache = _rewinding_one_short(super().new_cache(slots, capacity))
        return cache

    def paged_cache(self, *args: Any, **options: Any) -> PagedCache:
        cache: PagedCache = _rewinding_one_short(super().paged_cache(*args, **options))
        return cache


class _EndsLate(Finisher):
    """Looks for a stop token in a round's last token only."""

    def take(self, tokens: Sequence[int], accepted: int, budget: int) -> End:
        ids = self.stop_ids
        last = tokens[min(accepted, budget - 1)]
        self.stop_ids = ids if last in ids else ()
        try:
            return super().take(tokens, accepted, budget)
        finally:
            self.stop_ids = ids


class EngineEndsLate(GrammarEngine):
    def submit(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, index: int = 0, expected: Sequence[int] = ()
    ) -> Request:
        request = super().submit(prompt, params, seed, index, expected)
        request.finisher = _EndsLate(request.finisher.stop_ids)
        return request


class LeaksThroughPadding(ToyTarget):
    """Rows shorter than the longest of their batch are padded with a neighbour's tokens, which are not masked out."""

    def forward(
        self, batch: RaggedBatch, cache: Any, aux_layers: Sequence[int] = (), logits_at: Tensor | None = None
    ) -> TargetOutput:
        output = super().forward(batch, cache, aux_layers)
        logits, lengths, ends = output.logits.clone(), batch.lengths.tolist(), batch.offsets[1:].tolist()
        for b, length in enumerate(lengths):
            if length < max(lengths):
                neighbour = int(batch.tokens[ends[b - 1] - 1])
                logits[ends[b] - 1] += self.table[(neighbour,) * (self.table.ndim - 1)]
        return TargetOutput(logits if logits_at is None else logits[logits_at], output.features, output.hidden)


class SampledUnprocessedQ(DraftModelDrafter):
    """Really samples, and states the probabilities before temperature."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        drafted = super().propose(slots, last, context, limit, rng)
        if drafted.distribution is None:
            return drafted
        stated = Categorical.of(_rows(self.model, _prefixes(context, drafted)))
        return Proposal(drafted.tokens, drafted.lengths, stated, drafted.confidence)
