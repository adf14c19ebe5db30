"""Drafters that read features, in one call of the compiled core: what they draft step by step in Python."""

from __future__ import annotations

import pytest
import torch
from trained import DESIGNS, SAMPLED, VOCABULARY, Session, make_checkpoint, make_target, propose, random_tokens

from outrider.backends.native import NativeBackend
from outrider.config import SamplingParams
from outrider.core import native
from outrider.registry import find
from outrider.scheduling.calibration import Calibration, Scaling
from outrider.types import Proposal

ISAS = [] if native is None else list(native.instruction_sets())
PARAMS = [
    SamplingParams(),
    SAMPLED,
    SamplingParams(temperature=1e-4),
    SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.02),
    SamplingParams(temperature=0.7, top_p=0.5),
]
LIMITS = [3, 2, 0, 1]


@pytest.mark.parametrize("drafted", [VOCABULARY, 20])
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("isa", ISAS)
def test_drafts_of_one_call_are_those_drawn_step_by_step(isa: str, name: str, drafted: int) -> None:
    """Ragged rows, one without drafts: tokens, confidences and distributions, of whole and reduced vocabularies."""
    backend = NativeBackend(isa)
    target = make_target(backend=backend)
    checkpoint = make_checkpoint(DESIGNS[name], target=target, drafted=drafted)
    kind = find("drafter", checkpoint.kind)
    history, drafters, sessions = random_tokens(80, 3), [], []
    histories = [history[:20], history[:8], history, history[:5]]
    for _ in range(2):
        drafter = kind(checkpoint, target, backend, config=kind.Config(""), dtype="float32", max_rows=4)
        assert drafter.core is not None
        drafters.append(drafter)
        sessions.append(Session(target, drafter, 4))
        sessions[-1].observe([h[:-1] for h in histories], [0] * 4)
    drafters[1].core = None
    drafters[0].calibration = drafters[1].calibration = Calibration({("block", 1.0): Scaling((2.0, 0.7), (0.3, -0.2))})
    for params in PARAMS:
        proposals = []
        for drafter, session in zip(drafters, sessions, strict=True):
            proposals.append(propose(drafter, session.slots, histories, limit=LIMITS, params=params))
            slots = drafter.cache.cache_slots([0, 1, 3])
            assert torch.equal(drafter.cache.kv_cache.lengths[slots], drafter.cache.held([0, 1, 3]))
        check_equal(*proposals, params)
        if checkpoint.reduced and params.temperature:
            assert not proposals[0].distribution.dense(torch.arange(2))[:, ~checkpoint.tensors["t2d"]].any()


def check_equal(quick: Proposal, steps: Proposal, params: SamplingParams) -> None:
    assert torch.equal(quick.lengths, steps.lengths) and quick.lengths.tolist() == LIMITS
    for b, count in enumerate(LIMITS):
        assert torch.equal(quick.tokens[b, :count], steps.tokens[b, :count])
        torch.testing.assert_close(quick.confidence[b, :count], steps.confidence[b, :count], atol=1e-5, rtol=0)
    assert (quick.distribution is None) == (steps.distribution is None) == (params.temperature == 0)
    if quick.distribution is not None:
        index = torch.tensor([0, 1, 2, 3, 4, 9])
        ours, theirs = quick.distribution.dense(index), steps.distribution.dense(index)
        torch.testing.assert_close(ours, theirs, atol=1e-5 if params.temperature > 0.1 else 0.2, rtol=0)
        if params.top_p < 1:  # truncated: the same tokens are left
            assert torch.equal(ours > 0, theirs > 0) and bool((ours == 0).any())
