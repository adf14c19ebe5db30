"""The Llama family: Llama, Mistral, Qwen2 and Qwen3 differ in biases, query/key norms and windows only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.backends.layers import rope_config
from outrider.config import LayerConfig, StackConfig
from outrider.models.decoder import DecoderTarget, activation, biases, layer_types, optional, required

__all__ = ["LlamaTarget"]

DEFAULTS = {"mistral": {"num_key_value_heads": 8, "sliding_window": 4096}}
DEFAULTS |= dict.fromkeys(("qwen2", "qwen3"), {"sliding_window": 4096})
"""What configs mean where they are silent, by ``model_type``."""


class LlamaTarget(DecoderTarget):
    """Pre-norm layers with grouped queries, rotary positions and gated MLPs."""

    @classmethod
    def stack_config(cls, config: Mapping[str, Any]) -> StackConfig:
        """The stack of a Llama-family config. Raises CheckpointError."""
        config = {**DEFAULTS.get(config["model_type"], {}), **config}
        width, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
        head_dim = optional(config, "head_dim", width // heads)
        rope = rope_config(config, head_dim)
        layers = tuple(
            LayerConfig(
                num_heads=heads,
                num_kv_heads=optional(config, "num_key_value_heads", heads),
                head_dim=head_dim,
                intermediate_size=required(config, "intermediate_size"),
                rope=rope,
                window=required(config, "sliding_window") if kind == "sliding_attention" else None,
                qk_norm=config["model_type"] == "qwen3",
            )
            for kind in _layer_types(config)
        )
        return StackConfig(
            vocab_size=required(config, "vocab_size"),
            hidden_size=width,
            layers=layers,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=activation(config.get("hidden_act", "silu")),
            max_positions=optional(config, "max_position_embeddings", 2048),
        )

    @classmethod
    def optional_weights(cls, config: Mapping[str, Any]) -> set[str]:
        """Biases: a choice for Llama and Qwen3, on queries, keys and values for Qwen2, none for Mistral."""
        if config["model_type"] == "qwen2":
            return biases(config, "qkv")
        if config["model_type"] == "mistral":
            return set()
        mlp = ("gate", "up", "down") if config["model_type"] == "llama" and config.get("mlp_bias") else ()
        return super().optional_weights(config) | biases(config, mlp)


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """Which layers have a sliding window: none of Llama's, all of Mistral's or those that it names, and Qwen's where a
    flag switches it on."""
    model_type, window = config["model_type"], config.get("sliding_window") is not None
    if model_type.startswith("qwen") and config.get("use_sliding_window"):
        return layer_types(config, lambda index: window and index >= config.get("max_window_layers", 28))
    slides = model_type == "mistral" and window
    named = config.get("layer_types") if model_type == "mistral" else None
    return layer_types({**config, "layer_types": named}, lambda index: slides)
