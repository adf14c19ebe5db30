"""Cost tables at the start: measured once, kept by what they depend on, and used only while passes agree with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest

from outrider.engine import cost_tables
from outrider.engine.cost_tables import (
    cost_key,
    costs_path,
    feature_share,
    keep_costs,
    kept_costs,
    load_costs,
    quick_costs,
    save_costs,
    start_costs,
)
from outrider.models.loading import load_target
from outrider.scheduling.costs import CostPoint, CostTable
from outrider.types import TargetModel


@pytest.fixture(scope="module")
def target(tiny_model_dir: Path) -> TargetModel:
    return load_target(str(tiny_model_dir), dtype="float32")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_measuring_is_bounded(target: TargetModel) -> None:
    began = perf_counter()
    table = quick_costs(target, cost_key(target, "float32"), rows=8, tokens=72, seconds=0.5)
    assert perf_counter() - began < 5.0  # what was promised, on any machine that runs tests
    tokens = {point.tokens for point in table.target if point.rows == 1}
    assert {1, 8, 16, 17, 64} <= tokens and max(tokens) <= 72, "the edges of tiles among them"
    assert {point.rows for point in table.target} == {1, 2, 4, 8}


def test_a_kept_table_is_used_while_passes_agree_with_it(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = start_costs(target, "float32", rows=2, tokens=16)
    assert load_costs(measured.key) == measured
    monkeypatch.setattr(cost_tables, "SAME_SHAPE", 50.0)  # a busy machine is not what is tested
    monkeypatch.setattr(cost_tables, "SAME_SPEED", 50.0)
    assert start_costs(target, "float32", rows=2, tokens=16) == measured
    wrong = replace(measured, target=tuple(replace(p, seconds=1000 * p.seconds) for p in measured.target))
    save_costs(wrong)
    assert start_costs(target, "float32", rows=2, tokens=16) != wrong, "no busy machine is a thousand times faster"
    costs_path(measured.key).write_text("{broken")
    assert start_costs(target, "float32", rows=2, tokens=16).key == measured.key


def test_a_kept_table_that_ends_too_soon_is_measured_again(target: TargetModel) -> None:
    short = start_costs(target, "float32", rows=2, tokens=8)
    assert max(point.tokens for point in short.target) == 8
    again = start_costs(target, "float32", rows=8, tokens=64)
    assert max(point.tokens for point in again.target) == 64 and load_costs(again.key) == again
    more = start_costs(target, "float32", rows=32, tokens=64)
    assert max(point.rows for point in more.target) == 32


def test_a_coarse_table_is_measured_again_and_does_not_replace_a_finer_one(target: TargetModel) -> None:
    key = cost_key(target, "float32")
    coarse = CostTable(key, tuple(CostPoint(m, r, 64 * r, 0.01) for m, r in ((1, 1), (4, 1), (16, 1), (2, 2))))
    assert keep_costs(coarse) == costs_path(key)
    fine = start_costs(target, "float32", rows=2, tokens=16)
    assert {3, 5, 6} < {point.tokens for point in fine.target}
    assert keep_costs(coarse) is None and load_costs(key) == fine


def test_a_table_of_slow_passes_is_used_though_it_has_few(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_tables, "_fits", lambda table, target: True)
    slow = CostTable(cost_key(target, "float32"), (CostPoint(1, 1, 64, 0.5), CostPoint(4, 1, 64, 0.6)))
    save_costs(slow)
    assert kept_costs(target, "float32", rows=8, tokens=16) == slow
    assert kept_costs(target, "float32", rows=8, tokens=17) is None


def test_what_features_cost_is_measured(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert feature_share(target, ()) == 0.0
    assert 0 <= feature_share(target, (0,)) <= 0.5
    noise = iter([0.001, 0.0011, 0.0008, 0.0012] * 20)  # a busy machine, where neither is certainly slower
    monkeypatch.setattr(cost_tables, "_time", lambda *given: next(noise))
    assert feature_share(target, (0,)) == 0.0
    monkeypatch.setattr(cost_tables, "_time", lambda *given: 0.0012 if given[-1] else 0.001)
    assert feature_share(target, (0,)) == pytest.approx(0.2)


def test_a_key_holds_whatever_changes_the_costs(target: TargetModel) -> None:
    key = cost_key(target, "auto")
    assert key.dtype == "float32" and key == cost_key(target, "float32")
    table = CostTable(key, (CostPoint(1, 1, 0, 0.01),))
    save_costs(table)
    for other in (
        replace(key, dtype="int8"),
        replace(key, threads=key.threads + 1),
        replace(key, instruction_set="avx9"),
        replace(key, machine="another"),
        replace(key, model="another"),
        replace(key, backend="another"),
    ):
        assert load_costs(other) is None
    assert load_costs(key) == table
