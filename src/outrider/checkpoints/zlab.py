"""z-lab's DFlash files: a Qwen3 config with a ``dflash_config``; only masks predict, no embedding and no head.

https://github.com/z-lab/dflash, ``dflash/model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import DraftCheckpoint, TargetFacts
from outrider.checkpoints.forms import forms
from outrider.checkpoints.specforge import spread_or_named
from outrider.checkpoints.stack_format import known_keys, refuse_unknown, require

__all__ = ["matches", "read"]

TOP_KEYS = {"architectures", "auto_map", "block_size", "dflash_config", "is_causal", "num_target_layers"}
SECTION_KEYS = {"block_size", "mask_token_id", "target_layer_ids"}
EXTRAS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def matches(config: Mapping[str, Any]) -> bool:
    """SpecForge's files have the same architecture and more keys in their ``dflash_config``."""
    section = config.get("dflash_config")
    return (
        isinstance(section, Mapping)
        and set(section) <= SECTION_KEYS
        and bool(set(config.get("architectures") or ()) & set(forms("zlab")))
    )


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    form = next(form for tag, form in forms("zlab").items() if tag in config["architectures"])
    refuse_unknown(config, TOP_KEYS | known_keys(require(config, "model_type", str)))
    return DraftCheckpoint(
        design=form.read(config),
        decoder={key: value for key, value in config.items() if key not in TOP_KEYS | EXTRAS},
        target_layers=spread_or_named(config, config["dflash_config"]),
        target=TargetFacts(hidden_size=require(config, "hidden_size"), num_layers=require(config, "num_target_layers")),
        draft_vocab_size=require(config, "vocab_size"),
        format="zlab",
        extras={key: config[key] for key in sorted(EXTRAS & set(config))},
    )
