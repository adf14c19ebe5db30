"""The target on a device, tried on the CPU: the same text and features as the target that serves."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.config import LayerConfig, RopeConfig, SamplingParams, StackConfig
from outrider.engine.llm import LLM
from outrider.errors import InvalidRequest
from outrider.training.conversations import ChatTurn, Settings
from outrider.training.dataset import Text
from outrider.training.device_target import DeviceRunner, DeviceTarget, FrozenLayer, check_device, device_answers
from outrider.training.networks import DSparkTraining
from outrider.training.networks.stack import LearnedLayer, LearnedStack
from outrider.training.target_runner import TargetRunner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> LLM:
    return LLM(str(tiny_model_dir), "none", dtype="float32")


@pytest.fixture(scope="module")
def target(tiny_model_dir: Path) -> DeviceTarget:
    return DeviceTarget(str(tiny_model_dir), CPU, torch.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_are_those_of_the_engine(llm: LLM, target: DeviceTarget, temperature: float) -> None:
    prompts = [[5 + i] * (3 + 5 * i) for i in range(6)]  # lengths that differ, so that padding would show
    params = [SamplingParams(max_tokens=70 if i == 2 else 9 + i, temperature=temperature, seed=i) for i in range(6)]
    expected = [output.token_ids for output in llm.generate(prompts, params)]
    assert target.answer(prompts, params, llm.target.spec.eos_token_ids) == expected


def test_rows_that_end_leave_the_others_alone(llm: LLM, target: DeviceTarget) -> None:
    prompts = [[7, 8, 9 + i] for i in range(8)]
    params = [SamplingParams(max_tokens=60, temperature=1.5, seed=i) for i in range(8)]
    whole = [output.token_ids for output in llm.generate(prompts, [SamplingParams(max_tokens=60, temperature=1.5,
                                                                                 seed=i, ignore_eos=True)
                                                                  for i in range(8)])]  # fmt: skip
    ends = {tokens[20] for tokens in whole[:5]}
    cut = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in ends), 60)] for tokens in whole]
    assert target.answer(prompts, params, sorted(ends)) == cut


def test_features_are_those_of_the_target(llm: LLM, target: DeviceTarget) -> None:
    texts = [Text(str(i), "", tuple(3 + (i * 7 + j) % 200 for j in range(9 + 6 * i)), 3) for i in range(3)]
    drafter = DSparkTraining(markov_rank=4, aux_layers=1).start(llm.target, {"num_attention_heads": 2}, {"<|mask|>": 1})
    ours = DeviceRunner(target).batch(texts, drafter, 0)
    theirs = TargetRunner(llm.target, 64).batch(texts, drafter, 0)
    torch.testing.assert_close(ours.features, theirs.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_a_text_is_read_once(llm: LLM, tiny_model_dir: Path) -> None:
    reads = []

    class Counting(DeviceTarget):
        def read(self, texts: Sequence[Sequence[int]], aux_layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            reads.append(len(texts))
            return super().read(texts, aux_layers)

    texts = [Text(str(i), "", tuple(3 + (i * 7 + j) % 200 for j in range(9 + 6 * i)), 3) for i in range(4)]
    drafter = DSparkTraining(markov_rank=4, aux_layers=1).start(llm.target, {"num_attention_heads": 2}, {"<|mask|>": 1})
    kept = DeviceRunner(Counting(str(tiny_model_dir), CPU, torch.float32))
    kept.batch(texts[:2], drafter, 0)
    again = kept.batch(texts[::-1], drafter, 1)  # two of them are there, and in another order
    anew = kept.batch(texts[::-1], drafter, 1)
    assert reads == [2, 2]
    expected = DeviceRunner(Counting(str(tiny_model_dir), CPU, torch.float32)).batch(texts[::-1], drafter, 1)
    for batch in (again, anew):
        torch.testing.assert_close(batch.features, expected.features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch.logits, expected.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "stack"),
    [
        ({}, {}),
        ({"qk_norm": True, "window": 3}, {"sandwich_norms": True, "norm_offset": 1.0, "activation": "gelu_tanh"}),
        ({"value_is_key": True, "v_norm": True, "layer_scalar": 0.5}, {}),
    ],
)
def test_a_frozen_layer_computes_what_the_learnt_one_does(layer: dict[str, Any], stack: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rope = RopeConfig((1.0, 0.1, 0.01, 0.001))
    kind = LayerConfig(4, 2, 8, 24, rope, **layer)
    learnt = LearnedStack(StackConfig(10, 16, (kind,), **stack)).requires_grad_(False)
    for parameter in learnt.parameters():
        parameter.normal_()
    own, x, angles = learnt.layers[0], torch.randn(5, 16), learnt.angles(torch.arange(5))[rope]
    assert isinstance(own, LearnedLayer)

    def attend(layer: int, config: LayerConfig, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q * (k + v).repeat_interleave(2, 1)  # tells the three apart

    expected = own(x, None, angles, attend)
    torch.testing.assert_close(FrozenLayer(own, torch.float32)(x, angles, attend), expected, rtol=1e-5, atol=1e-5)


def test_options_that_a_device_does_not_know(target: DeviceTarget) -> None:
    settings = Settings(SamplingParams(temperature=1.0, top_p=0.9), (), 64, 0)
    with pytest.raises(InvalidRequest, match="temperature alone"):
        device_answers(lambda: target, 4, settings)
    with pytest.raises(InvalidRequest, match="device 'warp' cannot be used here"):
        check_device("warp")


def test_turns_are_answered_at_several_temperatures(target: DeviceTarget) -> None:
    settings = Settings(SamplingParams(max_tokens=5), (), 64, 0, (0.0, 0.5, 1.0))
    turns = [ChatTurn(str(i), "", [4, 5, 6 + i], (), ()) for i in range(30)]
    assert {settings.of(turn).temperature for turn in turns} == {0.0, 0.5, 1.0}
    answers = [pair for some in device_answers(lambda: target, 7, settings)(deque(turns)) for pair in some]
    assert {turn.id for turn, _ in answers} == {turn.id for turn in turns}
