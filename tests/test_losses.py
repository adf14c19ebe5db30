"""The fused measures of two distributions, against their definitions and autograd."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from outrider.training.networks.losses import divergence, negative_log_acceptance, position_weights


def plain(logits: Tensor, distributions: Tensor, index: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definitions, in float64."""
    p, log_q = distributions[index].double(), logits.double().log_softmax(-1)
    hard = torch.where(tokens >= 0, -log_q.gather(1, tokens.clamp(min=0)[:, None])[:, 0], 0)
    outside = (1 - p.sum(-1)).clamp(min=0)
    return hard, (p - log_q.exp()).abs().sum(-1) + outside, -(p * log_q).sum(-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(2, 700), st.integers(0, 2**31), st.booleans())
def test_the_fused_measures_are_their_definitions(
    n: int, distributions: int, vocab: int, seed: int, reduced: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(n, vocab, generator=generator)).requires_grad_()
    given = torch.randn(distributions, vocab, generator=generator).softmax(-1) * (0.7 if reduced else 1.0)
    index = torch.randint(distributions, (n,), generator=generator)
    tokens = torch.randint(-1 if reduced else 0, vocab, (n,), generator=generator)
    weights = torch.randn(3, n, generator=generator)

    measures = divergence(logits, given, index, tokens)
    torch.stack([(w * m).sum() for w, m in zip(weights, measures, strict=True)]).sum().backward()
    got, logits.grad = logits.grad, None
    expected = plain(logits, given, index, tokens)
    torch.stack([(w * m).sum() for w, m in zip(weights, expected, strict=True)]).sum().backward()

    for mine, theirs in zip(measures, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
    assert got is not None and logits.grad is not None
    torch.testing.assert_close(got, logits.grad, rtol=1e-3, atol=1e-5)


def test_equal_distributions_are_always_accepted_and_disjoint_ones_never() -> None:
    same = torch.tensor([[2.0, -1.0, 0.5]])
    equal = divergence(same, same.softmax(-1), torch.tensor([0]), torch.tensor([0]))
    apart = divergence(torch.tensor([[50.0, -50.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([0]))

    assert float(equal.total_variation) < 1e-6
    assert float(negative_log_acceptance(equal.total_variation)) < 1e-6
    assert abs(float(apart.total_variation) - 2) < 1e-6
    assert float(negative_log_acceptance(apart.total_variation)) < 20  # finite


def test_acceptance_is_the_mass_that_both_distributions_share() -> None:
    p, logits = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]]).log()
    variation = divergence(logits, p, torch.tensor([0]), torch.tensor([0])).total_variation
    torch.testing.assert_close(negative_log_acceptance(variation), -torch.tensor([0.2 + 0.3 + 0.2]).log())


def test_weights_fall_with_the_place() -> None:
    assert torch.equal(position_weights(3, None), torch.ones(3))
    torch.testing.assert_close(position_weights(3, 2.0), torch.tensor([1.0, 0.60653, 0.36788]))
