"""z-lab's DFlash files: a Qwen3 config with a ``dflash_config``; only masks predict, no embedding and no head.

https://github.com/z-lab/dflash, ``dflash/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import BlockDesign, DraftCheckpoint, TargetFacts
from outrider.checkpoints.stack_format import known_keys, refuse_unknown, require, require_layers, spread_layers

__all__ = ["matches", "read"]

TOP_KEYS = {"architectures", "auto_map", "block_size", "dflash_config", "num_target_layers"}
OWN_KEYS = {"mask_token_id", "target_layer_ids"}
EXTRAS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def matches(config: Mapping[str, Any]) -> bool:
    own = config.get("dflash_config")
    return (
        isinstance(own, Mapping) and set(own) <= OWN_KEYS and "DFlashDraftModel" in (config.get("architectures") or ())
    )


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    own = config["dflash_config"]
    refuse_unknown(config, TOP_KEYS | known_keys(require(config, "model_type", str)))
    count, draft_layers = require(config, "num_target_layers"), require(config, "num_hidden_layers")
    layers = (
        require_layers(own, "target_layer_ids") if "target_layer_ids" in own else spread_layers(count, draft_layers)
    )
    return DraftCheckpoint(
        design=BlockDesign(require(config, "block_size"), require(own, "mask_token_id"), sample_from_anchor=False),
        decoder={key: value for key, value in config.items() if key not in TOP_KEYS | EXTRAS},
        target_layers=layers,
        target=TargetFacts(hidden_size=require(config, "hidden_size"), num_layers=count),
        draft_vocab_size=require(config, "vocab_size"),
        format="zlab",
        extras={key: config[key] for key in sorted(EXTRAS & set(config))},
    )
