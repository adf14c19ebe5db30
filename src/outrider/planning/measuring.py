"""Costs and acceptance measured on this machine: what a plan is made of when target and drafters are here.

Plain decoding and every drafter answer the same prompts in turns, as many together as the workload has rows, through
the engine that serves them. What a setting gains is the ratio of whole runs: it contains all that a round costs,
weights and caches that each pass pushes out for the next included. Parts of steps (draft, verify, bookkeeping, reading
prompts) are observed in the same runs and brought to these totals; they say how costs change with other lengths,
rows and numbers of drafts.
"""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from statistics import fmean, median
from time import perf_counter

import numpy as np
from scipy.special import stdtrit

from outrider import checkpoints
from outrider.backends.layers import weight_shapes
from outrider.backends.native import NativeStack
from outrider.config import SamplingParams, StackConfig
from outrider.drafters.base.trained import TrainedDrafter
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine.cost_tables import start_costs
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.evaluation.pass_times import matrix_bytes
from outrider.models.decoder import DecoderTarget
from outrider.models.locations import PACKAGED_DRAFTERS
from outrider.planning.advice import Candidate
from outrider.planning.described import DrafterShape, Machine, TargetShape
from outrider.planning.forecast import Profile, Workload, forecast, prompt_seconds
from outrider.scheduling.costs import CostTable
from outrider.types import RequestStats, StepRecord

__all__ = ["MeasuredCosts", "measure", "measured_shape", "this_machine"]

LADDER = (1, 3)  # drafts that every drafter tries, beside all of its own
TURNS = (3, 16)  # that a setting takes at least and at most
PAIRS = 48  # of a group and a turn, after which no more turns are taken, but for TURNS[1] / 2
TRIMMED = 0.2  # of a setting's turns, on either side
PRECISE = 0.02  # half an interval of a ratio of times that needs no further turns
LEAST = 0.02  # half an interval is never taken to be narrower: the next run is not this one
UNTRIED = 0.08  # uncertainty of a number of drafts that was not run, beside that of its neighbours
BETTER = 1.02  # gain in the forecast for which another number of drafts is tried
SLOWEST = 0.02  # of steps, which are left out of means
ENOUGH = 10  # steps over one number of tokens that tell what they cost
DRAWS = 1000
Prompts = Sequence[str | list[int]]
Make = Callable[[int | None], LLM]
"""An LLM with one drafter, and so many drafts at most; None: all of its own."""


@dataclass(frozen=True)
class MeasuredCosts:
    """``StepCosts`` from a cost table, observed steps and whole runs."""

    table: CostTable
    factors: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    """(tokens, observed passes over the table's): in a run memory and caches are used by more than passes."""
    plain: float = 0.0
    """Bookkeeping of a plain step, and of one that drafts."""
    drafting: float = 0.0
    drafts: tuple[tuple[int, float], ...] = ()
    """(drafts, seconds) of drafting for ``rows`` rows."""
    rows: int = 1
    reading: tuple[float, float] = (0.0, 0.0)
    """Seconds for each token of a prompt, in plain decoding and where a drafter reads it too."""
    rounds: tuple[tuple[int, float], ...] = ()
    """(drafts, whole rounds over the sum of their parts), by whole runs; 0 drafts: plain steps."""

    def verify(self, tokens: int, rows: int, context: int) -> float:
        counts, factors = zip(*self.factors, strict=True)
        factor = float(np.interp(tokens, counts, factors))
        return factor * self.table.seconds(tokens, rows, context)

    def draft(self, rows: int, drafts: int) -> float:
        if not drafts or not self.drafts:
            return 0.0
        counts, seconds = zip(*self.drafts, strict=True)
        at_measured = float(np.interp(drafts, counts, seconds))
        if drafts < counts[0] and len(counts) > 1:  # the first slope goes on to fewer drafts
            slope = max(0.0, (seconds[1] - seconds[0]) / (counts[1] - counts[0]))
            at_measured = max(0.0, seconds[0] + slope * (drafts - counts[0]))
        return at_measured * (0.5 + 0.5 * rows / self.rows)  # half of it grows with rows: a guess beside measured rows

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return (self.drafting if drafting else self.plain) * (0.5 + 0.5 * rows / self.rows)

    def prompt(self, tokens: int, drafting: bool) -> float:
        return tokens * self.reading[drafting]

    def whole(self, drafts: int) -> float:
        tried = [(n, factor) for n, factor in self.rounds if bool(n) == bool(drafts)]
        if not tried:
            return 1.0
        counts, factors = zip(*tried, strict=True)
        return float(np.interp(drafts, counts, factors))


# ------------------------------------------------------------------------------------------------ runs in turns


@dataclass
class _Watch:
    """A ``StepObserver``: the steps of full batches, and those that read prompts."""

    rows: int
    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    bookkeeping: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    """Of all steps."""
    wall: float = 0.0
    """Of the runs, what passes between steps included."""
    read: int = 0
    """Tokens of prompts."""
    reading: float = 0.0
    """Seconds of the steps that read them."""

    def step(self, record: StepRecord) -> None:
        cost, rows = record.cost, [row for row in record.rows if not row.first]
        self.steps += 1
        self.seconds += cost.draft + cost.verify + cost.bookkeeping
        prompts = cost.tokens - sum(1 + row.verified for row in rows)
        if prompts:
            self.read += prompts
            self.reading += cost.draft + cost.verify + cost.bookkeeping
        elif len(rows) == self.rows:
            self.draft.append(cost.draft)
            self.verify.append(cost.verify)
            self.bookkeeping.append(cost.bookkeeping)
            self.tokens.append(cost.tokens)
            self.context.append(cost.context)

    def mean(self, values: Sequence[float]) -> float:
        """Without the slowest, which other programs held up. Silent rounds count: most are, for some drafters."""
        if not values:
            raise InvalidRequest(
                f"no step had {self.rows} rows at once: give more prompts, longer answers, or a lower concurrency"
            )
        return fmean(sorted(values)[: max(1, round(len(values) * (1 - SLOWEST)))])

    def factors(self, table: CostTable) -> list[tuple[float, float]]:
        """(tokens, observed over the table's seconds), by the passes' numbers of tokens."""
        by_tokens: dict[int, list[float]] = defaultdict(list)
        for tokens, seconds, context in zip(self.tokens, self.verify, self.context, strict=True):
            by_tokens[tokens].append(seconds / table.seconds(tokens, self.rows, context))
        return [(tokens, median(ratios)) for tokens, ratios in by_tokens.items() if len(ratios) >= ENOUGH]

    @property
    def overhead(self) -> float:
        """Bookkeeping of a step, and what passes before the next one begins."""
        return self.mean(self.bookkeeping) + max(0.0, self.wall - self.seconds) / max(1, self.steps)

    @property
    def reading_each(self) -> float:
        return self.reading / max(1, self.read)


@dataclass
class _Side:
    """One setting that answers the prompts in turns with others: plain decoding, or a drafter with its drafts."""

    llm: LLM
    watch: _Watch
    seconds: list[list[float]] = field(default_factory=list)
    """[turns, groups] of prompts: seconds a token."""
    turns: list[int] = field(default_factory=list)
    """Which turns it took part in."""
    stats: list[list[RequestStats]] = field(default_factory=list)
    """[turns, prompts]."""


class _Turns:
    """Groups of prompts that every setting answers before the next group: what disturbs one disturbs all.

    A group is handed over at once. With several rows it has twice as many prompts, so that rows that end are followed
    by others, as in use.
    """

    def __init__(
        self, plain: LLM, prompts: Prompts, params: SamplingParams, rows: int, clock: Callable[[], float] = perf_counter
    ) -> None:
        size = rows if rows == 1 else 2 * rows
        groups = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        self.groups = [group for group in groups if len(group) >= rows] or groups
        self.rows, self.params, self._clock = rows, params, clock
        self.plain = self.side(plain)
        self.count = 0
        self._order = random.Random(0)
        self.tokens = np.ones(len(self.groups))
        """That plain decoding writes, by group: what the groups weigh."""

    def side(self, llm: LLM) -> _Side:
        llm.generate(list(self.groups[0][: self.rows]), replace(self.params, max_tokens=4))  # warm up
        return _Side(llm, _Watch(self.rows))

    def take(self, sides: Sequence[_Side]) -> None:
        """One turn of plain decoding and these."""
        all_sides = [self.plain, *sides]
        for side in all_sides:
            side.llm.forget()  # a repeated prompt would be too easy; what it learns in this turn it keeps, as in use
            side.llm.observers.append(side.watch)
            side.turns.append(self.count)
            side.seconds.append([])
            side.stats.append([])
        for group in self.groups:
            for side in self._order.sample(all_sides, len(all_sides)):  # none always after the same one
                began = self._clock()
                outputs = side.llm.generate(list(group), self.params)
                seconds = self._clock() - began
                side.watch.wall += seconds
                side.seconds[-1].append(seconds / max(1, sum(len(output.token_ids) for output in outputs)))
                side.stats[-1] += [output.stats for output in outputs]
                if side is self.plain:
                    self.tokens[len(side.seconds[-1]) - 1] = sum(len(output.token_ids) for output in outputs)
        for side in all_sides:
            side.llm.observers.remove(side.watch)
        self.count += 1

    @property
    def most(self) -> int:
        """Turns of a setting at most: the fewer groups a turn has, the less one tells."""
        return min(TURNS[1], max(TURNS[1] // 2, PAIRS // len(self.groups)))

    def speedup(self, side: _Side) -> float:
        """Of whole runs, over the turns that both took part in.

        Of a group it is the trimmed geometric mean of its turns' ratios. A processor whose clock changes between two
        speeds, as where a neighbour shares its cores, gives ratios around several values, between which a median
        jumps; a program held up for a second gives one that would spoil the mean.
        """
        ratios, weights = self._ratios(side).mean(0), self.tokens * self._plain_token()
        return float(weights.sum() / (weights @ np.exp(-ratios)))

    def plain_token(self) -> float:
        """Seconds of plain decoding for a token."""
        return float(np.average(self._plain_token(), weights=self.tokens))

    def _plain_token(self) -> np.ndarray:
        """[groups]."""
        return np.exp(_trimmed(np.log(self.plain.seconds)).mean(0))

    def _ratios(self, side: _Side) -> np.ndarray:
        """[turns kept, groups]: logarithms, in order."""
        theirs = np.log([self.plain.seconds[turn] for turn in side.turns])
        return _trimmed(theirs - np.log(side.seconds))

    def uncertainty(self, side: _Side) -> float:
        """Half a 95 % interval of the logarithm of that, by how much a group's ratios differ from turn to turn (Yuen
        1974, The two-sample trimmed t for unequal population variances)."""
        kept = self._ratios(side)
        (turns, groups), cut = kept.shape, (len(side.turns) - len(kept)) // 2
        if turns < 2:
            return 1.0
        winsorised = np.concatenate([kept, *[kept[:1], kept[-1:]] * cut])
        freedom = groups * (turns - 1)
        spread = math.sqrt(float(((winsorised - winsorised.mean(0)) ** 2).sum()) / freedom)
        return max(LEAST, float(stdtrit(freedom, 0.975)) * spread / math.sqrt(turns * groups))


def _trimmed(values: np.ndarray) -> np.ndarray:
    """Each column in order, without a fifth of its values on either side."""
    cut = int(TRIMMED * len(values))
    return np.sort(values, 0)[cut : len(values) - cut]


def measure(
    plain: LLM,
    drafters: Mapping[str, Make],
    prompts: Prompts,
    params: SamplingParams,
    work: Workload,
    *,
    clock: Callable[[], float] = perf_counter,
) -> tuple[MeasuredCosts, list[Candidate]]:
    """Costs of plain decoding, and candidates with measured costs and acceptance.

    Each drafter tries all of its drafts and few of them; then, in turns until the interval is narrow, the number that
    is best by what is known. ``clock``: seconds of whole runs. Raises InvalidRequest.
    """
    turns = _Turns(plain, prompts, params, work.concurrency, clock)
    trials = {name: _Trial(name, make, turns) for name, make in drafters.items()}
    table = start_costs(
        plain.target,
        plain.loaded.dtype,
        rows=work.concurrency,
        tokens=work.concurrency * (max((trial.most for trial in trials.values()), default=0) + 1),
    )
    turns.take([side for trial in trials.values() for side in trial.sides.values()])
    sample = _sample(plain, turns)
    while True:
        costs = _plain_costs(turns, table, sample)
        candidates = {name: trial.candidate(costs, sample) for name, trial in trials.items()}
        wanted = [trial.next(candidates[name], sample) for name, trial in trials.items()]
        if not any(wanted):
            return costs, list(candidates.values())
        turns.take([side for side in wanted if side is not None])


def _sample(plain: LLM, turns: _Turns) -> Workload:
    """The workload that the runs were."""
    read = fmean(len(plain.encode(prompt)) for group in turns.groups for prompt in group)
    written = fmean(stats.generated for stats in turns.plain.stats[0])
    return Workload(max(1, round(read)), max(1, round(written)), turns.rows)


class _Trial:
    """One drafter's numbers of drafts."""

    def __init__(self, name: str, make: Make, turns: _Turns) -> None:
        self.name, self._make, self._turns = name, make, turns
        llm = make(None)
        self.most = llm.drafter.block
        self.shape = _drafter_shape(name, llm)
        self.sides = {self.most: turns.side(llm)}
        self.sides |= {drafts: turns.side(make(drafts)) for drafts in LADDER if drafts < self.most}
        self.chosen = self.most

    def next(self, candidate: Candidate, sample: Workload) -> _Side | None:
        """What is to be run in the next turn; None: nothing more."""
        curve = [forecast(self.name, n, candidate.profile, candidate.costs, sample) for n in range(1, self.most + 1)]
        best = max(curve, key=lambda one: one.speedup)
        if best.speedup > BETTER * curve[self.chosen - 1].speedup and self._turns.count < self._turns.most:
            self.chosen = best.drafts
        if self.chosen not in self.sides:
            self.sides[self.chosen] = self._turns.side(self._make(self.chosen))
        side = self.sides[self.chosen]
        ready = len(side.turns) >= TURNS[0] and self._turns.uncertainty(side) <= PRECISE
        return None if ready or len(side.turns) >= self._turns.most else side

    def candidate(self, plain: MeasuredCosts, sample: Workload) -> Candidate:
        """From what was run so far."""
        tried = {drafts: side for drafts, side in sorted(self.sides.items()) if side.turns}
        best = self.chosen if self.chosen in tried else self.most
        profile = _profile({drafts: side.stats for drafts, side in tried.items()}, best, self.most)
        costs = _costs(plain, {drafts: side.watch for drafts, side in tried.items()}, best)
        speedups = {drafts: self._turns.speedup(side) for drafts, side in tried.items()}
        spread = {drafts: self._turns.uncertainty(side) for drafts, side in tried.items()}
        return Candidate(
            self.name,
            profile,
            replace(costs, rounds=_rounds(costs, profile, plain, speedups, sample)),
            self.most,
            UNTRIED + spread[best],
            self.shape,
            tried={drafts: half for drafts, half in spread.items() if len(tried[drafts].turns) >= TURNS[0]},
        )


def _plain_costs(turns: _Turns, table: CostTable, sample: Workload) -> MeasuredCosts:
    """Plain decoding: its steps as observed, and its rounds as whole runs took."""
    watch, rows = turns.plain.watch, turns.rows
    expected = [table.seconds(rows, rows, context) for context in watch.context]
    factor = watch.mean(watch.verify) / max(1e-12, watch.mean(expected))
    each = watch.reading_each
    costs = MeasuredCosts(table, ((float(rows), factor),), watch.overhead, rows=rows, reading=(each, each))
    seconds = rows * sample.answer * turns.plain_token()
    return replace(costs, rounds=((0, _whole(costs, Profile(()), 0, seconds, sample)),))


def _rounds(
    costs: MeasuredCosts, profile: Profile, plain: MeasuredCosts, speedups: Mapping[int, float], sample: Workload
) -> tuple[tuple[int, float], ...]:
    """By drafts: whole rounds over the sum of their parts, such that the forecast of the sample is the measurement.
    Plain rounds too: their parts were observed once more in rounds without drafts."""
    seconds = forecast("none", 0, Profile(()), plain, sample).latency
    ratios = {0: 1.0} | dict(speedups)
    return tuple((drafts, _whole(costs, profile, drafts, seconds / x, sample)) for drafts, x in ratios.items())


def _whole(costs: MeasuredCosts, profile: Profile, drafts: int, seconds: float, sample: Workload) -> float:
    """``seconds``: of an answer, the reading of its rows' prompts included. At least a tenth of the parts."""
    parts = replace(costs, rounds=())
    reading = sample.concurrency * prompt_seconds(parts, sample.prompt, drafts > 0)
    steps = forecast("", drafts, profile, parts, sample).latency - reading
    return max(0.1, (seconds - reading) / steps)


def _costs(plain: MeasuredCosts, watches: Mapping[int, _Watch], best: int) -> MeasuredCosts:
    """Plain decoding's costs with those of drafting, by drafts in order; bookkeeping as with ``best`` drafts."""
    seen: dict[float, list[float]] = defaultdict(list)
    for tokens, factor in chain(plain.factors, *(watch.factors(plain.table) for watch in watches.values())):
        seen[tokens].append(factor)
    return replace(
        plain,
        factors=tuple((tokens, fmean(factors)) for tokens, factors in sorted(seen.items())),
        drafting=watches[best].overhead,
        drafts=tuple((drafts, watch.mean(watch.draft)) for drafts, watch in watches.items()),
        reading=(plain.reading[0], watches[best].reading_each),
    )


# ------------------------------------------------------------------------------------------------ sizes


def this_machine(name: str) -> Machine:
    """This machine's memory; its speed is measured, not described."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # not told: enough
        memory = 0.0
    return Machine(bandwidth=1.0, tflops=1.0, memory=memory, name=name)


def measured_shape(llm: LLM) -> TargetShape | None:
    """The sizes of a loaded target, None where its layers are not known."""
    target = llm.target
    if not isinstance(target, DecoderTarget):
        return None
    config = target.stack.config
    matrices = _parameters(config)
    layer = config.layers[0]
    cached = sum(2 * one.num_kv_heads * one.head_dim for one in config.layers)
    return TargetShape(
        layers=len(config.layers),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=float(matrices + config.vocab_size * config.hidden_size),
        bytes=matrix_bytes(target, _dtype(target)) / matrices,
        kv_heads=max(1, round(cached / (2 * len(config.layers) * layer.head_dim))),
        head_dim=layer.head_dim,
        heads=layer.num_heads,
        kv_bytes=4.0 if _dtype(target) in ("float32", "float64") else 2.0,
        name=llm.model,
    )


def _dtype(target: DecoderTarget) -> str:
    stack = target.stack
    return stack.dtype if isinstance(stack, NativeStack) else str(target.spec.dtype).removeprefix("torch.")


def _parameters(config: StackConfig) -> int:
    """Of all matrices that multiply, the head included."""
    shapes = {name: shape.sizes for name, shape in weight_shapes(config).items() if name != "embed.weight"}
    return sum((sizes[0] or 0) * (sizes[1] or 0) for sizes in shapes.values() if len(sizes) == 2)


def _drafter_shape(name: str, llm: LLM) -> DrafterShape:
    """The sizes of a loaded drafter, for what memory it needs."""
    drafter, most = llm.drafter, llm.drafter.block
    if isinstance(drafter, TrainedDrafter):
        checkpoint = checkpoints.load(PACKAGED_DRAFTERS.get(llm.model, {}).get(name, name))
        count = sum(tensor.numel() for tensor in checkpoint.tensors.values() if tensor.is_floating_point())
        layers, aux = max(1, len(checkpoint.stack(head=False).layers)), len(drafter.aux_layers)
        kind = checkpoint.kind if checkpoint.kind in DrafterShape.KINDS else "dspark"
        return DrafterShape(
            kind, most, length=1.0, parameters=float(count), bytes=1.0, layers=layers, aux_layers=aux, name=name
        )
    if isinstance(drafter, DraftModelDrafter) and isinstance(drafter.model, DecoderTarget):
        config = drafter.model.stack.config
        count, size = _parameters(config), matrix_bytes(drafter.model, _dtype(drafter.model))
        return DrafterShape(
            "draft_model", most, length=1.0, parameters=float(count), bytes=size / count, layers=len(config.layers)
        )
    return DrafterShape("ngram", most, length=1.0, name=name)


# ------------------------------------------------------------------------------------------------ acceptance


def _profile(runs: Mapping[int, Sequence[Sequence[RequestStats]]], best: int, most: int) -> Profile:
    """Acceptance by position, and how wrong its mean may be, by resampling prompts. From the run with ``best`` drafts;
    positions beyond them from the one with ``most``. ``runs``: by drafts of a round at most; [turns, prompts]."""
    long, short = (_by_position(list(chain(*runs[drafts])), most) for drafts in (most, best))
    accepted = [*short[0][:best], *long[0][best:]]
    conditional = [min(1.0, p / before) if before else 0.0 for before, p in pairwise([1.0, *accepted])]
    offered = tuple([*short[1][:best], *long[1][best:]])
    stats = runs[best]
    rounds, accepted_all = (
        np.array([[getattr(s, name) for s in turn] for turn in stats], dtype=float).sum(0)
        for name in ("rounds", "accepted")
    )
    if not rounds.sum():
        return Profile((0.0,) * most, 1.0, (0.0,) * most)
    picks = np.random.default_rng(0).integers(0, len(rounds), (DRAWS, len(rounds)))
    means = accepted_all[picks].sum(1) / np.maximum(1, rounds[picks].sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    mean = max(1e-9, accepted_all.sum() / rounds.sum())
    spread = float((high - low) / 2 / mean) if len(rounds) > 1 else 0.3
    return Profile(tuple(conditional), min(1.0, spread), offered)


def _by_position(stats: Sequence[RequestStats], most: int) -> tuple[list[float], list[float]]:
    """Shares of rounds that accepted, and that verified, at least j drafts."""
    rounds = max(1, sum(s.rounds for s in stats))

    def shares(counts: str) -> list[float]:
        found = [getattr(s, counts) for s in stats]
        return [sum(c[j] for c in found if j < len(c)) / rounds for j in range(most)]

    return shares("accepted_per_position"), shares("drafted_per_position")
