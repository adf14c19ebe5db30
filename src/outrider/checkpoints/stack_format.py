"""A drafter's decoder layers: from their Hugging Face config to a ``StackConfig``, and the names of their weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from outrider.backends.layers import rope_config
from outrider.config import MOST_LAYERS, LayerConfig, StackConfig
from outrider.errors import CheckpointError, nearest

__all__ = [
    "GEMMA4",
    "decoder_stack",
    "file_name",
    "known_keys",
    "layer_kinds",
    "named_biases",
    "refuse_unknown",
    "require",
    "require_layers",
    "spread_layers",
]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
GEMMA4 = ("gemma4_text", "gemma4_unified_text")
ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh", "gelu"]] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}
# Written out, because importing transformers takes seconds. Keys of the shape and of the computation, and those that
# some version of transformers writes for every model or that none of the decoders here reads.
GENERIC_KEYS = frozenset(
    """
    _attn_implementation _name_or_path architectures attention_bias attention_dropout attn_implementation bos_token_id
    cache_implementation chunk_size_feed_forward dtype eos_token_id head_dim hidden_size id2label initializer_range
    intermediate_size is_encoder_decoder label2id layer_types max_position_embeddings max_window_layers mlp_bias
    model_type num_attention_heads num_hidden_layers num_key_value_heads original_max_position_embeddings
    output_attentions output_hidden_states pad_token_id pretraining_tp problem_type return_dict rms_norm_eps
    rope_parameters rope_scaling rope_theta sep_token_id sliding_window tie_word_embeddings torch_dtype
    transformers_version use_cache use_sliding_window vocab_size
    """.split()  # noqa: SIM905 (a list of strings would be a page)
)
LLAMA_KEYS = frozenset({"hidden_act"})
GEMMA4_KEYS = frozenset(
    """
    attention_k_eq_v enable_moe_block final_logit_softcapping global_head_dim hidden_activation
    hidden_size_per_layer_input moe_intermediate_size num_experts num_global_key_value_heads num_kv_shared_layers
    per_layer_config top_k_experts use_bidirectional_attention use_double_wide_mlp vocab_size_per_layer_input
    """.split()  # noqa: SIM905
)


def require(config: Mapping[str, Any], key: str, kind: type = int) -> Any:
    """``config[key]``, which must be there and of a kind. Raises CheckpointError."""
    if key not in config:
        raise CheckpointError(f"config.json has no {key!r}, which is needed to read the weights")
    value = config[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"config.json: {key} must be {kind.__name__}, got {value!r}")
    return value


def require_layers(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A non-empty list of layer numbers. Raises CheckpointError."""
    layers = require(config, key, list)
    if not layers or not all(isinstance(layer, int) for layer in layers):
        raise CheckpointError(f"config.json: {key} must be a list of layer numbers, got {layers!r}")
    return tuple(layers)


def spread_layers(target_layers: int, draft_layers: int) -> tuple[int, ...]:
    """Layers from the second to the fourth from the end, evenly spread: DFlash's where its config names none."""
    if draft_layers == 1:
        return (target_layers // 2,)
    span = target_layers - 4
    return tuple(round(1 + i * span / (draft_layers - 1)) for i in range(draft_layers))


def refuse_unknown(config: Mapping[str, Any], known: Collection[str], section: str = "config.json") -> None:
    """Raise CheckpointError for an unknown key: it may change what the weights mean."""
    for key in config:
        if key not in known:
            close = nearest(key, known)
            hint = close if close.startswith("did you mean") else "remove it if it changes nothing in the computation"
            raise CheckpointError(f"{section} has an unknown key {key!r}; {hint}")


def known_keys(model_type: str) -> frozenset[str]:
    """Keys that a config of this model type may hold.

    Raises CheckpointError for a model type that no drafter here is built from.
    """
    if model_type not in (*LLAMA_LIKE, *GEMMA4):
        raise CheckpointError(
            f"model_type {model_type!r} is not supported in a drafter; {nearest(model_type, (*LLAMA_LIKE, *GEMMA4))}"
        )
    return GENERIC_KEYS | (GEMMA4_KEYS if model_type in GEMMA4 else LLAMA_KEYS)


def decoder_stack(decoder: Mapping[str, Any], *, vocab_size: int, input_width: int = 0) -> StackConfig:
    """The stack of a drafter whose decoder layers a Hugging Face config describes.

    ``vocab_size`` is the head's (0: none of its own); ``input_width`` as in ``StackConfig``.
    """
    model_type = require(decoder, "model_type", str)
    gemma = model_type in GEMMA4
    width, heads = require(decoder, "hidden_size"), require(decoder, "num_attention_heads")
    count = require(decoder, "num_hidden_layers")
    if not 0 <= count <= MOST_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers must be 0 to {MOST_LAYERS}, got {count}")
    activation = decoder.get("hidden_activation" if gemma else "hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"config.json: activation {activation!r} is not supported; {nearest(activation, ACTIVATIONS)}"
        )
    layer = _gemma4_layer(decoder, heads) if gemma else _llama_layer(decoder, heads, width, model_type)
    if heads % layer["num_kv_heads"]:
        raise CheckpointError(
            f"config.json: {heads} attention heads cannot share {layer['num_kv_heads']} key/value heads evenly"
        )
    layers = tuple(
        LayerConfig(
            num_heads=heads,
            intermediate_size=require(decoder, "intermediate_size"),
            rope=rope_config(decoder, layer["head_dim"], kind),
            window=require(decoder, "sliding_window") if kind == "sliding_attention" else None,
            **layer,
        )
        for kind in layer_kinds(decoder)
    )
    return StackConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        layers=layers,
        norm_eps=float(decoder.get("rms_norm_eps", 1e-6)),
        activation=ACTIVATIONS[activation],
        sandwich_norms=gemma,
        embedding_scale=width**0.5 if gemma else 1.0,
        logit_softcap=float(decoder.get("final_logit_softcapping") or 0.0) if gemma else 0.0,
        input_width=input_width,
        max_positions=int(decoder.get("max_position_embeddings") or 2048),
    )


def layer_kinds(decoder: Mapping[str, Any]) -> list[str]:
    """``full_attention`` or ``sliding_attention`` for each layer. Where ``layer_types`` does not say: Mistral's layers
    slide if there is a window, and Qwen's from ``max_window_layers`` on if ``use_sliding_window`` says so, as in
    Transformers.

    Raises CheckpointError.
    """
    count, known = require(decoder, "num_hidden_layers"), ("full_attention", "sliding_attention")
    kinds = decoder.get("layer_types")
    if kinds:
        if not isinstance(kinds, list) or len(kinds) != count or not set(kinds) <= set(known):
            raise CheckpointError(f"config.json: layer_types must hold {count} of {' or '.join(known)}, got {kinds!r}")
        return kinds
    model_type, first = decoder["model_type"], count  # the first layer that slides
    if model_type == "mistral" and decoder.get("sliding_window") is not None:
        first = 0
    elif model_type in ("qwen2", "qwen3") and decoder.get("use_sliding_window"):
        first = int(decoder.get("max_window_layers", 28))
    return [known[index >= first] for index in range(count)]


def named_biases(decoder: Mapping[str, Any]) -> list[str]:
    """Neutral names of the biases that a decoder's config says there are, whose absence would go unnoticed."""
    model_type, parts = require(decoder, "model_type", str), ""
    if model_type == "qwen2":
        parts = "q k v"
    elif model_type != "mistral" and decoder.get("attention_bias"):
        parts = "q k v o"
    if model_type == "llama" and decoder.get("mlp_bias"):
        parts += " gate up down"
    return [f"layers.{i}.{part}.bias" for i in range(require(decoder, "num_hidden_layers")) for part in parts.split()]


def _llama_layer(decoder: Mapping[str, Any], heads: int, width: int, model_type: str) -> dict[str, Any]:
    return {
        "num_kv_heads": decoder.get("num_key_value_heads") or heads,
        "head_dim": decoder.get("head_dim") or width // heads,
        "qk_norm": model_type == "qwen3",
    }


def _gemma4_layer(decoder: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Gemma 4 drafters copy the shape of the target's global layers."""
    for key in ("enable_moe_block", "hidden_size_per_layer_input"):
        if decoder.get(key):
            raise CheckpointError(f"config.json: a Gemma 4 drafter with {key} = {decoder[key]!r} is not supported")
    value_is_key = bool(decoder.get("attention_k_eq_v"))
    return {
        "num_kv_heads": require(decoder, "num_global_key_value_heads" if value_is_key else "num_key_value_heads"),
        "head_dim": require(decoder, "global_head_dim"),
        "attention_scale": 1.0,
        "qk_norm": True,
        "v_norm": True,
        "value_is_key": value_is_key,
    }


# ------------------------------------------------------------------------------------------------ names

_PLAIN = {
    "embed.weight": "embed_tokens.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
_SANDWICH = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def file_name(neutral: str, *, sandwich: bool) -> str:
    """The name that DeepSpec, speculators, z-lab and SpecForge share (up to a prefix) for a weight of a stack. Any
    other neutral name stays as it is."""
    if neutral in _PLAIN:
        return _PLAIN[neutral]
    if match := re.fullmatch(r"layers\.(\d+)\.(\w+)(\.weight|\.bias)?", neutral):
        index, part, end = match.groups()
        if part == "scalar":
            return f"layers.{index}.layer_scalar"
        return f"layers.{index}.{(_LAYER | _SANDWICH if sandwich else _LAYER)[part]}{end}"
    return neutral
