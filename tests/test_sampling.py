"""Sampling: distributions against naive ones and Transformers' processors, and the forms a distribution may take."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from outrider.config import SamplingParams
from outrider.errors import InvalidRequest
from outrider.sampling import processors
from outrider.sampling.distribution import Categorical, settled
from outrider.sampling.rng import RowRng
from outrider.types import Context, RequestRows

PROMPT, OUTPUT = [1, 4, 4, 7], [2, 4, 9, 9, 9]
ERROR_RATE = 1e-5


def process(*arguments: Any, **options: Any) -> Categorical:
    """The distribution itself, as one of its three forms."""
    return settled(processors.process(*arguments, **options))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def context(*params: SamplingParams) -> Context:
    n = len(params)
    return Context(params, [PROMPT + OUTPUT] * n, [len(PROMPT)] * n)


def rows_of(distribution: Categorical) -> Tensor:
    return distribution.dense(torch.arange(len(distribution)))


def naive(logits: Tensor, params: SamplingParams, prompt: list[int], output: list[int]) -> np.ndarray:
    """The documented order, step by step on one row, in float64, with full stable sorts."""
    z = logits.double().numpy().copy()
    for token, amount in params.logit_bias:
        z[token] += amount
    for token in set(prompt + output):
        z[token] = z[token] * params.repetition_penalty if z[token] < 0 else z[token] / params.repetition_penalty
    for token in set(output):
        z[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature == 0:
        return (np.arange(len(z)) == np.argmax(z)).astype(float)
    z /= params.temperature
    order = np.argsort(-z, kind="stable")
    w = np.exp(z[order] - z[order[0]])
    if params.top_k:
        order, w = order[: params.top_k], w[: params.top_k]
    p = w / w.sum()
    before = np.cumsum(p) - p
    kept = (before < params.top_p) & (w >= params.min_p) if params.top_p < 1 else w >= params.min_p
    out = np.zeros(len(z))
    out[order[kept]] = w[kept] / w[kept].sum()
    return out


GRID: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"temperature": 1e-6},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 10**6},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"presence_penalty": 1.2, "frequency_penalty": -0.8},
    {"logit_bias": ((3, 4.0), (0, -100.0), (3, 1.0))},
    {"logit_bias": ((9, 2.0),), "repetition_penalty": 2.0, "frequency_penalty": 0.5, "temperature": 0.7, "top_k": 8},
]


def options(i: int) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, **GRID[i]})


# ------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("size", [12, 700, 40001])
@pytest.mark.parametrize("i", range(len(GRID)))
def test_distribution_against_naive(i: int, size: int) -> None:
    params = options(i)
    logits = randn(4, size, seed=i, dtype=torch.float64) * 2.5
    before = logits.clone()
    found = rows_of(process(logits, context(params, params, params, params)))
    assert found.dtype in (torch.float64, torch.float32)
    for r in range(4):
        np.testing.assert_allclose(found[r], naive(logits[r], params, PROMPT, OUTPUT), rtol=1e-9, atol=1e-12)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("size", [12, 6000])
@pytest.mark.parametrize("i", range(len(GRID)))
def test_ties_go_to_the_lowest_ids(i: int, size: int) -> None:
    """Logits on a coarse grid, as bfloat16 makes them: equal values on both sides of every cut."""
    logits = (randn(5, size, seed=50 + i) * 2).round() / 2
    found = rows_of(process(logits.bfloat16(), context(*[options(i)] * 5)))
    for r in range(5):
        np.testing.assert_allclose(found[r], naive(logits[r], options(i), PROMPT, OUTPUT), rtol=1e-5, atol=1e-9)


def test_flat_rows() -> None:
    """All tokens equal: top-p keeps the fewest that reach p, from the lowest id on; it asks for more until it does."""
    for top_p, kept in ((0.5, 2000), (0.25, 1000), (0.0001, 1)):
        distribution = process(
            torch.zeros(1, 4000, dtype=torch.float64), context(SamplingParams(temperature=1.0, top_p=top_p))
        )
        row = rows_of(distribution)[0]
        assert row[:kept] == pytest.approx(1 / kept) and row[kept:].sum() == 0


@pytest.mark.parametrize("shape", ["flat", "tied", "steps", "misleading"])
def test_large_nuclei(shape: str) -> None:
    """Where top-p keeps thousands, a sample finds the cut: among equals too, and where it is unlike its row."""
    logits = randn(3, 30011, seed=8)
    if shape == "tied":
        logits = (logits * 2).round() / 2
    if shape == "steps":
        logits = torch.arange(30011.0).expand(3, -1) // 10_000
    if shape == "misleading":
        logits[:, ::32] += 3
    for top_p, min_p in ((0.3, 0.0), (0.9, 0.0), (0.9, 0.03), (0.97, 0.0)):
        params = SamplingParams(temperature=1.0, top_p=top_p, min_p=min_p)
        found = rows_of(process(logits, context(*[params] * 3)))
        for r in range(3):
            want = naive(logits[r], params, PROMPT, OUTPUT)
            # Whether the last token is needed may hang on rounding: it alone has less than a hundred thousandth.
            assert abs(int((found[r] > 0).sum()) - int((want > 0).sum())) <= 1
            np.testing.assert_allclose(found[r], want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("i", range(len(GRID)))
def test_float32_distribution_is_near_the_exact_one(i: int) -> None:
    logits = randn(6, 3000, seed=i) * 3
    distribution = process(logits, context(*[options(i)] * 6))
    found = rows_of(distribution)
    assert found.dtype == torch.float32
    for r in range(6):
        np.testing.assert_allclose(found[r], naive(logits[r], options(i), PROMPT, OUTPUT), rtol=2e-5, atol=1e-9)


def test_against_transformers() -> None:
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    for seed, (penalty, t, k, p, m) in enumerate(product((0.7, 1.4), (0.5, 1.3), (5, 60), (0.6, 0.97), (0.01, 0.2))):
        theirs = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(penalty),
                TemperatureLogitsWarper(t),
                TopKLogitsWarper(k),
                TopPLogitsWarper(p),
                MinPLogitsWarper(m),
            ]
        )
        logits = randn(3, 200, seed=seed) * 2
        want = torch.softmax(theirs(torch.tensor([PROMPT + OUTPUT] * 3), logits.clone()), -1)
        params = SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=penalty)
        torch.testing.assert_close(rows_of(process(logits, context(*[params] * 3))), want, rtol=1e-5, atol=1e-7)


def test_rows_of_every_kind_in_one_batch() -> None:
    """Each place as it would be alone: a mixed batch changes the form of the distribution, never the distribution."""
    logits = randn(2 * len(GRID), 500, seed=3) * 2
    params = [options(i) for i in range(len(GRID))]
    owner = torch.arange(len(GRID)).repeat_interleave(2)
    distribution = process(logits, context(*params), owner)
    for r, b in enumerate(owner.tolist()):
        alone = process(logits[r : r + 1], context(params[b]))
        torch.testing.assert_close(rows_of(distribution)[r], rows_of(alone)[0].float(), rtol=1e-6, atol=0)
        assert distribution.argmax()[r] == alone.argmax()[0]


def test_drafted_tokens_count_for_penalties() -> None:
    params = SamplingParams(temperature=0.8, repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=0.3)
    plain = SamplingParams(temperature=1.0)
    logits = randn(7, 20, seed=4, dtype=torch.float64) * 2
    drafted = torch.tensor([[3, 9, 3], [0, 0, 0], [5, 5, 11]])
    rows, depth = torch.tensor([0, 0, 0, 0, 1, 2, 2]), torch.tensor([0, 1, 2, 3, 0, 0, 2])
    found = rows_of(process(logits, context(params, plain, params), rows, depth, drafted=drafted))
    for r, (b, d) in enumerate(zip(rows.tolist(), depth.tolist(), strict=True)):
        want = naive(logits[r], params if b != 1 else plain, PROMPT, OUTPUT + drafted[b, :d].tolist())
        np.testing.assert_allclose(found[r], want, rtol=1e-9)


def test_bias_on_an_unknown_token_is_refused() -> None:
    params = SamplingParams(temperature=1.0, logit_bias=((3, 1.0), (20, 1.0)))
    with pytest.raises(InvalidRequest, match="token 20, but the vocabulary has ids 0 to 19"):
        process(randn(1, 20), context(params))
    with pytest.raises(InvalidRequest, match="logit_bias"):
        SamplingParams(logit_bias=((-1, 1.0),))


def test_other_processors_join_those_of_the_request() -> None:
    """A mask as a grammar would give it, by the drafts each row follows: on dense, truncated and greedy rows."""

    def mask(logits: Tensor, rows: RequestRows) -> None:
        for row, depth in zip(rows.index.tolist(), rows.depth.tolist(), strict=True):
            seen = rows.tokens[: len(rows.tokens) - int(rows.depth.max()) + depth]
            logits[row, seen[-1]] = -torch.inf  # never the same token twice in a row

    logits, drafted = randn(3, 20, seed=3), torch.tensor([[4, 9]])
    rows, depth = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    for options in (
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3},
        {"temperature": 0.0},
    ):
        params = SamplingParams(**options)  # type: ignore[arg-type]
        free = Context([params], [[1, 2]], [1])
        found = process(logits, replace(free, processors=[[mask]]), rows, depth, drafted=drafted)
        plain = process(logits, free, rows, depth, drafted=drafted)
        for r, token in enumerate((2, 4, 9)):
            row, without = (d.dense(torch.tensor([r]))[0].double() for d in (found, plain))
            assert row[token] == 0 and row.sum() == pytest.approx(1)
            if not params.top_k and params.temperature:
                without[token] = 0
                torch.testing.assert_close(row, without / without.sum(), atol=1e-6, rtol=0)


def test_a_row_sums_alone() -> None:
    """Bit for bit the same distribution with other rows around it: coupled text must not depend on the batch."""
    logits = randn(9, 30011, seed=6) * 2
    for params in (SamplingParams(temperature=1.0), SamplingParams(temperature=0.9, top_p=0.9)):
        distribution = process(logits, context(*[params] * 9))
        crowd = distribution.logits if distribution.ids is None else distribution._spread()
        for r in range(9):
            alone = process(logits[r : r + 1].clone(), context(params))
            assert torch.equal(alone._spread()[0], crowd[r])
            assert torch.equal(rows_of(alone)[0] > 0, rows_of(distribution)[r] > 0)


# ------------------------------------------------------------------------------------------------ forms


def forms(size: int = 40) -> dict[str, Categorical]:
    """Seven places in every form."""
    logits = randn(7, size, seed=8) * 2
    few = SamplingParams(temperature=1.0, top_k=4, top_p=0.9)
    half = SamplingParams(temperature=1.0, top_k=size // 2)
    return {
        "greedy": process(logits, context(*[SamplingParams()] * 7)),
        "dense": Categorical.of(logits),
        "dense with zeros": process(logits, context(*[half] * 7)),
        "sparse": process(logits, context(*[few] * 7)),
        "weights": Categorical(size, probabilities=torch.softmax(logits, -1)),
        "mixed": process(logits, context(*[few, SamplingParams(), SamplingParams(temperature=1.0)] * 2, few)),
    }


def test_forms_are_what_they_should_be() -> None:
    made = forms()
    assert made["greedy"].is_greedy and not made["mixed"].is_greedy
    assert made["sparse"].ids is not None and made["dense with zeros"].ids is None and made["mixed"].ids is None
    one = process(randn(2, 40), context(SamplingParams(), SamplingParams(temperature=1.0, top_k=3)))
    assert one.ids is not None and not one.is_greedy


@pytest.mark.parametrize("name", forms())
def test_methods_agree(name: str) -> None:
    distribution = forms()[name]
    places, full = torch.tensor([3, 0, 3, 6]), rows_of(distribution)
    assert len(distribution) == 7
    torch.testing.assert_close(full.sum(1), torch.ones(7))
    assert torch.equal(distribution.dense(places), full[places])
    for token in range(40):
        assert torch.equal(distribution.at(torch.full((7,), token)), full[:, token])
        assert torch.equal(distribution.at(torch.full((4,), token), places), full[places, token])
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    ids[1, 3] = 40  # no token
    padded = torch.nn.functional.pad(full, (0, 1))
    assert torch.equal(distribution.lookup(places, ids), padded[places].gather(1, ids))
    values, columns = distribution.columns(places)
    assert columns is None or torch.equal(padded[places].gather(1, columns), values)
    assert torch.equal(distribution.argmax(), full.argmax(1))
    assert torch.equal(rows_of(distribution.take(places)), full[places])


def test_concatenate_and_stack() -> None:
    made = forms()
    for names in product(made, repeat=2):
        distributions = [made[name] for name in names]
        joined = Categorical.concatenate(distributions)
        want = torch.cat([rows_of(distribution) for distribution in distributions])
        torch.testing.assert_close(rows_of(joined), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            rows_of(Categorical.stack(distributions)),
            want.view(2, 7, 40).transpose(0, 1).reshape(14, 40),
            rtol=1e-6,
            atol=0,
        )
        assert joined.is_greedy == (names == ("greedy", "greedy"))


def test_draw_does_not_know_the_form() -> None:
    """The same key gives the same token from a sparse distribution, a dense one with zeros, alone or among others."""
    n = 400
    logits = randn(n, 300, seed=10) * 2
    few = SamplingParams(temperature=0.9, top_k=20, top_p=0.9)
    sparse = process(logits, context(*[few] * n))
    dense = Categorical.of(sparse._spread())
    assert sparse.ids is not None and dense.ids is None
    rng = RowRng([3], [0], ["coupled"])
    keys = rng.token_keys(torch.zeros(n, dtype=torch.int64), torch.arange(n), "own")
    drawn = sparse.draw(keys)
    assert torch.equal(drawn, dense.draw(keys))
    assert torch.equal(drawn[5:6], sparse.take(torch.tensor([5])).draw(keys[5:6]))
    plain = Categorical.of(logits)
    mixed = Categorical.concatenate([sparse, plain, process(logits, context(*[SamplingParams()] * n))])
    both = torch.cat([drawn, plain.draw(keys), logits.argmax(1)])
    assert torch.equal(mixed.draw(keys.repeat(3)), both)


@pytest.mark.parametrize("name", forms())
def test_pick_inverts_the_distribution_function(name: str) -> None:
    distribution = forms()[name]
    below = rows_of(distribution).double().cumsum(1)
    for u in (1e-15, 0.1, 0.5, 0.77, 1 - 1e-9, 1 - 2.0**-53):
        picked = distribution.pick(torch.full((7,), u, dtype=torch.float64))
        assert (distribution.at(picked) > 0).all()
        chosen = below.gather(1, picked[:, None])[:, 0]
        share = u * below[:, -1]
        assert (chosen >= share - 1e-6).all() and (chosen - distribution.at(picked) <= share + 1e-6).all()


@pytest.mark.parametrize("how", ["draw", "pick"])
@pytest.mark.parametrize("name", forms(8))
def test_samples_follow_the_distribution(name: str, how: str) -> None:
    distribution, n = forms(8)[name].take(torch.zeros(20000, dtype=torch.int64)), 20000
    rng = RowRng([77], [0], ["block"])
    zeros, index = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    found = (
        distribution.draw(rng.token_keys(zeros, index, "own"))
        if how == "draw"
        else distribution.pick(rng.uniform(zeros, index, "own"))
    )
    want = distribution.dense(torch.tensor([0]))[0].double()
    counts = torch.bincount(found, minlength=8)
    assert counts[want == 0].sum() == 0
    possible = want > 0
    if possible.sum() > 1:
        expected = want[possible] / want[possible].sum() * n
        assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > ERROR_RATE


def test_places_of_uncut_rows_among_rows_that_are_cut() -> None:
    """A pass may hold places of some rows only: here of the row that keeps every token."""
    params = [SamplingParams(temperature=1.0, top_p=0.5), SamplingParams(temperature=1.0)]
    context = Context(params, [[0], [0]], [1, 1])
    logits = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    distribution = process(logits, context, torch.tensor([1, 1]))
    assert torch.equal(distribution.dense(torch.arange(2)), torch.softmax(logits, -1))
