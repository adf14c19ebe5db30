"""Negative controls: engines that are broken in one way each, which an audit that works must catch.

The parts are in ``broken_parts``. ``self_test`` runs all controls, then the sound configuration under other seeds,
which must raise no alarm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from outrider.config import SamplingParams
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine.engine import Engine
from outrider.models.toy import ToyTarget
from outrider.proof.broken_parts import (
    Bfloat16Q,
    BonusFromTheDraft,
    BonusPastTheSampler,
    ClippedAtTheWrongSide,
    CutsAtForbidden,
    EngineEndsLate,
    LeaksThroughPadding,
    MaskOnTheTargetOnly,
    NoRenormalising,
    PenaltiesOnOneSide,
    ReusesNoise,
    SameNoiseBackend,
    SameNoiseEachRound,
    SampledUnprocessedQ,
    ToyRewindsOneShort,
    UnprocessedQ,
    in_world,
    peeking,
)
from outrider.proof.contracts import drafter_remembers_wrongly, policy_anticipates, rewind_difference
from outrider.proof.equality import Rounding, differences, texts_alone, texts_of
from outrider.proof.evidence import Budget
from outrider.proof.exact import TOLERANCE, Setting, settings
from outrider.proof.statistical import ToySetting
from outrider.proof.toy_world import ToyWorld, make_policy

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


# ------------------------------------------------------------------------------------------------ looked for


def _find_peeking() -> tuple[bool, str]:
    exact, found = _exact(Setting("rejection"), make_policy=peeking)()
    contract = policy_anticipates(lambda: peeking("", 6))
    return exact and contract, f"{found}; the contract of policies is {'broken' if contract else 'kept'}"


def _find_rewind() -> tuple[bool, str]:
    exact, found = _exact(Setting("rejection", size=3), target=ToyRewindsOneShort)()
    difference = rewind_difference(ToyWorld(size=4).target(ToyRewindsOneShort), [0, 1, 2, 3, 3, 1, 0, 2, 2, 1])
    return exact and difference > 0, f"{found}; a rewound cache gives logits {difference:.2g} off"


def _find_stale_draft_cache() -> tuple[bool, str]:
    world = ToyWorld(size=5)
    params = [SamplingParams(), SamplingParams(temperature=1.0, rule="block")]

    def found(kind: type[ToyTarget]) -> str:
        small = kind(world.tables[1])
        return drafter_remembers_wrongly(
            world.target(), lambda: DraftModelDrafter(small, 4), [[0, 1, 2], [3, 3, 1]], params
        )[0]

    broken, sound = found(ToyRewindsOneShort), found(ToyTarget)
    return bool(broken) and not sound, broken or "nothing found"


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

    broken, sound = faults(LeaksThroughPadding), faults(ToyTarget)
    return broken > 0 == sound, f"{broken} of {len(prompts)} texts differ in a batch ({sound} without the flaw)"


def _find_by_sampling() -> tuple[bool, str]:
    setting, bias, budget = ToySetting("rejection", "remembers", temperature=0.6), 0.02, Budget(1)

    def broken() -> Engine:
        world = setting.world
        drafter = SampledUnprocessedQ(world.draft_model(torch.float32), setting.drafts)
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
        _exact(Setting("rejection", "temperature 0.6"), draft_model=UnprocessedQ),
    ),
    Control(
        "reused noise",
        "exact",
        "the recovered token is drawn with the number that rejected the draft",
        _exact(Setting("rejection", size=3, length=3), backend=ReusesNoise),
    ),
    Control("bf16 q", "exact", "the stated probabilities are rounded", _exact(Setting("block"), draft_model=Bfloat16Q)),
    Control(
        "residual without renormalising",
        "exact",
        "the residual is drawn from without dividing by its mass",
        _exact(Setting("rejection", size=3, length=3), backend=NoRenormalising),
    ),
    Control(
        "bonus token from the draft",
        "exact",
        "the token after an accepted draft is drawn from the drafter's distribution",
        _exact(Setting("rejection"), backend=BonusFromTheDraft),
    ),
    Control(
        "bonus token past sampler and grammar",
        "exact",
        "the token after an accepted draft is drawn from the target's own logits",
        _exact(_GRAMMAR, backend=in_world(BonusPastTheSampler, _GRAMMAR.world)),
    ),
    Control("off-by-one rewind", "exact", "a rewound cache keeps a rejected draft's entry", _find_rewind),
    Control(
        "stop token counted inside a block",
        "exact",
        "a text goes on after a stop token among accepted drafts",
        _exact(Setting("rejection", "stop token"), engine=EngineEndsLate),
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
            backend=SameNoiseBackend,
            draft_model=SameNoiseEachRound,
        ),
    ),
    Control(
        "a sampled draft cut at a forbidden token",
        "exact",
        "a draft ends where the sampled token is forbidden",
        _exact(_GRAMMAR, draft_model=CutsAtForbidden),
    ),
    Control(
        "acceptance clipped at the wrong side",
        "exact",
        "a draft is accepted with probability min(1, q / p)",
        _exact(Setting("rejection"), backend=ClippedAtTheWrongSide),
    ),
    Control(
        "penalties on one side only",
        "exact",
        "penalties change the drafter's logits and not the target's",
        _exact(_PENALTIES, backend=in_world(PenaltiesOnOneSide, _PENALTIES.world)),
    ),
    Control(
        "grammar mask on the target only",
        "exact",
        "drafts are drawn without the mask and stated with it",
        _exact(_GRAMMAR, draft_model=MaskOnTheTargetOnly),
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
