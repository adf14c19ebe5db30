"""SpecForge's files: EAGLE-3 as a Llama with one middle layer, DFlash and DSpark with everything in ``dflash_config``.

https://github.com/sgl-project/SpecForge, ``specforge/modeling/draft/{llama3_eagle,dflash,dspark}.py``. None holds an
embedding. Its DSpark is trained like DeepSpec's, the anchor's slot predicting; its DFlash like z-lab's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outrider.checkpoints.checkpoint import AutoregressiveDesign, BlockDesign, DraftCheckpoint, TargetFacts
from outrider.checkpoints.stack_format import known_keys, refuse_unknown, require, require_layers, spread_layers
from outrider.errors import CheckpointError, nearest

__all__ = ["matches", "read"]

CHAIN = "LlamaForCausalLMEagle3"
BLOCKS = ("DFlashDraftModel", "DSparkDraftModel")
TOP_KEYS = {"architectures", "auto_map", "block_size", "dflash_config", "num_target_layers", "target_hidden_size"}
CHAIN_KEYS = {
    "architectures",
    "draft_vocab_size",
    "target_hidden_size",
    "target_model_type",
    "fc_norm",
    "norm_output",
    "eagle_config",
}
OWN_KEYS = {"attention_mode", "mask_token_id", "target_layer_ids", "projector_type", "markov_rank", "markov_head_type"}
OWN_KEYS |= {"enable_confidence_head", "confidence_head_with_markov", "confidence_head_alpha"}
PROJECTORS = ("dflash", "dspark")
EXTRAS = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def matches(config: Mapping[str, Any]) -> bool:
    kinds = set(config.get("architectures") or ())
    return CHAIN in kinds or (isinstance(config.get("dflash_config"), Mapping) and bool(kinds & set(BLOCKS)))


def read(config: Mapping[str, Any]) -> DraftCheckpoint:
    return _read_chain(config) if CHAIN in config["architectures"] else _read_block(config)


def _read_chain(config: Mapping[str, Any]) -> DraftCheckpoint:
    refuse_unknown(config, CHAIN_KEYS | known_keys(require(config, "model_type", str)))
    if not config.get("norm_output", True):
        raise CheckpointError("norm_output: false (logits from a state that was not normalised) is not supported")
    named = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    return DraftCheckpoint(
        design=AutoregressiveDesign(norm_each_before_fc=bool(config.get("fc_norm"))),
        decoder={key: value for key, value in config.items() if key not in CHAIN_KEYS | EXTRAS},
        target_layers=None if named is None else tuple(layer - 1 for layer in named),
        target=TargetFacts(hidden_size=config.get("target_hidden_size") or require(config, "hidden_size")),
        draft_vocab_size=config.get("draft_vocab_size") or require(config, "vocab_size"),
        format="specforge",
        extras={key: config[key] for key in sorted(EXTRAS & set(config))},
    )


def _read_block(config: Mapping[str, Any]) -> DraftCheckpoint:
    own = config["dflash_config"]
    refuse_unknown(config, TOP_KEYS | known_keys(require(config, "model_type", str)))
    refuse_unknown(own, OWN_KEYS, "dflash_config")
    projector = own.get("projector_type") or ("dspark" if "DSparkDraftModel" in config["architectures"] else "dflash")
    if projector not in PROJECTORS:
        raise CheckpointError(f"projector_type {projector!r} is not supported; {nearest(projector, PROJECTORS)}")
    dspark = projector == "dspark"
    count = require(config, "num_target_layers")
    layers = (
        require_layers(own, "target_layer_ids")
        if "target_layer_ids" in own
        else spread_layers(count, require(config, "num_hidden_layers"))
    )
    confidence = dspark and bool(own.get("enable_confidence_head", (own.get("confidence_head_alpha") or 0.0) > 0))
    return DraftCheckpoint(
        design=BlockDesign(
            block_size=require(config, "block_size"),
            mask_token_id=require(own, "mask_token_id"),
            sample_from_anchor=dspark,
            markov_rank=(own.get("markov_rank") or 0) if dspark else 0,
            markov_head=own.get("markov_head_type", "vanilla"),
            confidence=confidence,
            confidence_with_markov=confidence and bool(own.get("confidence_head_with_markov")),
        ),
        decoder={key: value for key, value in config.items() if key not in TOP_KEYS | EXTRAS},
        target_layers=layers,
        target=TargetFacts(
            hidden_size=config.get("target_hidden_size") or require(config, "hidden_size"), num_layers=count
        ),
        draft_vocab_size=require(config, "vocab_size"),
        format="specforge",
        extras={key: config[key] for key in sorted(EXTRAS & set(config))},
    )
