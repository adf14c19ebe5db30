"""Fixtures that more than one test file uses: small models and tokenizers, made on the spot."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and on a busy machine it waits long
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # as many processes as cores, whose threads would wait for each other; PARALLEL= has all threads
    os.environ.setdefault("OUTRIDER_THREADS", "1")

# Several processes share the machine's cores: no deadline per example, and the same examples on every run.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("repeatable")

if "OUTRIDER_NATIVE" in os.environ:  # another build of the core, as `make sanitize` has it, before anybody imports it
    found = spec_from_file_location("outrider._native", next(Path(os.environ["OUTRIDER_NATIVE"]).glob("_native*.so")))
    assert found is not None and found.loader is not None
    sys.modules["outrider._native"] = module_from_spec(found)
    found.loader.exec_module(sys.modules["outrider._native"])

EOT, BOS = "<|endoftext|>", "<|begin|>"
TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox runs on.",
    "def add(first, second):\n    return first + second\n\n\ndef main() -> None:\n    print(add(1, 2))\n",
    "Question: Tom has 3 boxes with 4 pens each. How many pens has he?\nAnswer: 3 * 4 = 12 pens.",
    "naïve café, Übung, Привет, 你好, こんにちは, 🙂🚀",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level_bpe(size: int = 512, bos: bool = False) -> Tokenizer:
    """A byte-level BPE in the shape of Qwen2's; with ``bos`` every text begins with a special token."""
    tokenizer = Tokenizer(models.BPE())
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(EOT, special=True), AddedToken(BOS, special=True)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False, min_frequency=2
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write the files that a model directory has for its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": EOT, "bos_token": BOS}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**names, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template})
    )
    return folder


def save_llama(folder: Path, *, layers: int = 2, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A random Llama of about 100k parameters and its tokenizer, as Transformers writes them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level_bpe()
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=tokenizer.token_to_id(EOT),
        bos_token_id=tokenizer.token_to_id(BOS),
        tie_word_embeddings=True,
        initializer_range=0.3,  # wide enough that the likeliest token changes from place to place
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder, tokenizer, chat_template)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer of 512 entries and a chat template."""
    return save_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_draft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with the same tokenizer."""
    return save_llama(tmp_path_factory.mktemp("tiny_draft"), layers=1, seed=1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Public data that is not part of the package: reference numbers and prompt sets. Absent: the test is skipped."""
    folder = Path(os.environ.get("OUTRIDER_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared data: set OUTRIDER_SHARED to its folder")
    return folder
