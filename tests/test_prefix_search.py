"""Algorithm 1 of the DSpark paper: against exact numbers computed elsewhere, by enumeration, and Appendix A."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.scheduling.prefix_search import Search, best_count, rank, survivals


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    file = shared / "golden" / "scheduler_golden.json"
    if not file.exists():
        pytest.skip("no numbers for the scheduler here")
    return json.loads(file.read_text())


def search(confidence: Any, sps: Any, how: Search) -> tuple[list[int], float]:
    """Lengths, and the throughput they have by the definition: tau x SPS(B)."""
    given = np.array(confidence, dtype=np.float64)
    rows, drafts = given.shape
    a = survivals(given, np.full(rows, drafts))
    ranking = rank(a)
    count = best_count(rows, ranking.survival, 1 / np.array(sps)[rows - 1 :], how)
    lengths = ranking.keep(count).tolist()
    tau = rows + sum(a[b, :n].sum() for b, n in enumerate(lengths))
    return lengths, tau * sps[rows + sum(lengths) - 1]


@pytest.mark.parametrize("how", ["early", "global"])
def test_meets_exact_numbers(golden: dict[str, Any], how: Search) -> None:
    assert len(golden["cases"]) >= 39
    for case in golden["cases"]:
        expected = case["early_stop" if how == "early" else "no_early_stop"]
        lengths, throughput = search(case["confidence"], case["sps"], how)
        assert lengths in expected["lengths_under_any_tie_order"], case["name"]
        assert throughput == pytest.approx(expected["throughput"], rel=1e-12), case["name"]


confidences = st.integers(1, 3).flatmap(
    lambda rows: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.99, 1.0]), min_size=3, max_size=3),
        min_size=rows,
        max_size=rows,
    )
)
curves = st.lists(st.floats(0.01, 2.0), min_size=9, max_size=9)


@given(confidences, curves)
@settings(max_examples=200, deadline=None)
def test_the_global_search_is_the_best_of_all_lengths(confidence: list[list[float]], steps: list[float]) -> None:
    """For any costs, jagged ones too: no other choice of lengths is better."""
    rows = len(confidence)
    sps = 1 / np.cumsum([1.0] * rows + steps)
    _, found = search(confidence, sps, "global")
    a = np.cumprod(np.array(confidence), axis=1)
    for lengths in itertools.product(range(4), repeat=rows):
        tau = rows + sum(a[b, :n].sum() for b, n in enumerate(lengths))
        assert tau * sps[rows + sum(lengths) - 1] <= found * (1 + 1e-9)


@given(confidences, curves, st.data())
@settings(max_examples=300, deadline=None)
def test_the_early_stop_and_a_budget_do_not_anticipate(
    confidence: list[list[float]], steps: list[float], data: st.DataObject
) -> None:
    """(keep[b] >= j) does not move when confidences of row b from j on, or its length beyond j, change."""
    rows = len(confidence)
    seconds = np.cumsum([1.0] * rows + steps)[rows - 1 :]
    budget = data.draw(st.integers(0, 9))

    def early(c: np.ndarray, lengths: np.ndarray) -> list[int]:
        ranking = rank(survivals(c, lengths))
        return ranking.keep(best_count(rows, ranking.survival, seconds)).tolist()

    def budgeted(c: np.ndarray, lengths: np.ndarray) -> list[int]:
        return rank(survivals(c, lengths)).keep(budget).tolist()

    row, j = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, 2))
    tail = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=3 - j, max_size=3 - j))
    before = np.array(confidence)
    after = before.copy()
    after[row, j:] = tail
    whole, shorter = np.full(rows, 3), np.full(rows, 3)
    shorter[row] = data.draw(st.integers(j, 3))
    for choose in (early, budgeted):
        kept = choose(before, whole)[row]
        assert min(choose(after, whole)[row], j) == min(kept, j)
        assert min(choose(before, shorter)[row], j) == min(kept, j)


def _first_token(lengths_of: Callable[[float], int]) -> dict[str, float]:
    """Appendix A, exactly: the target says A with 0.7, B with 0.3; the drafter says either with one half and is
    accepted with 0.8; after A its second draft is sure (0.9), after B hopeless (0)."""
    target, draft = {"A": 0.7, "B": 0.3}, {"A": 0.5, "B": 0.5}
    text = {"A": 0.0, "B": 0.0}
    for token, second in (("A", 0.9), ("B", 0.0)):
        if lengths_of(second):
            accept = min(1.0, target[token] / draft[token])
            text[token] += draft[token] * accept
            text["A"] += draft[token] * (1 - accept)  # the residual max(p - q, 0) is all on A
        else:  # plain decoding: the draft is not looked at
            for name, p in target.items():
                text[name] += draft[token] * p
    return text


def test_appendix_a() -> None:
    """The early stop keeps 0.7 / 0.3; a search that looks past the dip makes it 0.85 / 0.15."""
    sps = [1.0, 0.5, 0.45]

    def lengths(how: Search) -> Callable[[float], int]:
        return lambda second: search([[0.8, second]], sps, how)[0][0]

    assert [lengths("early")(second) for second in (0.9, 0.0)] == [0, 0]
    assert _first_token(lengths("early")) == pytest.approx({"A": 0.7, "B": 0.3})
    assert [lengths("global")(second) for second in (0.9, 0.0)] == [2, 0]
    assert _first_token(lengths("global")) == pytest.approx({"A": 0.85, "B": 0.15})


def test_many_rows_in_order() -> None:
    """1,024 rows of 8: what the ranking says is what sorting says."""
    a = survivals(np.random.default_rng(0).uniform(0.2, 1.0, (1024, 8)), np.full(1024, 8))
    ranking = rank(a)
    assert np.array_equal(ranking.survival, np.sort(a.ravel())[::-1])
    assert np.array_equal(a[ranking.rows, ranking.positions], ranking.survival)
    assert ranking.keep(5000).sum() == 5000
