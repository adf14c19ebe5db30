"""What the core is tuned to: chosen from measured times, kept for one machine, and without influence on any bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from outrider.backends import tuning
from outrider.backends.native import NativeBackend, available
from outrider.backends.tuning import (
    DISTANCES,
    NEVER,
    ROWS,
    WIDTHS,
    Measure,
    Tuning,
    apply_once,
    choose,
    stored_path,
    tune,
)
from outrider.config import StackConfig

if not available():
    pytest.skip("the compiled core is not built", allow_module_level=True)

from outrider import _native

ISA = _native.instruction_sets()[0]
DEFAULTS = (5, 5, 5, 3)


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, and what the core had is in force again afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("OUTRIDER_TUNING", raising=False)
    before, threads = {isa: _native.read_ahead(isa) for isa in _native.instruction_sets()}, _native.threads()
    tile_rows = _native.tile_rows(ISA)
    yield
    if tile_rows:
        _native.set_tile_rows(ISA, tile_rows)
    for isa, (ahead, rows) in before.items():
        _native.set_read_ahead(isa, ahead, rows)
    if _native.threads() != threads:
        _native.set_threads(threads)


def machine(seconds: Callable[[str, int, int], float]) -> Measure:
    """A machine whose products take ``seconds(width, rows, ahead)``."""

    def measure(width: str, settings: Sequence[tuple[int, int, int]], budget: float) -> list[float]:
        assert budget > 0
        return [seconds(width, rows, ahead) for rows, ahead, _ in settings]

    return measure


def test_the_switch_is_where_prefetching_begins_to_pay() -> None:
    """One row loses by it, eight gain; where the core's own switch is as good, it stays."""

    gains = {"f32": 6, "bf16": 6, "i8": 3, "i4": 3}

    def zen(width: str, rows: int, ahead: int) -> float:
        if not ahead:
            return 1.0 if rows < gains[width] else 1.3
        return (1.4 if rows < gains[width] else 1.0) + (0.2 if ahead < 4096 else 0.0)

    assert choose(machine(zen), DEFAULTS, 2, 2) == Tuning(8192, (5, 5, 3, 3), 2)
    always = choose(machine(lambda width, rows, ahead: 0.7 if ahead else 1.0), DEFAULTS, 2, 2)
    never = choose(machine(lambda width, rows, ahead: 1.0 if ahead else 0.7), DEFAULTS, 2, 2)
    assert always.rows == (1, 1, 1, 1)
    assert never.rows == (max(ROWS) + 1,) * len(WIDTHS)


def test_one_measurement_that_is_off_changes_nothing() -> None:
    seen: set[str] = set()

    def measure(width: str, settings: Sequence[tuple[int, int, int]], budget: float) -> list[float]:
        first, _ = width not in seen, seen.add(width)
        return [0.5 if first and ahead and rows < 3 else 1.0 for rows, ahead, _ in settings]

    assert choose(measure, DEFAULTS, 2, 2) == Tuning(8192, DEFAULTS, 2)


def test_tiles_are_used_from_where_they_are_faster() -> None:
    """Bytes at any number of rows, groups of bytes from eight, nibbles never."""
    least = {"i8": 1, "q8_0": 8, "q4_1": NEVER}

    def measure(name: str, settings: Sequence[tuple[int, int, int]], budget: float) -> list[float]:
        return [
            1.0 if not first or (rows >= first) == (rows >= least.get(name, 1)) else 1.5 for rows, _, first in settings
        ]

    assert choose(measure, DEFAULTS, 2, 2, tiles=True) == Tuning(8192, DEFAULTS, 2, (1, 8, NEVER))
    assert choose(measure, DEFAULTS, 2, 2).tile_rows == ()


def test_another_distance_must_be_clearly_better() -> None:
    for gain, expected in ((0.9, DISTANCES[0]), (0.8, 32768)):
        made = choose(machine(lambda width, rows, ahead, gain=gain: gain if ahead == 32768 else 1.0), DEFAULTS, 2, 2)
        assert made.bytes_ahead == expected


@pytest.mark.parametrize(("slowdown", "expected"), [(0.8, 2), (1.0, 4), (1.3, 4)])
def test_two_threads_of_one_core_are_used_where_they_help(slowdown: float, expected: int) -> None:
    """``slowdown``: the time of one thread a core, relative to two."""
    before = _native.threads()
    made = choose(machine(lambda width, rows, ahead: slowdown if _native.threads() == 2 else 1.0), DEFAULTS, 4, 2)
    assert made.threads == expected
    _native.set_threads(before)


def test_a_measurement_is_kept_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure_on", lambda isa: machine(lambda width, rows, ahead: 2.0 if ahead else 1.0))
    first = tune(ISA)
    assert stored_path(ISA).is_file()
    monkeypatch.setattr(tuning, "_measure_on", lambda isa: pytest.fail("measured again"))
    assert tune(ISA) == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored | {"version": 0},
        lambda stored: stored | {"key": stored["key"] | {"processor": "another one"}},
        lambda stored: stored | {"key": stored["key"] | {"build": "older"}},
        lambda stored: {"version": stored["version"], "key": stored["key"]},
        lambda stored: stored | {"tuning": stored["tuning"] | {"rows": [1, 1, 1]}},
        lambda stored: stored | {"tuning": stored["tuning"] | {"rows": [0, 1, 1, 1]}},
        lambda stored: stored | {"tuning": stored["tuning"] | {"rows": "1111"}},
        lambda stored: stored | {"tuning": stored["tuning"] | {"bytes_ahead": 12345}},
        lambda stored: stored | {"tuning": stored["tuning"] | {"threads": 100_000}},
        lambda stored: stored | {"tuning": stored["tuning"] | {"tile_rows": [3, 3, 3]}},
        lambda stored: stored | {"tuning": stored["tuning"] | {"tile_rows": [1]}},
        lambda stored: [stored],
        lambda stored: "nothing",
    ],
)
def test_a_stale_or_foreign_file_is_replaced(damage: Callable[[dict], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure_on", lambda isa: machine(lambda width, rows, ahead: 1.0 + rows))
    first, path = tune(ISA), stored_path(ISA)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(damage(whole)))
    assert tune(ISA) == first
    assert json.loads(path.read_text()) == whole
    path.write_bytes(b"\xff\x00 no JSON")
    assert tune(ISA) == first


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measure_on", lambda isa: machine(lambda width, rows, ahead: 1.0))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be kept"):
        tune(ISA)


def test_only_large_models_are_worth_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    made = Tuning(4096, (2, 3, 4, 5), _native.threads())
    monkeypatch.setattr(tuning, "_applied", set())
    monkeypatch.setattr(tuning, "tune", lambda isa: asked.append(isa) or made)
    apply_once(ISA, tuning.LARGE - 1, measure=True)
    assert not asked
    monkeypatch.setenv("OUTRIDER_TUNING", "0")
    apply_once(ISA, tuning.LARGE, measure=True)
    assert not asked
    monkeypatch.delenv("OUTRIDER_TUNING")
    for _ in range(2):
        apply_once(ISA, tuning.LARGE, measure=True)
    assert asked == [ISA]
    assert _native.read_ahead(ISA) == (4096, [2, 3, 4, 5])


def test_loading_applies_what_is_kept_and_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_applied", set())
    monkeypatch.setattr(tuning, "_measure_on", lambda isa: pytest.fail("measured"))
    before = _native.read_ahead(ISA)
    apply_once(ISA, tuning.LARGE, measure=False)
    assert _native.read_ahead(ISA) == before
    monkeypatch.setattr(tuning, "_measure_on", lambda isa: machine(lambda width, rows, ahead: 2.0 if ahead else 1.0))
    kept = tune(ISA)
    apply_once(ISA, tuning.LARGE, measure=False)
    assert _native.read_ahead(ISA) == (kept.bytes_ahead, list(kept.rows)) != before


@pytest.mark.parametrize("isa", _native.instruction_sets())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_bits_do_not_depend_on_it(isa: str, dtype: str) -> None:
    weights = {"head.weight": torch.randn(95, 416), "norm.weight": torch.ones(416)}
    made = NativeBackend(isa).load(StackConfig(vocab_size=95, hidden_size=416, layers=()), weights, dtype)
    x = torch.randn(19, 416)
    results = []
    for ahead, rows in ((64, 1), (8192, 3), (1 << 20, 1000)):
        _native.set_read_ahead(isa, ahead, [rows] * len(WIDTHS))
        results.append([made.unembed(x[:count]) for count in (1, 2, 5, 19)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="between 64 and"):
        _native.set_read_ahead(ISA, 0, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="4 positive numbers"):
        _native.set_read_ahead(ISA, 8192, [1, 1, 1])
    with pytest.raises(ValueError, match="1 to 256 rows"):
        _native.time_products(ISA, _native.DType.i8, 1 << 20, [(0, 0, 0)], 0.0)
    with pytest.raises(ValueError, match="instruction set portable has no matrix tiles"):
        _native.set_tile_rows("portable", [1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("width", ["f32", "bf16", "i8", "i4", "q8_0", "q4_1"])
def test_a_product_is_never_cheaper_for_another_row(width: str) -> None:
    """On this machine, as it is tuned. One attempt of three must show it, and a quarter is allowed: other processes
    change how fast memory is from one moment to the next."""
    kind = {"q8_0": "i8", "q4_1": "i4"}.get(width, width)
    region, format_ = 64 << 20, getattr(_native.DType, width)
    for _ in range(3):
        stored_path(ISA).unlink(missing_ok=True)
        made = tune(ISA)
        first = made.rows[WIDTHS.index(kind)]
        if made.tile_rows:
            _native.set_tile_rows(ISA, made.tile_rows)
        settings = [(rows, made.bytes_ahead if rows >= first else 0, 0) for rows in range(1, 17)]
        times = _native.time_products(ISA, format_, region, settings, 3.0)
        if all(later > 0.75 * max(times[:i]) for i, later in enumerate(times) if i):
            return
    pytest.fail(f"milliseconds for 1 to 16 rows: {[round(1000 * time, 2) for time in times]}")


def test_measuring_takes_less_than_a_second_and_finds_a_tuning() -> None:
    began = os.times()
    made = tune(ISA)
    took = os.times().elapsed - began.elapsed
    assert made.bytes_ahead in DISTANCES and all(1 <= rows <= max(ROWS) + 1 for rows in made.rows)
    assert took < 10  # a second where no other process takes the processor
