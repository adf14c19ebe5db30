"""The semi-autoregressive drafter: against a direct computation, through any feeding, alone and in a batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trained import (
    DESIGNS,
    SAMPLED,
    VOCABULARY,
    Session,
    features_of,
    make_checkpoint,
    make_target,
    norm,
    propose,
    random_tokens,
    rng_of,
    rotate,
)

from outrider.backends.native import NativeBackend, available
from outrider.backends.reference import ReferenceBackend
from outrider.checkpoints import DraftCheckpoint
from outrider.config import SamplingParams
from outrider.drafters.base import Drawing
from outrider.drafters.base.network import head_rows
from outrider.drafters.dspark import DSparkConfig, DSparkDrafter
from outrider.drafters.dspark_design import BlockDesign
from outrider.engine.loader import load_drafter, load_model
from outrider.errors import IncompatibleDrafter, InvalidRequest
from outrider.registry import find
from outrider.types import RaggedBatch, TargetModel

BLOCKS = {name: design for name, design in DESIGNS.items() if isinstance(design, BlockDesign)}


def make_drafter(checkpoint: DraftCheckpoint, target: TargetModel, dtype=torch.float32, **options) -> DSparkDrafter:
    config = DSparkConfig("", **options)
    return DSparkDrafter(checkpoint, target, ReferenceBackend(), config=config, dtype=dtype, max_rows=8)


# ------------------------------------------------------------------------------------------------ a direct computation


def dense_block(checkpoint: DraftCheckpoint, embedding: Tensor, features: Tensor, anchor: int) -> Tensor:
    """Hidden states of a block by the paper's equations 2 and 3, with one attention matrix and no cache. [S, D]"""
    w = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
    design, heads, groups, width = checkpoint.design, 4, 2, 8
    context = norm(features.double() @ w["fc.weight"].T, w["hidden_norm.weight"])
    tokens = [anchor] + [design.mask_token_id] * (design.block_size - 1)
    x = embedding.double()[tokens]
    positions = torch.arange(len(context) + len(x))
    for i in range(2):
        layer = {n.split(".")[2]: t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        inner = norm(x, layer["input_norm"])
        both = torch.cat([context, inner])
        q = rotate(norm((inner @ layer["q"].T).view(-1, heads, width), layer["q_norm"]), positions[len(context) :])
        k = rotate(norm((both @ layer["k"].T).view(-1, groups, width), layer["k_norm"]), positions)
        v = (both @ layer["v"].T).view(-1, groups, width)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        weights = torch.einsum("qhd,khd->hqk", q, k).mul(width**-0.5).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1) @ layer["o"].T
        inner = norm(x, layer["mlp_norm"])
        x = x + (F.silu(inner @ layer["gate"].T) * (inner @ layer["up"].T)) @ layer["down"].T
    return norm(x, w["norm.weight"])


def dense_bias(checkpoint: DraftCheckpoint, previous: list[int], hidden: Tensor) -> Tensor:
    """The Markov head's biases along a path of tokens (equations 4 to 6). [K, V]"""
    w = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
    design = checkpoint.design
    state, biases = torch.zeros(design.markov_rank, dtype=torch.float64), []
    for token, h in zip(previous, hidden, strict=True):
        out = before = w["markov.w1.weight"][token]
        if design.markov_head == "gated":
            mixed = w["markov.gate.weight"] @ torch.cat([h, before]) + w["markov.gate.bias"]
            out = torch.sigmoid(mixed) * before
        if design.markov_head == "rnn":
            mixed = w["markov.joint.weight"] @ torch.cat([state, before, h]) + w["markov.joint.bias"]
            gate, candidate, raw = mixed.chunk(3)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
            out = torch.tanh(raw)
        biases.append(w["markov.w2.weight"] @ out)
    return torch.stack(biases)


@pytest.mark.parametrize("name", BLOCKS)
def test_drafts_and_their_distributions_are_those_of_a_direct_computation(name: str) -> None:
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(BLOCKS[name], target=target)
    drafter = make_drafter(checkpoint, target, torch.float64)
    design, history = drafter.design, random_tokens(12, 3)
    session = Session(target, drafter, 1)
    session.observe([history[:-1]], [0])
    proposal = propose(drafter, [0], [history], params=SAMPLED)

    features = features_of(target, history[:-1], drafter.aux_layers)
    hidden = dense_block(checkpoint, target.tensors["embed.weight"], features, history[-1])
    hidden = hidden if design.sample_from_anchor else hidden[1:]
    logits = hidden @ target.tensors["head.weight"].double().T
    drafts = proposal.tokens[0].tolist()
    previous = [history[-1], *drafts[:-1]]
    if design.markov_rank:
        logits = logits + dense_bias(checkpoint, previous, hidden)
    distribution = (logits / SAMPLED.temperature).softmax(-1)
    assert len(drafts) == design.drafts and proposal.distribution is not None
    torch.testing.assert_close(
        proposal.distribution.dense(torch.arange(len(drafts))), distribution, atol=1e-6, rtol=0, check_dtype=False
    )
    if design.confidence:
        w = checkpoint.tensors
        read = (
            torch.cat([hidden.float(), w["markov.w1.weight"][previous]], 1)
            if design.confidence_with_markov
            else hidden.float()
        )
        expected = torch.sigmoid(read @ w["confidence.weight"][0] + w["confidence.bias"])
        torch.testing.assert_close(proposal.confidence[0], expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ the cache


@pytest.mark.parametrize("chunks", [[11], [1, 10], [5, 3, 2, 1], [1] * 11], ids=str)
def test_any_feeding_gives_the_same_drafts(chunks: list[int]) -> None:
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(BLOCKS["rnn"], target=target)
    history = random_tokens(12, 4)
    whole = make_drafter(checkpoint, target, torch.float64)
    Session(target, whole, 1).observe([history[:11]], [0])
    expected = propose(whole, [0], [history])

    drafter = make_drafter(checkpoint, target, torch.float64)
    session, start = Session(target, drafter, 1), 0
    for size in chunks:
        session.observe([history[start : start + size]], [start])
        start += size
        if start < 11:  # drafting in between must leave no trace
            propose(drafter, [0], [history[: start + 1]])
    got = propose(drafter, [0], [history])
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.confidence, expected.confidence)


def test_long_prompts_enter_the_draft_memory_before_anybody_drafts() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS["vanilla"], target=target), target)
    Session(target, drafter, 1).observe([random_tokens(100, 5)], [0])
    assert int(drafter.cache.held([0])) == 100
    assert int(drafter.cache.kv_cache.lengths[drafter.cache.cache_slots([0])]) == 100


def test_only_accepted_tokens_stay() -> None:
    """A block's own keys and values never stay, and a rejected draft's features are never seen."""
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS["vanilla"], target=target), target)
    history = random_tokens(9, 6)
    Session(target, drafter, 1).observe([history[:-1]], [0])
    before = propose(drafter, [0], [history])
    assert drafter.cache.kv_cache.lengths.tolist()[0] == 8 == drafter.cache.end_of(0)
    assert torch.equal(before.tokens, propose(drafter, [0], [history]).tokens)


def test_a_row_with_missing_features_stays_plain_until_they_are_caught_up() -> None:
    target = make_target()
    checkpoint = make_checkpoint(BLOCKS["gated"], target=target)
    drafter, whole = make_drafter(checkpoint, target), make_drafter(checkpoint, target)
    history = random_tokens(20, 7)
    features = features_of(target, history[:-1], drafter.aux_layers)
    for d in (drafter, whole):
        d.open(0, 64)
    whole.observe(RaggedBatch.pack([history[:-1]], [0], [0]), features)

    drafter.observe(RaggedBatch.pack([history[8:-1]], [8], [0]), features[8:])  # a prefix hit: nothing of 0 to 7
    assert drafter.cache.end_of(0) == 0
    assert propose(drafter, [0], [history]).lengths.tolist() == [0]
    drafter.observe(RaggedBatch.pack([history[:5]], [0], [0]), features[:5])
    drafter.observe(RaggedBatch.pack([history[5:-1]], [5], [0]), None)  # a plain round that gave no features
    assert propose(drafter, [0], [history]).lengths.tolist() == [0]
    drafter.observe(RaggedBatch.pack([history[5:-1]], [5], [0]), features[5:])
    assert torch.equal(propose(drafter, [0], [history]).tokens, propose(whole, [0], [history]).tokens)


def test_committed_tokens_that_are_taken_back_leave_the_cache() -> None:
    target = make_target()
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target)
    drafter, whole = make_drafter(checkpoint, target), make_drafter(checkpoint, target)
    history, other = random_tokens(90, 8), random_tokens(6, 9)
    session = Session(target, drafter, 1)
    session.observe([history], [0])  # absorbed at once
    session.cache.rewind(torch.tensor([0]), torch.tensor([70]))
    session.observe([other], [70])
    again = [*history[:70], *other, 1]
    Session(target, whole, 1).observe([again[:-1]], [0])
    assert torch.equal(propose(drafter, [0], [again]).tokens, propose(whole, [0], [again]).tokens)


def test_rows_open_and_close_and_rows_beyond_the_memory_stay_plain() -> None:
    target = make_target()
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target)
    drafter = DSparkDrafter(
        checkpoint, target, ReferenceBackend(), config=DSparkConfig(""), dtype="float32", max_rows=2
    )
    histories = [random_tokens(5, i) for i in range(3)]
    session = Session(target, drafter, 3)
    session.observe([h[:-1] for h in histories], [0] * 3)
    assert propose(drafter, session.slots, histories).lengths.tolist() == [5, 5, 0]
    for slot in session.slots:
        drafter.close(slot)
    drafter.open(1, 500)  # a longer context than before: a new memory
    drafter.observe(
        RaggedBatch.pack([histories[0][:-1]], [0], [1]), features_of(target, histories[0][:-1], drafter.aux_layers)
    )
    assert propose(drafter, [1], histories[:1]).lengths.tolist() == [5]


# ------------------------------------------------------------------------------------------------ batches and limits


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_row_drafts_the_same_alone_and_in_a_ragged_batch(name: str, params: SamplingParams) -> None:
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(BLOCKS[name], target=target)
    drafter = make_drafter(checkpoint, target, torch.float64)
    histories = [random_tokens(n, n) for n in (3, 9, 30, 5, 17, 2, 12, 8)]
    limits = [5, 2, 1, 0, 4, 5, 3, 5]
    session = Session(target, drafter, 8)
    session.observe([h[:-1] for h in histories], [0] * 8)
    together = propose(drafter, session.slots, histories, limit=limits, params=params)
    for b, history in enumerate(histories):
        single = make_drafter(checkpoint, target, torch.float64)
        Session(target, single, 1).observe([history[:-1]], [0])
        alone = propose(single, [0], [history], limit=[limits[b]], params=params, rng=rng_of(1, seed=7 + b))
        n = int(alone.lengths)
        assert n == int(together.lengths[b]) == min(limits[b], drafter.block)
        assert together.tokens[b, :n].tolist() == alone.tokens[0, :n].tolist()
        if params.temperature and n:
            k = together.tokens.shape[1]
            torch.testing.assert_close(
                together.distribution.dense(torch.arange(b * k, b * k + n)),
                alone.distribution.dense(torch.arange(n)),
                atol=1e-9,
                rtol=0,
            )


def test_greedy_drafts_carry_no_distribution_and_a_mixed_batch_does() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS["vanilla"], target=target), target)
    history = random_tokens(6, 1)
    Session(target, drafter, 1).observe([history[:-1]], [0])
    assert propose(drafter, [0], [history]).distribution is None
    assert propose(drafter, [0], [history], params=SAMPLED).distribution is not None


def test_a_reduced_vocabulary_drafts_its_own_tokens_only() -> None:
    """Distributions are over the target's vocabulary, W1 is read by target ids, W2 gives draft ids."""
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target, drafted=10)
    drafter = make_drafter(checkpoint, target, torch.float64)
    history = random_tokens(9, 2)
    Session(target, drafter, 1).observe([history[:-1]], [0])
    proposal = propose(drafter, [0], [history], params=SAMPLED)
    ids = checkpoint.tensors["d2t"] + torch.arange(10)
    drafts = proposal.tokens[0].tolist()
    assert set(drafts) <= set(ids.tolist())
    distributions = proposal.distribution.dense(torch.arange(len(drafts)))
    assert distributions.shape == (5, VOCABULARY) and not distributions[:, ~checkpoint.tensors["t2d"]].any()
    hidden = dense_block(
        checkpoint, target.tensors["embed.weight"], features_of(target, history[:-1], drafter.aux_layers), history[-1]
    )
    logits = hidden @ checkpoint.tensors["head.weight"].double().T + dense_bias(
        checkpoint, [history[-1], *drafts[:-1]], hidden
    )
    torch.testing.assert_close(distributions[:, ids], (logits / 0.8).softmax(-1), atol=1e-6, rtol=0, check_dtype=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_reduced_head_is_made_of_the_targets_rows_where_the_checkpoint_holds_none(dtype: str) -> None:
    """The same drafts as with those rows in the checkpoint, in every precision the core has for it."""
    if not available():
        pytest.skip("the compiled core is not built")
    backend = NativeBackend()
    target = make_target(backend=backend)
    given = make_checkpoint(BLOCKS["vanilla"], target=target, drafted=20)
    ids = given.tensors["d2t"] + torch.arange(20)
    rows = target.tensors["head.weight"][ids]
    torch.testing.assert_close(head_rows(target, ids), rows, atol=0, rtol=1e-6)
    absent = {name: tensor for name, tensor in given.tensors.items() if name != "head.weight"}
    history, proposals = random_tokens(20, 3), []
    for tensors in (absent, {**absent, "head.weight": head_rows(target, ids)}):
        made = replace(given, tensors=tensors)
        drafter = DSparkDrafter(made, target, backend, config=DSparkConfig(""), dtype=dtype, max_rows=1)
        assert drafter.net.head is drafter.net.stack and drafter.net.stack.config.vocab_size == 20
        Session(target, drafter, 1).observe([history[:-1]], [0])
        proposals.append(propose(drafter, [0], [history], params=SAMPLED))
    ours, theirs = proposals
    assert torch.equal(ours.tokens, theirs.tokens) and set(ours.tokens[0].tolist()) <= set(ids.tolist())
    assert torch.equal(ours.distribution.dense(torch.arange(5)), theirs.distribution.dense(torch.arange(5)))


def test_drafted_tokens_follow_the_distribution_they_carry() -> None:
    """The second draft of 1,200 rounds, given the first: total variation to its distribution is sampling noise."""
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS["vanilla"], target=target), target, draft_tokens=2)
    history = random_tokens(6, 1)
    session = Session(target, drafter, 8)
    session.observe([history[:-1]] * 8, [0] * 8)
    counts, distributions = torch.zeros(VOCABULARY, VOCABULARY), {}
    for round in range(150):
        proposal = propose(drafter, session.slots, [history] * 8, params=SAMPLED, rng=rng_of(8, round=round))
        rows = proposal.distribution.dense(torch.arange(16)).view(8, 2, -1)
        for b, (first, second) in enumerate(proposal.tokens.tolist()):
            counts[first, second] += 1
            distributions[first] = rows[b, 1]
    seen = counts.sum(1)
    distance = (
        sum(float((counts[t] / seen[t] - distributions[t]).abs().sum() / 2 * seen[t]) for t in distributions) / 1200
    )
    expected = sum(float((distributions[t] / seen[t]).sqrt().sum() * 0.4 * seen[t]) for t in distributions) / 1200
    assert distance < 1.3 * expected


def test_confidence_never_looks_at_its_own_token_or_later_ones() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS["vanilla"], target=target), target)
    hidden, before = torch.randn(1, 5, 32), [torch.randn(1, 6) for _ in range(5)]
    plain = drafter.head.confidence_logits(hidden, before)
    changed = drafter.head.confidence_logits(hidden, [*before[:3], torch.randn(1, 6), torch.randn(1, 6)])
    assert torch.equal(plain[:, :3], changed[:, :3]) and not torch.equal(plain[:, 3:], changed[:, 3:])


# ------------------------------------------------------------------------------------------------ options and targets


def test_block_size_and_anchor_layout_are_free() -> None:
    target = make_target()
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target)
    history = random_tokens(6, 1)
    for size, anchor, drafts in ((1, True, 1), (9, True, 9), (9, False, 8), (2, False, 1)):
        drafter = make_drafter(checkpoint, target, block_size=size, sample_from_anchor=anchor)
        Session(target, drafter, 1).observe([history[:-1]], [0])
        assert drafter.block == drafts
        assert propose(drafter, [0], [history]).lengths.tolist() == [drafts]
    assert make_drafter(checkpoint, target, draft_tokens=2).block == 2


def test_embedding_and_head_are_the_targets_where_equal() -> None:
    target = make_target()
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target)
    net = make_drafter(checkpoint, target).net
    assert net.embed == target.embed and net.unembed == target.unembed
    absent = {name: t for name, t in checkpoint.tensors.items() if name not in ("embed.weight", "head.weight")}
    net = make_drafter(replace(checkpoint, tensors=absent), target).net
    assert net.embed == target.embed and net.unembed == target.unembed
    head = checkpoint.tensors["head.weight"].clone()
    head[17, 3] += 0.01  # one value of one row
    net = make_drafter(replace(checkpoint, tensors={**checkpoint.tensors, "head.weight": head}), target).net
    assert net.embed == target.embed and net.unembed == net.stack.unembed


@pytest.mark.skipif(not available(), reason="the compiled core is not built")
def test_a_drafter_of_fewer_bits_than_its_target_has_a_head_of_its_own() -> None:
    backend = NativeBackend()
    target = make_target(backend=backend)
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target)
    shared, narrow = (
        DSparkDrafter(checkpoint, target, backend, config=DSparkConfig(""), dtype=dtype, max_rows=1).net
        for dtype in ("float32", "int8")
    )
    assert shared.head is target.stack and narrow.head is narrow.stack and narrow.embedding is target.stack
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(narrow.unembed(hidden), target.unembed(hidden), atol=0.2, rtol=0)


@pytest.mark.skipif(not available(), reason="the compiled core is not built")
def test_the_packaged_drafter_is_quantised_unless_told_otherwise() -> None:
    model = load_model("embedded")
    for asked, got in (("auto", "int8"), ("bfloat16", "bfloat16")):
        _, drafter = load_drafter("dspark", model, {"dtype": asked}, max_rows=1)
        assert isinstance(drafter, DSparkDrafter) and drafter.net.stack.dtype == got and drafter.core is not None


def test_drafters_of_other_targets_are_refused() -> None:
    target = make_target()
    checkpoint = make_checkpoint(BLOCKS["vanilla"], target=target)
    with pytest.raises(IncompatibleDrafter, match="embedding differs"):
        make_drafter(checkpoint, make_target(seed=5))
    with pytest.raises(IncompatibleDrafter, match="number of target layers is 7"):
        make_drafter(replace(checkpoint, target=replace(checkpoint.target, num_layers=7)), target)
    with pytest.raises(IncompatibleDrafter, match="hidden size is 48"):
        make_drafter(replace(checkpoint, target=replace(checkpoint.target, hidden_size=48)), target)
    with pytest.raises(IncompatibleDrafter, match="vocabulary size is 99"):
        make_drafter(replace(checkpoint, decoder={**checkpoint.decoder, "vocab_size": 99}), target)
    with pytest.raises(IncompatibleDrafter, match="last layer"):
        make_drafter(replace(checkpoint, target_layers=(0, 2, 4)), target)
    with pytest.raises(IncompatibleDrafter, match=r"\[0, 2, 9\]"):
        make_drafter(checkpoint, target, target_layers=(0, 2, 9))
    with pytest.raises(IncompatibleDrafter, match="reads 3 target layers, got 2"):
        make_drafter(checkpoint, target, target_layers=(0, 2))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="draft_tokens must be at least 1"):
        DSparkConfig("x", draft_tokens=0)
    with pytest.raises(InvalidRequest, match="block_size must be at least 1"):
        DSparkConfig("x", block_size=0)


# ------------------------------------------------------------------------------------------------ the compiled core


@pytest.mark.skipif(not available(), reason="the compiled core is not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DESIGNS)
def test_rows_of_a_batch_are_bit_identical_to_each_alone(name: str, dtype: str) -> None:
    """Eight ragged rows in the native backend: tokens, distributions and confidences of every kind of drafter."""
    backend = NativeBackend()
    target = make_target(backend=backend, dtype=getattr(torch, dtype))
    drafted = 20 if name in ("gated", "eagle3") else VOCABULARY
    checkpoint = make_checkpoint(DESIGNS[name], target=target, drafted=drafted)
    kind = find("drafter", checkpoint.kind)

    def make():
        return kind(checkpoint, target, backend, config=kind.Config(""), dtype=dtype, max_rows=8)

    histories = [random_tokens(n, n) for n in (3, 9, 30, 5, 70, 2, 12, 8)]
    limits = [3, 2, 1, 0, 3, 3, 2, 3]
    drafter = make()
    session = Session(target, drafter, 8)
    session.observe([h[:-1] for h in histories], [0] * 8)
    together = propose(drafter, session.slots, histories, limit=limits, params=SAMPLED)
    width = together.tokens.shape[1]
    for b, history in enumerate(histories):
        single = make()
        Session(target, single, 1).observe([history[:-1]], [0])
        alone = propose(single, [0], [history], limit=[limits[b]], params=SAMPLED, rng=rng_of(1, seed=7 + b))
        n = int(alone.lengths)
        assert n == int(together.lengths[b]) == limits[b]
        if n:
            assert together.tokens[b, :n].tolist() == alone.tokens[0, :n].tolist()
            assert torch.equal(together.confidence[b, :n], alone.confidence[0, :n])
            index = torch.arange(b * width, b * width + n)
            assert torch.equal(together.distribution.dense(index), alone.distribution.dense(torch.arange(n)))


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED, SamplingParams(temperature=1.0, top_p=0.8)], ids=repr)
@pytest.mark.parametrize("name", ["dflash", "masks-only"])
def test_blocks_without_a_head_are_drawn_at_once_as_step_by_step(
    name: str, params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS[name], target=target), target)
    session, history, proposals = Session(target, drafter, 3), random_tokens(20, 3), []
    session.observe([history[:-1], history[:7], history[:4]], [0, 0, 0])
    for stepwise in (False, True):
        monkeypatch.setattr(Drawing, "stepwise", stepwise)
        histories = [history, history[:8], history[:5]]
        proposals.append(propose(drafter, session.slots, histories, limit=[4, 0, 2], params=params))
    quick, steps = proposals
    assert torch.equal(quick.lengths, steps.lengths) and quick.lengths.tolist() == [4, 0, 2]
    assert torch.equal(quick.tokens, steps.tokens) and torch.equal(quick.confidence, steps.confidence)
    assert (quick.distribution is None) == (steps.distribution is None) == (params.temperature == 0)
    if quick.distribution is not None:
        index = torch.tensor([0, 1, 2, 3, 8, 9])
        assert torch.equal(quick.distribution.dense(index), steps.distribution.dense(index))


def test_a_penalty_makes_drafts_wait_for_those_before_them() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(BLOCKS["dflash"], target=target), target)
    session, history = Session(target, drafter, 1), random_tokens(20, 3)
    session.observe([history[:-1]], [0])
    free, penalised = (
        propose(drafter, session.slots, [history], params=SamplingParams(temperature=5.0, presence_penalty=amount))
        for amount in (0.0, 2.0)
    )
    drafts = penalised.tokens[0].tolist()
    distributions = penalised.distribution.dense(torch.arange(len(drafts)))
    plain = free.distribution.dense(torch.arange(len(drafts)))
    new = next(k for k in range(1, len(drafts)) if drafts[k - 1] not in history)
    other = next(v for v in range(VOCABULARY) if v not in history and v not in drafts)
    lost = (
        distributions[new, drafts[new - 1]]
        / distributions[new, other]
        / (plain[new, drafts[new - 1]] / plain[new, other])
    )
    assert lost.item() == pytest.approx(math.exp(-2.0 / 5.0), rel=1e-4)
