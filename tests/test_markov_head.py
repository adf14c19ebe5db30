"""The sequential head in the core: drafts of a block from shortlists, against the same step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from outrider.backends.native import NativeBackend, available
from outrider.backends.native_drafting import markov_head
from outrider.drafters.dspark import SequentialHead, markov_parts
from outrider.drafters.dspark_design import BlockDesign
from outrider.sampling.distribution import Categorical

if not available():
    pytest.skip("the compiled core is not built", allow_module_level=True)

WIDE = 4096  # a vocabulary much larger than a shortlist


class WideHead:
    """A Markov head with random weights in the core, and step by step. ``scale``: how much its bias can move."""

    def __init__(
        self,
        kind: str,
        scale: float,
        *,
        drafted: int = WIDE,
        shortlist: int = 64,
        rank: int = 16,
        ids: Tensor | None = None,
    ) -> None:
        design = BlockDesign(5, 3, markov_rank=rank, markov_head=kind)
        generator = torch.Generator().manual_seed(0)
        shapes: dict[str, tuple[int, ...]] = {"markov.w1.weight": (WIDE, rank), "markov.w2.weight": (drafted, rank)}
        shapes |= {"markov.gate.weight": (rank, 8 + rank), "markov.gate.bias": (rank,)}
        shapes |= {"markov.joint.weight": (3 * rank, 2 * rank + 8), "markov.joint.bias": (3 * rank,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors["markov.w2.weight"] *= scale
        self.steps = SequentialHead(design, tensors, NativeBackend(), "float32")
        self.parts = markov_parts(design, tensors, shortlist)
        assert self.parts is not None
        self.core = markov_head(self.parts, ids, "", "float32")

    def draft(
        self, base: Tensor, hidden: Tensor, anchors: Tensor, keys: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> tokens and margins [n, K], ids and logits of the distributions [n K, S]"""
        count, mixed = keys.numel(), None
        if self.parts.mix_hidden is not None:
            mixed = hidden.view(count, -1) @ self.parts.mix_hidden.T + self.parts.mix_bias
        tokens, margins = torch.empty_like(keys), torch.empty(keys.shape)
        ids, logits = torch.empty(count, self.core.shortlist).long(), torch.empty(count, self.core.shortlist)
        arrays = (base.reshape(count, -1), mixed, anchors, keys, temperatures, tokens, margins, ids, logits)
        self.core.draft(*(None if array is None else array.contiguous().numpy() for array in arrays))
        return tokens, margins, ids, logits


def block_inputs(rows: int, drafts: int, drafted: int = WIDE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Base logits, hidden states, anchors and keys."""
    generator = torch.Generator().manual_seed(1)
    base, hidden = (torch.randn(rows, drafts, n, generator=generator) for n in (drafted, 8))
    base *= 3
    words = torch.randint(-(2**62), 2**62, (rows, drafts), generator=generator)
    return base, hidden, torch.randint(0, WIDE, (rows,), generator=generator), words


def along(head: SequentialHead, base: Tensor, hidden: Tensor, anchors: Tensor, tokens: Tensor) -> Tensor:
    """All corrected logits along a path of tokens, by the steps in Python. [n, K, Vd]"""
    state, previous, logits = head.start(len(anchors)), anchors, []
    for k in range(tokens.shape[1]):
        state, _, latent = head.step(state, previous, hidden[:, k])
        logits.append(head.corrected(base[:, k], latent))
        previous = tokens[:, k]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("scale", [0.02, 0.1, 3.0])
@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_greedy_block_takes_the_best_of_its_shortlist(kind: str, scale: float) -> None:
    """Which is the best of all tokens where the sequential head corrects little."""
    head = WideHead(kind, scale)
    base, hidden, anchors, keys = block_inputs(12, 5)
    tokens, margins, _, _ = head.draft(base, hidden, anchors, keys, torch.zeros(12))
    logits = along(head.steps, base, hidden, anchors, tokens)
    likely = base >= base.topk(48, -1).values[..., -1:]
    drawn, best = logits.gather(2, tokens[..., None])[..., 0], logits.where(likely, -torch.inf).topk(2, -1).values
    assert (drawn >= best[..., 0] - 1e-4).all()
    assert torch.equal(tokens, logits.argmax(2)) == (scale < 1)
    alike = drawn == best[..., 0]  # else a token of the list that is not among the 48
    assert (margins <= best[..., 0] - best[..., 1] + 1e-4)[alike].all()


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_a_sampled_block_is_drawn_from_the_distribution_it_reports(kind: str) -> None:
    """The shortlist holds the largest base logits, its distribution is the full one truncated, the keys decide."""
    head, temperatures = WideHead(kind, 0.5), torch.tensor([0.0, 0.7, 1.0, 1e-4, 2.0])
    base, hidden, anchors, keys = block_inputs(5, 4)
    tokens, _, *distribution = head.draft(base, hidden, anchors, keys, temperatures)
    ids, logits = (part.view(5, 4, 64) for part in distribution)
    full = along(head.steps, base, hidden, anchors, tokens)
    assert (
        torch.equal(tokens[0], full[0].argmax(-1)) and ids[0, :, 0].equal(tokens[0]) and (ids[0, :, 1:] == WIDE).all()
    )
    for row in range(1, 5):
        for k in range(4):
            some = ids[row, k][ids[row, k] < WIDE]
            assert 48 <= len(some) <= 64 and (some.diff() > 0).all()
            assert set(some.tolist()) == set(base[row, k].topk(len(some)).indices.tolist())
            expected, got = full[row, k, some], logits[row, k, : len(some)] * temperatures[row]
            torch.testing.assert_close(got - got.max(), expected - expected.max(), atol=1e-4, rtol=0)
    sampled = Categorical(WIDE, ids=distribution[0], logits=distribution[1])
    assert torch.equal(sampled.draw(keys.flatten()).view(5, 4), tokens)


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("rank", [16, 128])  # a row on one thread, and one that threads share
def test_a_row_of_a_block_has_the_same_bits_alone_and_on_any_threads(rank: int, kind: str) -> None:
    from outrider import _native

    head, before = WideHead(kind, 4 / rank, shortlist=600, rank=rank), _native.threads()
    base, hidden, anchors, keys = block_inputs(4, 5)
    temperatures = torch.tensor([1.0, 0.0, 0.5, 1e-4])
    whole = head.draft(base, hidden, anchors, keys, temperatures)
    try:
        for threads in (1, 2, 3):
            _native.set_threads(threads)
            for b in range(4):
                one = slice(b, b + 1)
                alone = head.draft(base[one], hidden[one], anchors[one], keys[one], temperatures[one])
                assert torch.equal(alone[0], whole[0][one]) and torch.equal(alone[1], whole[1][one])
                for part, parts in zip(alone[2:], whole[2:], strict=True):
                    assert torch.equal(part, parts[5 * b : 5 * b + 5])
    finally:
        _native.set_threads(before)


def test_equal_logits_and_reduced_vocabularies_of_a_block() -> None:
    """Ties go to the lowest ids; draft ids become the target's, which is what W1 and the rng go by."""
    target_ids = torch.arange(1000) * 4 + 1
    head = WideHead("vanilla", 0.0, drafted=1000, ids=target_ids)
    base, keys, one = torch.zeros(1, 3, 1000), torch.tensor([[5, 6, 7]]), torch.ones(1)
    tokens, _, ids, logits = head.draft(base, torch.zeros(1, 3, 8), torch.tensor([4000]), keys, one)
    assert all(torch.equal(row, target_ids[:64]) for row in ids)
    assert torch.equal(Categorical(WIDE, ids=ids, logits=logits).draw(keys[0]), tokens[0])
    base[0, :, [7, 900]] = 50.0
    greedy, *_ = head.draft(base, torch.zeros(1, 3, 8), torch.tensor([0]), keys, one * 0)
    assert greedy.tolist() == [[29, 29, 29]]
    base[0, 1] = torch.inf
    with pytest.raises(ValueError, match="must be numbers"):
        head.draft(base, torch.zeros(1, 3, 8), torch.tensor([0]), keys, one)
    with pytest.raises(ValueError, match="token id 5000"):
        head.draft(base, torch.zeros(1, 3, 8), torch.tensor([5000]), keys, one)


@pytest.mark.parametrize("higher", [0, 32, 100])
def test_a_sample_that_misleads_costs_a_search_and_no_token(higher: int) -> None:
    """A sample holds every eighth piece of 32 logits; here logits from ``higher`` on, 32 of each 256, are far above."""
    head = WideHead("vanilla", 0.0)
    base, hidden, anchors, keys = block_inputs(2, 3)
    base[..., (torch.arange(WIDE) - higher) % 256 < 32] += 100
    _, _, ids, _ = head.draft(base, hidden, anchors, keys, torch.ones(2))
    for row, listed in zip(base.flatten(0, 1), ids, strict=True):
        some = listed[listed < WIDE]
        assert 48 <= len(some) <= 64 and set(some.tolist()) == set(row.topk(len(some)).indices.tolist())


@pytest.mark.parametrize("token", [5, 40, WIDE - 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_refused(value: float, token: int) -> None:
    """Whether a sample holds them or not."""
    head = WideHead("vanilla", 0.5)
    base, hidden, anchors, keys = block_inputs(1, 2)
    base[0, 1, token] = value
    with pytest.raises(ValueError, match="logits must be numbers"):
        head.draft(base, hidden, anchors, keys, torch.zeros(1))
