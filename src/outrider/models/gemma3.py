"""Gemma 3: sandwich norms with gain 1 + w, query/key norms, and windows on five layers of six.

The text part of a multimodal checkpoint is read as well; its vision tower is left in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.backends.layers import rope_config
from outrider.config import LayerConfig, StackConfig
from outrider.errors import CheckpointError
from outrider.models.decoder import (
    SANDWICH_PARTS,
    DecoderTarget,
    TensorNames,
    activation,
    layer_types,
    positive,
    refuse_set,
    required,
)

__all__ = ["Gemma3Target"]

DEFAULTS: dict[str, Any] = {  # published configs leave out what Transformers' Gemma3TextConfig assumes
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "vocab_size": 262_208,
}


class Gemma3Target(DecoderTarget):
    """The text model of Gemma 3."""

    defaults = DEFAULTS

    @classmethod
    def stack_config(cls, config: Mapping[str, Any]) -> StackConfig:
        """The stack of a Gemma 3 text config. Raises CheckpointError."""
        refuse_set(config, "attn_logit_softcapping", "use_bidirectional_attention")
        head_dim, width = required(config, "head_dim"), required(config, "hidden_size")
        ropes = {
            kind: rope_config(_with_ropes(config), head_dim, kind) for kind in ("full_attention", "sliding_attention")
        }
        layers = tuple(
            LayerConfig(
                num_heads=required(config, "num_attention_heads"),
                num_kv_heads=required(config, "num_key_value_heads"),
                head_dim=head_dim,
                intermediate_size=required(config, "intermediate_size"),
                rope=ropes[kind],
                window=config["sliding_window"] if kind == "sliding_attention" else None,
                attention_scale=positive(config, "query_pre_attn_scalar") ** -0.5,
                qk_norm=True,
            )
            for kind in layer_types(config, lambda index: (index + 1) % required(config, "sliding_window_pattern") != 0)
        )
        return StackConfig(
            vocab_size=required(config, "vocab_size"),
            hidden_size=width,
            layers=layers,
            norm_eps=config["rms_norm_eps"],
            norm_offset=1.0,
            activation=activation(config["hidden_activation"]),
            sandwich_norms=True,
            embedding_scale=width**0.5,
            logit_softcap=config["final_logit_softcapping"] or 0.0,
            max_positions=required(config, "max_position_embeddings"),
        )

    @classmethod
    def tensor_names(cls, config: Mapping[str, Any]) -> TensorNames:
        """Gemma's names: post_attention_layernorm is a sandwich norm here."""
        return TensorNames(SANDWICH_PARTS, tied=config["tie_word_embeddings"])


def _with_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Old configs keep one theta per kind of layer, and a scaling that is meant for the full layers."""
    ropes = config.get("rope_parameters") or {}
    if not isinstance(ropes, Mapping):
        raise CheckpointError(f"config.json: 'rope_parameters' must be an object, got {ropes!r}")
    scaling = config.get("rope_scaling") or {}
    full = {"rope_theta": config.get("rope_theta") or 1_000_000.0}
    sliding = {"rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    return {
        **config,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {**full, **(ropes.get("full_attention") or {}), **scaling},
            "sliding_attention": {**sliding, **(ropes.get("sliding_attention") or {})},
        },
    }
