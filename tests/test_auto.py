"""What ``auto`` means for the packaged target: measured once, remembered, measured anew when something changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider import LLM
from outrider.engine import auto
from outrider.models.locations import resolve_model

DRAFTERS = ("dspark", "dflash", "eagle3")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(auto, "TOKENS", 4)
    return tmp_path / "outrider" / "choices"


def test_the_fastest_is_measured_once(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = LLM("embedded").drafter_name
    (file,) = kept.iterdir()
    found = json.loads(file.read_text())
    speedups = found["speedup_over_plain"]

    fastest = found["fastest"]
    assert fastest == max(speedups, key=lambda name: speedups[name])
    assert first == fastest
    assert set(speedups) == {"none", "suffix", "draft_model", *DRAFTERS}
    monkeypatch.setattr(auto, "_measure", lambda *args: pytest.fail("measured again"))
    assert LLM("embedded").drafter_name == first


def test_plain_decoding_wins_where_nothing_is_faster(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = {"none": 1.0, "suffix": 0.9, "draft_model": 0.8}
    monkeypatch.setattr(auto, "_measure", lambda *args: slower)
    assert LLM("embedded").drafter_name == "none"


def test_what_loses_at_one_temperature_is_not_taken() -> None:
    class Side:
        """Twice as fast greedily; sampled, as it is told."""

        def __init__(self, sampled: float) -> None:
            self.sampled = sampled

        def forget(self) -> None: ...
        def generate(self, prompts: Any, params: Any = None) -> Any:
            seconds = 1.0 if self.sampled == 1 else 1 / (self.sampled if params.temperature else 2.0)
            return [SimpleNamespace(stats=SimpleNamespace(seconds=seconds))]

    sides = {"none": 1.0, "loses": 0.9, "gains": 1.125}
    found = auto._measure(["a"], lambda name: Side(sides[name]), list(sides), lambda act: act())
    assert found == {"none": 1.0, "loses": 0.9, "gains": 1.5}


def test_a_damaged_memory_is_measured_anew(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "_measure", lambda *args: {"none": 1.0, "suffix": 2.0})
    LLM("embedded")
    (file,) = kept.iterdir()
    file.write_text("{broken")
    assert LLM("embedded").drafter_name == "suffix"
    assert json.loads(file.read_text())["fastest"] == "suffix"


def test_an_engine_that_starts_at_once_measures_later(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual drafter and a short table first; measured piece by piece, and kept for the next start."""
    llm = LLM("embedded", measure=False)
    assert llm.drafter_name == "draft_model" and not (kept.parent / "choices").exists()
    costs = llm.policy.costs
    short = costs.table
    assert short is not None and not (kept.parent / "costs").exists()
    pieces = []

    def alone(act: Callable[[], Any]) -> Any:
        pieces.append(act)
        return act()

    llm.measure(alone)
    assert len(pieces) > 100 and costs.table != short
    assert json.loads(next(kept.iterdir()).read_text())["fastest"] == LLM("embedded", measure=False).drafter_name
    pieces.clear()
    llm.measure(alone)
    assert len(pieces) == 1, "the core's tuning, which is not measured twice"


@pytest.mark.parametrize("kind", DRAFTERS)
def test_packaged_drafters_draft_for_the_packaged_target(kind: str) -> None:
    llm = LLM("embedded", kind)
    output = llm.generate("Question: Tom has 3 boxes with 4 pens each. How many pens has he?\nAnswer:")[0]
    assert output.stats.drafted > 0 and output.stats.accepted > 0
    card = (resolve_model(f"embedded-{kind}") / "README.md").read_text()
    assert "what is written is the target's own" in card and "in less time" not in card and "only comes" not in card


def test_packaged_drafters_are_small() -> None:
    files = [file for kind in DRAFTERS for file in resolve_model(f"embedded-{kind}").iterdir()]
    assert sum(file.stat().st_size for file in files) < 20_000_000
