"""Costs and acceptance measured on this machine: what a plan is made of when target and drafters are here.

Plain decoding and each drafter answer the same sample of prompts, as many together as the workload has rows. Passes
over other numbers of tokens come from the target's cost table, brought to the plain passes that were observed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

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
from outrider.planning.forecast import Profile, Workload
from outrider.scheduling.costs import CostTable
from outrider.types import RequestStats, StepRecord

__all__ = ["MeasuredCosts", "measure_drafter", "measure_plain", "measured_shape", "this_machine"]

UNCERTAINTY = 0.06  # of ratios of measured times, half a 95 % interval
FEW = 3  # drafts of the second run, which shows what one draft more costs
DRAWS = 1000
Prompts = Sequence[str | list[int]]


@dataclass(frozen=True)
class MeasuredCosts:
    """``StepCosts`` from a cost table and observed steps."""

    table: CostTable
    factor: float = 1.0
    """Observed plain passes over the table's."""
    plain: float = 0.0
    """Bookkeeping of a plain step, and of one that drafts."""
    drafting: float = 0.0
    drafts: tuple[tuple[int, float], ...] = ()
    """(drafts, seconds) of drafting for ``rows`` rows."""
    rows: int = 1

    def verify(self, tokens: int, rows: int, context: int) -> float:
        return self.factor * self.table.seconds(tokens, rows, context)

    def draft(self, rows: int, drafts: int) -> float:
        if not drafts or not self.drafts:
            return 0.0
        (first, low), *others = self.drafts
        slope = max(0.0, (others[-1][1] - low) / (others[-1][0] - first)) if others else 0.0
        at_measured = max(0.0, low + slope * (drafts - first))
        return at_measured * (0.5 + 0.5 * rows / self.rows)  # half of it grows with rows: a guess beside measured rows

    def bookkeeping(self, rows: int, drafting: bool) -> float:
        return (self.drafting if drafting else self.plain) * (0.5 + 0.5 * rows / self.rows)


@dataclass
class _Watch:
    """A ``StepObserver``: the steps of full batches."""

    rows: int
    draft: list[float] = field(default_factory=list)
    verify: list[float] = field(default_factory=list)
    bookkeeping: list[float] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    rounds: int = 0
    proposed: int = 0

    def step(self, record: StepRecord) -> None:
        cost, rows = record.cost, [row for row in record.rows if not row.first]
        self.rounds += len(rows)
        self.proposed += sum(row.verified > 0 for row in rows)
        prompts = cost.tokens > sum(1 + row.verified for row in rows)
        if len(rows) == self.rows and not prompts:
            self.draft.append(cost.draft)
            self.verify.append(cost.verify)
            self.bookkeeping.append(cost.bookkeeping)
            self.context.append(cost.context)

    def middle(self, values: list[float]) -> float:
        if not values:
            raise InvalidRequest(
                f"no step had {self.rows} rows at once: give more prompts, longer answers, or a lower concurrency"
            )
        return median(values)


def _run(llm: LLM, prompts: Prompts, params: SamplingParams, rows: int) -> tuple[_Watch, list[RequestStats]]:
    watch, stats = _Watch(rows), []
    llm.generate(list(prompts[:rows]), SamplingParams(max_tokens=4, ignore_eos=True))  # warm up
    llm.observers.append(watch)
    llm.forget()  # what was learnt from the warm-up; what it learns from these prompts it keeps, as it does in use
    for start in range(0, len(prompts) - rows + 1, rows):
        stats += [output.stats for output in llm.generate(list(prompts[start : start + rows]), params)]
    llm.observers.remove(watch)
    return watch, stats


def measure_plain(llm: LLM, prompts: Prompts, params: SamplingParams, work: Workload, most: int) -> MeasuredCosts:
    """Costs of plain decoding. ``most``: drafts of a round at most. Raises InvalidRequest."""
    rows = work.concurrency
    table = start_costs(llm.target, llm.loaded.dtype, rows=rows, tokens=rows * (most + 1))
    watch, _ = _run(llm, prompts, params, rows)
    seen = watch.middle(watch.verify)
    expected = table.seconds(rows, rows, round(median(watch.context)))
    return MeasuredCosts(table, seen / expected, watch.middle(watch.bookkeeping), rows=rows)


def measure_drafter(
    make: Callable[[int | None], LLM],
    name: str,
    plain: MeasuredCosts,
    prompts: Prompts,
    params: SamplingParams,
    work: Workload,
) -> Candidate:
    """A candidate with measured costs and acceptance. ``make``: an LLM with this drafter and so many drafts at most."""
    rows = work.concurrency
    llm = make(None)
    most = llm.drafter.block
    watch, stats = _run(llm, prompts, params, rows)
    drafts = [(most, watch.middle(watch.draft))]
    if most > FEW:
        fewer, _ = _run(make(FEW), prompts[: max(rows, len(prompts) // 2 // rows * rows)], params, rows)
        drafts.insert(0, (FEW, fewer.middle(fewer.draft)))
    costs = MeasuredCosts(
        plain.table, plain.factor, plain.plain, watch.middle(watch.bookkeeping), tuple(drafts), rows=rows
    )
    return Candidate(
        name, _profile(stats, most, watch), costs, most, UNCERTAINTY, shape=_drafter_shape(name, llm), measured=True
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


def _profile(stats: Sequence[RequestStats], most: int, watch: _Watch) -> Profile:
    """Acceptance by position, and how wrong its mean may be, by resampling prompts."""

    def total(counts: str, j: int) -> int:
        return sum(getattr(s, counts)[j] for s in stats if j < len(getattr(s, counts)))

    conditional, reached = [], 1.0
    for j in range(most):
        drafted, accepted = total("drafted_per_position", j), total("accepted_per_position", j)
        survival = accepted / drafted if drafted else 0.0
        conditional.append(min(1.0, survival / reached) if reached else 0.0)
        reached = survival
    rounds, accepted_all = (np.array([getattr(s, n) for s in stats], dtype=float) for n in ("rounds", "accepted"))
    if not rounds.sum():
        return Profile((0.0,) * most, 1.0, 0.0)
    picks = np.random.default_rng(0).integers(0, len(stats), (DRAWS, len(stats)))
    means = accepted_all[picks].sum(1) / np.maximum(1, rounds[picks].sum(1))
    low, high = np.percentile(means, [2.5, 97.5])
    mean = max(1e-9, accepted_all.sum() / rounds.sum())
    spread = float((high - low) / 2 / mean) if len(stats) > 1 else 0.3
    return Profile(tuple(conditional), min(1.0, spread), watch.proposed / max(1, watch.rounds))
