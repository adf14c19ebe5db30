"""Rng: the bits, the definition, the distribution, and that every part of the key counts."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from outrider.errors import OutriderError
from outrider.sampling import rng as rng_module
from outrider.sampling.rng import GAMMA, RowRng, gumbel, gumbel_argmax, mix64

MASK = 2**64 - 1
ERROR_RATE = 1e-4  # of each hypothesis test below, under seeds that are fixed


def mix_by_hand(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def value_by_hand(key: int, token: int) -> float:
    x = mix_by_hand(((key & MASK) + (token + 1) * GAMMA) & MASK)
    u = min((float(x) + 0.5) * 2.0**-64, 1 - 2.0**-53)
    return -math.log(-math.log1p(-u))


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def index(count: int) -> torch.Tensor:
    return torch.arange(count)


@pytest.fixture(params=["core", "numpy"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test twice: with the compiled core, and as it is where there is none."""
    if request.param == "numpy":
        monkeypatch.setattr(rng_module, "native", None)
    elif rng_module.native is None:
        pytest.skip("the compiled core is not built")


# ------------------------------------------------------------------------------------------------ bits


def test_mixer_gives_the_published_stream_of_splitmix64() -> None:
    """The first outputs of Vigna's splitmix64.c from state 0."""
    counters = np.arange(1, 4, dtype=np.uint64) * np.uint64(GAMMA)
    assert [int(x) for x in mix64(counters)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_gumbel_values_are_the_documented_ones() -> None:
    some = keys(20)
    table = gumbel(some, None, 50)
    assert table.dtype == torch.float64
    for r, key in enumerate(some.tolist()):
        for token in range(50):
            assert table[r, token].item() == pytest.approx(value_by_hand(key, token), rel=1e-14, abs=1e-15)


def test_value_depends_on_key_and_token_alone() -> None:
    some = keys(7)
    full = gumbel(some, None, 1000)
    ids = torch.randint(0, 1000, (7, 13), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gumbel(some, ids, 1000), full.gather(1, ids))
    assert torch.equal(gumbel(some[3:4], None, 1000), full[3:4])


# ------------------------------------------------------------------------------------------------ draws


def exact(logits: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """The definition of a draw, in float64."""
    return (logits.double() + gumbel(some, None, logits.shape[1])).argmax(1)


@pytest.mark.parametrize(
    "logits",
    [
        pytest.param(torch.randn(3000, 64, generator=torch.Generator().manual_seed(2)) * 3, id="plain"),
        pytest.param(torch.zeros(2000, 300), id="flat"),
        pytest.param(torch.randn(3000, 40, generator=torch.Generator().manual_seed(3)) * 1e5, id="huge"),
        pytest.param(
            torch.randn(500, 40, generator=torch.Generator().manual_seed(4)) * 3 + 2.0**22, id="far from zero"
        ),
        pytest.param(torch.randn(500, 40, dtype=torch.float64).mul(3).add(1e9), id="beyond float32"),
        pytest.param(torch.cat([torch.full((20000, 1), 4.0), torch.zeros(20000, 2)], 1), id="peaked"),
        pytest.param(torch.cat([torch.zeros(500, 2), torch.full((500, 60), -torch.inf)], 1), id="masked"),
        pytest.param(torch.randn(3, 40000, generator=torch.Generator().manual_seed(5)), id="wide"),
    ],
)
def test_draw_is_the_float64_winner(logits: torch.Tensor) -> None:
    some = keys(len(logits), 9)
    assert torch.equal(gumbel_argmax(logits, some), exact(logits, some))


def test_photo_finish_is_decided_in_float64() -> None:
    """Rows whose two best scores differ by a millionth of a float32 unit, both ways round."""
    some, width = keys(400, 11), 20
    rng = gumbel(some, None, width)
    base = torch.randn(400, width, dtype=torch.float64)
    score = base + rng
    first, second = score.topk(2).indices.T
    gap = torch.where(torch.arange(400) % 2 == 0, 1e-13, -1e-13)
    rows = torch.arange(400)
    base[rows, second] += score[rows, first] - score[rows, second] + gap
    want = torch.where(gap > 0, second, first)
    assert torch.equal(exact(base, some), want)
    assert torch.equal(gumbel_argmax(base, some), want)


def test_token_that_wins_with_the_worst_noise() -> None:
    """u next to 1, where float32 has no bits left: the winner must still be the float64 one."""
    some = keys(200000, 12)
    worst = gumbel(some, torch.tensor([0]), 1)[:, 0]
    rows = worst.argsort()[:50]
    assert worst[rows].max() < -2.1
    rival = gumbel(some[rows], torch.tensor([1]), 2)[:, 0]
    for gap in (1e-6, -1e-6, 1e-2, -1e-2):
        logits = torch.stack([rival - worst[rows] + gap, torch.zeros(50, dtype=torch.float64)], 1)
        assert torch.equal(gumbel_argmax(logits, some[rows]), torch.full((50,), 0 if gap > 0 else 1))


def test_sparse_columns_draw_what_dense_ones_do() -> None:
    some = keys(200, 13)
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(6)) * 2
    ids = logits.topk(30).indices.sort().values
    kept = torch.full_like(logits, -torch.inf).scatter(1, ids, logits.gather(1, ids))
    column = gumbel_argmax(logits.gather(1, ids), some, ids)
    assert torch.equal(ids.gather(1, column[:, None])[:, 0], gumbel_argmax(kept, some))


@pytest.mark.parametrize("draw", [gumbel_argmax, rng_module._largest_anywhere])
def test_rows_that_cannot_be_drawn_from_are_refused(draw: Callable[..., torch.Tensor]) -> None:
    logits = torch.zeros(3, 40000)
    for columns, bad in ((slice(30000, 30001), torch.nan), (slice(30000, 30001), torch.inf), (slice(None), -torch.inf)):
        logits[1, columns] = bad
        with pytest.raises(OutriderError, match="NaN"):
            draw(logits, keys(3), None)


def test_other_devices_draw_what_the_cpu_draws() -> None:
    some, logits = keys(50, 3), torch.randn(50, 300, generator=torch.Generator().manual_seed(8))
    assert torch.equal(rng_module._largest_anywhere(logits, some, None), gumbel_argmax(logits, some))
    ids = torch.arange(0, 600, 2).expand(50, -1).contiguous()
    assert torch.equal(rng_module._largest_anywhere(logits, some, ids), gumbel_argmax(logits, some, ids))


def test_draws_follow_the_distribution() -> None:
    distribution = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.0099, 0.0001], dtype=torch.float64)
    rng = RowRng([5], [0], ["coupled"])
    n = 200000
    some = rng.token_keys(torch.zeros(n, dtype=torch.int64), index(n), "own")
    counts = torch.bincount(gumbel_argmax(distribution.log().float().expand(n, -1).contiguous(), some), minlength=6)
    assert stats.chisquare(counts.numpy(), distribution.numpy() * n).pvalue > ERROR_RATE


# ------------------------------------------------------------------------------------------------ distribution


def test_gumbel_distribution() -> None:
    rng = RowRng([1, 2], [0, 0], ["block", "block"])
    some = rng.token_keys(torch.tensor([0, 1]).repeat(50), index(100), "draft")
    values = gumbel(some, None, 2000).flatten().numpy()
    assert stats.kstest(values, stats.gumbel_r.cdf).pvalue > ERROR_RATE


def test_uniform_distribution() -> None:
    n = 200000
    u = RowRng([1], [3], ["rejection"]).uniform(torch.zeros(n, dtype=torch.int64), index(n), "accept")
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    assert stats.kstest(u.numpy(), "uniform").pvalue > ERROR_RATE
    assert torch.equal(u, ((u * 2**52).floor() + 0.5) * 2.0**-52)


def uniforms(seed: int, round: int, position: int, purpose: str, n: int = 20000) -> np.ndarray:
    """A stream whose rows differ by the seed alone."""
    rng = RowRng(range(seed, seed + n), [round] * n, ["block"] * n)
    return rng.uniform(index(n), torch.full((n,), position), purpose).numpy()


@pytest.mark.parametrize(
    "other",
    [(0, 1, 5, "accept"), (0, 0, 6, "accept"), (0, 0, 5, "own"), (1, 0, 5, "accept"), (0, 5, 0, "accept")],
    ids=["round", "position", "purpose", "seed", "round and position swapped"],
)
def test_every_part_of_the_key_makes_an_independent_stream(other: tuple[int, int, int, str]) -> None:
    a, b = uniforms(0, 0, 5, "accept"), uniforms(*other)
    table = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])[0]
    assert stats.chisquare(table.ravel()).pvalue > ERROR_RATE


def test_tokens_of_neighbouring_keys_and_ids_are_independent() -> None:
    rng = RowRng([7], [0], ["coupled"])
    values = gumbel(rng.token_keys(torch.zeros(400, dtype=torch.int64), index(400), "own"), None, 500).numpy()
    u = np.exp(-np.exp(-values))
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        table = np.histogram2d(a.ravel(), b.ravel(), bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(table.ravel()).pvalue > ERROR_RATE


# ------------------------------------------------------------------------------------------------ keys of a row


def test_coupled_rows_share_their_token_keys_across_rounds_and_purposes() -> None:
    early, late = (RowRng([4, 4], [r, r], ["coupled", "block"]) for r in (0, 9))
    rows, positions = torch.tensor([0, 1]), torch.tensor([17, 17])
    found = [rng.token_keys(rows, positions, p) for rng in (early, late) for p in ("draft", "own")]
    assert len({k[0].item() for k in found}) == 1
    assert len({k[1].item() for k in found}) == 4
    assert early.uniform(rows, positions, "own")[0] == late.uniform(rows, positions, "own")[0]


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("core", [True, False])
def test_keys_after_a_start_are_those_of_the_positions(count: int, core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core's and numpy's, for rows of several rules in any order."""
    if not core:
        monkeypatch.setattr(rng_module, "native", None)
    rng = RowRng([3, 2**64 - 1, 5], [1, 0, 7], ["coupled", "block", "rejection"])
    rows, starts = [2, 0, 1], [9, 0, 2**31]
    found = rng.token_keys_after(rows, starts, count, "draft")
    owners = torch.tensor(rows).repeat_interleave(count)
    positions = (torch.tensor(starts)[:, None] + torch.arange(count)).ravel()
    assert found == rng.token_keys(owners, positions, "draft").view(3, count).tolist()


def test_row_does_not_depend_on_its_neighbours() -> None:
    crowd = RowRng([3, 8, 5], [1, 2, 3], ["coupled", "block", "rejection"])
    for row, alone in enumerate(
        [RowRng([3], [1], ["coupled"]), RowRng([8], [2], ["block"]), RowRng([5], [3], ["rejection"])]
    ):
        for purpose in ("draft", "own"):
            here = crowd.token_keys(torch.tensor([row]), torch.tensor([40]), purpose)
            assert torch.equal(here, alone.token_keys(torch.tensor([0]), torch.tensor([40]), purpose))
            u = crowd.uniform(torch.tensor([row]), torch.tensor([40]), purpose)
            assert torch.equal(u, alone.uniform(torch.tensor([0]), torch.tensor([40]), purpose))


def test_any_integer_is_a_seed() -> None:
    seeds = [0, -1, 1, 255, 256, -256, 2**63, 2**64, 2**64 + 1, -(2**63), 10**40, -(10**40)]
    n = len(seeds)
    rng = RowRng(seeds, [0] * n, ["rejection"] * n)
    assert len(set(rng.uniform(index(n), torch.zeros(n, dtype=torch.int64), "own").tolist())) == n
