"""Cost tables of targets: measured once, kept on disk with everything they depend on.

``outrider profile`` measures the same thing at length and keeps it in the same place. A table is used for exactly its
key (model shape, dtype, backend, instruction set, machine, threads), and only while a few passes agree with it.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from outrider.backends.native import NativeStack
from outrider.backends.tuning import apply_once
from outrider.core import native
from outrider.engine.turns import Alone, at_once
from outrider.files import cache_folder, read_json, write_json
from outrider.models.decoder import DecoderTarget
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.types import KVCache, RaggedBatch, TargetModel

__all__ = [
    "cost_key",
    "costs_path",
    "describe",
    "feature_share",
    "instruction_set",
    "keep_costs",
    "kept_costs",
    "load_costs",
    "machine",
    "measured_costs",
    "model_key",
    "quick_costs",
    "save_costs",
    "start_costs",
    "threads",
    "tune_core",
]

SECONDS = 3.0
"""What measuring may take; a pass that has begun is finished."""
AT_FIRST = 0.3
"""What a first, short table may take, for an engine that is to start at once."""
ROUNDS = 5
CONTEXT, LONG_CONTEXT = 64, 768
TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 17, 24, 32, 33, 48, 64, 65, 96, 128, 192, 256)  # with the edges of tiles
ROWS = (2, 4, 8, 16, 32, 64)
FEWEST = (1, 4, 8, 16, 64)  # tokens, where passes are slow
BEYOND = 4  # times as many tokens as were timed, up to which a table of slow passes is used
SAME_SHAPE, SAME_SPEED = 1.6, 4.0  # factors within which a table fits
PAIRS, PAIRS_SECONDS = 16, 0.4  # passes with and without features, and the seconds in which no other pair begins


# ------------------------------------------------------------------------------------------------ keys and files


def machine() -> dict[str, Any]:
    """Processor and number of cores of this machine."""
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # not Linux: the platform's name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}


def describe(machine: Mapping[str, Any]) -> str:
    """The name of a machine in the keys of cost tables."""
    return f"{machine['cpu']}, {machine['cores']} cores"


def threads(backend: str) -> int:
    """Threads that a pass runs on."""
    if backend == "native" and native is not None:
        return int(native.threads())
    return torch.get_num_threads()


def instruction_set(target: TargetModel) -> str:
    """What the target's passes run with; empty where the backend does not say."""
    stack = getattr(target, "stack", None)
    return str(stack.core.isa) if isinstance(stack, NativeStack) else ""


def model_key(target: TargetModel) -> str:
    """A name shared by all models with the same costs: times depend on shapes, not on weights."""
    spec = target.spec
    shape = repr(target.stack.config) if isinstance(target, DecoderTarget) else spec.name
    digest = hashlib.sha256(shape.encode()).hexdigest()[:8]
    return f"{spec.architecture or 'model'}-{spec.hidden_size}x{spec.num_layers}-{digest}"


def cost_key(target: TargetModel, dtype: str, here: Mapping[str, Any] | None = None) -> CostKey:
    """What a table of a loaded target is valid for, on this machine (``here``: as ``machine()`` has it)."""
    backend = target.backend.name
    where = describe(here or machine())
    return CostKey(model_key(target), _dtype(target, dtype), backend, where, threads(backend), instruction_set(target))


def _dtype(target: TargetModel, asked: str) -> str:
    """What the matrices really are; where a file's own formats are kept, with their bytes, which tell files apart."""
    stack = getattr(target, "stack", None)
    if asked == "auto":
        asked = str(stack.dtype if isinstance(stack, NativeStack) else target.spec.dtype).removeprefix("torch.")
    return f"file-{int(stack.core.weight_bytes)}" if asked == "file" and isinstance(stack, NativeStack) else asked


def costs_path(key: CostKey) -> Path:
    """The file of a cost table."""
    where = hashlib.sha256(f"{key.machine} {key.threads} {key.instruction_set}".encode()).hexdigest()[:8]
    return cache_folder("costs") / f"{key.model}-{key.dtype}-{key.backend}-{where}.json"


def save_costs(table: CostTable) -> Path:
    """Save a table for the scheduler, atomically."""
    path = costs_path(table.key)
    write_json(path, table.to_json())
    return path


def keep_costs(table: CostTable) -> Path | None:
    """Save a table, unless one with more passes is kept for the same: then nothing happens, and None is returned."""
    kept = load_costs(table.key)
    return None if kept is not None and len(kept.target) > len(table.target) else save_costs(table)


def load_costs(key: CostKey) -> CostTable | None:
    """The table measured for exactly this key; None if there is none, or it is unreadable."""
    path = costs_path(key)
    try:
        table = CostTable.from_json(read_json(path))
    except ValueError:  # missing, damaged, or of another version: it can be measured again
        return None
    return table if table.key == key else None


# ------------------------------------------------------------------------------------------------ at the start


def start_costs(target: TargetModel, dtype: str, *, rows: int, tokens: int) -> CostTable:
    """The table kept for a target, if a few passes agree with it, else a new one, which is then kept."""
    return kept_costs(target, dtype, rows=rows, tokens=tokens) or measured_costs(
        target, dtype, rows=rows, tokens=tokens
    )


def kept_costs(target: TargetModel, dtype: str, *, rows: int, tokens: int) -> CostTable | None:
    """The table kept for a target, if it has what would be timed for passes of up to ``rows`` and ``tokens``, and a few
    passes agree with it."""
    kept = load_costs(cost_key(target, dtype))
    if kept is None or not _has_all(kept, rows, _most_tokens(target, tokens)):
        return None
    return kept if _fits(kept, target) else None


def _has_all(table: CostTable, rows: int, tokens: int) -> bool:
    """Whether a table has all that would be timed for passes of up to ``rows`` and ``tokens``.

    Between passes that were timed a table says nothing of the edges of tiles, where one more token may cost as much
    as ten: one that is coarse, or of an engine with fewer rows, will not do. Where passes are slow, few were timed."""
    timed = {(point.tokens, point.rows) for point in table.target}
    if timed <= {(few, 1) for few in FEWEST}:
        return BEYOND * max(timed)[0] >= tokens
    return {(m, 1) for m in TOKENS if m <= tokens} | {(r, r) for r in ROWS if r <= rows} <= timed


def measured_costs(target: TargetModel, dtype: str, *, rows: int, tokens: int, alone: Alone = at_once) -> CostTable:
    """A new table, which is then kept."""
    table = quick_costs(target, cost_key(target, dtype), rows=rows, tokens=tokens, alone=alone)
    with suppress(OSError):
        save_costs(table)
    return table


@torch.inference_mode()
def quick_costs(
    target: TargetModel,
    key: CostKey,
    *,
    rows: int,
    tokens: int,
    seconds: float = SECONDS,
    alone: Alone = at_once,
) -> CostTable:
    """Time passes for at most about ``seconds``, in rounds and shuffled, and take the median of each kind.

    Each is compared with the passes over one token before and after it, which met the same machine: its clock may
    change every second. Those take the least of their times, as when nobody interrupts them; how busy the machine is,
    the scheduler learns from steps. ``rows``, ``tokens``: the most that a pass will have. ``alone`` calls each pass,
    where requests may run beside.
    """
    spent = 0.0

    def time(shape: tuple[int, int, int], slots: Sequence[int]) -> float:
        nonlocal spent
        took = alone(lambda: _time(target, cache, slots, shape))
        spent += took
        return took

    room = target.spec.max_positions
    rows, tokens = min(rows, max(ROWS)), _most_tokens(target, tokens)
    longest = max(0, min(LONG_CONTEXT, room - tokens - 1))
    context = min(CONTEXT, longest)
    shapes = [(m, 1, context) for m in TOKENS if m <= tokens]
    shapes += [(r, r, context) for r in ROWS if r <= rows]
    shapes += [(m, 1, longest) for m in (1, 8) if longest > 2 * context and m <= tokens]
    cache = target.new_cache(rows + 1, longest + tokens)
    *slots, short = [cache.open() for _ in range(rows + 1)]
    for slot in (*slots, short):
        alone(lambda slot=slot: _fill(target, cache, slot, context))  # type: ignore[misc]
    one = (1, 1, context)
    once = min(time(one, [short]) for _ in range(2))  # the first one warms up
    if once * len(shapes) * 3 > seconds:
        shapes = [shape for shape in shapes if shape[1] == 1 and shape[0] in FEWEST and shape[2] == context]
    ratios: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in shapes if shape != one}
    ones = [once]
    order = random.Random(0)
    for c in sorted({context, longest}):
        alone(lambda c=c: _fill(target, cache, slots[0], c))  # type: ignore[misc]
        here = [shape for shape in ratios if shape[2] == c]
        for _ in range(ROUNDS):
            for shape in order.sample(here, len(here)):
                if not ratios[shape] or spent < seconds:
                    took = time(shape, slots)
                    ones.append(time(one, [short]))
                    ratios[shape].append(took / math.sqrt(ones[-2] * ones[-1]))
    least = min(ones)
    points = (CostPoint(m, r, c * r, least * median(found)) for (m, r, c), found in ratios.items())
    return CostTable(key, (CostPoint(1, 1, context, least), *points))


def _most_tokens(target: TargetModel, tokens: int) -> int:
    """Of the passes that are timed for an engine whose passes have up to ``tokens``."""
    return max(1, min(tokens, max(TOKENS), target.spec.max_positions // 2))


def tune_core(target: TargetModel) -> None:
    """Tune the core for a target that runs in it, once on a machine."""
    stack = getattr(target, "stack", None)
    if isinstance(stack, NativeStack):
        apply_once(stack.core.isa, stack.core.weight_bytes, measure=True)


@torch.inference_mode()
def feature_share(target: TargetModel, aux_layers: Sequence[int]) -> float:
    """The share that a pass over one token takes longer when it also gives features: as much of the median over pairs
    of passes as their spread leaves certain, so that a busy machine gives 0 and not a chance value."""
    if not aux_layers:
        return 0.0
    context = min(CONTEXT, max(0, target.spec.max_positions - 2))
    cache = target.new_cache(1, context + 1)
    slots = [cache.open()]
    _fill(target, cache, slots[0], context)
    shape, ends, found = (1, 1, context), perf_counter() + PAIRS_SECONDS, []
    for turn in range(PAIRS + 1):
        took = {}
        for layers in (tuple(aux_layers), ()) if turn % 2 else ((), tuple(aux_layers)):
            took[bool(layers)] = _time(target, cache, slots, shape, layers)
        if turn:  # the first pair warms up
            found.append(took[True] / took[False] - 1)
        if perf_counter() > ends and len(found) >= 4:
            break
    middle = median(found)
    deviation = 1.4826 * median(abs(share - middle) for share in found)
    return min(max(0.0, middle - 2.5 * deviation / math.sqrt(len(found))), 0.5)


@torch.inference_mode()
def _fits(table: CostTable, target: TargetModel) -> bool:
    """Whether passes over a few tokens take about what the table says, allowing for a machine that is busy."""
    context, most = min(CONTEXT, max(0, target.spec.max_positions - 9)), min(8, target.spec.max_positions)
    cache = target.new_cache(1, context + most)
    slot = cache.open()
    _fill(target, cache, slot, context)
    ratios = []
    for tokens in (1, most):
        took = min(_time(target, cache, [slot], (tokens, 1, context)) for _ in range(4))
        ratios.append(math.log(took / table.seconds(tokens, 1, context)))
    return abs(ratios[0] - ratios[1]) < math.log(SAME_SHAPE) and max(map(abs, ratios)) < math.log(SAME_SPEED)


def _time(
    target: TargetModel,
    cache: KVCache,
    slots: Sequence[int],
    shape: tuple[int, int, int],
    aux_layers: tuple[int, ...] = (),
) -> float:
    """Seconds of one pass over so many tokens in so many rows, which is taken back."""
    tokens, rows, context = shape
    row = [(11 * i + 3) % target.spec.vocab_size for i in range(tokens // rows)]
    batch = RaggedBatch.pack([row] * rows, [context] * rows, slots[:rows])
    cache.rewind(batch.slots, torch.full((rows,), context))
    began = perf_counter()
    target.forward(batch, cache, aux_layers)
    return perf_counter() - began


def _fill(target: TargetModel, cache: KVCache, slot: int, context: int) -> None:
    """Put tokens into a slot up to ``context``. A decoder stack gets hidden states, which is much faster."""
    start = int(cache.lengths[slot])
    if start >= context:
        return
    tokens = [(7 * i) % target.spec.vocab_size for i in range(context - start)]
    batch = RaggedBatch.pack([tokens], [start], [slot])
    if isinstance(target, DecoderTarget):
        target.stack.project(torch.randn(len(tokens), target.spec.hidden_size), batch, cache)
    else:
        target.forward(batch, cache, logits_at=batch.slots[:0])
