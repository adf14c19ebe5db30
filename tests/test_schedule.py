"""Scheduling, planning and learning in the compiled core: the same decisions as in numpy, for any drafts and costs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core import native
from outrider.scheduling import acceptance as acceptance_module
from outrider.scheduling.acceptance import AcceptanceModel, DraftHistory
from outrider.scheduling.prefix_search import SEARCHES
from outrider.scheduling.schedule import NumpyScheduler, RoundScheduler, Scheduler

pytestmark = pytest.mark.skipif(native is None, reason="needs the compiled core")

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0, float("nan"))
EARLY, GLOBAL = SEARCHES.index("early"), SEARCHES.index("global")
CORES = (True, False)


@pytest.fixture
def libm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials and logarithms by the C library, as the core has them: numpy's own may differ in the last bit."""

    def exponential(logits: Any) -> Any:
        return np.array([1 / (1 + math.exp(-z)) for z in np.ravel(logits).tolist()]).reshape(np.shape(logits))

    def adjust(self: AcceptanceModel, confidence: Any, slots: Any, drafts: int) -> Any:
        said = [None] * len(slots) if confidence is None else confidence.tolist()
        rows = [self.adjust_row(row, slot, drafts) for row, slot in zip(said, slots.tolist(), strict=True)]
        return np.array([z for z, _ in rows]).reshape(-1, drafts), np.array([p for _, p in rows]).reshape(-1, drafts)

    monkeypatch.setattr(acceptance_module, "sigmoid", exponential)
    monkeypatch.setattr(AcceptanceModel, "adjust", adjust)


def scheduler(drafts: int, rows: int, core: bool = True) -> Scheduler:
    made = Scheduler(drafts, core=core)
    made.forget_rows(np.arange(rows))
    return made


def learnt(rng: np.random.Generator, drafts: int, rows: int) -> Scheduler:
    """A scheduler in the core that has a past, with rounds of every length and limit."""
    made = scheduler(drafts, rows)
    for turn in range(int(rng.integers(1, 12))):
        lengths = rng.integers(0, drafts + 1, rows)
        limits = np.maximum(lengths, rng.integers(0, drafts + 1, rows)).tolist()
        said = rng.random((rows, drafts)).astype(np.float32)
        seconds = np.linspace(1, 2, rows * drafts + 1)
        keep = made.rounds.schedule(said, lengths.tolist(), list(range(rows)), limits, seconds, 0.1, GLOBAL, 1)
        made.rounds.accept(rng.integers(0, np.array(keep) + 1).tolist(), list(range(rows)), limits, True)
        made.rounds.learn(turn)
    return made


@given(
    st.integers(0, 10**6), st.sampled_from(range(3)), st.booleans(), st.booleans(), st.integers(0, 2), st.integers(0, 3)
)
@settings(max_examples=300, deadline=None)
@pytest.mark.usefixtures("libm")
def test_the_core_decides_as_numpy_does(
    seed: int, search: int, tied: bool, confident: bool, at_least: int, before: int
) -> None:
    """Bit for bit: jagged costs, ties, rows without drafts, rows behind those that may draft, slots in any order."""
    rng = np.random.default_rng(seed)
    ready, drafts = int(rng.choice([1, 2, 5, 40])), int(rng.integers(1, 9))
    made = learnt(rng, drafts, ready + 2)
    fresh, numpy, history = native.Scheduler(), NumpyScheduler(made.acceptance, made.history), made.history
    fresh.bind(*made.acceptance.arrays(drafts), history.logits, history.sizes, history.counts, history.shared,
               history.shared_sizes, history.shared_count)  # fmt: skip
    for _ in range(before + 1):
        batch = ready + int(rng.integers(0, 3))
        said = rng.choice(LEVELS, (batch, drafts)) if tied else rng.random((batch, drafts))
        lengths = rng.integers(0, drafts + 1, batch)
        lengths[0] = max(1, lengths[0])
        seconds = 1 + np.cumsum(rng.random(ready * drafts + 1) * rng.choice([0.05, 1.0, 5.0], ready * drafts + 1))
        limits, slots = rng.integers(0, drafts + 1, ready).tolist(), rng.permutation(ready + 2)[:ready].tolist()
        confidence = said.astype(np.float32) if confident else None
        found = []
        for core in (fresh, numpy):
            keep = core.schedule(confidence, lengths.tolist(), slots, limits, seconds, 0.3, search, at_least)
            rows, numbers = core.latest()
            there = (np.arange(max(lengths) if confidence is None else drafts) < np.array(rows)[:, 2:3]).ravel()
            found.append((keep, rows, [np.array(part)[there].tolist() for part in numbers]))
        assert found[0] == found[1]


@given(st.integers(0, 10**6), st.sampled_from([-1, *range(3)]), st.booleans())
@settings(max_examples=150, deadline=None)
@pytest.mark.usefixtures("libm")
def test_the_core_plans_as_numpy_does(seed: int, search: int, dips: bool) -> None:
    """Bit for bit, also where some rows stand for all."""
    rng = np.random.default_rng(seed)
    rows, drafts = int(rng.choice([1, 2, 5, 40, 150])), int(rng.integers(1, 8))
    made = learnt(rng, drafts, rows)
    steps = rng.random(rows * drafts + 1) * rng.choice([0.02, 0.5], rows * drafts + 1)
    seconds = 1 + (np.cumsum(steps) if not dips else rng.random(rows * drafts + 1))
    each, fixed, spared = rng.random(3) * 0.3

    def draft(rows: int, drafts: int) -> float:
        return float(fixed + each * drafts + 0.001 * rows)

    slots = rng.permutation(rows)[: int(rng.integers(1, rows + 1))].tolist()
    lengths = sorted({1, (drafts + 1) // 2, drafts})
    known = (slots, rows, int(rng.integers(1, 17)), seconds, rows / seconds[0])
    given = (*known, lengths, draft, seed % 1000, search, spared)
    expected = NumpyScheduler(made.acceptance, made.history).plan(*given)
    found = made.rounds.plan(*given)
    assert tuple(found[:3]) == expected[:3] and list(found[3]) == list(expected[3])


@pytest.mark.usefixtures("libm")
def test_many_rows_are_ranked_as_numpy_ranks_them() -> None:
    """Ties and sure drafts over several hundred rows; the walk ends where passes become dear."""
    rng = np.random.default_rng(0)
    said = np.where(rng.random((512, 8)) < 0.5, 0.999, rng.choice(LEVELS, (512, 8))).astype(np.float32)
    made, lengths = scheduler(8, 512), rng.integers(1, 9, 512).tolist()
    numpy = NumpyScheduler(made.acceptance, made.history)
    for dear in (1, 17, 300, 2000, 4000):
        seconds = np.where(np.arange(512 * 8 + 1) <= dear, 1.0, 1000.0)
        cores: tuple[RoundScheduler, ...] = (made.rounds, numpy)
        kept = [core.schedule(said, lengths, range(512), [8] * 512, seconds, 0.0, EARLY, 0) for core in cores]
        assert kept[0] == kept[1]
        if dear <= 300:
            assert sum(kept[0]) == dear


@pytest.mark.parametrize("core", CORES)
def test_a_confidence_that_is_no_number_spoils_nothing(core: bool) -> None:
    """It counts as the least likely draft, and what is learnt of its round are numbers."""
    made = scheduler(2, 1, core)
    said = np.array([[np.nan, 0.9]], dtype=np.float32)
    assert made.rounds.schedule(said, [2], [0], [2], np.array([1.0, 1.1, 1.2]), 0.0, GLOBAL, 1) == [1]
    assert made.rounds.latest()[1][1][0] < 0.001  # type: ignore[attr-defined]
    made.rounds.accept([1], [0], [2], True)
    made.rounds.learn(0)
    assert all(np.isfinite(part).all() for part in made.acceptance.arrays(2))


@pytest.mark.parametrize("search", [EARLY, GLOBAL])
@pytest.mark.parametrize("core", CORES)
def test_costs_that_are_no_numbers_verify_nothing(search: int, core: bool) -> None:
    made = scheduler(2, 1, core)
    assert made.rounds.schedule(None, [2], [0], [2], np.full(3, np.nan), 0.0, search, 0) == [0]


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_core_learns_as_numpy_does(seed: int) -> None:
    """Several rounds of one slot, drafts fewer than the block, rows that were asked and have none."""
    rng = np.random.default_rng(seed)
    block, rows = int(rng.integers(1, 9)), 5
    steps = []
    for _ in range(6):
        width = int(rng.integers(1, block + 1))
        lengths = rng.integers(0, width + 1, rows)
        steps.append((rng.random((rows, width)).astype(np.float32), lengths.tolist(),
                      np.maximum(lengths, rng.integers(0, block + 1, rows)).tolist(), rng.permutation(rows).tolist(),
                      rng.random(rows), bool(rng.random() < 0.3)))  # fmt: skip
    found = []
    for core in CORES:
        made = scheduler(block, rows, core)
        with pytest.MonkeyPatch.context() as patch:
            if not core:
                patch.setattr(acceptance_module, "native", None)
            for turn, (said, lengths, limits, slots, right, learns) in enumerate(steps):
                seconds = np.linspace(1, 2, rows * block + 1)
                keep = made.rounds.schedule(said, lengths, slots, limits, seconds, 0.1, GLOBAL, 2)
                made.rounds.accept((right * (np.array(keep) + 1)).astype(int).tolist(), slots, limits, True)
                if learns:
                    made.rounds.learn(turn)
            made.rounds.learn(0)
        found.append(made)
    for part in ("acceptance", "history"):
        for name, value in vars(getattr(found[1], part)).items():
            assert np.allclose(vars(getattr(found[0], part))[name], value, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("core", CORES)
def test_longer_drafts_than_the_block_are_learnt_from(core: bool) -> None:
    """A drafter from elsewhere may propose more than it said; what was pending is learnt first."""
    made = scheduler(2, 1, core)
    for drafts in (2, 5):
        made.widen(drafts)
        said = np.full((1, drafts), 0.9, dtype=np.float32)
        seconds = np.linspace(1, 1.1, drafts + 1)
        keep = made.rounds.schedule(said, [drafts], [0], [2], seconds, 0.0, GLOBAL, drafts)
        made.rounds.accept([drafts], [0], [2], True)
    made.rounds.learn(0)
    shifts = made.acceptance.arrays(5)[0][1]
    assert keep == [5] and (shifts > 0).all()


def test_the_core_refuses_what_does_not_fit() -> None:
    made = scheduler(3, 2)
    said, seconds = np.full((2, 3), 0.5, dtype=np.float32), np.ones(7)

    def decide(lengths: list[int], slots: list[int], seconds: Any) -> Any:
        return made.rounds.schedule(said, lengths, slots, [3, 3], seconds, 0.0, EARLY, 0)

    assert decide([3, 3], [0, 1], seconds) == [3, 3]
    for lengths, slots, costs, message in (
        ([4, 3], [0, 1], seconds, "row 0 has 4 drafts, expected 0 to 3"),
        ([3, 3], [0, 2], seconds, "slot 2 is not known"),
        ([3, 3], [0, 1], seconds[:6], "seconds are too few"),
    ):
        with pytest.raises(ValueError, match=message):
            decide(lengths, slots, costs)
    with pytest.raises(ValueError, match="accepted needs a number for each row"):
        made.rounds.accept([1], [0, 1], [3, 3], True)


def known(confidences: list[float], length: int, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A round: logits, drafts and limit."""
    p = np.array([confidences])
    return np.log(p / (1 - p)), np.array([length]), np.array([limit])


def test_positions_beyond_a_limit_are_as_likely_as_those_before_it() -> None:
    """Of the same row, as far as that holds for all rows; else a short limit would never be seen to be too short."""
    model, history, one, two = AcceptanceModel(4), DraftHistory(4), np.array([0]), np.array([1])
    model.forget_row(np.array([0, 1]))
    history.add(one, *known([0.9, 0.9], 2, 2))
    assert history.of(one, 1, 0, model)[0, 0] == pytest.approx([0.9, 0.81, 0.729, 0.6561])
    for _ in range(200):  # what positions 3 and 4 are like in general: half as likely
        history.add(two, *known([0.8, 0.8, 0.4, 0.4], 4, 4))
    history.forget_row(one)
    history.add(one, *known([0.9, 0.9], 2, 2))
    assert history.of(one, 1, 0, model)[0, 0] == pytest.approx([0.9, 0.81, 0.81 * 0.45, 0.81 * 0.45**2], rel=0.03)
    history.add(one, *known([0.9, 0.9], 2, 3))  # the drafter had no more to say
    assert history.of(one, 1, 1, model)[0, 0, 2:] == pytest.approx([0.0, 0.0])


def test_the_past_is_seen_as_corrected_now() -> None:
    """A drafter that is right far more often than it says: its first rounds do not stay as unlikely as they seemed."""
    made = scheduler(2, 1)
    seen = []
    for turn in range(30):
        said = np.full((1, 2), 0.2, dtype=np.float32)
        made.rounds.schedule(said, [2], [0], [2], np.array([1.0, 1.01, 1.02]), 0.0, GLOBAL, 2)
        made.rounds.accept([2], [0], [2], True)
        made.rounds.learn(turn)
        seen.append(made.history.of(np.array([0]), 1, 0, made.acceptance)[0, 0, 0])  # the first round
    assert seen[0] < 0.5 < 0.8 < seen[-1]


def test_a_position_never_verified_is_corrected_like_the_one_before_it() -> None:
    model, slots = AcceptanceModel(3), np.array([0])
    model.forget_row(slots)
    for _ in range(100):
        logits, adjusted = model.adjust(np.full((1, 3), 0.2, dtype=np.float32), slots, 3)
        model.update(logits, adjusted, slots, np.array([2]), np.array([2]))
    _, shifts, _, _ = model.arrays(3)[0]
    assert shifts[1] > 1 and shifts[2] == pytest.approx(shifts[1], rel=0.3)


def test_a_new_request_does_not_begin_with_the_corrections_of_the_row_before_it() -> None:
    model, slots, said = AcceptanceModel(1), np.array([0]), np.full((1, 1), 0.5, dtype=np.float32)
    for _ in range(20):
        logits, adjusted = model.adjust(said, slots, 1)
        model.update(logits, adjusted, slots, np.array([1]), np.array([0]))
    other = model.adjust(said, np.array([1]), 1)[1]
    assert model.adjust(said, slots, 1)[1] < 0.9 * other
    model.forget_row(slots)
    assert model.adjust(said, slots, 1)[1] == other
