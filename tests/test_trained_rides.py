"""Trained drafters in the engine: the text is the target's own, whatever they draft."""

from __future__ import annotations

import pytest
import torch
from trained import DESIGNS, VOCABULARY, make_checkpoint, make_target, random_tokens

from outrider.backends.reference import ReferenceBackend
from outrider.config import SamplingParams, build
from outrider.engine.engine import Engine
from outrider.registry import find
from outrider.types import Drafter, TargetModel

PARAMS = {
    "greedy": SamplingParams(max_tokens=20),
    "coupled": SamplingParams(max_tokens=20, temperature=0.9, seed=3),
    "penalised": SamplingParams(max_tokens=20, temperature=0.7, seed=4, repetition_penalty=1.3, top_k=9),
}
PROMPTS = [random_tokens(n, n) for n in (3, 90, 1, 17)]  # one is longer than a chunk


def ride(target: TargetModel, drafter: Drafter, params: SamplingParams) -> list[list[int]]:
    kind = find("policy", "fixed")
    policy = kind.from_config(build(kind.Config, {"draft_tokens": max(1, drafter.block)}, "policy"))
    engine = Engine(target, drafter, policy, max_rows=3, capacity=128, chunk=32)
    requests = [engine.submit(prompt, params, params.seed or 0, i) for i, prompt in enumerate(PROMPTS)]
    while engine.step() or any(request.finish_reason is None for request in requests):
        pass
    return [request.output for request in requests]


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return make_target(dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(target: TargetModel) -> dict[str, list[list[int]]]:
    none = find("drafter", "none")
    return {name: ride(target, none.from_config(none.Config(), target), params) for name, params in PARAMS.items()}


@pytest.mark.parametrize("sampling", PARAMS)
@pytest.mark.parametrize("name", DESIGNS)
def test_the_text_is_the_targets_own(name: str, sampling: str, target: TargetModel, plain: dict) -> None:
    drafted = 30 if name in ("vanilla", "eagle3") else VOCABULARY
    checkpoint = make_checkpoint(DESIGNS[name], target=target, drafted=drafted)
    kind = find("drafter", checkpoint.kind)
    drafter = kind(checkpoint, target, ReferenceBackend(), config=kind.Config(""), dtype=torch.float64, max_rows=3)
    assert ride(target, drafter, PARAMS[sampling]) == plain[sampling]
