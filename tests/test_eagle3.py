"""EAGLE-3: against a direct computation, rewound and re-run as tokens are accepted, alone and in a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from trained import (
    DESIGNS,
    SAMPLED,
    VOCABULARY,
    Session,
    dense_layer,
    features_of,
    make_checkpoint,
    make_target,
    norm,
    propose,
    random_tokens,
    rng_of,
)

from outrider.backends.reference import ReferenceBackend
from outrider.checkpoints import DraftCheckpoint
from outrider.config import SamplingParams
from outrider.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from outrider.drafters.eagle3_design import Eagle3Design
from outrider.errors import InvalidRequest
from outrider.types import RaggedBatch, TargetModel

CHAINS = {name: design for name, design in DESIGNS.items() if isinstance(design, Eagle3Design)}


def make_drafter(checkpoint: DraftCheckpoint, target: TargetModel, dtype=torch.float64, **options) -> Eagle3Drafter:
    config = Eagle3Config("", **options)
    return Eagle3Drafter(checkpoint, target, ReferenceBackend(), config=config, dtype=dtype, max_rows=8)


def dense_distribution(checkpoint: DraftCheckpoint, target, features: Tensor, tokens: list[int]) -> Tensor:
    """Distribution of the token after ``tokens``; those past the features are drafts. One pass over everything. [V]"""
    w = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
    design, features = checkpoint.design, features.double()
    if design.norm_before_fc:
        features = norm(features, w["feature_norm.weight"])
    if design.norm_each_before_fc:
        parts = [norm(part, w[f"feature_norms.{i}.weight"]) for i, part in enumerate(features.chunk(3, -1))]
        features = torch.cat(parts, -1)
    states = list(features @ w["fc.weight"].T)
    embedded = norm(target.tensors["embed.weight"].double()[tokens], w["embed_norm.weight"])
    while True:
        hidden = torch.stack(states)
        normed = norm(hidden, w["hidden_norm.weight"])
        wide = torch.cat([embedded[1 : len(states) + 1], normed], -1)
        out = dense_layer(w, wide, normed if design.norm_before_residual else hidden)[-1]
        final = norm(out, w["norm.weight"])
        if len(states) + 1 == len(tokens):
            return (final @ target.tensors["head.weight"].double().T / SAMPLED.temperature).softmax(-1)
        states.append(final if design.norm_output else out)


@pytest.mark.parametrize("name", CHAINS)
def test_drafts_follow_the_distributions_of_a_direct_computation(name: str) -> None:
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(CHAINS[name], target=target)
    drafter, history = make_drafter(checkpoint, target), random_tokens(9, 3)
    session = Session(target, drafter, 1)
    session.observe([history[:-1]], [0])
    for accepted in (2, 0, 4, 1):  # rounds: each re-runs what was accepted on the target's features
        features = features_of(target, history[:-1], drafter.aux_layers)
        proposal = propose(drafter, [0], [history], params=SAMPLED, rng=rng_of(1, round=len(history)))
        drafts = proposal.tokens[0].tolist()
        assert len(drafts) == 4
        distributions = proposal.distribution.dense(torch.arange(4))
        for j in range(4):
            expected = dense_distribution(checkpoint, target, features, [*history, *drafts[:j]])
            torch.testing.assert_close(distributions[j], expected, atol=1e-6, rtol=0, check_dtype=False)
        session.observe([[history[-1], *drafts[:accepted]]], [len(history) - 1])
        history += [*drafts[:accepted], accepted]


@pytest.mark.parametrize("chunks", [[11], [1, 10], [5, 3, 2, 1], [1] * 11], ids=str)
def test_any_feeding_gives_the_same_drafts(chunks: list[int]) -> None:
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(CHAINS["eagle3"], target=target)
    history = random_tokens(12, 4)
    whole = make_drafter(checkpoint, target)
    Session(target, whole, 1).observe([history[:11]], [0])
    expected = propose(whole, [0], [history])
    drafter = make_drafter(checkpoint, target)
    session, start = Session(target, drafter, 1), 0
    for size in chunks:
        session.observe([history[start : start + size]], [start])
        start += size
        propose(drafter, [0], [history[: start + 1]])
    assert torch.equal(propose(drafter, [0], [history]).tokens, expected.tokens)


def test_self_fed_keys_are_taken_back() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(CHAINS["eagle3"], target=target), target, torch.float32)
    history = random_tokens(9, 6)
    Session(target, drafter, 1).observe([history[:-1]], [0])
    first = propose(drafter, [0], [history])
    # The last feature waits for a token that is certain: it is run again with the next ones.
    assert drafter.cache.kv_cache.lengths.tolist()[0] == 7 and drafter.cache.end_of(0) == 8
    assert torch.equal(first.tokens, propose(drafter, [0], [history]).tokens)
    other = [*history[:-1], 5]
    assert propose(drafter, [0], [other]).lengths.tolist() == [4]


def test_long_prompts_are_run_as_they_come() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(CHAINS["eagle3"], target=target), target, torch.float32)
    session, tokens = Session(target, drafter, 1), random_tokens(101, 5)
    session.observe([tokens[:70]], [0])
    session.observe([tokens[70:100]], [70])
    assert int(drafter.cache.held([0])) == 69
    whole = make_drafter(make_checkpoint(CHAINS["eagle3"], target=target), target, torch.float32)
    Session(target, whole, 1).observe([tokens[:100]], [0])
    assert int(whole.cache.held([0])) == 99
    assert torch.equal(propose(drafter, [0], [tokens]).tokens, propose(whole, [0], [tokens]).tokens)


def test_a_row_with_missing_features_stays_plain() -> None:
    target = make_target()
    drafter = make_drafter(make_checkpoint(CHAINS["eagle3"], target=target), target, torch.float32)
    history = random_tokens(20, 7)
    features = features_of(target, history[:-1], drafter.aux_layers)
    drafter.open(0, 64)
    drafter.observe(RaggedBatch.pack([history[8:-1]], [8], [0]), features[8:])
    assert propose(drafter, [0], [history]).lengths.tolist() == [0]
    drafter.observe(RaggedBatch.pack([history[:-1]], [0], [0]), features)
    assert propose(drafter, [0], [history]).lengths.tolist() == [4]


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
def test_a_row_drafts_the_same_alone_and_in_a_ragged_batch(params: SamplingParams) -> None:
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(CHAINS["eagle3"], target=target, drafted=20)
    drafter = make_drafter(checkpoint, target)
    histories = [random_tokens(n, n) for n in (3, 9, 30, 5, 17, 2, 12, 8)]
    limits = [4, 2, 1, 0, 4, 3, 3, 4]
    session = Session(target, drafter, 8)
    session.observe([h[:-1] for h in histories], [0] * 8)
    together = propose(drafter, session.slots, histories, limit=limits, params=params)
    drawable = (checkpoint.tensors["d2t"] + torch.arange(20)).tolist()
    for b, history in enumerate(histories):
        single = make_drafter(checkpoint, target)
        Session(target, single, 1).observe([history[:-1]], [0])
        alone = propose(single, [0], [history], limit=[limits[b]], params=params, rng=rng_of(1, seed=7 + b))
        n = int(alone.lengths)
        assert n == int(together.lengths[b]) == limits[b]
        assert together.tokens[b, :n].tolist() == alone.tokens[0, :n].tolist()
        assert set(alone.tokens[0, :n].tolist()) <= set(drawable)


def test_options() -> None:
    target = make_target()
    checkpoint = make_checkpoint(CHAINS["eagle3"], target=target)
    drafter = make_drafter(checkpoint, target, torch.float32, draft_tokens=9)  # deeper than it was trained for
    history = random_tokens(6, 1)
    Session(target, drafter, 1).observe([history[:-1]], [0])
    assert propose(drafter, [0], [history]).lengths.tolist() == [9]
    with pytest.raises(InvalidRequest, match="draft_tokens must be at least 1"):
        Eagle3Config("x", draft_tokens=0)


def test_a_draft_vocabulary_of_one_token_and_one_in_another_order() -> None:
    target, tokens = make_target(), random_tokens(20, 7)
    plain = make_checkpoint(CHAINS["eagle3"], target=target)
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))
    moved = {"head.weight": plain.tensors["head.weight"][order], "d2t": order - torch.arange(VOCABULARY)}
    one = make_checkpoint(CHAINS["eagle3"], drafted=1)
    drafts = []
    for checkpoint in (plain, replace(plain, tensors={**plain.tensors, **moved}), one):
        drafter = make_drafter(checkpoint, target, torch.float32)
        Session(target, drafter, 1).observe([tokens[:-1]], [0])
        drafts.append(propose(drafter, [0], [tokens]))
    assert torch.equal(drafts[0].tokens, drafts[1].tokens)
    assert drafts[2].tokens.tolist() == [[int(one.tensors["d2t"])] * 4]
    assert drafts[2].confidence is not None and drafts[2].confidence.tolist() == [[1.0] * 4]
