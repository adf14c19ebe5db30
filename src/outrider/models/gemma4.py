"""Gemma 4, dense: full layers have wider heads and no value projection, and attention is not scaled.

Mixtures of experts, per-layer inputs and layers that share keys and values are refused. The text part of a multimodal
checkpoint is read as well; its other towers are left in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.backends.layers import rope_config
from outrider.config import LayerConfig, StackConfig
from outrider.models.decoder import (
    SANDWICH_PARTS,
    DecoderTarget,
    TensorNames,
    activation,
    layer_types,
    refuse_set,
    required,
)

__all__ = ["Gemma4Target"]

DEFAULTS: dict[str, Any] = {  # what Transformers' Gemma4TextConfig assumes where a config is silent
    "attention_k_eq_v": False,
    "final_logit_softcapping": None,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    },
    "sliding_window": 512,
    "tie_word_embeddings": True,
    "vocab_size": 262_144,
}


class Gemma4Target(DecoderTarget):
    """The text model of a dense Gemma 4."""

    defaults = DEFAULTS

    @classmethod
    def stack_config(cls, config: Mapping[str, Any]) -> StackConfig:
        """The stack of a Gemma 4 text config. Raises CheckpointError."""
        refuse_set(config, "enable_moe_block", "hidden_size_per_layer_input", "num_kv_shared_layers")
        if config.get("use_bidirectional_attention") == "all":
            refuse_set(config, "use_bidirectional_attention")
        width = required(config, "hidden_size")
        kinds = [
            *layer_types(config, lambda index: (index + 1) % 6 != 0)[:-1],
            "full_attention",
        ]  # the last is always full
        return StackConfig(
            vocab_size=config["vocab_size"],
            hidden_size=width,
            layers=tuple(_layer(config, index, kind) for index, kind in enumerate(kinds)),
            norm_eps=config["rms_norm_eps"],
            activation=activation(config["hidden_activation"]),
            sandwich_norms=True,
            embedding_scale=width**0.5,
            logit_softcap=config["final_logit_softcapping"] or 0.0,
            max_positions=config["max_position_embeddings"],
        )

    @classmethod
    def tensor_names(cls, config: Mapping[str, Any]) -> TensorNames:
        """Gemma's names: post_attention_layernorm is a sandwich norm here."""
        return TensorNames(SANDWICH_PARTS, tied=config["tie_word_embeddings"])

    @classmethod
    def optional_weights(cls, config: Mapping[str, Any]) -> set[str]:
        """Every layer has its scalar."""
        return super().optional_weights(config) | {f"layers.{i}.scalar" for i in range(config["num_hidden_layers"])}


def _layer(config: Mapping[str, Any], index: int, kind: str) -> LayerConfig:
    full = kind == "full_attention"
    head_dim = config["global_head_dim"] if full else config["head_dim"]
    num_kv_heads = config["num_key_value_heads"]
    if full and config["attention_k_eq_v"]:
        num_kv_heads = config.get("num_global_key_value_heads") or num_kv_heads
    given = (config.get("per_layer_config") or {}).get(str(index), {})  # newer files list every exception
    head_dim, num_kv_heads = given.get("head_dim", head_dim), given.get("num_key_value_heads", num_kv_heads)
    return LayerConfig(
        num_heads=config["num_attention_heads"],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=required(config, "intermediate_size"),
        rope=rope_config(config, head_dim, kind),
        window=None if full else config["sliding_window"],
        attention_scale=1.0,
        qk_norm=True,
        v_norm=True,
        value_is_key=full and config["attention_k_eq_v"],
    )
