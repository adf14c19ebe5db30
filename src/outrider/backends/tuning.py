"""What the compiled core is tuned to on this machine: prefetch distance, the rows from which on it prefetches and uses
matrix tiles, and threads.

Measured once, in at most a second, for the first model that is larger than a cache; kept on disk for the machine, the
number of cores, the instruction set and the build of the core. Loading a model applies what is kept. Nothing here
changes a result's bits. With ``OUTRIDER_TUNING=0`` the core keeps its defaults.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.core import native
from outrider.errors import CheckpointError
from outrider.files import cache_folder, read_json, write_json

__all__ = ["Measure", "Tuning", "apply_once", "choose", "stored_path", "tune"]

VERSION = 3
WIDTHS = ("f32", "bf16", "i8", "i4")
"""The core's names of a format of each width, in the core's order."""
TILE_USES = ("i8", "q8_0", "q4_1")
"""A format of each kind that matrix tiles compute with the bits of vectors, in the core's order."""
LARGE = 32 << 20  # bytes of weights from which a model is not read from a cache alone
REGION = 64 << 20  # bytes of the matrix that is multiplied
DISTANCES = (8192, 2048, 4096, 16384, 32768)  # the default first: others must be clearly better
ROWS = (1, 2, 3, 4, 6, 8)
TILE_ROWS = (1, 2, 4, 8, 16, 32)
NEVER = 1 << 20  # rows: more than a pass has
CLEARLY = 0.98  # of a time: less is noise
CLEARLY_DISTANCE = 0.85  # one large matrix likes longer distances than passes do, whose products are short
CLEARLY_ROWS = 0.98  # of the sum over all rows, measured twice
SECONDS = 0.5  # of all measurements together, those that are repeated counted once

Measure = Callable[[str, Sequence[tuple[int, int, int]], float], Sequence[float]]
"""(format, settings, seconds) -> seconds of a product for each: rows, bytes ahead (0: no prefetch), least rows on tiles
(0: as they are)."""

_applied: set[str] = set()


@dataclass(frozen=True, slots=True)
class Tuning:
    """What was chosen for one instruction set."""

    bytes_ahead: int
    rows: tuple[int, ...]
    """The least rows of a product that prefetch, by width (see WIDTHS)."""
    threads: int
    tile_rows: tuple[int, ...] = ()
    """The least rows of a product on matrix tiles, by kind (see TILE_USES); empty without tiles."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tuning:
        """Raises ValueError, KeyError or TypeError for anything that cannot have been chosen."""
        made = cls(value["bytes_ahead"], tuple(value["rows"]), value["threads"], tuple(value["tile_rows"]))
        numbers = (made.bytes_ahead, made.threads, *made.rows, *made.tile_rows)
        if any(type(number) is not int or number < 1 for number in numbers) or len(made.rows) != len(WIDTHS):
            raise ValueError(f"not a tuning: {value}")
        if not set(made.tile_rows) <= {*TILE_ROWS, NEVER}:
            raise ValueError(f"out of range: {value}")
        if made.bytes_ahead not in DISTANCES or max(made.rows) > max(ROWS) + 1 or made.threads > (os.cpu_count() or 1):
            raise ValueError(f"out of range: {value}")
        return made


def apply_once(isa: str, weight_bytes: int, *, measure: bool) -> None:
    """Tune the core for an instruction set, once a process, when a model of ``weight_bytes`` is large enough. Without
    ``measure`` the core stays as it is where nothing was measured before."""
    if isa in _applied or weight_bytes < LARGE or os.environ.get("OUTRIDER_TUNING") == "0":
        return
    tuning = tune(isa) if measure else _stored(isa)
    if tuning is None:
        return
    _applied.add(isa)
    native.set_read_ahead(isa, tuning.bytes_ahead, list(tuning.rows))
    if tuning.tile_rows:
        native.set_tile_rows(isa, list(tuning.tile_rows))
    if tuning.threads != native.threads() and native.threads() == len(_cores()) and not _threads_are_given():
        native.set_threads(tuning.threads)


def tune(isa: str) -> Tuning:
    """What was chosen earlier, or what is measured now and kept. A file that does not fit is replaced."""
    stored = _stored(isa)
    if stored is not None:
        return stored
    key, path, threads = _key(isa), stored_path(isa), native.threads()
    physical = 0 if _threads_are_given() else _physical_cores()
    tuning = choose(_measure_on(isa), native.read_ahead(isa)[1], threads, physical, tiles=bool(native.tile_rows(isa)))
    try:
        write_json(path, {"version": VERSION, "key": key, "tuning": asdict(tuning)})
    except OSError as error:
        warnings.warn(f"what was measured on this machine could not be kept in {path.parent}: {error}", stacklevel=2)
    return tuning


def _stored(isa: str) -> Tuning | None:
    """What was chosen earlier; None where that is missing, damaged, or written by something else."""
    with suppress(CheckpointError, KeyError, TypeError, ValueError):
        stored = read_json(stored_path(isa))
        if stored.get("version") == VERSION and stored.get("key") == _key(isa):
            tuning = Tuning.from_json(stored["tuning"])
            if len(tuning.tile_rows) == len(native.tile_rows(isa)):
                return tuning
    return None


def choose(measure: Measure, defaults: Sequence[int], threads: int, physical: int, *, tiles: bool = False) -> Tuning:
    """The distance, the rows and the threads with the least measured times.

    ``defaults``: the core's rows by width; ``threads``: as many as the core uses; ``physical``: processor cores among
    them, fewer where each runs two threads, 0 where that is not to be measured; ``tiles``: whether there are any.
    """
    uses = TILE_USES if tiles else ()
    share = SECONDS / (2 + len(WIDTHS) + len(uses) + (2 if 0 < physical < threads else 0))
    ahead = _distance(measure, 2 * share)
    rows = tuple(
        _least_rows(measure, width, ahead, default, share) for width, default in zip(WIDTHS, defaults, strict=True)
    )
    tile_rows = tuple(_least_rows_on_tiles(measure, use, ahead, share) for use in uses)
    return Tuning(ahead, rows, _threads(measure, threads, physical, share), tile_rows)


def _distance(measure: Measure, seconds: float) -> int:
    """The distance with the least times for four and for eight rows of bytes; the default unless clearly slower."""
    settings = [(rows, distance, 0) for rows in (4, 8) for distance in DISTANCES]
    times = dict(zip(settings, measure("i8", settings, seconds), strict=True))
    totals = {distance: times[4, distance, 0] + times[8, distance, 0] for distance in DISTANCES}
    best = min(DISTANCES, key=lambda distance: totals[distance])
    return best if totals[best] < CLEARLY_DISTANCE * totals[DISTANCES[0]] else DISTANCES[0]


def _least_rows(measure: Measure, width: str, ahead: int, default: int, seconds: float) -> int:
    """From how many rows on prefetching pays: the switch with the least sum of relative times. The default, unless two
    measurements find the same switch clearly better: on a busy machine one can be far off."""
    settings = [(rows, distance, 0) for rows in ROWS for distance in (0, ahead)]
    best = default
    for attempt in range(2):
        total = _totals(ROWS, measure(width, settings, seconds))
        if attempt == 0:
            best = min((*ROWS, max(ROWS) + 1), key=total)
        if total(best) >= CLEARLY_ROWS * total(default):
            return default
    return best


def _least_rows_on_tiles(measure: Measure, name: str, ahead: int, seconds: float) -> int:
    """From how many rows on matrix tiles compute a product in less time, all measured numbers of rows together."""
    settings = [(rows, ahead, first) for rows in TILE_ROWS for first in (NEVER, 1)]
    return min((*TILE_ROWS, NEVER), key=_totals(TILE_ROWS, measure(name, settings, seconds)))


def _totals(sizes: Sequence[int], times: Sequence[float]) -> Callable[[int], float]:
    """``times``: of each number of rows, without something and with it. What they add up to, each relative to the
    better one, where it is used from a number of rows on."""
    pairs = [(size, *times[2 * i : 2 * i + 2]) for i, size in enumerate(sizes)]

    def total(first: int) -> float:
        return sum((used if size >= first else unused) / min(unused, used) for size, unused, used in pairs)

    return total


def _threads(measure: Measure, threads: int, physical: int, seconds: float) -> int:
    """All threads, or one for each core where two on a core are clearly slower for one row and for eight together."""
    if not 0 < physical < threads:
        return threads
    times = {}
    try:
        for count in (threads, physical):
            native.set_threads(count)
            times[count] = sum(measure("i8", [(1, 0, 0), (8, DISTANCES[0], 0)], seconds))
    finally:
        native.set_threads(threads)
    return physical if times[physical] < CLEARLY * times[threads] else threads


def _measure_on(isa: str) -> Measure:
    def measure(name: str, settings: Sequence[tuple[int, int, int]], seconds: float) -> Sequence[float]:
        times: Sequence[float] = native.time_products(isa, getattr(native.DType, name), REGION, list(settings), seconds)
        return times

    return measure


# ------------------------------------------------------------------------------------------------ this machine


def stored_path(isa: str) -> Path:
    """Where the tuning of an instruction set is kept on this machine."""
    name = hashlib.sha256(json.dumps(_key(isa), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder("tuning") / f"{name}.json"


def _key(isa: str) -> dict[str, Any]:
    """What a tuning is valid for."""
    processor = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    with open(native.__file__, "rb") as file:
        build = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return {"processor": processor, "cores": _cores(), "threads": native.threads(), "isa": isa, "build": build}


def _cores() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _physical_cores() -> int:
    """As many as this process may use; 0 where the system does not tell."""
    found = set()
    for core in _cores():
        siblings = _lines(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        if not siblings:
            return 0
        found.add(siblings[0])
    return len(found)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _threads_are_given() -> bool:
    return bool(os.environ.get("OUTRIDER_THREADS"))
