"""Cost tables: what was measured comes back, more work never costs less, and files round-trip."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import InvalidRequest
from outrider.scheduling.costs import CostKey, CostPoint, CostTable, isotonic

KEY = CostKey("llama-768x12", "float32", "native", "some processor", 2)


def table(*points: tuple[int, int, int, float]) -> CostTable:
    return CostTable(KEY, tuple(CostPoint(*p) for p in points))


def linear_cost(tokens: int, rows: int, context: int) -> float:
    """Weights are read once, tokens cost arithmetic, every row reads its own cache, more tokens more attention."""
    each = context / rows
    return 0.015 + 2e-4 * tokens + 1e-6 * each + 1e-8 * each * tokens + (rows - 1) * (1e-4 + 1e-6 * each)


measured = table(
    *(
        (tokens * rows, rows, context * rows, linear_cost(tokens * rows, rows, context * rows))
        for context in (256, 1024, 4096)
        for tokens, rows in [*((m, 1) for m in (1, 2, 4, 8, 16, 32, 64)), *((1, r) for r in (2, 4, 8, 16))]
    )
)


@pytest.mark.parametrize("point", measured.target)
def test_measured_passes_come_back(point: CostPoint) -> None:
    assert measured.seconds(point.tokens, point.rows, point.context) == pytest.approx(point.seconds)


@given(st.integers(1, 300), st.integers(1, 64), st.integers(256, 20_000))
def test_a_cost_that_is_linear_is_known_everywhere(tokens: int, rows: int, each: int) -> None:
    """Inside the grid and beyond it; rows were measured with one token each, so the rest is interpolation."""
    tokens = max(tokens, rows)
    got = measured.seconds(tokens, rows, rows * each)
    assert got == pytest.approx(linear_cost(tokens, rows, rows * each), rel=1e-9)


def test_beyond_the_points_the_upper_half_goes_on() -> None:
    """The last two lie close together, at the edge of a tile, and were measured the wrong way round."""
    costs = table((1, 1, 0, 0.007), (16, 1, 0, 0.02), (32, 1, 0, 0.04), (64, 1, 0, 0.082), (65, 1, 0, 0.08))
    assert costs.seconds(256, 1, 0) == pytest.approx(0.32, rel=0.05)


rng = st.floats(1e-4, 1e-1)
noisy_tables = st.builds(
    lambda single, several: table(
        *((m, 1, c, s) for (m, c), s in single.items()), *((m * r, r, c * r, s) for (m, r, c), s in several.items())
    ),
    st.dictionaries(
        st.tuples(st.sampled_from([1, 2, 3, 8, 20]), st.sampled_from([0, 100, 5000])), rng, min_size=1, max_size=12
    ),
    st.dictionaries(
        st.tuples(st.sampled_from([1, 3]), st.sampled_from([2, 5, 16]), st.sampled_from([0, 700])), rng, max_size=8
    ),
)


@given(
    noisy_tables, st.integers(1, 80), st.integers(0, 9000), st.integers(1, 20), st.integers(0, 40), st.integers(0, 9000)
)
def test_more_work_never_costs_less_whatever_the_noise(
    costs: CostTable, tokens: int, context: int, rows: int, more_tokens: int, more_context: int
) -> None:
    tokens = max(tokens, rows)
    least = costs.seconds(tokens, rows, context)
    assert least > 0
    slack = 1 + 1e-9
    assert costs.seconds(tokens + more_tokens, rows, context) * slack >= least
    assert costs.seconds(tokens, rows, context + more_context) * slack >= least
    # One more row with a context of its own, like the others'.
    assert costs.seconds(tokens + 1, rows + 1, context // rows * (rows + 1)) * slack >= costs.seconds(
        tokens, rows, context // rows * rows
    )


def test_an_empty_pass_costs_nothing_and_few_tokens_cannot_be_many_rows() -> None:
    assert measured.seconds(0) == 0.0
    assert measured.seconds(2, 8, 512) == measured.seconds(2, 2, 512)


def test_steps_between_measured_points_are_straight_and_repeated_points_are_averaged() -> None:
    costs = table((1, 1, 0, 0.010), (4, 1, 0, 0.012), (4, 1, 0, 0.020))
    assert costs.seconds(4) == pytest.approx(0.016)
    assert costs.seconds(2) == pytest.approx(0.012)
    assert costs.seconds(7) == pytest.approx(0.022)  # the last slope goes on


def test_a_step_down_is_pooled() -> None:
    costs = table((1, 1, 0, 0.010), (2, 1, 0, 0.014), (4, 1, 0, 0.012), (8, 1, 0, 0.020))
    assert costs.seconds(2) == costs.seconds(3) == costs.seconds(4) == pytest.approx(0.013)


@given(st.lists(st.floats(-10, 10), max_size=9), st.lists(st.floats(0, 5), min_size=9, max_size=9), st.integers(0, 5))
def test_isotonic_is_the_nearest_sequence_that_never_falls(values: list[float], steps: list[float], at: int) -> None:
    fitted = np.array(isotonic(values))
    assert (np.diff(fitted) >= -1e-12).all()
    assert np.sum(fitted) == pytest.approx(np.sum(values))
    other = np.cumsum(steps)[: len(values)] - at  # any other such sequence is no nearer
    assert np.sum((fitted - values) ** 2) <= np.sum((other - values) ** 2) + 1e-9


def test_json_round_trip() -> None:
    costs = table((1, 1, 0, 0.01), (8, 8, 80, 0.02))
    kept = {**costs.to_json(), "drafters": {}}  # which earlier versions wrote
    again = CostTable.from_json(json.loads(json.dumps(kept)))
    assert again == costs
    assert again.seconds(5, 3, 30) == costs.seconds(5, 3, 30)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda value: [], "no cost table"),
        (lambda value: value.pop("target") and value, "no cost table"),
        (lambda value: value | {"version": 0}, "version 0"),
        (lambda value: value | {"key": {}}, "no cost table"),
        (lambda value: value | {"target": [{"tokens": 1}]}, "no cost table"),
        (lambda value: value | {"target": []}, "passes of one row"),
        (lambda value: value | {"target": [{"tokens": 1, "rows": 1, "context": 0, "seconds": 0}]}, "seconds > 0"),
        (lambda value: value | {"target": [{"tokens": 1, "rows": 2, "context": 0, "seconds": 1}]}, "rows <= tokens"),
        (lambda value: value | {"target": [{"tokens": "1", "rows": 1, "context": 0, "seconds": 1}]}, "no cost table"),
    ],
)
def test_what_is_no_cost_table_is_refused(spoil: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        CostTable.from_json(spoil(table((1, 1, 0, 0.01)).to_json()))
