"""Drafters that read features, in one call of the compiled core: what they draft step by step in Python."""

from __future__ import annotations

import pytest
import torch
from trained import DESIGNS, SAMPLED, VOCABULARY, Session, make_checkpoint, make_target, propose, random_tokens

from outrider.backends.native import NativeBackend
from outrider.config import SamplingParams
from outrider.core import native
from outrider.registry import find

ISAS = [] if native is None else list(native.instruction_sets())
CUT = SamplingParams(temperature=1.0, top_k=5, top_p=0.9)


@pytest.mark.parametrize("params", [SamplingParams(), SAMPLED, SamplingParams(temperature=1e-4), CUT], ids=repr)
@pytest.mark.parametrize("drafted", [VOCABULARY, 20])
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("isa", ISAS)
def test_drafts_of_one_call_are_those_drawn_step_by_step(
    isa: str, name: str, drafted: int, params: SamplingParams
) -> None:
    """Ragged rows, some without drafts: tokens, confidences and distributions, of whole and reduced vocabularies."""
    backend = NativeBackend(isa)
    target = make_target(backend=backend)
    checkpoint = make_checkpoint(DESIGNS[name], target=target, drafted=drafted)
    kind = find("drafter", checkpoint.kind)
    drafters = [
        kind(checkpoint, target, backend, config=kind.Config(""), dtype="float32", max_rows=4) for _ in range(2)
    ]
    assert drafters[0].core is not None
    drafters[1].core = None
    history, proposals = random_tokens(80, 3), []
    histories = [history[:20], history[:8], history, history[:5]]
    for drafter in drafters:
        session = Session(target, drafter, 4)
        session.observe([h[:-1] for h in histories], [0] * 4)
        proposals.append(propose(drafter, session.slots, histories, limit=[3, 2, 0, 1], params=params))
        slots = drafter.cache.cache_slots([0, 1, 3])
        assert torch.equal(drafter.cache.kv_cache.lengths[slots], drafter.cache.held([0, 1, 3]))
    quick, steps = proposals
    assert torch.equal(quick.lengths, steps.lengths) and quick.lengths.tolist() == [3, 2, 0, 1]
    for b, count in enumerate(quick.lengths.tolist()):
        assert torch.equal(quick.tokens[b, :count], steps.tokens[b, :count])
        torch.testing.assert_close(quick.confidence[b, :count], steps.confidence[b, :count], atol=1e-5, rtol=0)
    assert (quick.distribution is None) == (steps.distribution is None) == (params.temperature == 0)
    if params.temperature:
        index = torch.tensor([0, 1, 2, 3, 4, 9])
        ours, theirs = quick.distribution.dense(index), steps.distribution.dense(index)
        torch.testing.assert_close(ours, theirs, atol=1e-5 if params.temperature > 0.1 else 0.2, rtol=0)
        if checkpoint.reduced:
            assert not ours[:, ~checkpoint.tensors["t2d"]].any()
