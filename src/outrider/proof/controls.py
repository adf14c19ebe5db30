"""Negative controls: engines that are broken in one way each, which an audit that works must catch.

Each control is a small subclass of a part of the engine, given where the sound part is given; nothing of the product is
edited. ``self_test`` runs them all, then the sound configuration under other seeds, which must raise no alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from outrider.config import SamplingParams
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine.engine import Engine
from outrider.engine.finisher import End, Finisher
from outrider.engine.request import Request
from outrider.models.toy import ToyTarget
from outrider.proof.contracts import drafter_remembers_wrongly, policy_anticipates, rewind_difference
from outrider.proof.enumeration import EnumeratingBackend, EnumeratingDraftModel, dense_rows
from outrider.proof.equality import Rounding, differences, texts_alone, texts_of
from outrider.proof.evidence import Budget
from outrider.proof.exact import TOLERANCE, Setting, settings
from outrider.proof.statistical import ToySetting
from outrider.proof.toy_world import GrammarEngine, NoRepeat, ToyWorld, make_policy
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

__all__ = ["CONTROLS", "Control", "Outcome", "self_test", "sound_repetition"]


@dataclass(frozen=True)
class Outcome:
    """What became of one control."""

    name: str
    tier: str
    caught: bool
    found: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "caught": self.caught, "tier": self.tier, "found": self.found}


@dataclass(frozen=True)
class Control:
    """A broken variant, and the tier that catches it."""

    name: str
    tier: str
    what: str
    """What is broken."""
    find: Callable[[], tuple[bool, str]]
    """Whether it was caught, and what was found."""

    def run(self) -> Outcome:
        return Outcome(self.name, self.tier, *self.find())


@cache
def _sound(setting: Setting) -> float:
    return setting.distance()


def _exact(setting: Setting, **parts: Any) -> Callable[[], tuple[bool, str]]:
    """Caught where the enumerated distribution is off, while the same setting without the flaw is exact."""

    def find() -> tuple[bool, str]:
        made = {name: part() if name == "backend" else part for name, part in parts.items()}
        broken, sound = setting.distance(**made), _sound(setting)
        return broken > TOLERANCE >= sound, f"total variation {broken:.2g} ({sound:.0e} without the flaw)"

    return find


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


class _UnprocessedQ(EnumeratingDraftModel):
    """States the probabilities before temperature."""

    def stated(self, drafted: Proposal, context: Context) -> Distribution:
        return Categorical.of(_rows(self.model, _prefixes(context, drafted)))


class _Bfloat16Q(EnumeratingDraftModel):
    """States its probabilities rounded to bfloat16."""

    def stated(self, drafted: Proposal, context: Context) -> Distribution:
        assert drafted.distribution is not None
        rows = dense_rows(drafted.distribution)
        return Categorical(rows.shape[1], probabilities=rows.bfloat16().double())


class _UnmaskedDrafts(EnumeratingDraftModel):
    """Samples without the grammar's mask."""

    def seen(self, context: Context) -> Context:
        return replace(context, processors=None)


class _CutsAtForbidden(_UnmaskedDrafts):
    """Ends the draft before the first token that the grammar forbids."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        drafted = super().propose(slots, last, context, limit, rng)
        lengths = []
        for b, (row, length) in enumerate(zip(drafted.tokens.tolist(), drafted.lengths.tolist(), strict=True)):
            before = [context.history[b][-1], *row]
            wrong = [j for j in range(length) if before[j] == before[j + 1] == GRAMMAR]
            lengths.append(wrong[0] if wrong else length)
        return Proposal(drafted.tokens, lengths, drafted.distribution, drafted.confidence)


class _MaskOnTheTargetOnly(_UnmaskedDrafts):
    """States the probabilities that the mask would give."""

    def stated(self, drafted: Proposal, context: Context) -> Distribution:
        prefixes = _prefixes(context, drafted)
        params = [context.params[i // drafted.tokens.shape[1]] for i in range(len(prefixes))]
        mask = Context(params, prefixes, [1] * len(prefixes), [[NoRepeat(GRAMMAR)]] * len(prefixes))
        return process(_rows(self.model, prefixes), mask)


class _SameNoiseEachRound(EnumeratingDraftModel):
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


class _ReusesNoise(EnumeratingBackend):
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


class _SameNoiseBackend(EnumeratingBackend):
    """Verifies with the noise of round 0 in every round."""

    def rng(self, rng: Rng) -> Rng:
        assert isinstance(rng, RowRng)
        return _RoundZero(rng)


class _NoRenormalising(EnumeratingBackend):
    """The residual is not divided by its mass: inversion runs off its end, onto the last token."""

    sound = False

    def bonus_rows(self, rows: Tensor, round: DraftRound, accepted: npt.NDArray[np.int64], context: Context) -> Tensor:
        for b, count in enumerate(accepted.tolist()):
            if count < round.keep[b]:
                p, q = _target_row(round, b, count), _drafted_row(round, b, count)
                rows[b] = (p - q).clamp_min(0)
                rows[b, -1] += 1 - rows[b].sum()
        return rows


class _BonusFromTheDraft(EnumeratingBackend):
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


class _BonusPastTheSampler(_WithTarget):
    """The token after a fully accepted draft is drawn from the target's own logits: no temperature, no grammar."""

    def bonus_rows(self, rows: Tensor, round: DraftRound, accepted: npt.NDArray[np.int64], context: Context) -> Tensor:
        raw = self.raw(context, round.tokens, accepted.tolist()).softmax(-1)
        all_accepted = torch.from_numpy((accepted == round.keep) & (round.keep > 0))
        return torch.where(all_accepted[:, None], raw, rows)


class _PenaltiesOnOneSide(_WithTarget):
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


class _ClippedAtTheWrongSide(EnumeratingBackend):
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


def _of(kind: type[_WithTarget], world: ToyWorld) -> Callable[[], EnumeratingBackend]:
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


def _peeking(name: str, drafts: int) -> SchedulerPolicy:
    return _LooksOneAhead(FixedConfig(draft_tokens=drafts))


def _find_peeking() -> tuple[bool, str]:
    exact, found = _exact(Setting("rejection"), make_policy=_peeking)()
    contract = policy_anticipates(lambda: _peeking("", 6))
    return exact and contract, f"{found}; the contract of policies is {'broken' if contract else 'kept'}"


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


class _ToyRewindsOneShort(ToyTarget):
    def new_cache(self, slots: int, capacity: int) -> KVCache:
        cache: KVCache = _rewinding_one_short(super().new_cache(slots, capacity))
        return cache

    def paged_cache(self, *args: Any, **options: Any) -> PagedCache:
        cache: PagedCache = _rewinding_one_short(super().paged_cache(*args, **options))
        return cache


def _find_rewind() -> tuple[bool, str]:
    exact, found = _exact(Setting("rejection", size=3), target=_ToyRewindsOneShort)()
    difference = rewind_difference(ToyWorld(size=4).target(_ToyRewindsOneShort), [0, 1, 2, 3, 3, 1, 0, 2, 2, 1])
    return exact and difference > 0, f"{found}; a rewound cache gives logits {difference:.2g} off"


def _find_stale_draft_cache() -> tuple[bool, str]:
    world = ToyWorld(size=5)
    params = [SamplingParams(), SamplingParams(temperature=1.0, rule="block")]

    def found(kind: type[ToyTarget]) -> str:
        small = kind(world.tables[1])
        return drafter_remembers_wrongly(
            world.target(), lambda: DraftModelDrafter(small, 4), [[0, 1, 2], [3, 3, 1]], params
        )[0]

    broken, sound = found(_ToyRewindsOneShort), found(ToyTarget)
    return bool(broken) and not sound, broken or "nothing found"


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


class _EngineEndsLate(GrammarEngine):
    def submit(
        self, prompt: Sequence[int], params: SamplingParams, seed: int, index: int = 0, expected: Sequence[int] = ()
    ) -> Request:
        request = super().submit(prompt, params, seed, index, expected)
        request.finisher = _EndsLate(request.finisher.stop_ids)
        return request


class _LeaksThroughPadding(ToyTarget):
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


def _find_leak() -> tuple[bool, str]:
    world = ToyWorld(size=5)
    prompts = [[0], [1, 2, 3], [4, 4, 0, 1, 2, 3, 1], [2, 1]]
    params = [SamplingParams(max_tokens=24, temperature=1.0, seed=i) for i in range(len(prompts))]

    def faults(kind: type[ToyTarget]) -> int:
        target = world.target(kind)
        plain = world.engine(target, DraftModelDrafter(world.draft_model(), 1), make_policy("fixed", 0), rows=1)
        fast = world.engine(target, DraftModelDrafter(world.draft_model(), 3), make_policy("threshold", 3), rows=4)
        alone, together = texts_alone(plain, prompts, params), texts_of(fast, prompts, params)
        return len(differences(target, prompts, params, alone, together, Rounding(0.0, 0)))

    broken, sound = faults(_LeaksThroughPadding), faults(ToyTarget)
    return broken > 0 == sound, f"{broken} of {len(prompts)} texts differ in a batch ({sound} without the flaw)"


class _SampledUnprocessedQ(DraftModelDrafter):
    """Really samples, and states the probabilities before temperature."""

    def propose(self, slots: list[int], last: list[int], context: Context, limit: list[int], rng: Rng) -> Proposal:
        drafted = super().propose(slots, last, context, limit, rng)
        if drafted.distribution is None:
            return drafted
        stated = Categorical.of(_rows(self.model, _prefixes(context, drafted)))
        return Proposal(drafted.tokens, drafted.lengths, stated, drafted.confidence)


def _find_by_sampling() -> tuple[bool, str]:
    setting, bias, budget = ToySetting("rejection", "remembers", temperature=0.6), 0.02, Budget(1)

    def broken() -> Engine:
        world = setting.world
        drafter = _SampledUnprocessedQ(world.draft_model(torch.float32), setting.drafts)
        policy = make_policy(setting.policy, setting.drafts)
        return world.engine(world.target(dtype=torch.float32), drafter, policy, rows=setting.rows)

    check, sound = setting.check(bias, budget, broken), setting.check(bias, budget)
    return sound.passed and not check.passed, check.found


# ------------------------------------------------------------------------------------------------ all

_GRAMMAR = Setting("rejection", "grammar", size=3)
_PENALTIES = Setting("rejection", "penalties")
CONTROLS: tuple[Control, ...] = (
    Control("peeking scheduler", "exact", "a token is kept for the confidence of the token after it", _find_peeking),
    Control(
        "unprocessed q",
        "exact",
        "the stated probabilities are those before temperature",
        _exact(Setting("rejection", "temperature 0.6"), draft_model=_UnprocessedQ),
    ),
    Control(
        "reused noise",
        "exact",
        "the recovered token is drawn with the number that rejected the draft",
        _exact(Setting("rejection", size=3, length=3), backend=_ReusesNoise),
    ),
    Control(
        "bf16 q", "exact", "the stated probabilities are rounded", _exact(Setting("block"), draft_model=_Bfloat16Q)
    ),
    Control(
        "residual without renormalising",
        "exact",
        "the residual is drawn from without dividing by its mass",
        _exact(Setting("rejection", size=3, length=3), backend=_NoRenormalising),
    ),
    Control(
        "bonus token from the draft",
        "exact",
        "the token after an accepted draft is drawn from the drafter's distribution",
        _exact(Setting("rejection"), backend=_BonusFromTheDraft),
    ),
    Control(
        "bonus token past sampler and grammar",
        "exact",
        "the token after an accepted draft is drawn from the target's own logits",
        _exact(_GRAMMAR, backend=_of(_BonusPastTheSampler, _GRAMMAR.world)),
    ),
    Control("off-by-one rewind", "exact", "a rewound cache keeps a rejected draft's entry", _find_rewind),
    Control(
        "stop token counted inside a block",
        "exact",
        "a text goes on after a stop token among accepted drafts",
        _exact(Setting("rejection", "stop token"), engine=_EngineEndsLate),
    ),
    Control(
        "stale draft cache",
        "contracts",
        "the drafter's cache keeps rejected drafts: lossless, slower",
        _find_stale_draft_cache,
    ),
    Control(
        "noise of a rejected tail reused under a budget that remembers",
        "exact",
        "the round is not part of a number's key",
        _exact(
            Setting("block", policy="remembers", length=5, drafts=3),
            backend=_SameNoiseBackend,
            draft_model=_SameNoiseEachRound,
        ),
    ),
    Control(
        "a sampled draft cut at a forbidden token",
        "exact",
        "a draft ends where the sampled token is forbidden",
        _exact(_GRAMMAR, draft_model=_CutsAtForbidden),
    ),
    Control(
        "acceptance clipped at the wrong side",
        "exact",
        "a draft is accepted with probability min(1, q / p)",
        _exact(Setting("rejection"), backend=_ClippedAtTheWrongSide),
    ),
    Control(
        "penalties on one side only",
        "exact",
        "penalties change the drafter's logits and not the target's",
        _exact(_PENALTIES, backend=_of(_PenaltiesOnOneSide, _PENALTIES.world)),
    ),
    Control(
        "grammar mask on the target only",
        "exact",
        "drafts are drawn without the mask and stated with it",
        _exact(_GRAMMAR, draft_model=_MaskOnTheTargetOnly),
    ),
    Control(
        "unprocessed q, by sampling",
        "statistical",
        "the same as above, in an engine that samples",
        _find_by_sampling,
    ),
    Control(
        "a neighbour's row leaking through padding",
        "equality",
        "a row shorter than its batch sees a neighbour's last token",
        _find_leak,
    ),
)


def sound_repetition(seed: int) -> list[str]:
    """Alarms that the sound configuration raises in another world with other random numbers; none are expected."""
    alarms = []
    turns = settings(quick=True, seed=seed)
    for setting in turns[seed % 7 :: 7]:
        distance = setting.distance()
        if distance > TOLERANCE:
            alarms.append(f"exact, {setting.name}: total variation {distance:.2g}")
    rules = ("rejection", "block", "coupled")
    check = ToySetting(rules[seed % 3], "remembers", seed=seed).check(0.05, Budget(1))  # type: ignore[arg-type]
    if not check.passed:
        alarms.append(f"statistical, {check.name}: {check.found}")
    world = ToyWorld(size=5, seed=seed)
    prompts = [[0], [1, 2, 3], [4, 4, 0, 1, 2, 3, 1]]
    params = [SamplingParams(max_tokens=24, temperature=1.0, seed=seed + i) for i in range(len(prompts))]
    target = world.target()
    plain = world.engine(target, DraftModelDrafter(world.draft_model(), 1), make_policy("fixed", 0), rows=1)
    fast = world.engine(target, DraftModelDrafter(world.draft_model(), 4), make_policy("threshold", 4), rows=3)
    if texts_alone(plain, prompts, params) != texts_of(fast, prompts, params):
        alarms.append("equality: a seed's text differs from plain decoding's")
    small = world.draft_model()
    broken, wrong, _ = drafter_remembers_wrongly(
        target, lambda: DraftModelDrafter(small, 4), prompts, params, rounds=4, seed=seed
    )
    if broken or wrong:
        alarms.append(f"contracts: {broken or f'{wrong} drafts are not draws of their stated probabilities'}")
    return alarms


def self_test(repetitions: int = 20, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """{"controls": [{name, caught, tier, found}], "sound": {repetitions, alarms}}"""
    controls = []
    for control in CONTROLS:
        controls.append(control.run())
        progress(
            f"{control.name}: {'caught' if controls[-1].caught else 'MISSED'} ({control.tier}), {controls[-1].found}"
        )
    alarms = [alarm for seed in range(1, repetitions + 1) for alarm in sound_repetition(seed)]
    progress(f"sound configuration: {len(alarms)} false alarms in {repetitions} repetitions")
    return {
        "controls": [outcome.to_json() for outcome in controls],
        "sound": {"repetitions": repetitions, "alarms": alarms},
    }
