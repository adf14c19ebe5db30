"""Costs and acceptance measured on this machine: what a plan is made of when target and drafters are here.

Plain decoding and each drafter answer the same sample of prompts, as many together as the workload has rows. Passes
over other numbers of tokens come from the target's cost table, brought to the plain passes that were observed.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from statistics import fmean, median
from time import perf_counter

import numpy as np

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
from outrider.planning.forecast import Profile, Workload, forecast
from outrider.scheduling.costs import CostTable
from outrider.types import RequestStats, StepRecord

__all__ = ["MeasuredCosts", "measure_drafter", "measure_plain", "measured_shape", "this_machine"]

UNCERTAINTY = 0.06  # of ratios of measured times, half a 95 % interval
FEW = 3  # drafts of the second run, which shows what one draft more costs
RUNS = 4  # at most, with different numbers of drafts
SLOWEST = 0.02  # of steps, which are left out of means
ENOUGH = 10  # steps over one number of tokens that tell what they cost
DRAWS = 1000
Prompts = Sequence[str | list[int]]


@dataclass(frozen=True)
class MeasuredCosts:
    """``StepCosts`` from a cost table and observed steps."""

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
    outside: float = 0.0
    """Seconds a step that pass between steps."""
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
        return self.mean(self.bookkeeping) + self.outside

    @property
    def reading_each(self) -> float:
        return self.reading / max(1, self.read)


Runs = dict[int, tuple[_Watch, list[RequestStats]]]  # by drafts of a round at most


def _run(llm: LLM, prompts: Prompts, params: SamplingParams, rows: int) -> tuple[_Watch, list[RequestStats]]:
    watch, stats = _Watch(rows), []
    llm.generate(list(prompts[:rows]), SamplingParams(max_tokens=4, ignore_eos=True))  # warm up
    llm.observers.append(watch)
    llm.forget()  # what was learnt from the warm-up; what it learns from these prompts it keeps, as it does in use
    wall = 0.0
    for start in range(0, len(prompts) - rows + 1, rows):
        began = perf_counter()
        stats += [output.stats for output in llm.generate(list(prompts[start : start + rows]), params)]
        wall += perf_counter() - began
    llm.observers.remove(watch)
    watch.outside = max(0.0, wall - watch.seconds) / max(1, watch.steps)
    return watch, stats


def measure_plain(llm: LLM, prompts: Prompts, params: SamplingParams, work: Workload, most: int) -> MeasuredCosts:
    """Costs of plain decoding. ``most``: drafts of a round at most. Raises InvalidRequest."""
    rows = work.concurrency
    table = start_costs(llm.target, llm.loaded.dtype, rows=rows, tokens=rows * (most + 1))
    watch, _ = _run(llm, prompts, params, rows)
    expected = [table.seconds(rows, rows, context) for context in watch.context]
    factor = watch.mean(watch.verify) / max(1e-12, watch.mean(expected))
    return MeasuredCosts(
        table, ((float(rows), factor),), watch.overhead, rows=rows, reading=(watch.reading_each, watch.reading_each)
    )


def measure_drafter(
    make: Callable[[int | None], LLM],
    name: str,
    plain: MeasuredCosts,
    prompts: Prompts,
    params: SamplingParams,
    work: Workload,
) -> Candidate:
    """A candidate with measured costs and acceptance. ``make``: an LLM with this drafter and so many drafts at most.

    It runs with all of its drafts and with few; then, where another number is best by these two, with that one.
    """
    rows = work.concurrency
    llm = make(None)
    most = llm.drafter.block
    runs = {most: _run(llm, prompts, params, rows)}
    if most > FEW:
        runs[FEW] = _run(make(FEW), prompts[: max(rows, len(prompts) // 2 // rows * rows)], params, rows)
    best = most
    while True:
        candidate = Candidate(
            name, _profile(runs, best, most), _costs(plain, runs, best), most, UNCERTAINTY, measured=True
        )
        guesses = [forecast(name, n, candidate.profile, candidate.costs, work) for n in range(1, most + 1)]
        best = max(guesses, key=lambda guess: guess.speedup).drafts
        if best in runs or len(runs) == RUNS:
            return replace(candidate, shape=_drafter_shape(name, llm))
        runs[best] = _run(make(best), prompts, params, rows)


def _costs(plain: MeasuredCosts, runs: Runs, best: int) -> MeasuredCosts:
    """Plain decoding's costs with those of drafting; bookkeeping as with ``best`` drafts, if that was run."""
    watches = {drafts: watch for drafts, (watch, _) in sorted(runs.items())}
    seen: dict[float, list[float]] = defaultdict(list)
    for tokens, factor in chain(plain.factors, *(watch.factors(plain.table) for watch in watches.values())):
        seen[tokens].append(factor)
    nearest = watches.get(best, watches[max(watches)])
    return replace(
        plain,
        factors=tuple((tokens, fmean(factors)) for tokens, factors in sorted(seen.items())),
        drafting=nearest.overhead,
        drafts=tuple((drafts, watch.mean(watch.draft)) for drafts, watch in watches.items()),
        reading=(plain.reading[0], nearest.reading_each),
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


def _profile(runs: Runs, best: int, most: int) -> Profile:
    """Acceptance by position, and how wrong its mean may be, by resampling prompts. From the run with ``best`` drafts;
    positions beyond them from the one with ``most``."""
    long, short = (_by_position(runs.get(drafts, runs[most])[1], most) for drafts in (most, best))
    depth = best if best in runs else most
    accepted = [*short[0][:depth], *long[0][depth:]]
    conditional = [min(1.0, p / before) if before else 0.0 for before, p in pairwise([1.0, *accepted])]
    offered = tuple([*short[1][:depth], *long[1][depth:]])
    stats = runs[best if best in runs else most][1]
    rounds, accepted_all = (np.array([getattr(s, n) for s in stats], dtype=float) for n in ("rounds", "accepted"))
    if not rounds.sum():
        return Profile((0.0,) * most, 1.0, (0.0,) * most)
    picks = np.random.default_rng(0).integers(0, len(stats), (DRAWS, len(stats)))
    means = accepted_all[picks].sum(1) / np.maximum(1, rounds[picks].sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    mean = max(1e-9, accepted_all.sum() / rounds.sum())
    spread = float((high - low) / 2 / mean) if len(stats) > 1 else 0.3
    return Profile(tuple(conditional), min(1.0, spread), offered)


def _by_position(stats: Sequence[RequestStats], most: int) -> tuple[list[float], list[float]]:
    """Shares of rounds that accepted, and that verified, at least j drafts."""
    rounds = max(1, sum(s.rounds for s in stats))

    def shares(counts: str) -> list[float]:
        found = [getattr(s, counts) for s in stats]
        return [sum(c[j] for c in found if j < len(c)) / rounds for j in range(most)]

    return shares("accepted_per_position"), shares("drafted_per_position")
