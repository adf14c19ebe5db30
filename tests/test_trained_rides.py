"""Trained drafters in the engine: the text is the target's own, whatever they draft."""

from __future__ import annotations

import pytest
import torch
from test_block_cache import native
from trained import DESIGNS, VOCABULARY, make_checkpoint, make_target, random_tokens

from outrider.backends.native import NativeBackend
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


@pytest.mark.parametrize("length", [129, 150, 64])  # the drafter's last block may be one token short of the target's
@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("core", [False, pytest.param(True, marks=native)])
def test_a_shared_prefix_changes_neither_text_nor_drafts(
    core: bool, name: str, length: int, target: TargetModel
) -> None:
    """The drafter's keys and values of the prefix are taken over too: it drafts what it would have drafted."""
    backend, dtype = (NativeBackend(), torch.float32) if core else (ReferenceBackend(), torch.float64)
    target = make_target(dtype=dtype, backend=backend) if core else target
    checkpoint = make_checkpoint(DESIGNS[name], target=target)
    kind, policy = find("drafter", checkpoint.kind), find("policy", "fixed")
    drafter = kind(checkpoint, target, backend, config=kind.Config(""), dtype=dtype, max_rows=3)
    fixed = policy.from_config(build(policy.Config, {"draft_tokens": drafter.block}, "policy"))
    engine = Engine(target, drafter, fixed, max_rows=3, capacity=256, chunk=100)
    prompt, params = random_tokens(length, 1), SamplingParams(max_tokens=20, temperature=0.9, seed=3)
    runs = []
    for _ in range(2):
        request = engine.submit(prompt, params, 3)
        engine.wait([request])
        runs.append((request.output, request.stats.accepted, request.stats.drafted, request.stats.rounds))
    assert request.stats.cached_tokens >= length // 64 * 64 - 64 and (length < 129 or request.stats.cached_tokens > 0)
    assert runs[0] == runs[1] and request.stats.drafted > 0
