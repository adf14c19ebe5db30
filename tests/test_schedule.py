"""Scheduling and learning in the compiled core: the same decisions as in numpy, for any drafts and costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core import native
from outrider.scheduling import acceptance as acceptance_module
from outrider.scheduling import schedule as schedule_module
from outrider.scheduling.acceptance import AcceptanceModel, SurvivalHistory
from outrider.scheduling.schedule import FORMS, schedule

pytestmark = pytest.mark.skipif(native is None, reason="needs the compiled core")

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0, float("nan"))


class RowByRow(AcceptanceModel):
    """``adjust`` by the C library's functions, as the core has them: numpy's own may differ in the last bit."""

    def adjust(self, confidence: Any, slots: Any, drafts: int) -> Any:
        said = [None] * len(slots) if confidence is None else confidence.tolist()
        rows = [self.adjust_row(row, slot, drafts) for row, slot in zip(said, slots.tolist(), strict=True)]
        return np.array([z for z, _ in rows]).reshape(-1, drafts), np.array([p for _, p in rows]).reshape(-1, drafts)


def learnt(rng: np.random.Generator, model: AcceptanceModel, rows: int, drafts: int) -> AcceptanceModel:
    model.forget_row(np.arange(rows))
    for _ in range(3):
        kept = rng.integers(0, drafts + 1, rows)
        logits = rng.normal(size=(rows, drafts))
        adjusted = 1 / (1 + np.exp(-logits))
        model.update(logits, adjusted, np.arange(rows), kept, rng.integers(0, kept + 1))
    return model


@given(st.integers(0, 10**6), st.sampled_from(FORMS), st.booleans(), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_core_decides_as_numpy_does(
    seed: int, form: Any, tied: bool, confident: bool, one_each: bool, first: bool
) -> None:
    """Bit for bit: jagged costs, ties, rows without drafts, rows behind those that may draft, slots in any order."""
    rng = np.random.default_rng(seed)
    ready, drafts = int(rng.choice([1, 2, 5, 40])), int(rng.integers(1, 9))
    batch = ready + int(rng.integers(0, 3))
    said = rng.choice(LEVELS, (batch, drafts)) if tied else rng.random((batch, drafts))
    lengths = rng.integers(0, drafts + 1, batch)
    lengths[0] = max(1, lengths[0])
    steps = rng.random(ready * drafts + 1) * rng.choice([0.05, 1.0, 5.0], ready * drafts + 1)
    past = None if first else (np.sort(rng.random((3, 4)), axis=1)[:, ::-1].copy(), int(rng.integers(3, 9)))
    model = learnt(rng, RowByRow(drafts), ready + 2, drafts)
    limits, slots = rng.integers(0, drafts + 1, ready).tolist(), rng.permutation(ready + 2)[:ready]
    confidence = said.astype(np.float32) if confident else None

    def decide() -> Any:
        return schedule(
            confidence, lengths, slots, limits, model, 1 + np.cumsum(steps), 0.3, form, past,
            drafts=drafts, one_each=one_each,
        )  # fmt: skip

    keep, round = decide()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule_module, "native", None)
        expected_keep, expected = decide()
    assert keep.tolist() == expected_keep.tolist()
    assert round.numbers.tolist() == expected.numbers.tolist()
    assert np.array_equal(round.survival, expected.survival)
    there = np.arange(drafts) < round.numbers[:, 2:3]
    assert np.array_equal(round.chances[:, there], expected.chances[:, there])


def test_many_rows_are_ranked_as_numpy_ranks_them() -> None:
    """Ties and sure drafts over several hundred rows; the walk ends where passes become dear."""
    rng = np.random.default_rng(0)
    said = np.where(rng.random((512, 8)) < 0.5, 0.999, rng.choice(LEVELS, (512, 8))).astype(np.float32)
    model, lengths = RowByRow(8), rng.integers(1, 9, 512)
    model.forget_row(np.arange(512))
    for dear in (1, 17, 300, 2000, 4000):
        seconds = np.where(np.arange(512 * 8 + 1) <= dear, 1.0, 1000.0)
        given = (said, lengths, np.arange(512), 8, model, seconds, 0.0, "early", None)
        keep, _ = schedule(*given, drafts=8)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedule_module, "native", None)
            assert keep.tolist() == schedule(*given, drafts=8)[0].tolist()  # type: ignore[arg-type]
        if dear <= 300:
            assert keep.sum() == dear


@pytest.mark.parametrize("core", [True, False])
def test_a_confidence_that_is_no_number_spoils_nothing(core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as the least likely draft, and what is learnt of its round are numbers."""
    if not core:
        monkeypatch.setattr(schedule_module, "native", None)
        monkeypatch.setattr(acceptance_module, "native", None)
    model = AcceptanceModel(2)
    model.forget_row(np.arange(1))
    said = np.array([[np.nan, 0.9]], dtype=np.float32)
    seconds = np.array([1.0, 1.1, 1.2])
    _, round = schedule(
        said, np.array([2]), np.arange(1), 2, model, seconds, 0.0, "global", None, drafts=2, one_each=True
    )
    assert round.chances[1, 0, 0] < 0.001
    logits, adjusted, _ = round.chances
    model.update(logits, adjusted, np.array([0]), np.array([2]), np.array([1]))
    assert all(np.isfinite(part).all() for part in model.corrections(2))


@pytest.mark.parametrize("form", ["early", "global"])
@pytest.mark.parametrize("core", [True, False])
def test_costs_that_are_no_numbers_verify_nothing(form: Any, core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not core:
        monkeypatch.setattr(schedule_module, "native", None)
    model = AcceptanceModel(2)
    model.forget_row(np.arange(1))
    keep, _ = schedule(None, np.array([2]), np.arange(1), 2, model, np.full(3, np.nan), 0.0, form, None, drafts=2)
    assert keep.tolist() == [0]


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_core_learns_as_numpy_does(seed: int) -> None:
    """Several rounds of one slot, parts of larger arrays, limits shorter than the block."""
    rng = np.random.default_rng(seed)
    drafts, block = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    rounds = []
    for _ in range(4):
        count = int(rng.integers(1, 17))
        lengths = rng.integers(1, drafts + 1, count)
        kept = rng.integers(0, lengths + 1)
        rounds.append((
            rng.integers(0, 5, count), rng.normal(size=(2 * count, drafts))[::2], lengths,
            np.maximum(lengths, rng.integers(0, drafts + 1, count)), kept, rng.integers(0, kept + 1),
        ))  # fmt: skip

    def learn() -> tuple[AcceptanceModel, SurvivalHistory]:
        model, history = AcceptanceModel(block), SurvivalHistory(block)
        model.forget_row(np.arange(5))
        for slots, logits, lengths, limits, kept, accepted in rounds:
            _, adjusted = model.adjust(np.float32(1) / (1 + np.exp(-logits)).astype(np.float32), slots, drafts)
            model.update(logits, adjusted, slots, kept, accepted)
            there = adjusted * (np.arange(drafts) < lengths[:, None])
            history.add(slots, adjusted, np.cumprod(there, axis=1, dtype=np.float64), lengths, limits)
        return model, history

    found = learn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance_module, "native", None)
        expected = learn()
    for one, other in zip(found, expected, strict=True):
        for name, value in vars(other).items():
            assert np.allclose(vars(one)[name], value, rtol=1e-9, atol=1e-12), name


def test_the_core_refuses_what_does_not_fit() -> None:
    model = AcceptanceModel(3)
    model.forget_row(np.arange(2))
    said, seconds = np.full((2, 3), 0.5, dtype=np.float32), np.ones(7)

    def decide(lengths: list[int], slots: list[int], seconds: Any) -> Any:
        return schedule(said, np.array(lengths), np.array(slots), 3, model, seconds, 0.0, "early", None, drafts=3)

    assert decide([3, 3], [0, 1], seconds)[0].tolist() == [3, 3]
    for lengths, slots, costs, message in (
        ([4, 3], [0, 1], seconds, "row 0 has 4 drafts, expected 0 to 3"),
        ([3, 3], [0, 2], seconds, "slot 2 has no correction"),
        ([3, 3], [0, 1], seconds[:6], "seconds are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            decide(lengths, slots, costs)
