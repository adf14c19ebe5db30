"""A draft model whose head is padded to another number of rows than the target's: same tokenizer, so it drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import byte_level_bpe, save_tokenizer

from outrider import LLM, SamplingParams
from outrider.drafters.draft_model import DraftModelDrafter
from outrider.engine import loader
from outrider.errors import IncompatibleDrafter
from outrider.models.loading import load_target
from outrider.types import Context, Proposal, Rng

TOKENS = 265
PROMPTS = ["The quick brown fox", "def add(first", "naïve"]


def save(folder: Path, rows: int, *, layers: int, seed: int, tokens: int = TOKENS, family: str = "Llama") -> Path:
    """A random model with a head of ``rows`` rows and a tokenizer of ``tokens``; padding is as likely as any token."""
    sizes = {"vocab_size": rows, "eos_token_id": None, "bos_token_id": None, "initializer_range": 0.3}
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    if family != "GPTNeoX":
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"max_position_embeddings": 128}
    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return save_tokenizer(folder, byte_level_bpe(tokens))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("padded")
    return {rows: save(folder / str(rows), rows, layers=1, seed=rows) for rows in (TOKENS, 272, 288)}


class Watched(DraftModelDrafter):
    """Notes the largest id that was drafted."""

    largest = -1

    def propose(self, *given: object) -> Proposal:
        proposal = super().propose(*given)  # type: ignore[arg-type]
        for row, length in zip(proposal.tokens.tolist(), proposal.lengths.tolist(), strict=True):
            self.largest = max([self.largest, *row[:length]])
        return proposal


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("target", "draft"), [(272, 288), (288, 272), (288, 288), (TOKENS, 288), (288, TOKENS)])
def test_heads_of_different_padding(target: int, draft: int, backend: str, models: dict[int, Path]) -> None:
    """Ids are plain decoding's; no id past the tokenizer is drafted, greedy or sampled, in one row or three."""
    if backend == "native":
        pytest.importorskip("outrider._native")
    llm = LLM(models[target], models[draft], dtype="float32", backend=backend, drafter_options={"dtype": "float32"})
    assert isinstance(llm.drafter, DraftModelDrafter)
    llm.drafter.__class__ = Watched
    plain = llm.with_drafter("none")
    options = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=12, temperature=1.0, seed=3)]
    options += [SamplingParams(max_tokens=12, temperature=0.8, top_k=40, presence_penalty=0.3, seed=4)]
    for prompts, params in [(PROMPTS[:1], options[:1]), (PROMPTS[:1], options[1:2]), (PROMPTS, options)]:
        got, expected = llm.generate(prompts, params), plain.generate(prompts, params)
        assert [output.token_ids for output in got] == [output.token_ids for output in expected]
    assert 0 <= llm.drafter.largest < TOKENS
    assert llm.stats()["drafted"] > 0


def test_a_target_of_its_own_draft_model_is_accepted(models: dict[int, Path], tmp_path: Path) -> None:
    """The same weights with padding cut off draft what the target writes: nothing is lost on the way."""
    wide = load_target(models[288], dtype="float32")
    model = transformers.LlamaForCausalLM.from_pretrained(models[288])
    with torch.no_grad():  # padding that is never sampled, as in a trained model
        model.lm_head.weight[TOKENS:] = 0
    model.save_pretrained(tmp_path / "target")
    model.resize_token_embeddings(272)
    model.save_pretrained(tmp_path / "draft")
    for name in ("target", "draft"):
        save_tokenizer(tmp_path / name, byte_level_bpe(TOKENS))
    assert wide.spec.vocab_size == 288
    llm = LLM(
        tmp_path / "target", tmp_path / "draft", dtype="float32", policy="fixed", drafter_options={"dtype": "float32"}
    )
    llm.generate(PROMPTS[0], SamplingParams(max_tokens=30))
    stats = llm.stats()
    assert stats["accepted"] == stats["drafted"] > 10


def test_probabilities_of_a_padded_proposal(models: dict[int, Path]) -> None:
    """Sampled drafts carry the distribution they were drawn from: of the target's width, zero past the tokenizer."""
    from outrider.sampling.rng import RowRng

    draft, target = (load_target(models[rows], dtype="float32", backend="reference") for rows in (288, 272))
    drafter = DraftModelDrafter.from_config(
        DraftModelDrafter.Config(model="", draft_tokens=3), target, load_target=lambda *_: draft, tokens=TOKENS
    )
    drafter.open(0, 64)
    context = Context(params=[SamplingParams(temperature=1.0, seed=1)], history=[[5, 6, 7]], prompt_lengths=[3])
    rng: Rng = RowRng([1], [0], ["coupled"])
    proposal = drafter.propose([0], [7], context, [3], rng)
    assert proposal.distribution is not None
    rows = proposal.distribution.probabilities
    assert rows.shape == (3, 272) and not rows[:, TOKENS:].any()
    torch.testing.assert_close(rows.sum(-1), torch.ones(3))


def test_other_tokenizers_stay_refused(models: dict[int, Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", 288, layers=1, seed=1, tokens=268)
    with pytest.raises(IncompatibleDrafter, match="must share its tokenizer"):
        LLM(models[272], other)
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(IncompatibleDrafter, match="a vocabulary of 288 tokens, the target .* one of 272"):
        LLM(models[272], other)


def test_a_draft_model_that_lacks_tokens_is_refused(models: dict[int, Path], tmp_path: Path) -> None:
    short = save(tmp_path / "short", TOKENS - 1, layers=1, seed=1)
    with pytest.raises(IncompatibleDrafter, match=f"a vocabulary of {TOKENS - 1} tokens"):
        LLM(models[272], short)


def test_models_that_transformers_runs_draft_for_each_other(tmp_path: Path) -> None:
    """Nobody asked for int8, so a draft model that cannot have it runs in the target's dtype."""
    target = save(tmp_path / "target", 272, layers=2, seed=1, family="GPTNeoX")
    draft = save(tmp_path / "draft", 288, layers=1, seed=2, family="GPTNeoX")
    for dtype in ("auto", "bfloat16"):
        llm = LLM(target, draft, dtype=dtype, policy="fixed")
        expected = llm.with_drafter("none").generate(PROMPTS[0], SamplingParams(max_tokens=8))
        got = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8))
        assert llm.drafter_name == "draft_model" and llm.stats()["drafted"] > 0
        assert dtype == "bfloat16" or got[0].token_ids == expected[0].token_ids


@pytest.mark.parametrize(
    ("config", "recognised"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, True),
        ({"architectures": ["OpenAIGPTLMHeadModel"], "model_type": "openai-gpt"}, True),
        ({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}, True),
        ({"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4"}, True),
        ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, True),
        ({"model_type": "qwen3"}, True),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, False),
        ({"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"}, False),
        ({"architectures": ["LlamaModel"], "model_type": "llama"}, False),
    ],
)
def test_which_configs_are_draft_models(config: dict[str, object], recognised: bool) -> None:
    assert DraftModelDrafter.recognises(config) is recognised


@pytest.mark.parametrize("dtype", ["int8", "int4", "file"])
def test_a_draft_model_that_transformers_runs_is_not_quantised_with_its_target(dtype: str, tmp_path: Path) -> None:
    target = LLM("embedded", "none")
    folder = save(tmp_path / "draft", 272, layers=1, seed=2, family="GPTNeoX")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    asked = replace(target.loaded, dtype=dtype)
    assert loader._load_draft_model(str(folder), "auto", asked).spec.dtype == torch.float32
