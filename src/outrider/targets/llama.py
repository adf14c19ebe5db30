"""The Llama family: Llama, Mistral, Qwen2 and Qwen3 differ in biases, query/key norms and windows only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.config import LayerConfig, StackConfig
from outrider.decoder import DecoderTarget, activation, required
from outrider.layers import rope_config

__all__ = ["LlamaTarget"]


class LlamaTarget(DecoderTarget):
    """Pre-norm layers with grouped queries, rotary positions and gated MLPs."""

    @classmethod
    def stack_config(cls, config: Mapping[str, Any]) -> StackConfig:
        """The stack of a Llama-family config. Raises CheckpointError."""
        width, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
        head_dim = config.get("head_dim") or width // heads
        rope = rope_config(config, head_dim)
        layers = tuple(
            LayerConfig(
                num_heads=heads,
                num_kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=head_dim,
                intermediate_size=required(config, "intermediate_size"),
                rope=rope,
                window=_window(config, index),
                qk_norm=config.get("model_type") == "qwen3",
            )
            for index in range(required(config, "num_hidden_layers"))
        )
        return StackConfig(
            vocab_size=required(config, "vocab_size"),
            hidden_size=width,
            layers=layers,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=activation(config.get("hidden_act", "silu")),
            max_positions=config.get("max_position_embeddings", 2048),
        )


def _window(config: Mapping[str, Any], index: int) -> int | None:
    """The sliding window of one layer. Qwen switches it on with a flag and for some layers, Mistral for all."""
    window = config.get("sliding_window")
    if config["model_type"] == "llama" or window is None:
        return None
    if config["model_type"] == "mistral":
        return window
    if not config.get("use_sliding_window"):
        return None
    kinds = config.get("layer_types")
    slides = kinds[index] == "sliding_attention" if kinds else index >= config.get("max_window_layers", 28)
    return window if slides else None
