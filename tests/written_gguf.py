"""GGUF files as llama.cpp's converters write them, of small random models, for tests."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

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


def tiny_model() -> transformers.PreTrainedModel:
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
