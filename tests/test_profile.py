"""`outrider profile`: timing, pairing, the meaning of the figures, and stored tables."""

from __future__ import annotations

import gc
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from outrider.backends.layers import check_weights
from outrider.cli import app
from outrider.config import LayerConfig, RopeConfig, StackConfig
from outrider.core import native
from outrider.engine.cost_tables import costs_path, load_costs, save_costs
from outrider.errors import InvalidRequest
from outrider.evaluation import pass_times as module
from outrider.evaluation.pass_times import (
    Cell,
    cache_bytes,
    grid,
    measure,
    run_profile,
    time_passes,
    weight_bytes,
)
from outrider.models.loading import load_backend
from outrider.models.random import SHAPES, RandomWeights, Shape, random_target
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.types import KVCache, RaggedBatch, TargetModel, TargetOutput

MACHINE = {"cpu": "test processor", "cores": 2}
TINY = Shape(64, 2, 4, 2, 128, 300, tied=True, head_dim=16)
KEY = CostKey("model", "float32", "reference", "test processor, 2 cores", 2)
TABLE = CostTable(KEY, (CostPoint(1, 1, 256, 0.01), CostPoint(8, 1, 256, 0.02)))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "PROBE_BYTES", 1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES, "tiny", TINY)


def tiny_target() -> TargetModel:
    return random_target("tiny", "float32", load_backend("reference"))


class Clock:
    """A clock that advances in target passes only; every round the machine is slower."""

    def __init__(self, target: TargetModel) -> None:
        self.target, self.spec = target, target.spec
        self.stack = target.stack  # type: ignore[attr-defined]
        self.now, self.slowness = 0.0, 1.0
        self.passes: list[tuple[int, int, int]] = []

    def __call__(self) -> float:
        return self.now

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        return self.target.new_cache(slots, capacity)

    def forward(self, batch: RaggedBatch, cache: KVCache, **options: Any) -> TargetOutput:
        lengths, starts = batch.lengths.tolist(), batch.positions[batch.offsets[:-1]].tolist()
        assert len(set(lengths)) == len(set(starts)) == 1
        assert cache.lengths[batch.slots].tolist() == starts, "every pass starts where the context ends"
        self.passes.append((lengths[0], len(lengths), starts[0]))
        output = self.target.forward(batch, cache, **options)
        assert len(output.logits) == len(batch.tokens), "verification needs all logits"
        self.now += self.slowness * (1.0 + 0.01 * len(batch.tokens))
        return output

    def probe(self) -> float:
        """Bytes per second; halves every round."""
        self.slowness *= 2
        return 1e9 / self.slowness


def test_rounds_are_interleaved_and_every_kind_is_timed_once_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(tiny_target())
    monkeypatch.setattr(module, "perf_counter", clock)
    cells = grid([20], [1, 2, 8], [1, 3])
    seconds, bandwidths = measure(clock, cells, 6, clock.probe)  # type: ignore[arg-type]
    assert {cell: len(values) for cell, values in seconds.items()} == dict.fromkeys(cells, 6)
    assert len(bandwidths) == 6
    turns = [clock.passes[i : i + 5] for i in range(0, len(clock.passes), 5)]  # an untimed pass, then four
    assert len(turns) == 7  # one round to warm up
    expected = sorted((cell.new_tokens, cell.rows, cell.context) for cell in cells)
    assert all(sorted(turn[1:]) == expected for turn in turns)
    assert len({tuple(turn[1:]) for turn in turns}) > 1, "the order changes"
    assert all(later == pytest.approx(2 * former) for former, later in pairwise(seconds[cells[0]]))


def test_a_target_without_a_stack_reads_its_context_and_nothing_is_collected_meanwhile() -> None:
    target, seen = tiny_target(), []

    def forward(batch: RaggedBatch, cache: KVCache, **options: Any) -> TargetOutput:
        start = int(batch.positions[0])
        assert cache.lengths[batch.slots].tolist() == [start] * len(batch.slots)
        seen.append((start, gc.isenabled()))
        return target.forward(batch, cache, **options)

    bare: Any = SimpleNamespace(spec=target.spec, new_cache=target.new_cache, forward=forward)
    measure(bare, [Cell(1, 1, 600), Cell(1, 2, 600)], 1, lambda: 1.0)
    assert [start for start, _ in seen[:4]] == [0, 512, 0, 512] and {start for start, _ in seen[4:]} == {600}
    assert not any(collects for _, collects in seen[4:]) and gc.isenabled()


def test_the_probe_reads_and_the_core_is_tuned_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < module.read_probe("reference")() < 1e12
    tuned: list[TargetModel] = []
    monkeypatch.setattr(module, "tune_core", tuned.append)
    options: dict[str, Any] = {"shape": "tiny", "dtypes": ["float32"], "backend": "reference", "machine": MACHINE}
    run_profile("", cells=grid([0], [1], [1]), repeats=1, **options)
    assert len(tuned) == 1
    with pytest.raises(InvalidRequest, match="repeats must be at least 1, got 0"):
        run_profile("", cells=grid([0], [1], [1]), repeats=0, **options)


def test_ratios_and_shares_are_of_pairs_so_that_drift_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock and the probe slow down 2x per round: medians of pairs are still exact."""
    clock = Clock(tiny_target())
    monkeypatch.setattr(module, "perf_counter", clock)
    timings, skipped = time_passes(clock, "float32", grid([5, 20], [1, 8], [4]), 5, clock.probe)  # type: ignore[arg-type]
    assert not skipped
    assert [(t.cell.new_tokens, t.cell.rows, t.cell.context) for t in timings] == [
        (m, r, c) for c in (5, 20) for m, r in ((1, 1), (8, 1), (1, 4))
    ]
    for timing in timings:
        tokens = timing.cell.new_tokens * timing.cell.rows
        assert timing.ratio_to_one == pytest.approx((1 + 0.01 * tokens) / 1.01)
        assert timing.rounds == 5
        assert timing.bandwidth_share is None  # the size of a wrapped target is unknown


def test_bandwidth_share_is_bytes_over_time_over_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target()
    clock = Clock(target)
    monkeypatch.setattr(module, "perf_counter", clock)
    clock.target = SimpleNamespace(forward=target.forward)  # type: ignore[assignment]
    monkeypatch.setattr(target, "forward", clock.forward)
    config = TINY.stack_config()
    timings, _ = time_passes(target, "float32", grid([30], [1], [4]), 3, clock.probe)
    matrices = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 300 * 64
    for timing in timings:
        cached = timing.cell.rows * 30 * 2 * 2 * (2 * 16)
        assert weight_bytes(config, "float32") + cache_bytes(config, "float32", timing.cell) == 4 * (matrices + cached)
        expected = 4 * (matrices + cached) / (1 + 0.01 * timing.cell.rows) / 1e9
        assert timing.bandwidth_share == pytest.approx(expected)


def test_bytes_of_each_dtype() -> None:
    config = SHAPES["llama-110m"].stack_config()
    layers, head = 12 * (4 * 768 * 768 + 3 * 768 * 2048), 32_000 * 768
    outputs = 12 * (4 * 768 + 2 * 2048 + 768)
    assert weight_bytes(config, "float32") == 4 * (layers + head)
    assert weight_bytes(config, "bfloat16") == 2 * (layers + head)
    assert weight_bytes(config, "int8") == layers + head + 4 * (outputs + 32_000)
    assert weight_bytes(config, "int4") == layers // 2 + 2 * layers // 32 + head + 4 * 32_000
    assert cache_bytes(config, "float32", Cell(8, 1, 256)) == 12 * 2 * 768 * 256 * 4
    assert cache_bytes(config, "int8", Cell(1, 3, 256)) == 3 * 12 * 2 * 768 * 256 * 2


def test_a_window_bounds_what_is_read() -> None:
    rope = RopeConfig((1.0,) * 8)
    layers = (LayerConfig(1, 1, 16, 8, rope, window=10), LayerConfig(1, 1, 16, 8, rope))
    config = StackConfig(5, 16, layers)
    assert cache_bytes(config, "float32", Cell(1, 1, 4)) == 4 * (4 + 4) * 2 * 16
    assert cache_bytes(config, "float32", Cell(1, 1, 50)) == 4 * (10 + 50) * 2 * 16


@pytest.mark.parametrize("name", ["llama-110m", "llama-1b"])
def test_random_weights_fit_their_shape(name: str) -> None:
    config = SHAPES[name].stack_config()
    weights = RandomWeights(config, SHAPES[name].tied)
    check_weights(config, weights)
    assert ("head.weight" in weights) == (name == "llama-110m")
    parameters = sum(torch.Size(shape).numel() for shape in weights.shapes.values())
    assert parameters == pytest.approx({"llama-110m": 134e6, "llama-1b": 1.236e9}[name], rel=0.01)
    norm, matrix = weights["layers.0.input_norm.weight"], weights["layers.1.k.weight"]
    assert (norm == 1).all()
    assert tuple(matrix.shape) == weights.shapes["layers.1.k.weight"]
    assert 0.01 < matrix.std() < 0.03


def test_a_profile_of_random_weights_gives_figures_and_a_table() -> None:
    shares: list[float] = []
    profile = run_profile(
        "embedded",
        shape="tiny",
        dtypes=["float32", "bfloat16"],
        cells=grid([0, 16], [1, 4], [1, 2]),
        repeats=2,
        backend="reference",
        machine=MACHINE,
        progress=lambda text, done: shares.append(done),
    )
    figures = json.loads(json.dumps(profile.to_json()))
    assert figures["model"] == "tiny" and figures["bandwidth_gb_s"] > 0
    assert len(figures["rows"]) == len(figures["ratio_to_one"]) == 2 * 2 * 3
    for row in figures["rows"]:
        assert list(row) == ["dtype", "new_tokens", "rows", "context", "milliseconds", "bandwidth_share"]
        assert row["milliseconds"] > 0 and row["bandwidth_share"] > 0
    assert {r["ratio"] for r in figures["ratio_to_one"] if r["new_tokens"] == r["rows"] == 1} == {1.0}
    assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
    assert [table.key.dtype for table in profile.tables] == ["float32", "bfloat16"]
    [timing] = [t for t in profile.timings if t.cell == Cell(1, 2, 16) and t.dtype == "float32"]
    assert CostPoint(2, 2, 32, timing.seconds) in profile.tables[0].target


def test_a_loaded_model_is_profiled_and_its_context_is_a_limit() -> None:
    options: dict[str, Any] = {"dtypes": ["float32"], "repeats": 1, "backend": "reference", "machine": MACHINE}
    profile = run_profile("embedded", cells=grid([2040], [8], [1]), **options)
    assert profile.tables[0].key.model.startswith("qwen3-")
    with pytest.raises(InvalidRequest, match="reach 2049 positions, and the model has 2048"):
        run_profile("embedded", cells=grid([2040], [9], [1]), **options)


def test_a_profile_does_not_change_the_model() -> None:
    target = tiny_target()
    cache, batch = target.new_cache(1, 8), RaggedBatch.pack([[1, 2, 3]], [0], [0])
    cache.open()
    before = target.forward(batch, cache).logits.clone()
    measure(target, [Cell(1, 1, 10), Cell(5, 1, 10)], 1, lambda: 1.0)
    cache.rewind(torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(target.forward(batch, cache).logits, before)


def test_caches_that_are_too_large_are_skipped_and_listed() -> None:
    each = cache_bytes(TINY.stack_config(), "float32", Cell(1, 1, 64))
    options: dict[str, Any] = {"dtypes": ["float32"], "repeats": 1, "backend": "reference", "machine": MACHINE}
    profile = run_profile("", shape="tiny", cells=grid([64], [1], [1, 2, 4]), max_cache_bytes=2 * each, **options)
    assert profile.skipped == [("float32", Cell(1, 4, 64))]
    assert profile.to_json()["skipped"] == [{"dtype": "float32", "new_tokens": 1, "rows": 4, "context": 64}]
    profile = run_profile("", shape="tiny", cells=grid([64, 65], [1], []), max_cache_bytes=each, **options)
    assert [timing.cell.context for timing in profile.timings] == [64]
    with pytest.raises(InvalidRequest, match="lower --context"):
        run_profile("", shape="tiny", cells=grid([64, 128], [1], [1]), max_cache_bytes=each - 1, **options)


def test_the_grid_is_tokens_of_one_row_and_rows_of_one_token() -> None:
    assert grid([7, 7], [2, 4], [1, 2]) == [Cell(1, 1, 7), Cell(2, 1, 7), Cell(4, 1, 7), Cell(1, 2, 7)]
    with pytest.raises(InvalidRequest, match="at least 1"):
        grid([7], [0], [1])
    with pytest.raises(InvalidRequest, match="at least 0"):
        grid([-1], [1], [1])


# ------------------------------------------------------------------------------------------------ stored tables


def test_a_saved_table_is_loaded() -> None:
    assert load_costs(KEY) is None
    path = save_costs(TABLE)
    assert path == costs_path(KEY)
    assert load_costs(KEY) == TABLE
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing is left beside it"


@pytest.mark.parametrize("field", ["model", "dtype", "backend", "machine", "threads"])
def test_a_table_is_loaded_for_its_key_only(field: str) -> None:
    save_costs(TABLE)
    other = CostKey(**{**TABLE.to_json()["key"], field: 7 if field == "threads" else "other"})
    assert costs_path(other) != costs_path(KEY)
    assert load_costs(other) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 0}', "\udcff"])
def test_a_damaged_table_is_ignored(content: str) -> None:
    save_costs(TABLE).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert load_costs(KEY) is None
    save_costs(TABLE)
    assert load_costs(KEY) == TABLE


# ------------------------------------------------------------------------------------------------ command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", "--backend", "reference", "--repeats", "1", *arguments])


def test_the_command_prints_only_json_and_saves_the_table(tmp_path: Path) -> None:
    result = run("--shape", "tiny", "--dtype", "float32", "--context", "9", "--new-tokens", "3", "--json", "-")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert {"bandwidth_gb_s", "rows"} <= set(figures)
    [table] = (tmp_path / "outrider" / "costs").iterdir()
    kept = CostTable.from_json(json.loads(table.read_text()))
    assert kept.seconds(3, 1, 9) >= kept.seconds(1, 1, 9) > 0


def test_a_cache_that_cannot_be_written_costs_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    figures = tmp_path / "figures.json"
    result = run("--shape", "tiny", "--dtype", "float32", "--context", "9", "--new-tokens", "3", "--json", str(figures))
    assert result.exit_code == 0, result.output
    assert "not kept for the scheduler: " in result.output and "XDG_CACHE_HOME" in result.output
    assert json.loads(figures.read_text())["rows"]


@pytest.mark.skipif(native is None, reason="the native core is not built")
def test_greedy_passes_are_timed_and_no_table_is_kept(tmp_path: Path) -> None:
    asked = ["--shape", "tiny", "--dtype", "int8", "--context", "9", "--new-tokens", "3", "--greedy"]
    result = run(*asked, "--backend", "native", "--json", "-")
    assert result.exit_code == 0, result.output
    assert {row["new_tokens"] for row in json.loads(result.stdout)["rows"]} == {1, 3}
    assert not (tmp_path / "outrider" / "costs").exists()


def test_the_command_shows_a_table_and_bars() -> None:
    result = run("--shape", "tiny", "--dtype", "float32", "--context", "9", "--rows", "2")
    assert result.exit_code == 0, result.output
    assert "read bandwidth" in result.output and "█" in result.output and "kept for the scheduler" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama-110"], "did you mean 'llama-110m'"),
        (["--shape", "tiny", "--dtype", "float16"], "float16"),
        (["--model", "/nowhere"], "no such model directory"),
        (["--shape", "tiny", "--greedy"], "leave out --greedy"),
        (["--shape", "tiny", "--context", "200000", "--new-tokens", "1"], "lower --context"),
    ],
)
def test_invalid_profiles_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
