"""Calibration: measures with known values, recovered scalings, and a correction that follows drift."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from outrider.config import SamplingParams
from outrider.errors import CheckpointError
from outrider.scheduling.calibration import (
    Calibration,
    Scaling,
    area_under_curve,
    brier,
    calibration_error,
    conditional_quality,
    error_of_chance,
    fit,
    log_loss,
    logits_of,
    reliability,
    survival_quality,
)
from outrider.scheduling.online_correction import OnlineCorrection
from outrider.types import Context, Proposal

ROUNDS, K = 12_000, 4


def rounds(seed: int = 0, n: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor]:
    """Calibrated logits, drafts verified, drafts accepted."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, K, generator=generator, dtype=torch.float64) * 1.5 + 1
    held = torch.rand(n, K, generator=generator, dtype=torch.float64) < torch.sigmoid(logits)
    return logits, torch.full((n,), K), held.long().cumprod(1).sum(1)


def worst(confidence: Tensor, verified: Tensor, accepted: Tensor) -> float:
    return max(quality.ece for quality in survival_quality(confidence, verified, accepted))


# ------------------------------------------------------------------------------------------------ measures


def test_the_calibration_error_of_two_bins_by_hand() -> None:
    probabilities, outcomes = torch.tensor([0.1, 0.3, 0.8, 0.6]), torch.tensor([False, False, True, False])
    found = reliability(probabilities, outcomes, bins=2)
    assert found.predicted.tolist() == pytest.approx([0.2, 0.7])
    assert found.observed.tolist() == [0, 0.5]
    assert found.counts.tolist() == [2, 2]
    assert found.error == pytest.approx((0.2 + 0.2) / 2)


def test_brier_and_log_loss_by_hand() -> None:
    probabilities, outcomes = torch.tensor([0.5, 0.9], dtype=torch.float64), torch.tensor([True, False])
    assert brier(probabilities, outcomes) == pytest.approx((0.25 + 0.81) / 2)
    assert log_loss(probabilities, outcomes) == pytest.approx(-(math.log(0.5) + math.log(0.1)) / 2)


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.7, 0.9]), st.booleans()), min_size=2, max_size=30).filter(
        lambda pairs: len({y for _, y in pairs}) == 2
    )
)
def test_the_area_under_the_curve_counts_pairs(pairs: list[tuple[float, bool]]) -> None:
    true, false = [p for p, y in pairs if y], [p for p, y in pairs if not y]
    wins = sum((a > b) + 0.5 * (a == b) for a in true for b in false)
    found = area_under_curve(torch.tensor([p for p, _ in pairs]), torch.tensor([y for _, y in pairs]))
    assert found == pytest.approx(wins / (len(true) * len(false)))


def test_a_single_kind_of_outcome_has_no_area() -> None:
    assert math.isnan(area_under_curve(torch.tensor([0.1, 0.9]), torch.tensor([True, True])))


@given(st.permutations(list(range(12))), st.integers(1, 20))
def test_the_order_of_equal_probabilities_does_not_matter(order: list[int], bins: int) -> None:
    probabilities = torch.tensor([0.2, 0.2, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9])
    outcomes = torch.tensor([True, False, False, True, False, True, False, True, True, True, False, True])
    same = calibration_error(probabilities[order], outcomes[order], bins)
    assert same == pytest.approx(calibration_error(probabilities, outcomes, bins), abs=1e-6)


def test_exact_probabilities_are_calibrated_up_to_chance_and_wrong_ones_are_not() -> None:
    logits, verified, accepted = rounds()
    right, bold = torch.sigmoid(logits), torch.sigmoid(3 * logits)
    assert worst(right, verified, accepted) < 0.02
    assert worst(bold, verified, accepted) > 0.05
    for found in survival_quality(right, verified, accepted):
        assert found.ece < 2 * found.ece_of_chance
        assert found.predicted == pytest.approx(found.observed, abs=0.01)


def test_the_error_of_chance_shrinks_with_the_root_of_the_rounds() -> None:
    p = torch.rand(16_000, generator=torch.Generator().manual_seed(1))
    assert error_of_chance(p[:1000]) / error_of_chance(p) == pytest.approx(4, rel=0.25)


def test_a_position_counts_only_the_rounds_that_reached_it() -> None:
    confidence = torch.tensor([[0.9, 0.8], [0.7, math.nan], [0.6, 0.5]])
    verified, accepted = torch.tensor([2, 1, 2]), torch.tensor([2, 1, 0])
    assert [q.rounds for q in survival_quality(confidence, verified, accepted)] == [3, 2]
    assert [q.rounds for q in conditional_quality(confidence, verified, accepted)] == [3, 1]


# ------------------------------------------------------------------------------------------------ scaling


def test_the_factors_of_scaled_logits_are_recovered() -> None:
    logits, verified, accepted = rounds()
    factors = torch.tensor([3.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    found = fit(logits * factors, verified, accepted)
    assert found.temperatures == pytest.approx(factors.tolist(), rel=0.15)
    assert found.shifts == (0, 0, 0, 0)


def test_a_fit_on_some_rounds_holds_on_others() -> None:
    factors = torch.tensor([3.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    logits, verified, accepted = rounds()
    found = fit(logits * factors, verified, accepted)
    logits, verified, accepted = rounds(seed=1)
    assert worst(torch.sigmoid(logits * factors), verified, accepted) > 0.05
    assert worst(found.apply(logits * factors), verified, accepted) < 0.02


def test_a_margin_needs_a_shift() -> None:
    logits, verified, accepted = rounds()
    margins = (logits + 3).clamp(min=0) * 2  # at least 0, so never under one half
    plain, shifted = (fit(margins, verified, accepted, shift=shift) for shift in (False, True))
    assert worst(plain.apply(margins), verified, accepted) > 0.05
    assert worst(shifted.apply(margins), verified, accepted) < 0.02


def test_a_shift_is_fitted_only_where_a_temperature_does_not_suffice() -> None:
    logits, verified, accepted = rounds()
    assert not any(fit(logits * 2, verified, accepted, shift=None).shifts)
    signal = torch.cat([logits[:, :1] * 2, (logits[:, 1:] + 3).clamp(min=0)], 1)
    found = fit(signal, verified, accepted, shift=None)
    assert not found.shifts[0] and found.shifts[1]
    assert worst(found.apply(signal), verified, accepted) < 0.03
    assert worst(fit(signal, verified, accepted).apply(signal), verified, accepted) > 0.04


def test_a_position_that_was_never_reached_takes_the_previous_scaling() -> None:
    logits, _, accepted = rounds(n=4000)
    found = fit(logits * 2, torch.full((4000,), 2), accepted.clamp(max=2))
    assert found.temperatures[1] == found.temperatures[2] == found.temperatures[3]
    longer = found.apply(torch.ones(1, 9))
    assert bool((longer[0, 3:] == longer[0, 3]).all())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_rows_and_tensors_are_adjusted_alike(confidence: list[float]) -> None:
    scaling = Scaling((2.0, 0.5, 1.0), (0.0, -1.0, 0.3))
    tensor = scaling.apply(logits_of(torch.tensor([confidence], dtype=torch.float64)))[0]
    assert scaling.adjust(confidence) == pytest.approx(tensor.tolist(), abs=1e-9)


# ------------------------------------------------------------------------------------------------ a drafter's file

TWO = Calibration({("block", 0.0): Scaling((2.0,), (0.0,)), ("block", 1.0): Scaling((1.0,), (-1.0,))})


def test_rows_get_the_scaling_of_their_rule_and_nearest_temperature() -> None:
    params = [
        SamplingParams(temperature=0.2),
        SamplingParams(temperature=0.9),
        SamplingParams(temperature=0.9, seed=1),  # coupled: nothing was fitted for it
    ]
    confidence = torch.full((3, 2), 0.8)
    proposal = Proposal(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([2, 2, 2]), None, confidence)
    adjusted = TWO.calibrated(proposal, Context(params, [[1]] * 3, [1] * 3)).confidence
    assert adjusted is not None
    z = math.log(4)
    assert adjusted[0].tolist() == pytest.approx([1 / (1 + math.exp(-z / 2))] * 2)
    assert adjusted[1].tolist() == pytest.approx([1 / (1 + math.exp(1 - z))] * 2)
    assert adjusted[2].tolist() == confidence[2].tolist()


def test_the_core_adjusts_confidences_to_the_same_bits() -> None:
    """``Scaling.adjust`` in Python is the reference; 0, 1 and NaN included."""
    scaling = Scaling((0.7, 1.9), (0.3, -1.2))
    calibration = Calibration({("block", 1.0): scaling})
    values = torch.rand(2000, 3, generator=torch.Generator().manual_seed(1))
    values[0], values[1, 0] = torch.tensor([0.0, 1.0, 1e-30]), torch.nan
    proposal = Proposal(torch.zeros(2000, 3, dtype=torch.int64), torch.full((2000,), 3), None, values)
    context = Context([SamplingParams(temperature=1.0)] * 2000, [[1]] * 2000, [1] * 2000)
    adjusted = calibration.calibrated(proposal, context).confidence
    expected = torch.tensor([scaling.adjust(row) for row in values.tolist()])
    assert adjusted is not None and torch.equal(adjusted.nan_to_num(-1), expected.nan_to_num(-1))


def test_a_calibration_round_trips_through_its_file() -> None:
    assert Calibration.from_json(TWO.to_json()) == TWO


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "expected format"),
        ({"version": 2}, "version 1"),
        ({"buckets": {}}, "list `buckets`"),
        ({"buckets": [{"rule": "block", "temperature": 1}]}, "bucket 0: expected rule, temperature"),
        ({"buckets": [{"rule": "block", "temperature": 1, "temperatures": [0], "shifts": [0]}]}, "above 0"),
        ({"buckets": [{"rule": "block", "temperature": 1, "temperatures": [1, 2], "shifts": [0]}]}, "as many"),
        ({"buckets": [{"rule": "block", "temperature": 1, "temperatures": [math.nan], "shifts": [0]}]}, "finite"),
        ({"buckets": ["x"]}, "bucket 0"),
    ],
)
def test_a_broken_file_is_one_clear_error(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Calibration.from_json({**TWO.to_json(), **change})


# ------------------------------------------------------------------------------------------------ drift


def test_the_online_correction_follows_drift() -> None:
    logits, verified, accepted = rounds(n=6000)
    shown = torch.sigmoid(logits * 2.5 - 1).tolist()
    correction, after = OnlineCorrection(rate=0.05), []
    for confidence, kept in zip(shown, accepted.tolist(), strict=True):
        after.append(correction.adjust(confidence))
        correction = correction.update(confidence, K, kept)
    late = slice(3000, None)
    before = worst(torch.tensor(shown)[late], verified[late], accepted[late])
    assert worst(torch.tensor(after)[late], verified[late], accepted[late]) < before / 2


def test_calibrated_confidences_stay_nearly_unchanged() -> None:
    logits, verified, accepted = rounds(n=6000)
    correction, after = OnlineCorrection(), []
    shown = torch.sigmoid(logits).tolist()
    for confidence, kept in zip(shown, accepted.tolist(), strict=True):
        after.append(correction.adjust(confidence))
        correction = correction.update(confidence, K, kept)
    assert worst(torch.tensor(after), verified, accepted) < 0.04


def test_unverified_positions_do_not_change_the_correction() -> None:
    start = OnlineCorrection()
    assert start.update([0.5, 0.5, 0.5], 0, 0) == start
    assert len(start.update([0.5, 0.5, 0.5], 3, 0).slopes) == 1
    assert len(start.update([0.5, 0.5, 0.5], 2, 2).slopes) == 2
