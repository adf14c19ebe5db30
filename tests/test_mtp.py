"""The multi-token-prediction module: against a direct computation of the report's equations 21 to 23."""

from __future__ import annotations

import pytest
import torch
from trained import (
    DESIGNS,
    SAMPLED,
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
from outrider.drafters.mtp import MTPConfig, MTPDrafter
from outrider.errors import IncompatibleDrafter, InvalidRequest


def make_drafter(target, checkpoint, **options) -> MTPDrafter:
    config = MTPConfig("", **options)
    return MTPDrafter(checkpoint, target, ReferenceBackend(), config=config, dtype=torch.float64, max_rows=4)


@pytest.mark.parametrize("depth", [1, 3])
def test_drafts_follow_the_distributions_of_a_direct_computation(depth: int) -> None:
    """Applied once or to its own output; re-run on the target's states as tokens are accepted."""
    target = make_target(dtype=torch.float64)
    checkpoint = make_checkpoint(DESIGNS["mtp"], target=target)
    drafter, history = make_drafter(target, checkpoint, draft_tokens=depth), random_tokens(9, 3)
    w = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
    session = Session(target, drafter, 1)
    session.observe([history[:-1]], [0])
    for accepted in (1, 0, depth):
        proposal = propose(drafter, [0], [history], params=SAMPLED, rng=rng_of(1, round=len(history)))
        drafts = proposal.tokens[0].tolist()
        states = list(features_of(target, history[:-1], drafter.aux_layers).double())
        for j in range(depth):
            tokens = [*history, *drafts[:j]]
            embedded = norm(target.tensors["embed.weight"].double()[tokens[1:]], w["embed_norm.weight"])
            both = torch.cat([embedded, norm(torch.stack(states), w["hidden_norm.weight"])], -1)
            entered = both @ w["fc.weight"].T
            out = dense_layer(w, norm(entered, w["layers.0.input_norm.weight"]), entered)[-1]
            logits = norm(out, w["norm.weight"]) @ target.tensors["head.weight"].double().T
            distribution = (logits / SAMPLED.temperature).softmax(-1)
            torch.testing.assert_close(
                proposal.distribution.dense(torch.tensor([j]))[0], distribution, atol=1e-6, rtol=0, check_dtype=False
            )
            states.append(out)
        session.observe([[history[-1], *drafts[:accepted]]], [len(history) - 1])
        history += [*drafts[:accepted], accepted]


def test_the_last_layer_is_refused_and_so_is_more_than_one() -> None:
    target = make_target()
    checkpoint = make_checkpoint(DESIGNS["mtp"], target=target)
    with pytest.raises(IncompatibleDrafter, match="last layer"):
        make_drafter(target, checkpoint, target_layers=(4,))
    with pytest.raises(IncompatibleDrafter, match="reads 1 target layers"):
        make_drafter(target, checkpoint, target_layers=(1, 3))
    with pytest.raises(InvalidRequest, match="draft_tokens must be at least 1"):
        MTPConfig("x", draft_tokens=0)
