"""A plan: which drafter and how many drafts, what that gives, what it needs, and what would change the answer.

Every candidate (a drafter and its costs) is forecast with each number of drafts and compared with plain decoding. What
is advised is the fastest of those whose whole 95 % interval is above plain decoding and that fit the memory; where
there is none, plain decoding. Such a setting answers sooner than plain decoding, so objectives that it misses are
missed by both: that is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from outrider.planning.described import DrafterShape, Machine, TargetShape
from outrider.planning.forecast import (
    LARGEST,
    Forecast,
    Profile,
    Workload,
    cache_seconds,
    forecast,
    prompt_seconds,
    whole_rounds,
)
from outrider.planning.roofline import Roofline
from outrider.planning.step_costs import StepCosts

__all__ = ["Candidate", "Memory", "Plan", "Sensitivity", "described_candidates", "make_plan"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (512, 2048, 8192, 32768, 131072)
CHUNK = 2048  # tokens of a prompt whose auxiliary hidden states are held at once
SMALL_GAIN = 1.005  # fewer drafts are preferred to a gain below this


@dataclass(frozen=True)
class Candidate:
    """A drafter that may be used, and what steps with it cost."""

    name: str
    profile: Profile
    costs: StepCosts
    most: int
    """Drafts of a round at most."""
    uncertainty: float
    """Of the ratio of two times: half a 95 % interval, as a share."""
    shape: DrafterShape | None = None
    tried: Mapping[int, float] = field(default_factory=dict)
    """The same of numbers of drafts that were run with the workload's rows; where there are any, only these are
    advised for it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; None: not known."""

    target: float
    target_cache: float
    drafter: float
    drafter_cache: float
    auxiliary: float
    """Hidden states of the target's auxiliary layers, of one chunk of a prompt and one step."""
    available: float

    @property
    def total(self) -> float:
        return self.target + self.target_cache + self.drafter + self.drafter_cache + self.auxiliary

    @property
    def fits(self) -> bool:
        return not self.available or self.total <= self.available


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What becomes of the answer when one thing is otherwise."""

    what: str
    speedup: float  # of the advised setting
    best: str
    best_speedup: float
    changes: bool  # another answer is better


@dataclass(frozen=True)
class Plan:
    """The answer to: does it pay here?"""

    target: str
    machine: str
    workload: Workload
    plain: Forecast
    advised: Forecast
    """Plain decoding where nothing pays."""
    forecasts: list[Forecast]
    """The best number of drafts of every candidate."""
    curves: dict[str, list[Forecast]]
    """Every number of drafts, by candidate."""
    by_rows: list[tuple[int, Forecast]]
    by_context: list[tuple[int, Forecast]]
    sensitivities: list[Sensitivity]
    memory: Memory | None
    cost_per_million: tuple[float, float] | None
    """Of plain decoding and of what is advised."""
    notes: list[str] = field(default_factory=list)

    @property
    def pays(self) -> bool:
        return self.advised.drafts > 0

    def to_json(self) -> dict[str, Any]:
        """Plain data; seconds, bytes and factors."""
        return asdict(self) | {
            "pays": self.pays,
            "policy": self.policy,
            "answer": self.answer,
            "memory": None if self.memory is None else asdict(self.memory) | {"total": self.memory.total},
        }

    @property
    def answer(self) -> str:
        """One sentence."""
        best = self.advised
        if self.pays:
            return (
                f"It pays: {best.drafter} with {best.drafts} {'draft' if best.drafts == 1 else 'drafts'} a round, "
                f"{best.speedup:.2f} x plain decoding (95 %: {best.low:.2f} to {best.high:.2f})."
            )
        fastest = max(self.forecasts, key=lambda f: f.speedup, default=None)
        if fastest is None or fastest.speedup <= 1:
            return "It does not pay: decode plainly."
        reason = "does not fit the memory" if self.memory is not None and not self.memory.fits else ""
        reason = reason or f"may be anything from {fastest.low:.2f} to {fastest.high:.2f} x"
        return f"It is not certain to pay ({fastest.drafter} {reason}): decode plainly, or measure it on more prompts."

    @property
    def policy(self) -> str:
        """Outrider's policy that suits it."""
        if not self.pays:
            return "none"
        changing = {f.drafts for _, f in self.by_rows} != {self.advised.drafts}
        return "throughput" if changing or self.workload.rate else f"fixed, {self.advised.drafts} drafts"


def described_candidates(machine: Machine, target: TargetShape, drafters: Sequence[DrafterShape]) -> list[Candidate]:
    """Candidates of which nothing was measured."""
    return [
        Candidate(
            d.title,
            Profile(d.conditional, d.uncertainty),
            Roofline(machine, target, d),
            d.drafts,
            machine.uncertainty,
            d,
        )
        for d in drafters
    ]


def make_plan(
    candidates: Sequence[Candidate],
    plain: StepCosts,
    work: Workload,
    *,
    target: TargetShape | None = None,
    machine: Machine | None = None,
    target_name: str = "",
    machine_name: str = "",
    longest: int = 0,
    notes: Sequence[str] = (),
) -> Plan:
    """Compare candidates. ``plain``: costs of steps without drafts. ``target`` and ``machine``: for memory and prices.
    ``longest``: the target's longest context, 0: unknown."""
    base = _plain(plain, work)
    curves = {c.name: _curve(c, work) for c in candidates}
    sure = {c.name: [f for f in curves[c.name] if not c.tried or f.drafts in c.tried] for c in candidates}
    bests = {name: _best(curve) for name, curve in sure.items()}
    kept = [c for c in candidates if _memory(c.shape, target, machine, work, bests[c.name].drafts).fits]
    good = [f for c in kept for f in sure[c.name] if f.pays]
    advised = _best(good) if good else base
    chosen = next((c for c in candidates if c.name == advised.drafter), None)
    shown = chosen or max(candidates, key=lambda c: bests[c.name].speedup, default=None)
    price = machine.price if machine is not None else 0.0
    memory = None
    if target is not None and machine is not None:
        shape = None if shown is None else shown.shape
        memory = _memory(shape, target, machine, work, advised.drafts or (bests[shown.name].drafts if shown else 0))
    return Plan(
        target=target_name or (target.name if target else ""),
        machine=machine_name or (machine.name if machine else ""),
        workload=work,
        plain=base,
        advised=advised,
        forecasts=list(bests.values()),
        curves=curves,
        by_rows=[(r, _advised_at(candidates, plain, replace(work, concurrency=r, rate=0.0))) for r in ROWS],
        by_context=[
            (n, _advised_at(candidates, plain, replace(work, prompt=max(1, n - work.answer // 2))))
            for n in CONTEXTS
            if n > work.answer // 2 and (not longest or n <= longest)
        ],
        sensitivities=[] if shown is None else _sensitivities(candidates, shown, plain, advised, work),
        memory=memory,
        cost_per_million=None if not price else (_cost(price, base), _cost(price, advised)),
        notes=[*notes, *_notes(target, work, base, advised, memory)],
    )


def _curve(candidate: Candidate, work: Workload) -> list[Forecast]:
    return [
        forecast(
            candidate.name,
            k,
            candidate.profile,
            candidate.costs,
            work,
            uncertainty=candidate.tried.get(k, candidate.uncertainty),
        )
        for k in range(1, candidate.most + 1)
    ]


def _best(curve: Sequence[Forecast]) -> Forecast:
    """The fastest; of those that are about as fast, the one with the fewest drafts."""
    most = max(f.speedup for f in curve)
    return min((f for f in curve if f.speedup * SMALL_GAIN >= most), key=lambda f: (f.drafts, -f.speedup))


def _advised_at(candidates: Sequence[Candidate], plain: StepCosts, work: Workload) -> Forecast:
    """The fastest certain setting, else plain decoding."""
    good = [f for c in candidates for f in _curve(c, work) if f.pays]
    return _best(good) if good else _plain(plain, work)


def _plain(costs: StepCosts, work: Workload) -> Forecast:
    return forecast("none", 0, Profile(()), costs, work)


def _cost(price: float, one: Forecast) -> float:
    return price / 3600 / one.tokens_per_second * 1e6


# ------------------------------------------------------------------------------------------------ memory


def _memory(
    drafter: DrafterShape | None, target: TargetShape | None, machine: Machine | None, work: Workload, drafts: int
) -> Memory:
    if target is None or machine is None:
        return Memory(0, 0, 0, 0, 0, 0)
    tokens = work.concurrency * (work.prompt + work.answer)
    weights = cache = auxiliary = 0.0
    if drafter is not None and drafts:
        size = drafter.bytes or target.bytes
        weights = drafter.multiplied(target) * size + 2 * target.vocabulary * drafter.rank() * size
        cache = tokens * drafter.cache_bytes(target)
        held = min(CHUNK, work.prompt) + work.concurrency * (drafts + 1)
        auxiliary = held * drafter.num_aux_layers() * target.width * target.kv_bytes
    return Memory(
        target.parameters * target.bytes,
        tokens * target.cache_bytes,
        weights,
        cache,
        auxiliary,
        machine.memory * 1e9,
    )


# ------------------------------------------------------------------------------------------------ what would change it


class _Scaled:
    """Costs with some parts longer or shorter."""

    def __init__(self, costs: StepCosts, draft: float = 1.0, step: float = 1.0, slope: float = 1.0) -> None:
        self._costs, self._draft, self._step, self._slope = costs, draft, step, slope

    def draft(self, rows: int, drafts: int) -> float:
        return self._draft * self._costs.draft(rows, drafts)

    def draft_cache(self, drafts: int, context: int) -> float:
        return self._draft * cache_seconds(self._costs, drafts, context)

    def verify(self, tokens: int, rows: int, context: int) -> float:
        whole, least = self._costs.verify(tokens, rows, context), self._costs.verify(min(rows, tokens), rows, context)
        return least + self._slope * max(0.0, whole - least)

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return self._step * self._costs.bookkeeping(rows, drafting)

    def prompt(self, tokens: int, drafting: bool) -> float:
        return prompt_seconds(self._costs, tokens, drafting)

    def whole(self, drafts: int) -> float:
        return whole_rounds(self._costs, drafts)


def _accepts(profile: Profile, factor: float) -> Profile:
    """With so many times the accepted drafts, as far as probabilities allow."""
    drafts = len(profile.conditional)
    wanted = min(factor * profile.accepted(drafts), 0.999 * sum(profile.offered[:drafts] or (1.0,) * drafts))
    low, high = 0.0, 8.0

    def moved(power: float) -> Profile:
        return replace(profile, conditional=tuple(p**power for p in profile.conditional))

    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if moved(middle).accepted(drafts) < wanted else (middle, high)
    return moved(low)


def _sensitivities(
    candidates: Sequence[Candidate], shown: Candidate, plain: StepCosts, advised: Forecast, work: Workload
) -> list[Sensitivity]:
    drafts = advised.drafts or _best(_curve(shown, work)).drafts

    def costs(**factors: float) -> Callable[[Candidate], Candidate]:
        return lambda c: replace(c, costs=_Scaled(c.costs, **factors))

    def same(c: Candidate) -> Candidate:
        return c

    cases: list[tuple[str, Callable[[Candidate], Candidate], Workload]] = [
        ("accepted drafts -25 %", lambda c: replace(c, profile=_accepts(c.profile, 0.75)), work),
        ("accepted drafts +25 %", lambda c: replace(c, profile=_accepts(c.profile, 1.25)), work),
        ("drafting takes half the time", costs(draft=0.5), work),
        ("drafting takes twice the time", costs(draft=2.0), work),
        ("no bookkeeping", costs(step=0.0), work),
        ("verifying costs nothing beyond a plain pass", costs(slope=0.0), work),
        ("verifying costs twice as much beyond a plain pass", costs(slope=2.0), work),
    ]
    if (rows := 4 * work.concurrency) <= LARGEST:
        cases.append((f"{rows} rows instead of {work.concurrency}", same, replace(work, concurrency=rows, rate=0.0)))
    if 8 * work.prompt <= LARGEST:
        cases.append(("contexts 8 times as long", same, replace(work, prompt=8 * work.prompt)))
    found = []
    for what, change, asked in cases:
        mine = change(shown)
        now = forecast(mine.name, drafts, mine.profile, mine.costs, asked, uncertainty=mine.uncertainty)
        best = _advised_at([change(c) for c in candidates], plain, asked)
        changes = (best.drafter, best.drafts) != (advised.drafter, advised.drafts) and (
            best.drafts == 0 or not advised.drafts or best.speedup > 1.03 * now.speedup
        )
        found.append(Sensitivity(what, now.speedup, _name(best), best.speedup, changes))
    return found


def _name(one: Forecast) -> str:
    return "plain decoding" if one.drafts == 0 else f"{one.drafter}, {one.drafts}"


def _notes(
    target: TargetShape | None, work: Workload, base: Forecast, advised: Forecast, memory: Memory | None
) -> list[str]:
    notes = []
    if target is not None and target.experts:
        one, eight = target.touched(work.concurrency), target.touched(work.concurrency * (max(advised.drafts, 7) + 1))
        notes.append(
            f"mixture of experts: verifying {max(advised.drafts, 7)} drafts a row reads {eight / one:.1f} x the "
            "weights of a plain step, because more experts are used; it pays with few drafts, or with so many rows "
            "that all experts are read anyway"
        )
    if base.overloaded:
        notes.append("the rate is more than plain decoding can serve here")
    for what, wanted, got, plain in (
        ("latency objective", work.latency, advised.latency, base.latency),
        ("objective between tokens", work.token_latency, advised.between_tokens, base.between_tokens),
    ):
        if wanted and got > wanted:
            beside = f"; plain decoding: {plain:.3g} s" if advised.drafts else ""
            notes.append(f"the {what} of {wanted:g} s is missed ({got:.3g} s{beside})")
    if memory is not None and not memory.fits:
        notes.append(
            f"{memory.total / 1e9:.1f} GB are needed and {memory.available / 1e9:.1f} GB are there: fewer rows, "
            "shorter contexts or smaller weights"
        )
    return notes
