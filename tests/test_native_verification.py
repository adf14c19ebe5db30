"""The core's verification against the rules in ``sampling.verification``, and its truncation against numpy's.

Both see the same distributions and random numbers, so they must agree in every draft and every token; only where a
uniform number falls within rounding of a probability might they differ, which the fixed seeds here do not meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from outrider.backends import native_verification
from outrider.backends.native_verification import verify_native
from outrider.config import SamplingParams
from outrider.errors import OutriderError, RowsFailed
from outrider.sampling.distribution import Categorical, settled
from outrider.sampling.processors import process
from outrider.sampling.rng import RowRng
from outrider.sampling.truncation import _kept, kept_tokens
from outrider.types import Context, Proposal, Verification

_native: Any = pytest.importorskip("outrider._native")

RULES = ("rejection", "block", "coupled")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": {"temperature": 1.7},
    "cool": {"temperature": 0.6},
    "cold": {"temperature": 1e-4},
    "top-k": {"top_k": 7, "temperature": 0.8},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05, "temperature": 1.3},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 0.9, "repetition_penalty": 1.2},
}
WIDTHS = (3, 37, 5000, 70_000)


def in_turn(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Verification]) -> tuple[Verification, Verification]:
    """By the core, and by the rules as they are written."""
    fast = make()
    with monkeypatch.context() as patch:
        patch.setattr(native_verification, "_core_forms", lambda target, drafter: ())
        return fast, make()


def expect_equal(found: Verification, expected: Verification) -> None:
    assert torch.equal(found.accepted, expected.accepted)
    assert torch.equal(found.lengths, expected.accepted + 1)
    for mine, theirs, length in zip(found.tokens, expected.tokens, expected.lengths.tolist(), strict=True):
        assert torch.equal(mine[:length], theirs[:length])


class Case:
    """Rows of one step: distributions of a target, drafts really drawn from the drafter's."""

    def __init__(self, seed: int, width: int, params: Sequence[SamplingParams], drafts: int, near: float) -> None:
        random = torch.Generator().manual_seed(seed)
        self.params, rows = params, len(params)
        self.keep = torch.randint(0, drafts + 1, (rows,), generator=random).tolist()
        self.histories = [torch.randint(0, width, (5 + b,), generator=random).tolist() for b in range(rows)]
        self.context = Context(params, self.histories, [2] * rows)
        self.seeds = [seed * 7 + b for b in range(rows)]
        rules = [p.effective_rule for p in params]
        self.rng = RowRng(self.seeds, [b + 1 for b in range(rows)], rules)
        places = torch.arange(drafts).repeat(rows)
        self.rows = torch.arange(rows).repeat_interleave(drafts)
        self.base = torch.randn(rows, drafts + 1, width, generator=random) * 2
        self.draft_logits = self.base[:, :drafts] + near * torch.randn(rows, drafts, width, generator=random)
        distribution = self.draft_distribution()
        positions = torch.tensor([len(h) for h in self.histories])[self.rows] + places
        self.tokens = distribution.draw(self.rng.token_keys(self.rows, positions, "draft")).view(rows, drafts)

    def draft_distribution(self) -> Categorical:
        width = self.base.shape[-1]
        plain = [SamplingParams(temperature=p.temperature or 1.0) for p in self.params]
        context = Context(plain, self.context.history, self.context.prompt_lengths)
        return process(self.draft_logits.reshape(-1, width), context, self.rows)

    def verify(
        self, distribution: Callable[[Categorical], Any] = lambda distribution: distribution, early: bool = False
    ) -> Verification:
        logits = torch.cat([self.base[b, : n + 1] for b, n in enumerate(self.keep)])
        rows = torch.tensor([b for b, n in enumerate(self.keep) for _ in range(n + 1)])
        depth = torch.tensor([i for n in self.keep for i in range(n + 1)])
        target = process(logits, self.context, rows, depth, drafted=self.tokens)
        if early:
            target = settled(target)
            assert target.ids is None or target.ids.shape[1] < target.vocab_size
        whole = [self.tokens.shape[1]] * len(self.keep)
        proposal = Proposal(self.tokens, whole, distribution(self.draft_distribution()))
        return verify_native(target, proposal, self.keep, self.context, self.rng)


def sparse(distribution: Categorical) -> Categorical:
    """The same distribution over the 60 likeliest tokens of each row, which probably include the drafted one."""
    distribution = settled(distribution)
    values, ids = distribution.logits.topk(min(60, distribution.vocab_size), -1)
    order = ids.argsort(-1)
    return Categorical(distribution.vocab_size, logits=values.gather(1, order), ids=ids.gather(1, order))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_same_result_as_the_rules(rule: Any, options: dict[str, Any], width: int, monkeypatch: Any) -> None:
    """Rows alone and together, with drafts that are near the target's distribution and far from it."""
    params = SamplingParams(**{"temperature": 1.0, "rule": rule, **options})
    accepted = 0
    for seed in range(6 if width < 10_000 else 2):
        case = Case(seed, width, [params] * (1 + 3 * (seed % 2)), 6, near=0.2 + 0.6 * (seed % 3))
        for distribution in (lambda distribution: distribution, lambda distribution: None, sparse):
            found, expected = in_turn(
                monkeypatch, lambda case=case, distribution=distribution: case.verify(distribution)
            )
            expect_equal(found, expected)
            accepted += int(expected.accepted.sum())
    assert accepted or width > 10_000  # both outcomes were met


def test_rows_of_all_kinds_together(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [
        SamplingParams(temperature=1.0, rule=rule, **extra)
        for rule in RULES
        for extra in ({}, {"top_k": 5}, {"top_p": 0.7}, {"logit_bias": ((1, 3.0),), "presence_penalty": 0.5})
    ]
    kinds += [SamplingParams(temperature=0.0, rule="block"), SamplingParams(temperature=0.3, rule="rejection")]
    for seed in range(20):
        case = Case(seed, 50, kinds, 4, near=0.3)
        expect_equal(*in_turn(monkeypatch, case.verify))


@pytest.mark.parametrize("rule", RULES)
def test_distributions_that_were_settled_before(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a cut distribution list different numbers of tokens, and are padded."""
    params = SamplingParams(temperature=1.0, rule=rule, top_p=0.7)
    for seed in range(4):
        case = Case(seed, 1000, [params] * 3, 5, near=0.3)
        for distribution in (lambda distribution: distribution, lambda distribution: None, sparse):
            expect_equal(
                *in_turn(
                    monkeypatch, lambda case=case, distribution=distribution: case.verify(distribution, early=True)
                )
            )


def test_a_row_is_judged_as_it_is_alone() -> None:
    params = [SamplingParams(temperature=1.0, rule=rule) for rule in RULES] * 4
    case = Case(3, 7000, params, 5, near=0.2)  # so wide that threads share the rows
    together = case.verify()
    for b in range(len(params)):
        rng, keep = RowRng([case.seeds[b]], [b + 1], [params[b].effective_rule]), case.keep[b : b + 1]
        context = Context([params[b]], [case.histories[b]], [2])
        distribution = process(case.draft_logits[b], context, torch.zeros(5, dtype=torch.int64))
        target = process(case.base[b, : keep[0] + 1], context, torch.zeros(keep[0] + 1, dtype=torch.int64))
        alone = verify_native(target, Proposal(case.tokens[b : b + 1], keep, distribution), keep, context, rng)
        length = int(alone.lengths)
        assert torch.equal(alone.accepted[0], together.accepted[b])
        assert torch.equal(alone.tokens[0, :length], together.tokens[b, :length])


@pytest.mark.parametrize("isa", _native.instruction_sets())
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_ISA", isa)
    for rule in RULES:
        params = SamplingParams(temperature=0.8, rule=rule, top_p=0.9)  # type: ignore[arg-type]
        expect_equal(*in_turn(monkeypatch, Case(11, 4099, [params] * 3, 6, near=0.3).verify))


def test_equal_distributions_accept_everything() -> None:
    for rule in ("rejection", "block"):
        case = Case(5, 300, [SamplingParams(temperature=1.0, rule=rule)] * 8, 6, near=0.0)  # type: ignore[arg-type]
        found = case.verify()
        assert found.accepted.tolist() == case.keep


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_tokens_follow_the_targets_distribution(rule: Any, deterministic: bool) -> None:
    """20,000 rounds of two drafts over five tokens: a chi-square of the first token and of each pair stays under the
    1e-5 quantile of its degrees of freedom (4 and 24)."""
    rounds, size = 20_000, 5
    base = torch.randn(3, size, generator=torch.Generator().manual_seed(2))
    other = torch.randn(2, size, generator=torch.Generator().manual_seed(3))
    params = [SamplingParams(temperature=1.0, rule=rule)] * rounds
    context = Context(params, [[0]] * rounds, [1] * rounds)
    rng = RowRng(list(range(rounds)), [1] * rounds, [rule] * rounds)
    distribution = process(other.repeat(rounds, 1), context, torch.arange(rounds).repeat_interleave(2))
    positions = torch.tensor([1, 2]).repeat(rounds)
    keys = rng.token_keys(torch.arange(rounds).repeat_interleave(2), positions, "draft")
    drafts = distribution.draw(keys).view(rounds, 2)
    if deterministic:
        drafts, distribution = torch.tensor([[1, 3]]).repeat(rounds, 1), None  # type: ignore[assignment]
    keep = [2] * rounds
    target = process(base.repeat(rounds, 1), context, torch.arange(rounds).repeat_interleave(3))
    found = verify_native(target, Proposal(drafts, keep, distribution), keep, context, rng)
    p = base.double().softmax(1)
    firsts = torch.bincount(found.tokens[:, 0], minlength=size).double()
    assert chi_square(firsts, p[0] * rounds) < 28.5
    # Rounds that were cut after one token say nothing of the second one; whether they are depends on the first alone.
    longer = found.lengths > 1
    for first in range(size):
        seconds = found.tokens[longer & (found.tokens[:, 0] == first), 1]
        if len(seconds) > 200:
            assert chi_square(torch.bincount(seconds, minlength=size).double(), p[1] * len(seconds)) < 28.5


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1, "temperature": 0.5}])
def test_damaged_logits_are_refused(rule: Any, value: float, rows: int, options: dict[str, Any]) -> None:
    params = SamplingParams(**{"temperature": 1.0, "rule": rule, **options})
    case = Case(1, 6000, [params] * rows, 2, near=0.3)
    case.base[-1, 0, 4567] = value
    with pytest.raises(OutriderError, match="damaged"):
        case.verify()


LIMITS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 2},
    {"top_p": 0.5},
    {"min_p": 0.1},
    {"top_k": 4, "top_p": 0.7, "min_p": 0.01},
)


@pytest.mark.parametrize("by_core", [True, False])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "row", [[2e37, 1, 0, 0, 0, 0], [3e38, -3e38, 0, 1, 2, 3], [-3e38] * 6, [1e-45, -1e-45, 0, 1e-40, 0, 0]]
)
def test_logits_at_the_ends_of_float32(
    row: list[float], rule: Any, by_core: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quotient by the temperature that is infinite is refused: with top-p it had ended the process."""
    if not by_core:
        monkeypatch.setattr(native_verification, "_core_forms", lambda target, drafter: ())
    logits = torch.tensor([row, row])
    for limits, temperature in product(LIMITS, (0.01, 1.0, 100.0)):
        params = SamplingParams(temperature=temperature, rule=rule, **limits)
        context, rng = Context([params], [[0]], [1]), RowRng([3], [0], [rule])
        target = process(logits, context, torch.tensor([0, 0]), torch.tensor([0, 1]))
        drafts = Proposal(torch.tensor([[1]]), torch.tensor([1]))
        if not torch.isfinite((logits[0] / temperature).max()):
            with pytest.raises(RowsFailed, match="rows \\[0\\]"):
                verify_native(target, drafts, [1], context, rng)
            continue
        found = verify_native(target, drafts, [1], context, rng)
        (accepted,), (tokens,) = found.lists
        for token in tokens[: accepted + 1]:
            assert float(settled(target).at(torch.tensor([token]))[0]) > 0


@pytest.mark.parametrize("row", [[3e38, 0, 0], [-math.inf] * 3, [math.nan, 0, 0]])
def test_a_row_without_a_token_to_draw_is_refused(row: list[float]) -> None:
    """Column 0 had been drawn of a row that overflows, or forbids every token."""
    logits, out = np.array([row], np.float32), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="logits must be numbers"):
        _native.gumbel_argmax(logits, np.array([7]), out, np.array([0.5], np.float32))


def test_cuts_of_damaged_logits_are_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(OutriderError, match="damaged"):
            kept_tokens(np.array([1, value, 0], np.float32), 2, 1.0, 0.0)


def test_arguments_are_checked() -> None:
    logits = np.zeros((2, 5), np.float32)
    control = np.array([[0, 0, 1, 1, 4, 9, 1]])
    tokens, none = np.zeros((1, 1), np.int64), (None,) * 5

    def call(**changes: Any) -> None:
        given = {"logits": logits, "draft": logits, "control": control, "tokens": tokens} | changes
        native = (
            (given["logits"], *none),
            (given["draft"], *none),
            [tuple(row.tolist()) for row in given["control"]],
            given["tokens"],
            (1, 2, 3),
        )
        _native.verify(*native)

    call()
    with pytest.raises(ValueError, match="control has shape"):
        call(control=np.concatenate([control, control]))
    for column, value in ((0, 1), (0, -1), (1, 2), (2, 2), (2, -1)):
        wrong = control.copy()
        wrong[0, column] = value
        with pytest.raises(ValueError, match="keeps more drafts"):
            call(control=wrong)
    wrong = control.copy()
    wrong[0, 3] = 3
    with pytest.raises(ValueError, match="no such rule"):
        call(control=wrong)
    with pytest.raises(ValueError, match="at least one token"):
        call(logits=np.zeros((2, 0), np.float32))
    with pytest.raises(TypeError):
        call(logits=logits.astype(np.float64))


# ------------------------------------------------------------------------------------------------ what a cut leaves


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("size", [1, 2, 17, 4096, 30_011])
def test_cuts_are_numpys(size: int, scale: float) -> None:
    random = np.random.default_rng([size, int(scale * 100)])
    row = (scale * random.standard_normal(size)).astype(np.float32)
    row[random.integers(0, size, size // 10)] = -np.inf
    row[0] = 1.0
    for k, p, min_p in (
        (1, 1, 0),
        (5, 1, 0),
        (50, 1, 0),
        (50, 0.9, 0),
        (size, 0.9, 0),
        (size, 0.5, 0.01),
        (size, 1, 0.1),
    ):
        if k <= size:
            assert np.array_equal(kept_tokens(row, k, p, min_p), _kept(row, k, p, min_p)), (k, p, min_p)


def test_cuts_among_equals_keep_the_lowest_ids() -> None:
    row = np.round(3 * np.random.default_rng(0).standard_normal(20_000).astype(np.float32)) / 2
    for k, p in ((7, 1.0), (300, 1.0), (20_000, 0.05), (20_000, 0.6), (500, 0.5)):
        assert np.array_equal(kept_tokens(row, k, p, 0.0), _kept(row, k, p, 0.0))
    assert kept_tokens(np.zeros(8, np.float32), 8, 0.5, 0.0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.999999, 1 - 1e-12])
def test_a_nucleus_holds_its_mass_and_no_token_more(p: float) -> None:
    for scale in (0.1, 3.0, 12.0):
        row = (scale * np.random.default_rng(9).standard_normal(152_000)).astype(np.float32)
        kept = kept_tokens(row, len(row), p, 0.0)
        mass = np.exp(row.astype(np.float64) - row.max())
        mass /= mass.sum()
        assert mass[kept].sum() >= p - 2e-6
        assert mass[kept].sum() - mass[kept].min() < p + 2e-6 or len(kept) == 1
        assert row[kept].min() >= np.delete(row, kept).max(initial=-np.inf)
