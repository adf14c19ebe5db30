"""Measure the time of a forward pass by new tokens, rows and context, and the share of memory bandwidth it uses.

A pass over few tokens is limited by reading the weights and the cached keys and values once, so its bandwidth share is
those bytes / its time / the read bandwidth probed in the same round. Every kind of pass is measured once per round, in
a new order each round, so that drift of the machine affects all of them; ratios are medians of pairs from one round.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from time import perf_counter
from typing import Any

import torch

from outrider.backends.layers import weight_shapes
from outrider.backends.native import NativeStack
from outrider.config import StackConfig
from outrider.engine.cost_tables import cost_key, threads, tune_core
from outrider.errors import InvalidRequest
from outrider.models.decoder import DecoderTarget
from outrider.models.loading import load_backend, load_target
from outrider.models.random import random_target
from outrider.scheduling.costs import CostPoint, CostTable
from outrider.types import KVCache, RaggedBatch, TargetModel, finds_largest

__all__ = [
    "Cell",
    "Profile",
    "Timing",
    "cache_bytes",
    "grid",
    "measure",
    "read_probe",
    "run_profile",
    "time_passes",
    "weight_bytes",
]

PROBE_BYTES = 256 << 20  # far larger than any processor cache
MAX_CACHE_BYTES = 2 << 30
FILL = 512  # tokens per pass when filling the cache
INT4_GROUP = 32


# ------------------------------------------------------------------------------------------------ what is measured


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of pass: ``rows`` rows with ``new_tokens`` new tokens each, after ``context`` cached ones each."""

    new_tokens: int
    rows: int
    context: int


def grid(contexts: Iterable[int], new_tokens: Iterable[int], rows: Iterable[int]) -> list[Cell]:
    """Every count of new tokens in one row, and every count of rows with one token each. Raises InvalidRequest."""
    contexts, new_tokens, rows = sorted(set(contexts)), {1, *new_tokens}, set(rows)
    if min(contexts) < 0 or min(new_tokens) < 1 or min(rows, default=1) < 1:
        raise InvalidRequest("contexts must be at least 0, new tokens and rows at least 1")
    shapes = [*((m, 1) for m in sorted(new_tokens)), *((1, r) for r in sorted(rows - {1}))]
    return [Cell(m, r, context) for context in contexts for m, r in shapes]


def weight_bytes(config: StackConfig, dtype: str) -> int:
    """Bytes of all matrices that a pass reads.

    A weight is 4 bytes in float32, 2 in bfloat16, 1 in int8 (and 4 for each output's scale), and 1/2 + 2/32 in int4
    (2 for the scale of 32 weights), where the head is int8.
    """
    total = 0.0
    for name, shape in weight_shapes(config).items():
        if len(shape.sizes) != 2 or name == "embed.weight":  # a tied embedding is read as the head
            continue
        outputs, inner = (size or 0 for size in shape.sizes)
        kind = "int8" if dtype == "int4" and name == "head.weight" else dtype
        total += outputs * inner * {"float64": 8, "float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}[kind]
        total += {"int8": 4 * outputs, "int4": 2 * outputs * inner / INT4_GROUP}.get(kind, 0)
    return round(total)


def matrix_bytes(target: DecoderTarget, dtype: str) -> int:
    """``weight_bytes`` of a loaded target, whose file may hold each matrix in a format of its own."""
    if dtype == "file" and isinstance(target.stack, NativeStack):
        return int(target.stack.core.weight_bytes)
    return weight_bytes(target.stack.config, dtype)


def cache_bytes(config: StackConfig, dtype: str, cell: Cell) -> int:
    """Bytes of cached keys and values that a pass reads: 4 a number in float32, else 2."""
    each = {"float64": 8, "float32": 4}.get(dtype, 2)
    seen = [
        (cell.context if layer.window is None else min(cell.context, layer.window), layer) for layer in config.layers
    ]
    return cell.rows * sum(2 * layer.num_kv_heads * layer.head_dim * tokens * each for tokens, layer in seen)


def read_probe(backend: str) -> Callable[[], float]:
    """A probe of read bandwidth in bytes per second: all threads read a buffer larger than the caches.

    Uses the native core's reader for the native backend, else torch's sum.
    """
    if backend == "native":
        core = import_module("outrider._native")
        return lambda: float(core.read_bandwidth(PROBE_BYTES))
    buffer = torch.ones(PROBE_BYTES // 8, dtype=torch.float64)

    def probe() -> float:
        began = perf_counter()
        buffer.sum()
        return PROBE_BYTES / (perf_counter() - began)

    return probe


def measure(
    target: TargetModel,
    cells: Sequence[Cell],
    repeats: int,
    probe: Callable[[], float],
    progress: Callable[[], None] = lambda: None,
    greedy: bool = False,
) -> tuple[dict[Cell, list[float]], list[float]]:
    """Seconds of each kind of pass, once per round, and the bandwidth probed in each round (bytes per second).

    All cells have the same context. Every pass computes the logits of all its new tokens, as verification does, and
    writes them, or with ``greedy`` finds the largest of each row.
    """
    rows, context = max(cell.rows for cell in cells), cells[0].context
    assert all(cell.context == context for cell in cells), "all cells must have the same context"
    cache = target.new_cache(rows, context + max(cell.new_tokens for cell in cells))
    slots = [cache.open() for _ in range(rows)]
    _fill(target, cache, slots, context)
    batches = {cell: _batch(target, cell, slots) for cell in cells}
    seconds: dict[Cell, list[float]] = {cell: [] for cell in cells}
    bandwidths = []
    shuffled = random.Random(0)
    with _no_collection():
        for turn in range(-1, repeats):  # warm up; round -1 is not timed
            order = shuffled.sample(list(cells), len(cells))
            bandwidth = probe()
            _time(target, batches[order[-1]], cache, greedy)  # the probe has replaced the contents of the caches
            if turn >= 0:
                bandwidths.append(bandwidth)
            for cell in order:
                took = _time(target, batches[cell], cache, greedy)
                if turn >= 0:
                    seconds[cell].append(took)
                progress()
    return seconds, bandwidths


def _time(target: TargetModel, batch: RaggedBatch, cache: KVCache, greedy: bool) -> float:
    """Seconds of one pass; the cache is rewound afterwards."""
    held = cache.lengths[batch.slots].clone()
    largest: dict[str, Any] = {"largest": True} if greedy else {}
    began = perf_counter()
    target.forward(batch, cache, **largest)
    took = perf_counter() - began
    cache.rewind(batch.slots, held)
    return took


@contextmanager
def _no_collection() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _fill(target: TargetModel, cache: KVCache, slots: Sequence[int], context: int) -> None:
    """Put ``context`` tokens into every slot. A decoder stack gets random hidden states, which is much faster."""
    stack = getattr(target, "stack", None)
    for slot in slots:
        for start in range(0, context, FILL):
            tokens = [(7 * i) % target.spec.vocab_size for i in range(min(FILL, context - start))]
            batch = RaggedBatch.pack([tokens], [start], [slot])
            if stack is None:
                target.forward(batch, cache, logits_at=batch.slots[:0])
            else:
                stack.project(torch.randn(len(tokens), target.spec.hidden_size), batch, cache)


def _batch(target: TargetModel, cell: Cell, slots: Sequence[int]) -> RaggedBatch:
    row = [(11 * i + 3) % target.spec.vocab_size for i in range(cell.new_tokens)]
    return RaggedBatch.pack([row] * cell.rows, [cell.context] * cell.rows, slots[: cell.rows])


# ------------------------------------------------------------------------------------------------ a whole profile


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one kind of pass. Medians over rounds."""

    dtype: str
    cell: Cell
    seconds: float
    bandwidth: float  # probed, bytes a second
    bandwidth_share: float | None  # None where the size of the model is not known
    ratio_to_one: float  # to one row with one new token
    rounds: int


@dataclass(frozen=True)
class Profile:
    """All timings of a model, the skipped kinds of pass, and cost tables for the scheduler."""

    model: str
    backend: str
    machine: Mapping[str, Any]
    timings: list[Timing]
    skipped: list[tuple[str, Cell]]
    tables: list[CostTable]

    def to_json(self) -> dict[str, Any]:
        """Milliseconds, bandwidth shares, and ratios to one token with the number of pairs behind each."""

        def named(dtype: str, cell: Cell) -> dict[str, Any]:
            return {"dtype": dtype, "new_tokens": cell.new_tokens, "rows": cell.rows, "context": cell.context}

        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 4)

        return {
            "model": self.model,
            "backend": self.backend,
            "machine": dict(self.machine),
            "threads": threads(self.backend),
            "bandwidth_gb_s": round(median(t.bandwidth for t in self.timings) / 1e9, 2) if self.timings else None,
            "rows": [
                {
                    **named(t.dtype, t.cell),
                    "milliseconds": rounded(1e3 * t.seconds),
                    "bandwidth_share": rounded(t.bandwidth_share),
                }
                for t in self.timings
            ],
            "ratio_to_one": [
                {**named(t.dtype, t.cell), "ratio": rounded(t.ratio_to_one), "pairs": t.rounds} for t in self.timings
            ],
            "skipped": [named(dtype, cell) for dtype, cell in self.skipped],
        }


def run_profile(
    model: str,
    *,
    shape: str | None = None,
    dtypes: Sequence[str],
    cells: Sequence[Cell],
    repeats: int = 20,
    backend: str = "auto",
    machine: Mapping[str, Any],
    max_cache_bytes: int = MAX_CACHE_BYTES,
    progress: Callable[[str, float], None] = lambda text, done: None,
    greedy: bool = False,
) -> Profile:
    """Profile ``model``, or a ``shape`` of random weights instead, in each dtype. ``greedy``: passes as greedy rows
    need them (``FindsLargest``), of which no cost table is made.

    Kinds of pass whose cache would exceed ``max_cache_bytes`` are skipped and listed. ``progress`` is called with the
    current activity and the finished share. Raises InvalidRequest, CheckpointError, UnknownKind.
    """
    if repeats < 1:
        raise InvalidRequest(f"repeats must be at least 1, got {repeats}")
    name = shape or model
    profile = Profile(name, load_backend(backend, dtypes[0]).name, machine, [], [], [])
    for index, dtype in enumerate(dtypes):
        progress(f"{dtype}: loading", index / len(dtypes))
        target: TargetModel
        if shape is not None:
            target = random_target(shape, dtype, load_backend(backend, dtype))
        else:
            target = load_target(model, dtype=dtype, backend=backend)
        if greedy and not finds_largest(target):
            raise InvalidRequest("only the native backend has passes without logits; leave out --greedy")
        tune_core(target)

        def report_context(context: int, done: float) -> None:
            progress(f"{dtype}: context {context}", (index + done) / len(dtypes))  # noqa: B023 (called at once)

        timings, skipped = time_passes(
            target, dtype, cells, repeats, read_probe(profile.backend), max_cache_bytes, report_context, greedy
        )
        profile.timings.extend(timings)
        profile.skipped.extend((dtype, cell) for cell in skipped)
        if timings and not greedy:
            key = cost_key(target, dtype, machine)
            profile.tables.append(CostTable(key, tuple(_point(timing) for timing in timings)))
    return profile


def time_passes(
    target: TargetModel,
    dtype: str,
    cells: Sequence[Cell],
    repeats: int,
    probe: Callable[[], float],
    max_cache_bytes: int = MAX_CACHE_BYTES,
    progress: Callable[[int, float], None] = lambda context, done: None,
    greedy: bool = False,
) -> tuple[list[Timing], list[Cell]]:
    """Time every cell on one target, context by context. -> timings, and cells whose cache would be too large."""
    longest = max(cell.context + cell.new_tokens for cell in cells)
    if longest > target.spec.max_positions:
        raise InvalidRequest(
            f"context and new tokens reach {longest} positions, and the model has {target.spec.max_positions}: "
            "lower --context or --new-tokens"
        )
    config = target.stack.config if isinstance(target, DecoderTarget) else None
    fitting = [c for c in cells if config is None or cache_bytes(config, dtype, c) <= max_cache_bytes]
    if not fitting:
        raise InvalidRequest(f"one row's cache exceeds {max_cache_bytes >> 20} MiB at every context; lower --context")
    timings: list[Timing] = []
    done, contexts = 0, sorted({cell.context for cell in fitting})
    passes = (repeats + 1) * len(fitting)
    for context in contexts:
        here = [cell for cell in fitting if cell.context == context]
        one = Cell(1, 1, context)

        def tick() -> None:
            nonlocal done
            done += 1
            progress(context, done / passes)  # noqa: B023 (called at once)

        seconds, bandwidths = measure(target, here, repeats, probe, tick, greedy)
        for cell in here:
            share = None
            if isinstance(target, DecoderTarget) and config is not None:
                size = matrix_bytes(target, dtype) + cache_bytes(config, dtype, cell)
                share = median(size / s / b for s, b in zip(seconds[cell], bandwidths, strict=True))
            ratio = median(s / first for s, first in zip(seconds[cell], seconds[one], strict=True))
            timings.append(Timing(dtype, cell, median(seconds[cell]), median(bandwidths), share, ratio, repeats))
    return timings, [cell for cell in cells if cell not in fitting]


def _point(timing: Timing) -> CostPoint:
    cell = timing.cell
    return CostPoint(cell.new_tokens * cell.rows, cell.rows, cell.context * cell.rows, timing.seconds)
