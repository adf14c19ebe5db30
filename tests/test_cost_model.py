"""What steps cost now, by hand: estimates, lines through draft costs, corrections, the machine's speed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from outrider.scheduling.cost_model import CostModel as Model
from outrider.scheduling.cost_model import _Change, _Check, _Corrections, _Estimate, _Line
from outrider.scheduling.costs import CostKey, CostPoint, CostTable
from outrider.types import StepCost

KEY = CostKey("model", "int8", "native", "a machine", 2)
TABLE = CostTable(KEY, tuple(CostPoint(n, 1, c, 0.01 + 0.001 * n + 1e-6 * c) for n in (1, 1000) for c in (0, 8000)))


def seconds(tokens: int) -> float:
    return 0.01 + 0.001 * tokens


def estimate(*observed: float) -> _Estimate:
    made = _Estimate()
    for value in observed:
        made.add(value, 0.05)
    return made


def test_an_estimate_begins_with_a_median_and_moves_by_bounded_steps() -> None:
    made = estimate(0.5, 0.001, 0.001, 0.001, 0.002, 0.002)
    assert made.seconds == pytest.approx(0.001)
    for count, share in ((6, 1 / 7), (100, 0.05)):
        made.count, before = count, made.value
        made.add(10.0, 0.05)
        assert made.value - before == pytest.approx(0.15 * share)


def test_an_estimate_follows_times_that_change_at_once() -> None:
    made = estimate(*[0.001] * 6)
    assert [made.add(0.002, 0.05) for _ in range(4)] == [0.0] * 4
    assert made.add(0.002, 0.05) > 0.6 and made.seconds == pytest.approx(0.002, rel=0.1)


def test_times_have_changed_when_most_of_the_latest_say_so() -> None:
    change = _Change()
    assert [change.by(error) for error in (0, 0, 0, 0, 0, 1, 1, 1)] == [0, 0, 0, 0, 0, 0, 0, 1], "three of five"
    assert [change.by(error) for error in (1, 1, 1, 1, 0.1, 1)] == [0, 0, 0, 0, 0, 1], "counted anew, and not by 0.1"


def test_lines_through_draft_costs() -> None:
    one = _Line.through({3: estimate(*[0.003] * 10)})
    assert [one.seconds(n) for n in (3, 6)] == pytest.approx([0.003, 0.0045]), "half of it in proportion"
    rising = {1: estimate(*[0.001] * 32), 3: estimate(*[0.003] * 32)}
    assert _Line.through(rising).seconds(2) == pytest.approx(0.002)
    falling = _Line.through({1: estimate(*[0.003] * 1000), 3: estimate(*[0.001] * 64)})  # weights of 64
    assert [falling.seconds(n) for n in (1, 2)] == pytest.approx([(64 * 0.003 + 32 * 0.002) / 96, 0.002])
    steep = _Line.through({3: estimate(*[0.001] * 32), 4: estimate(*[0.005] * 32)})
    assert steep.seconds(1) == pytest.approx(0.0003), "a tenth of the mean at least"


def test_corrections_are_straight_between_cells_and_level_beyond() -> None:
    alone = _Corrections()
    beside = _Corrections(alone)
    places = [1, 4, 5, 6, 8, 100]
    for kind, cells, expected in (
        (alone, {}, [0.0] * 6),
        (alone, {4: 0.1, 8: 0.3}, [0.1, 0.1, 0.15, 0.2, 0.3, 0.3]),
        (beside, {}, [0.1, 0.1, 0.15, 0.2, 0.3, 0.3]),
        (beside, {6: 0.5}, [0.4, 0.4, 0.45, 0.5, 0.6, 0.6]),
        (beside, {4: 0.1}, [0.1, 0.1, 0.3, 0.5, 0.6, 0.6]),
    ):
        for key, value in cells.items():
            kind.cell(key).value = value
        assert kind.of(np.array(places)).tolist() == pytest.approx(expected)
        assert [kind.at(place) for place in places] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratios", "wrong"), [((0, 2.3), True), ((0, 2.1), False), ((6.1,), True), ((5.9,), False), ((1 / 6.1,), True)]
)
def test_a_table_is_wrong_in_shape_or_beyond_what_clocks_explain(ratios: tuple[float, ...], wrong: bool) -> None:
    check = _Check()
    logs = [math.log(ratio) if ratio else 0.0 for ratio in ratios]
    told = [check.wrong(tokens, ratio) for _ in range(4) for tokens, ratio in enumerate(logs)]
    assert told == [False] * (len(told) - 1) + [wrong], "four observations of a size first"
    assert check.wrong(0, 0.0) == wrong and check.seen == len(told) + 1, "one more observation moves no median"


def test_the_speed_is_that_of_the_newest_passes() -> None:
    model = Model(TABLE, features=0.25)
    for slow in (1, 1, 1, 1, 1, 2, 2):
        model.observe_verify(4, 1, 0, slow * 1.25 * seconds(4), features=True)
    told = model.verify(4)
    assert told == pytest.approx(2 * seconds(4), rel=0.1), "without the features"
    assert model.verify(50) == pytest.approx(2 * seconds(50), rel=0.1)
    assert model.usual(50) == pytest.approx(seconds(50), rel=0.1)
    assert model.verify_curve(3, 4).tolist() == pytest.approx([model.verify(n) for n in range(3, 8)])
    model.observe_verify(0, 1, 0, 1.0)
    model.observe_verify(4, 1, 0, math.nan)
    model.observe_verify(4, 1, 0, math.inf)
    assert model.verify(4) == told


def test_what_was_not_seen_since_becomes_slower_with_the_machine() -> None:
    model = Model(TABLE)
    for slow in [1.0] * 6 + [2.0] * 3:
        model.observe_verify(4, 1, 0, slow * seconds(4))
        if slow == 1:
            model.observe_draft(1, 3, 0.001)
            model.observe_bookkeeping(1, False, 0.0001, asked=False)
            model.observe_bookkeeping(1, False, 0.0003)
    assert model.draft(1, 3) == pytest.approx(0.002, rel=0.1)
    assert model.bookkeeping(1, False, asked=False) == pytest.approx(0.0002, rel=0.1)
    assert model.deciding(1) == pytest.approx(0.0004, rel=0.1)
    model.observe_draft(4, 3, 0.004)
    model.observe_bookkeeping(4, True, 0.0008)
    assert model.draft(4, 3) == pytest.approx(0.004) and model.bookkeeping(4, True) == pytest.approx(0.0008)


def test_passes_with_prompts_have_curves_of_their_own() -> None:
    model = Model(TABLE)
    for _ in range(200):
        model.observe_verify(4, 1, 0, seconds(4))
        model.observe_verify(64, 1, 0, 1.5 * seconds(64), beside=True)
    for beside, times in ((False, 1.0), (True, 1.5)):
        told = model.verify(64, beside=beside)
        assert told / model.verify(4) == pytest.approx(times * seconds(64) / seconds(4), rel=0.05)
        assert model.verify_curve(64, 0, beside=beside)[0] == pytest.approx(told)


def test_drafts_of_rows_never_seen_are_those_of_the_nearest() -> None:
    model = Model(TABLE)
    assert model.draft(2, 3) == pytest.approx(0.2 * seconds(2)) and model.draft(0, 3) == model.draft(2, 0) == 0
    model.observe_draft(4, 3, 0.002)
    model.observe_draft(1, 3, 0.001)
    assert model.draft(8, 3) == pytest.approx(0.002 * seconds(8) / seconds(4)), "as the target's passes"
    assert model.draft(100, 3) == pytest.approx(0.002 * seconds(108) / seconds(4)), "four sizes to an octave"
    model.observe_draft(100, 3, 0.01)
    assert model.known_drafts(101) == 1 and model.known_drafts(5) == 0
    assert model.draft(8, 3) == pytest.approx(0.002 * seconds(8) / seconds(4)), "4 rows are nearer"


def test_bookkeeping_of_the_nearest_rows_and_kind() -> None:
    model = Model(TABLE)
    assert model.bookkeeping(2, True) == 0 and model.deciding(2, unknown=0.5) == 0.5
    model.observe_bookkeeping(1, False, 0.0001, asked=False)
    assert model.bookkeeping(3, True) == pytest.approx(0.0001), "all that is known"
    model.observe_bookkeeping(8, True, 0.0009)
    model.observe_bookkeeping(2, True, 0.0005)
    assert [model.bookkeeping(n, True) for n in (3, 7)] == pytest.approx([0.0005, 0.0009])
    assert model.bookkeeping(7, True, asked=False) == pytest.approx(0.0009)
    assert model.bookkeeping(7, False) == pytest.approx(0.0001)
    model.observe_bookkeeping(1, False, 0.00005)
    assert model.deciding(1) == 0, "never less than nothing"


def test_cold_observations_say_the_most_that_something_takes() -> None:
    model = Model(TABLE)
    for _ in range(6):
        model.observe_draft(1, 3, 0.001, cold=True)
        model.observe_bookkeeping(1, True, 0.0001, cold=True)
    model.observe_draft(1, 3, 0.004, cold=True)
    model.observe_bookkeeping(1, True, 0.004, cold=True)
    assert model.draft(1, 3) == pytest.approx(0.001) and model.bookkeeping(1, True) == pytest.approx(0.0001)
    model.observe_draft(1, 3, 0.0005, cold=True)
    assert model.draft(1, 3) < 0.00099


def test_a_plain_step_is_not_charged_with_what_following_takes() -> None:
    for planned, own in (((0, 0), 0.0002), ((1, 7), 0.0005)):
        model = Model(TABLE)
        cost = StepCost(0.001, 1.25 * seconds(4), 0.0005, 1, 4, 0, follow=0.0003, drafts=3 if planned[1] else 0)
        model.observe_step(cost, 1, planned, beside=False)
        assert model.bookkeeping(1, planned[1] > 0) == pytest.approx(own)
        assert model.known_drafts(1) == (planned[1] > 0)
    assert model.draft(1, 3) == pytest.approx(0.001) and model.draft(1, 7) > 0.0012, "of the three that were drafted"


def test_sizes_that_count_as_one() -> None:
    model = Model(TABLE)
    for tokens, beside in ((255, False), (300, False), (100, True)):
        model.observe_verify(tokens, 1, 0, 0.1, beside=beside)
    assert [model.seen(n) for n in (254, 255, 300, 301, 310)] == [0, 1, 1, 1, 0]
    assert [model.seen(n, beside=True) for n in (90, 100, 101)] == [0, 1, 1]


def test_contexts_are_those_of_a_row() -> None:
    """Of four rows too, of which no pass of the table has the number of tokens."""
    for rows, context in ((1, 0), (4, 4000), (1, 4000)):
        assert Model(TABLE).usual(4, rows, context) == pytest.approx(seconds(4) + 1e-6 * context / rows, rel=0.02)


def test_a_later_table_is_checked_too() -> None:
    model = Model(TABLE)
    for _ in range(100):
        model.observe_verify(4, 1, 0, seconds(4))
    for _ in range(4):
        model.observe_verify(8, 1, 0, 10 * seconds(8))
    assert model.trusted, "it was checked long ago"
    model.use(TABLE)
    for _ in range(4):
        model.observe_verify(8, 1, 0, 10 * seconds(8), beside=True)
    assert model.trusted, "prompts are no measure of it"
    for _ in range(4):
        model.observe_verify(8, 1, 0, 10 * seconds(8))
    assert not model.trusted and model.table is None
